"""`hf-decoder serve`: a real openai client asks a saved folder, and every parameter is honoured or refused."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import openai
import pytest
import torch
from small_folder import write_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_decoder.cli.main import main

pytestmark = pytest.mark.peers

ROOT = Path(__file__).resolve().parents[2]
MESSAGES = [{"role": "user", "content": "def main("}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A random model that can write, with its tokenizer and chat template."""
    shape = {"intermediate_size": 48, "max_position_embeddings": 256, "initializer_range": 0.3}
    return write_folder(tmp_path_factory.mktemp("serving") / "model", tokenizer, **shape)


@contextmanager
def serving(folder, log_file):
    """A client of a server on the loopback, which is started and ended here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    log = log_file.open("w+")
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "serve.py"), str(folder), *address, "--device", "cpu"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
        deadline = time.monotonic() + 300  # other tests may hold the cores
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
def client(folder, tmp_path_factory):
    with serving(folder, tmp_path_factory.mktemp("server") / "log") as found:
        yield found


@pytest.fixture(scope="module")
def chat(client, folder):
    """Asks for a greedy chat of at most 12 tokens, with whatever else is given."""

    def ask(**given):
        asked = {"model": str(folder), "messages": MESSAGES, "max_tokens": 12, "temperature": 0.0, **given}
        return client.chat.completions.create(**{name: value for name, value in asked.items() if value is not ...})

    return ask


@pytest.fixture(scope="module")
def complete(client, folder):
    def ask(**given):
        asked = {"model": str(folder), "prompt": "def main(", "max_tokens": 12, "temperature": 0.0, **given}
        return client.completions.create(**{name: value for name, value in asked.items() if value is not ...})

    return ask


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


def test_many_clients_get_what_each_would_get_alone(chat, complete):
    def ask(number):
        way = {"chat": chat, "complete": complete}["chat" if number % 3 else "complete"]
        text = "def main(" * (number % 4 + 1)
        given = {"messages": [{"role": "user", "content": text}]} if number % 3 else {"prompt": text}
        given |= {"max_tokens": 3 + 2 * number, "stream": number % 2 == 0}
        given |= {"logit_bias": {"5": -3}} if number == 7 else {"stop": "e"} if number > 9 else {}
        found = way(**given)
        if given["stream"]:
            return streamed(found)[::2]
        choice = found.choices[0]
        return (choice.message.content if number % 3 else choice.text), [choice.finish_reason]

    alone = [ask(number) for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        for _ in range(3):
            assert list(pool.map(ask, range(12))) == alone


def test_a_plain_completion(client, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("def main(", return_tensors="pt")
    tokens = AutoModelForCausalLM.from_pretrained(folder).generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = client.completions.create(model=str(folder), prompt="def main(", max_tokens=12, temperature=0.0)
    expected = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.choices[0].text == expected


def streamed(stream):
    """The whole text of a stream, its pieces, and why it ended."""
    pieces, reasons = [], []
    for chunk in stream:
        for choice in chunk.choices:
            pieces.append((choice.delta.content if hasattr(choice, "delta") else choice.text) or "")
            reasons += [choice.finish_reason] if choice.finish_reason else []
    return "".join(pieces), pieces, reasons


@pytest.mark.parametrize("way", ["chat", "complete"])
def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(way, chat, complete):
    ask = {"chat": chat, "complete": complete}[way]
    text = ask().choices[0]
    text = text.message.content if way == "chat" else text.text
    for stop in (text[4:7], text[2:4], ["\x00never\x00", text[5:8]]):
        first = stop if isinstance(stop, str) else stop[1]
        choice = ask(stop=stop).choices[0]
        assert (choice.message.content if way == "chat" else choice.text) == text.partition(first)[0]
        assert choice.finish_reason == "stop"
        assert streamed(ask(stop=stop, stream=True))[::2] == (text.partition(first)[0], ["stop"])
    assert streamed(ask(stop=text + "more", stream=True))[::2] == (text, ["length"])


def test_answers_end_at_max_tokens_or_at_the_end_of_a_turn(client, folder, chat, tokenizer):
    short = chat(max_tokens=3)
    assert short.usage.completion_tokens == 3 and short.choices[0].finish_reason == "length"
    assert chat(max_tokens=..., max_completion_tokens=3).choices[0].message.content == short.choices[0].message.content
    (end,) = tokenizer("<|im_end|>")["input_ids"]
    ended = chat(logit_bias={str(end): 1000.0})
    assert ended.choices[0].finish_reason == "stop" and ended.choices[0].message.content == ""
    assert ended.usage.completion_tokens == 1
    exact = chat(logit_bias={str(end): 1000.0}, max_tokens=1)
    assert exact.choices[0].finish_reason == "stop"  # it came to an end, and not to its length
    assert streamed(chat(logit_bias={str(end): 1000.0}, max_tokens=1, stream=True))[2] == ["stop"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context_is_refused(stream, chat, complete):
    for ask, given in (
        (chat, {"messages": [{"role": "user", "content": "main " * 400}]}),
        (complete, {"prompt": "main " * 400}),
        (chat, {"max_tokens": 250}),
        (complete, {"max_tokens": 256}),
    ):
        with pytest.raises(openai.BadRequestError, match="context is 256 tokens; the prompt has") as error:
            ask(stream=stream, **given)
        assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="empty"):
        complete(prompt="", stream=stream)


def test_without_max_tokens_an_answer_ends_with_the_context(chat):
    answer = chat(max_tokens=..., logit_bias={str(special): -100 for special in range(4)})
    assert answer.usage.total_tokens == 256 and answer.choices[0].finish_reason == "length"


def test_a_seed_gives_the_same_text_again_whatever_runs_beside_it(chat):
    def ask(seed):
        return chat(temperature=1.5, seed=seed).choices[0].message.content

    alone = [ask(1), ask(2)]
    assert alone[0] != alone[1] and ask(1) == alone[0]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, [1, 2, None, 1, 2]))[0:2] == alone
    assert len({ask(None) for _ in range(4)}) > 1  # a seed is of its request alone
    assert streamed(chat(temperature=1.5, seed=2, stream=True))[0] == alone[1]


def test_a_temperature_draws_and_zero_does_not(chat, expected):
    assert {chat().choices[0].message.content for _ in range(2)} == {expected}
    assert len({chat(temperature=1.5).choices[0].message.content for _ in range(4)}) > 1
    assert chat(temperature=1.5, top_p=1e-6).choices[0].message.content == expected


@pytest.mark.parametrize("way", ["chat", "complete"])
def test_n_answers(way, chat, complete, expected):
    ask = {"chat": chat, "complete": complete}[way]
    answer = ask(n=3, temperature=1.5, seed=5)
    texts = [choice.message.content if way == "chat" else choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert answer.usage.completion_tokens > 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    again = ask(n=3, temperature=1.5, seed=5)
    assert texts == [choice.message.content if way == "chat" else choice.text for choice in again.choices]


def test_log_probabilities_are_those_of_the_model(folder, chat, complete):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    parts = [token for token in range(len(tokenizer)) if not tokenizer.decode([token]).isascii() or token < 4]
    bias = {str(token): -100 for token in parts}  # of characters; what is left is text by itself
    choice = complete(logprobs=2, logit_bias=bias).choices[0]
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text and len(found.tokens) == 12
    prompt = tokenizer("def main(", return_tensors="pt")["input_ids"]
    ids = model.generate(prompt, max_new_tokens=12, do_sample=False, suppress_tokens=parts)
    with torch.no_grad():
        table = model(ids).logits.log_softmax(-1)[0, prompt.shape[1] - 1 : -1]
    exact = table.gather(1, ids[0, prompt.shape[1] :, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found.token_logprobs), exact, atol=1e-4, rtol=0)
    best = torch.tensor([sorted(top.values(), reverse=True) for top in found.top_logprobs])
    torch.testing.assert_close(best, table.topk(2).values, atol=1e-4, rtol=0)
    assert all(choice.text[at:].startswith(t) for at, t in zip(found.text_offset, found.tokens, strict=True))


def test_log_probabilities_of_a_chat(chat):
    entries = chat(logprobs=True, top_logprobs=3, n=2).choices[1].logprobs.content
    assert len(entries) == 12
    assert all(len(e.top_logprobs) == 3 and e.logprob == e.top_logprobs[0].logprob for e in entries)
    plain = chat(logprobs=True).choices[0]
    assert plain.logprobs.content[0].top_logprobs == []
    cut = chat(logprobs=True, stop=plain.message.content[4:7]).choices[0].logprobs.content
    assert 0 < len(cut) < 12 and cut == plain.logprobs.content[: len(cut)]


def test_penalties_count_what_was_written(complete):
    plain = complete(max_tokens=60, logprobs=0).choices[0].logprobs.tokens
    assert len(set(plain)) < 60
    once = complete(max_tokens=60, logprobs=0, presence_penalty=2, logit_bias={}).choices[0].logprobs.tokens
    often = complete(max_tokens=60, logprobs=0, frequency_penalty=2).choices[0].logprobs.tokens
    assert len(set(often)) > len(set(plain)) and once != plain


def test_a_stream_tells_its_usage(chat):
    *_, last = chat(stream=True, stream_options={"include_usage": True})
    assert last.usage.completion_tokens == 12


REFUSED = [
    ("chat", {"n": 2, "stream": True}, "n: not in a stream"),
    ("chat", {"n": 0}, "n: "),
    ("chat", {"logprobs": True, "stream": True}, "logprobs: not in a stream"),
    ("complete", {"logprobs": 0, "stream": True}, "logprobs: not in a stream"),
    ("chat", {"top_logprobs": 2}, "top_logprobs: only with logprobs"),
    ("chat", {"max_tokens": 0}, "max_tokens: "),
    ("chat", {"max_tokens": 5, "max_completion_tokens": 6}, "give one of them"),
    ("chat", {"temperature": -1}, "temperature: "),
    ("chat", {"temperature": "hot"}, "temperature: "),
    ("chat", {"top_p": 0}, "top_p: "),
    ("chat", {"seed": "one"}, "seed: "),
    ("chat", {"stop": ""}, "stop: "),
    ("chat", {"stop": ["a"] * 17}, "stop: "),
    ("chat", {"logit_bias": {"9999": 1}}, "logit_bias: 9999 is not a token"),
    ("chat", {"response_format": {"type": "json_object"}}, "response_format"),
    ("chat", {"tool_choice": "required"}, "tool_choice"),
    ("chat", {"reasoning_effort": "low"}, "reasoning_effort"),
    ("chat", {"stream_options": {"include_usage": True}}, "only with stream"),
    ("chat", {"extra_body": {"top_k": 5}}, "top_k: unknown to this server"),
    ("chat", {"extra_body": {"chat_template_kwargs": {"thinking": True}}}, "thinking: "),
    ("chat", {"extra_body": {"generation_config": "{"}}, "generation_config: not JSON"),
    ("chat", {"extra_body": {"generation_config": '{"topk": 1}'}}, "'topk' is not a setting"),
    ("chat", {"messages": []}, "messages: "),
    ("chat", {"messages": [{"role": "user", "content": "a", "name": "Ann"}]}, "name: "),
    (
        "chat",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
        "reads only text parts",
    ),
    ("complete", {"echo": True}, "echo: this server takes only False"),
    ("complete", {"suffix": "end"}, "suffix"),
    ("complete", {"best_of": 3}, "best_of"),
    ("complete", {"logprobs": 9}, "logprobs: "),
    ("complete", {"prompt": ["a", "b"]}, "prompt: "),
]


@pytest.mark.parametrize(("way", "given", "reason"), REFUSED)
def test_what_is_not_honoured_is_refused(way, given, reason, chat, complete):
    with pytest.raises(openai.BadRequestError) as error:
        {"chat": chat, "complete": complete}[way](**given)
    assert reason in error.value.body["message"] and error.value.type == "invalid_request_error"


@pytest.mark.parametrize("way", ["chat", "complete"])
def test_a_model_that_does_not_exist_is_named(way, chat, complete):
    with pytest.raises(openai.NotFoundError, match="no/such/model"):
        {"chat": chat, "complete": complete}[way](model="no/such/model")


def test_values_that_ask_for_nothing_are_no_error(chat, complete, expected):
    neutral = {
        "n": 1,
        "logprobs": False,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "logit_bias": None,
        "user": "me",
    }
    neutral |= {"stop": None, "response_format": {"type": "text"}, "store": False, "top_p": 1, "stream": False}
    assert chat(**neutral).choices[0].message.content == expected
    complete(n=1, echo=False, best_of=1, suffix=None, logprobs=None)


def test_a_setting_of_generate_is_taken_from_generation_config(chat, expected):
    given = {"generation_config": json.dumps({"repetition_penalty": 50.0})}
    assert chat(extra_body=given).choices[0].message.content != expected


def test_the_other_endpoint_of_openai_is_checked_too(client, folder):
    answer = client.responses.create(model=str(folder), input="def main(", max_output_tokens=5, temperature=0)
    assert answer.output_text
    with pytest.raises(openai.BadRequestError, match="context is 256 tokens"):
        client.responses.create(model=str(folder), input="def main(" * 100, max_output_tokens=5)
    with pytest.raises(openai.BadRequestError, match="top_logprobs"):
        client.responses.create(model=str(folder), input="def main(", top_logprobs=2)


def test_a_body_that_is_no_json_is_told_in_openais_form(client):
    with pytest.raises(openai.BadRequestError, match="not a JSON object"):
        client.post("/chat/completions", body=[], cast_to=object)


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """What `finetune` makes of the folder with LoRA."""
    pytest.importorskip("trl")
    path = tmp_path_factory.mktemp("finetuned")
    rows = [{"prompt": "def main(", "completion": "the end"}] * 8
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--task", "sft", "--model_name_or_path", str(folder), "--train_file", str(path / "rows.jsonl")]
    argv += ["--use_peft", "true", "--learning_rate", "3e-2", "--max_steps", "4", "--bf16", "false"]
    argv += ["--validation_split_percentage", "0", "--report_to", "none", "--output_dir", str(path / "out")]
    assert main(["finetune", *argv]) == 0
    return path / "out"


def test_an_adapter_is_served_on_its_base(adapter, folder, expected, tmp_path):
    from peft import AutoPeftModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    inputs = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    tuned = tokenizer.decode(tokens, skip_special_tokens=True)
    with serving(adapter, tmp_path / "log") as client:
        assert [model.id for model in client.models.list()] == [str(adapter)]
        answer = client.chat.completions.create(model=str(adapter), messages=MESSAGES, max_tokens=12, temperature=0)
    assert answer.choices[0].message.content == tuned != expected


@pytest.mark.parametrize("damage", ["base", "task", "weights"])
def test_an_adapter_that_cannot_be_served_is_one_line(damage, folder, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    values |= {"base": {"base_model_name_or_path": str(tmp_path / "gone")}, "task": {"task_type": "SEQ_CLS"}}.get(
        damage, {}
    )
    path.write_text(json.dumps(values))
    if damage == "weights":
        (tmp_path / "adapter_model.safetensors").write_bytes(b"cut")
    assert main(["serve", str(tmp_path), "--device", "cpu"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("hf-decoder serve: error: ")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--port", "many"], "many"),
        (["--no-such-flag"], "no-such-flag"),
        (["absent/folder/here", "--port", "0"], "absent/folder/here"),
        (["folder", "--continuous-batching"], "--continuous-batching"),
    ],
)
def test_what_a_user_can_get_wrong(flags, reason, capsys):
    assert main(["serve", *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("hf-decoder serve: error: ") and reason in line and "TRACEBACK" not in line


def test_a_port_in_use_is_one_line_before_the_model_is_loaded(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", "absent/folder/here", "--host", "127.0.0.1", "--port", port]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("hf-decoder serve: error: ") and f"--port {port} cannot be used" in line


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "folder"]) == 2
    assert "pip install 'hf-decoder[serve]'" in capsys.readouterr().err
