"""Glue for running transformers' own model tests: their markers, and the comparison with the stock Llama."""

import os
import re
from pathlib import Path

import pytest

# Every test runs under a class name; the stock class is the yardstick that the others are held to.
STOCK_CLASS = "StockLlamaModelTest"
_RANK = {"passed": 0, "skipped": 1, "failed": 2}
_outcomes = pytest.StashKey[dict[tuple[str, str], str]]()
_by_design = pytest.StashKey[set[tuple[str, str]]]()  # skips that the class names: counted, not held against it


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_outcomes] = {}
    config.stash[_by_design] = set()
    source = os.environ.get("TRANSFORMERS_SOURCE")
    if source:
        # `--strict-markers` refuses names that nobody declared, and transformers declares its own in a pyproject.toml
        # and a conftest.py that a run from this repository never reads.
        root = Path(source)
        files = [root / "src/transformers/testing_utils.py", *(root / "tests").glob("*.py")]
        files += [*(root / "tests/generation").glob("*.py"), *(root / "tests/exporters").glob("*.py")]
        texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
        names = {name for text in texts for name in re.findall(r"\bmark\.(\w+)", text)}
        for name in sorted(names):
            config.addinivalue_line("markers", f"{name}: a marker of transformers' own tests")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if item.cls is not None:
        key = (item.cls.__name__, item.name)
        if report.skipped and item.name in getattr(item.cls, "skipped_by_design", ()):
            item.config.stash[_by_design].add(key)
        seen = item.config.stash[_outcomes]
        # One test makes several reports (setup, call, teardown): the worst of them is its outcome.
        seen[key] = max(seen.get(key, "passed"), report.outcome, key=_RANK.__getitem__)
    return report


def _behind_stock(stash: pytest.Stash) -> list[str]:
    """Tests that the stock class passes and one of ours that ran does not, one line each."""
    seen, by_design = stash[_outcomes], stash[_by_design]
    stock = {name for (cls, name), outcome in seen.items() if cls == STOCK_CLASS and outcome == "passed"}
    return sorted(
        f"{cls}::{name} {outcome}, {STOCK_CLASS}::{name} passed"
        for (cls, name), outcome in seen.items()
        if cls != STOCK_CLASS and outcome != "passed" and name in stock and (cls, name) not in by_design
    )


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    # A test that is skipped for our class but runs for the stock one is a gap, not a pass.
    if exitstatus == pytest.ExitCode.OK and _behind_stock(session.config.stash):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    seen = terminalreporter.config.stash[_outcomes]
    if not seen:
        return
    terminalreporter.section("transformers' model tests")
    for cls in sorted({cls for cls, _ in seen}):
        counts = [sum(c == cls and o == outcome for (c, _), o in seen.items()) for outcome in _RANK]
        terminalreporter.write_line(f"{cls}: {counts[0]} passed, {counts[1]} skipped, {counts[2]} failed")
    for line in _behind_stock(terminalreporter.config.stash):
        terminalreporter.write_line(f"BEHIND STOCK {line}", red=True)
