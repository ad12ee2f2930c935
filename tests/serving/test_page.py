"""`hf-decoder demo` and `compare --web` in a real browser; what they generate, against `generate` called by hand."""

import http.client
import json
import socket
import time
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest
import torch
from browser import ROOT, as_phone, chromium, needs_chromium, one, requested, served, text_of, wait_for
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.cli.main import main
from hf_decoder.data.tokenization import train_tokenizer

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'hf-decoder[demo]'")
pytestmark = pytest.mark.process

SAID, SYSTEM = "def main(", "the end <b>&"
HOSTILE = (
    "<img src=x onerror=window.hit=1><script>window.hit=1</script> ${window.hit=1} {{7*7}} </pre> "
    "![a](http://192.0.2.1/a)"
)


def write_model(folder: Path, seed: int, vocab_size: int) -> Path:
    tokenizer = train_tokenizer(["def main(argv):\n    return 0 if argv else 1\n", "the end"] * 4, vocab_size)
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = HfDecoderConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=8192,
        initializer_range=0.3,
        tie_word_embeddings=False,
        **shape,
        **special,
    )
    model = HfDecoderForCausalLM(config)
    for token in range(len(tokenizer)):
        text = tokenizer.decode(token)
        if not (text.isascii() and text.isprintable()) or token in tokenizer.all_special_ids:
            model.lm_head.weight.data[token] = 0  # is never the likeliest: every answer is text, and as long as may be
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Two models of different tokenizers, and an adapter of the first beside it."""
    root = tmp_path_factory.mktemp("models")
    write_model(root / "one", 0, 280)
    write_model(root / "two", 1, 270)
    model = AutoModelForCausalLM.from_pretrained(root / "one")
    torch.manual_seed(2)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False))
    adapted.save_pretrained(root / "lora")
    # what pretrain leaves: a chat template, and no chat was ever shown
    (root / "two" / "all_results.json").write_text('{"train_tokens": 1}')
    return root


def answer(folder: Path, *said: str, system: str | None = None, adapter: Path | None = None, count: int = 12) -> str:
    """What greedy `generate` answers to the last of what was said, its own answers between."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    turns = [] if system is None else [{"role": "system", "content": system}]
    for text in said:
        turns.append({"role": "user", "content": text})
        inputs = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
        out = model.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=ends)
        turns.append(
            {
                "role": "assistant",
                "content": tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True),
            }
        )
    return turns[-1]["content"]


