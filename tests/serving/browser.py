"""A real Chromium without a window, and pages that are served by a command in a process of its own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="chromium and chromedriver are not installed"
)


@contextmanager
def chromium(folder: Path):
    """A browser with a profile of its own in `folder`, which notes every request that it makes."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={folder}", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@contextmanager
def served(*argv: object, log: Path):
    """The process of `hf-decoder ARGV --port 0`, and the address of its page."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment |= {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}  # where nothing answers
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / f"{argv[0]}.py"), *map(str, argv[1:]), "--port", "0"],
            env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"http://127\.0\.0\.1:\d+/", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield process, found[0]
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(condition, seconds: float = 120):
    """The first true value of `condition()`; a part of the page that goes meanwhile is asked for again."""
    from selenium.common.exceptions import WebDriverException

    deadline, error = time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        try:
            if found := condition():
                return found
        except WebDriverException as problem:
            error = problem
        time.sleep(0.05)
    raise AssertionError(f"it never came: {error}")


def one(driver, selector: str):
    """A part of the page, once it is there: Gradio makes what is folded up or on another tab when it is asked for."""
    return wait_for(lambda: driver.find_element("css selector", selector))


def text_of(driver, selector: str) -> str:
    """The text of a part as it is in the document, whatever the style makes of its blanks."""
    return driver.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector)


def as_phone(driver) -> None:
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def requested(driver) -> set[str]:
    """The hosts that the browser asked anything of over a network."""
    entries = [json.loads(row["message"])["message"] for row in driver.get_log("performance")]
    urls = [row["params"]["request"]["url"] for row in entries if row["method"] == "Network.requestWillBeSent"]
    return {url.split("/")[2] for url in urls if url.startswith(("http", "ws"))}
