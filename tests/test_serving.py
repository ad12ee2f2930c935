"""The server of `transformers serve` with a saved folder: a real openai client chats and streams against it."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
MESSAGES = [{"role": "user", "content": "def main("}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A random model that can write, with its tokenizer and chat template."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = HfDecoderConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        **shape,
        **special,
    )
    path = tmp_path_factory.mktemp("serving") / "model"
    HfDecoderForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def client(folder, tmp_path_factory):
    """A client of a server on the loopback, which is started and ended here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    log = (tmp_path_factory.mktemp("server") / "log").open("w+")
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "serve.py"), str(folder), *address, "--device", "cpu"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
        deadline = time.monotonic() + 120
        while True:
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except URLError:
                log.seek(0)
                assert server.poll() is None and time.monotonic() < deadline, log.read()
                time.sleep(0.2)
        yield client
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        log.close()


@pytest.fixture(scope="module")
def expected(folder):
    """What `generate` answers to the chat, greedily, in 12 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def test_the_folder_is_listed_and_chats(client, folder, expected):
    answer = client.chat.completions.create(model=str(folder), messages=MESSAGES, max_tokens=12, temperature=0.0)
    assert answer.choices[0].message.content == expected
    assert answer.usage.completion_tokens <= 12 and answer.usage.prompt_tokens > 0
    assert len(expected) > 3


def test_a_stream_brings_the_same_text_in_pieces(client, folder, expected):
    stream = client.chat.completions.create(
        model=str(folder), messages=MESSAGES, max_tokens=12, temperature=0.0, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == expected
    assert sum(map(bool, pieces)) > 2


def test_two_chats_at_once(client, folder, expected):
    def ask(_):
        answer = client.chat.completions.create(model=str(folder), messages=MESSAGES, max_tokens=12, temperature=0.0)
        return answer.choices[0].message.content

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, range(2))) == [expected, expected]


def test_a_plain_completion(client, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("def main(", return_tensors="pt")
    tokens = AutoModelForCausalLM.from_pretrained(folder).generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = client.completions.create(model=str(folder), prompt="def main(", max_tokens=12, temperature=0.0)
    expected = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.choices[0].text == expected


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--port", "many"], "many"),
        (["--no-such-flag"], "no-such-flag"),
        (["absent/folder/here"], "absent/folder/here"),
    ],
)
def test_what_a_user_can_get_wrong(flags, reason, capsys):
    assert main(["serve", *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("hf-decoder serve: error: ") and reason in line


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "folder"]) == 2
    assert "pip install 'hf-decoder[serve]'" in capsys.readouterr().err