@pytest.fixture(scope="module")
def page(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    with served("demo", models / "one", models / "two", "--device", "cpu", log=folder / "log") as (process, address):
        yield process, address


@pytest.fixture
def driver(tmp_path):
    with chromium(tmp_path / "profile") as found:
        yield found


def write(driver, selector: str, text: str) -> None:
    field = one(driver, selector)
    field.clear()
    field.send_keys(text)


def open_settings(driver, is_open: bool) -> None:
    def shown() -> bool:
        return any(part.is_displayed() for part in driver.find_elements("css selector", "#system textarea"))

    if shown() != is_open:
        next(b for b in driver.find_elements("css selector", "button.label-wrap") if "Settings" in b.text).click()
        wait_for(lambda: shown() == is_open)


def set_number(driver, label: str, value: object) -> None:
    open_settings(driver, True)
    write(driver, f'input[aria-label^="{label}"]', str(value))


def bubbles(driver, column: int) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map(part => part.textContent)"
    return driver.execute_script(script, f"#chat{column} .turn")


@needs_chromium
def test_a_chat_side_by_side(models, page, driver):
    """The answers of `generate` in both columns, of models with different tokenizers; nothing comes from elsewhere."""
    driver.get(page[1])
    one(driver, "#said textarea")
    assert "never taught to chat" in one(driver, "body").text
    set_number(driver, "Max new tokens", 12)
    write(driver, "#said textarea", SAID)
    one(driver, "#send").click()
    expected = [answer(models / name, SAID) for name in ("one", "two")]
    for column in range(2):
        wait_for(lambda column=column: bubbles(driver, column)[-1:] == [expected[column]])
    assert requested(driver) == {page[1].split("/")[2]}


@needs_chromium
def test_stop_retry_and_the_system_prompt(models, page, driver):
    process, address = page
    driver.get(address)
    one(driver, "#said textarea")
    set_number(driver, "Max new tokens", 8000)  # which takes long
    write(driver, "#said textarea", SAID)
    one(driver, "#send").click()
    wait_for(lambda: len((bubbles(driver, 0) or [""])[-1]) > 20)
    one(driver, "#stop").click()
    wait_for(lambda: is_idle(process))
    assert len(bubbles(driver, 0)) == 2

    set_number(driver, "Max new tokens", 12)
    write(driver, "#system textarea", SYSTEM)
    open_settings(driver, False)
    one(driver, "#retry").click()
    wait_for(lambda: bubbles(driver, 0) == [SAID, answer(models / "one", SAID, system=SYSTEM)])
    write(driver, "#said textarea", HOSTILE)
    one(driver, "#send").click()
    expected = answer(models / "one", SAID, HOSTILE, system=SYSTEM)
    wait_for(lambda: bubbles(driver, 0)[2:] == [HOSTILE, expected])
    assert driver.execute_script("return window.hit") is None
    one(driver, "#clear").click()
    wait_for(lambda: bubbles(driver, 0) == [])


def is_idle(process) -> bool:
    """Whether the server computes nothing, whatever its page shows."""
    found = psutil.Process(process.pid)
    before = sum(found.cpu_times()[:2])
    time.sleep(1)
    return sum(found.cpu_times()[:2]) - before < 0.2


@needs_chromium
def test_a_browser_that_leaves_stops_the_work(page, tmp_path):
    process, address = page
    with chromium(tmp_path / "leaving") as driver:
        driver.get(address)
        one(driver, "#said textarea")
        set_number(driver, "Max new tokens", 8000)
        write(driver, "#said textarea", SAID)
        one(driver, "#send").click()
        wait_for(lambda: len((bubbles(driver, 0) or [""])[-1]) > 20)
        assert not is_idle(process)
    wait_for(lambda: is_idle(process), 15)


@needs_chromium
def test_a_completion_tells_the_probability_of_each_token(models, page, driver):
    driver.get(page[1])
    one(driver, "#said textarea")
    set_number(driver, "Max new tokens", 6)
    next(tab for tab in driver.find_elements("css selector", "button[role=tab]") if "Completion" in tab.text).click()
    write(driver, "#prompt textarea", SAID)
    one(driver, "#continue").click()
    tips = "return [...document.querySelectorAll('#completion0 [data-tip]')].map(x => [x.textContent, x.dataset.tip])"
    found = wait_for(lambda: driver.execute_script(tips))
    model, tokenizer = (kind.from_pretrained(models / "one") for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer(SAID, return_tensors="pt")["input_ids"]
    expected, text = [], ""
    for _ in range(6):  # token by token, without a cache
        share, token = model(ids).logits[0, -1].softmax(-1).max(-1)
        ids = torch.cat([ids, token[None, None]], 1)
        text += tokenizer.decode(token)
        expected.append(f"{100 * float(share):.1f}%")
    assert "".join(piece for piece, _ in found) == text
    assert [tip.split()[0] for _, tip in found] == expected


@needs_chromium
def test_an_adapter_is_chosen_and_taken_off(models, driver, tmp_path):
    with served("demo", models / "lora", "--device", "cpu", log=tmp_path / "log") as (_, address):
        driver.get(address)
        as_phone(driver)
        one(driver, "#said textarea")
        set_number(driver, "Max new tokens", 12)
        for number, (name, adapter) in enumerate([("one + lora", models / "lora"), ("one", None)]):
            if number:
                one(driver, "#model0 input").click()
                options = wait_for(lambda: driver.find_elements("css selector", "[role=option]"))
                assert {option.get_attribute("aria-label") for option in options} == {"one", "one + lora"}
                next(option for option in options if option.get_attribute("aria-label") == name).click()
                one(driver, "#clear").click()
                wait_for(lambda: bubbles(driver, 0) == [])
            assert one(driver, "#model0 input").get_attribute("value") == name
            write(driver, "#said textarea", SAID)
            one(driver, "#send").click()
            expected = answer(models / "one", SAID, adapter=adapter)
            wait_for(lambda expected=expected: bubbles(driver, 0)[-1:] == [expected])


PROMPTS = [f"question {number} {HOSTILE}" for number in range(3)]


@pytest.fixture
def comparing(tmp_path):
    for name in ("secret_a", "secret_b"):
        rows = [{"prompt": text, "completion": f"{name[-1]}{n} {HOSTILE}"} for n, text in enumerate(PROMPTS)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", "utf-8")
    files = [tmp_path / "secret_a.jsonl", tmp_path / "secret_b.jsonl", "--input_file", tmp_path / "prompts.txt"]
    with served("compare", *files, "--web", "--output_dir", tmp_path / "out", log=tmp_path / "log") as found:
        yield *found, tmp_path


def judgments(folder: Path) -> list[dict]:
    path = folder / "out" / "judgments.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


@needs_chromium
def test_blind_judgments_on_a_phone(comparing, driver):
    _, address, folder = comparing
    driver.get(address)
    as_phone(driver)

    def shown(number: int) -> tuple[str, str, str]:
        wait_for(lambda: text_of(driver, "#progress p").startswith(f"{number} of 3"))
        return tuple(text_of(driver, f"{part} pre") for part in ("#question", "#answer_left", "#answer_right"))

    question, left, right = shown(1)
    assert question in PROMPTS and {left[0], right[0]} == {"a", "b"} and left.endswith(HOSTILE)
    left_box, right_box = one(driver, "#answer_left").rect, one(driver, "#answer_right").rect
    assert left_box["x"] == right_box["x"] and right_box["y"] > left_box["y"] + left_box["height"]
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
    write(driver, "#note textarea", "12tb <i>")  # its letters are no judgments
    one(driver, "#left").click()
    second = shown(2)
    (row,) = judgments(folder)
    assert (row["prompt"], row["choice"], row["note"]) == (question, "left", "12tb <i>")
    assert row["winner"] == left[0].upper()
    one(driver, "#undo").click()
    assert shown(1) == (question, left, right) and judgments(folder) == []
    one(driver, "body").send_keys("2")
    assert shown(2) == second
    one(driver, "#both_bad").click()
    shown(3)
    page_text = driver.page_source + urlopen(f"{address}config").read().decode()
    assert "secret_" not in page_text and "left_is_a" not in page_text and "model_a" not in page_text
    one(driver, "#tie").click()
    wait_for(lambda: one(driver, "#end").is_displayed())
    assert [row["choice"] for row in judgments(folder)] == ["right", "both_bad", "tie"]
    assert "secret_" not in driver.page_source
    one(driver, "#end").click()
    wait_for(lambda: "95% interval" in text_of(driver, "#result"))
    assert "secret_" in text_of(driver, "#result") and "both bad 1" in text_of(driver, "#result")
    assert driver.execute_script("return window.hit") is None
    assert requested(driver) == {address.split("/")[2]}


def test_the_page_answers_to_itself_only(comparing):
    process, address, folder = comparing
    port = int(address.rsplit(":", 1)[1].strip("/"))
    sockets = psutil.Process(process.pid).net_connections()
    listening = {found.laddr.ip for found in sockets if found.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}

    def ask(path: str = "/", **headers: str) -> tuple[int, str | None]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", path, headers=headers)
        found = connection.getresponse()
        return found.status, found.getheader("Content-Security-Policy")

    status, policy = ask()
    assert status == 200 and policy.startswith("default-src 'self'") and "http" not in policy
    assert ask(Host="evil.example")[0] == ask(Origin="http://evil.example")[0] == ask(Host="localhost:1")[0] == 403
    assert ask(Origin=f"http://127.0.0.1:{port}")[0] == 200
    for path in (folder / "prompts.txt", ROOT / "pyproject.toml", "http://192.0.2.1/a"):
        assert ask(f"/gradio_api/file={path}")[0] == ask(f"/gradio_api/%66ile={path}")[0] == 403


def test_a_port_in_use_is_one_line(models, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["demo", str(models / "one"), "--port", str(port)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--port {port} cannot be used" in line and "--port 0 for any" in line
