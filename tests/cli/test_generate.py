"""Completions and chats on the command line against `generate` called by hand."""

import io
import json
import os
import re
import select
import signal
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_decoder.cli.main import main
from hf_decoder.data.tokenization import train_tokenizer

PROMPT = "the cat sees"


def by_hand(folder, prompt: str, **settings) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    return tokenizer.decode(model.generate(**ids, **settings)[0], skip_special_tokens=True)


@pytest.mark.parametrize("settings", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}])
def test_completion_is_that_of_generate(run, capsys, settings):
    flags = [f"--{name}={value}" for name, value in settings.items()]
    assert main(["generate", str(run.folder), PROMPT, "--max_new_tokens", "12", *flags]) == 0
    assert capsys.readouterr().out == by_hand(run.folder, PROMPT, max_new_tokens=12, **settings) + "\n"


def test_seed_repeats_a_draw(run, capsys):
    def draw(seed: str) -> str:
        assert main(["generate", str(run.folder), PROMPT, "--max_new_tokens", "30", "--seed", seed]) == 0
        return capsys.readouterr().out

    assert draw("1") == draw("1") != draw("2")


def test_completion_stops_at_the_longest_the_model_reads(run, capsys):
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    assert main(["generate", str(run.folder), PROMPT, "--max_new_tokens", "1000", "--do_sample", "false"]) == 0
    assert len(tokenizer(capsys.readouterr().out)["input_ids"]) <= 130


def test_any_causal_model_will_do(run, tmp_path, capsys):
    tokenizer = train_tokenizer([run.train_file.read_text(encoding="utf-8")], vocab_size=280)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert main(["generate", str(tmp_path), PROMPT, "--max_new_tokens", "5", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.startswith(PROMPT)


def test_ids_outside_the_vocabulary(fails, model_copy):
    tokenizer = AutoTokenizer.from_pretrained(model_copy)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(model_copy)
    assert "vocabulary" in fails("generate", str(model_copy), "the <new>")


def test_chat_sends_the_whole_conversation(run, capsys, monkeypatch):
    seen: list[str] = []
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    original = torch.nn.Module.__call__
    monkeypatch.setattr("sys.stdin", io.StringIO("first\nsecond\n"))

    def spy(self, *args, **kwargs):
        ids = kwargs.get("input_ids")
        if type(self).__name__ == "HfDecoderForCausalLM" and ids is not None and ids.shape[1] > 1:
            seen.append(tokenizer.decode(ids[0]))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", spy)
    flags = ["--chat", "--system", "Be kind.", "--max_new_tokens", "3", "--do_sample", "false"]
    assert main(["generate", str(run.folder), *flags]) == 0
    first, second = seen
    assert "system\nBe kind.<|im_end|>" in first and "user\nfirst<|im_end|>" in first
    assert first.endswith("<|im_start|>assistant\n")
    assert second.startswith(first)
    assert second.endswith("<|im_end|>\n<|im_start|>user\nsecond<|im_end|>\n<|im_start|>assistant\n")
    answer = second.removeprefix(first).split("<|im_end|>")[0]
    assert answer in capsys.readouterr().out


def talk(run, monkeypatch, capsys, *lines: str, flags=(), folder=None) -> tuple[str, list[str]]:
    """What is answered and what is said besides, to these lines of standard input."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    short = ["--max_new_tokens", "4", "--do_sample", "false"]
    capsys.readouterr()
    assert main(["generate", str(folder or run.folder), "--chat", *short, *flags]) == 0
    said = capsys.readouterr()
    return said.out, said.err.splitlines()


def test_a_message_that_is_too_long_is_refused_and_the_chat_goes_on(run, monkeypatch, capsys, tmp_path):
    long, file = "the cat sees the dog " * 100, tmp_path / "talk.jsonl"
    plain, _ = talk(run, monkeypatch, capsys, "the cat", "the bird")
    out, notes = talk(run, monkeypatch, capsys, "the cat", long, "the bird", f"/save {file}")
    assert out == plain
    assert sum("max_position_embeddings is 128" in note for note in notes) == 1
    (row,) = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"] * 2
    assert [turn["content"] for turn in row["messages"]][::2] == ["the cat", "the bird"]


def test_blank_lines_unknown_commands_and_faults_do_not_end_a_chat(run, monkeypatch, capsys, tmp_path):
    plain, _ = talk(run, monkeypatch, capsys, "the cat")
    lines = [
        "",
        "   ",
        "/sve",
        "/save",
        "/save x",
        f"/save {tmp_path}",
        "the cat",
        f"/save {tmp_path}",
        "/exit",
        "more",
    ]
    out, notes = talk(run, monkeypatch, capsys, *lines)
    assert out == plain
    text = "\n".join(notes)
    assert "(/sve is no command; did you mean '/save'" in text and "(name the file: /save FILE)" in text
    assert text.count("nothing to save yet") == 2 and "Is a directory" in text


def test_commands_of_a_chat(run, monkeypatch, capsys, tmp_path):
    file = tmp_path / "talk.jsonl"
    file.write_text('{"messages": []}', encoding="utf-8")  # without an end of its line
    lines = ["/system Be kind.", "one", "/clear", "two", f"/save {file}", "/system", "/clear", "/help", "three"]
    _, notes = talk(run, monkeypatch, capsys, *lines, f"/save {file}", flags=["--system", "Be rude."])
    rows = [json.loads(line)["messages"] for line in file.read_text("utf-8").splitlines()]
    assert [[turn["content"] for turn in row if turn["role"] != "assistant"] for row in rows] == [
        [], ["Be kind.", "two"], ["three"]
    ]  # fmt: skip
    for command in ("/help", "/clear", "/system", "/save", "/exit"):
        assert any(note.startswith(f"{command} ") for note in notes)
    assert "(2 messages forgotten)" in notes


def test_the_banner_says_which_model_it_is_and_whether_it_was_taught_to_chat(run, model_copy, monkeypatch, capsys):
    def introduced() -> str:
        return "\n".join(talk(run, monkeypatch, capsys, folder=model_copy)[1])

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_copy), AutoTokenizer.from_pretrained(model_copy)
    size = f"{model.num_parameters() / 1e6:,.1f}M parameters, a context of 128 tokens, float32 on cpu"
    assert f"model: HfDecoderForCausalLM, {size}" in introduced()
    assert "It was never taught to chat: it has a chat template" in introduced()
    (model_copy / "all_results.json").write_text('{"train_tokens": 9, "train_rows": 3}')  # as finetune leaves it
    assert "never taught" not in introduced()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(model_copy)
    for path in model_copy.glob("chat_template*"):
        path.unlink()
    assert "It was never taught to chat (no chat template)" in introduced()
    out, _ = talk(run, monkeypatch, capsys, "the cat", "the cat", folder=model_copy)
    (line, again) = out.splitlines()
    assert line == again == by_hand(model_copy, "the cat", max_new_tokens=4, do_sample=False).removeprefix("the cat")


def test_what_a_chat_forgets_is_counted(run, monkeypatch, capsys):
    out, notes = talk(run, monkeypatch, capsys, *["the cat sees the dog"] * 12)
    assert len(out.splitlines()) >= 12
    forgotten = [int(re.search(r"the (\d+) oldest messages", note)[1]) for note in notes if "oldest" in note]
    assert forgotten and all(count % 2 == 0 for count in forgotten)


def test_a_template_that_refuses_the_talk_is_one_line(run, model_copy, monkeypatch, capsys):
    tokenizer = AutoTokenizer.from_pretrained(model_copy)
    tokenizer.chat_template = "{{ raise_exception('no system message') if messages[0].role == 'system' }}the"
    tokenizer.save_pretrained(model_copy)
    _, notes = talk(run, monkeypatch, capsys, "a", "/system", "b", flags=["--system", "x"], folder=model_copy)
    refused = [note for note in notes if "no system message" in note and "template" in note]
    (line,) = refused
    assert line.startswith("(the chat template does not take this conversation: ") and line.endswith(
        "no system message)"
    )


@pytest.mark.process
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_chat_in_a_terminal_survives_ctrl_c_and_ends_at_ctrl_d(run):
    """Without a prompt on a terminal, `generate` chats."""
    import pty

    # every token leaves a mark and takes a while, so that there is an answer to stop
    code = f"""
import sys, time
from transformers import TextStreamer
put = TextStreamer.put
TextStreamer.put = lambda self, value: (put(self, value), print("@", flush=True), time.sleep(0.5))
from hf_decoder.cli.main import main
sys.exit(main(["generate", {str(run.folder)!r}, "--max_new_tokens", "40", "--min_new_tokens", "40"]))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "dumb"}
    pid, terminal = pty.fork()
    if pid == 0:  # whatever the process that runs the tests does with the signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        os.execve(sys.executable, [sys.executable, "-c", code], env)
    screen = ""

    def until(pattern: str) -> str:
        """Reads up to the pattern; returns what came since the last one."""
        nonlocal screen
        end = time.monotonic() + 120
        while not (found := re.search(pattern, screen)):
            assert time.monotonic() < end, screen
            if select.select([terminal], [], [], 0.2)[0]:
                screen += os.read(terminal, 4096).decode(errors="replace")
        seen, screen = screen[: found.end()], screen[found.end() :]
        return seen

    try:
        assert "/help lists the commands" in until("> ")
        time.sleep(1)  # between the prompt and the wait for a line, readline loses a signal
        os.write(terminal, b"\x03")
        assert "(/exit or Ctrl-D ends the chat)" in until(r"\n> ")
        for number in range(2):  # the second time as the first
            os.write(terminal, b"hello\n")
            until(r"(?s)@.*@")
            os.write(terminal, b"\x03")
            assert "(stopped)" in until(r"\n> "), number
        os.write(terminal, b"\n/help\n")
        until("/exit .*\n> ")
        os.write(terminal, b"\x04")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        pid = 0
    finally:
        os.close(terminal)
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_a_temperature_of_zero_is_greedy(run, capsys):
    """Whatever else is said of the draw, and whatever generation_config says."""
    expected = by_hand(run.folder, PROMPT, max_new_tokens=12, do_sample=False) + "\n"
    for flags in ([], ["--do_sample"], ["--top_p", "0.9", "--top_k", "5", "--min_p", "0.1"]):
        assert main(["generate", str(run.folder), PROMPT, "--max_new_tokens", "12", "--temperature", "0", *flags]) == 0
        assert capsys.readouterr().out == expected


SAMPLING = {"min_p": 0.05, "top_k": 20, "top_p": 0.9, "temperature": 0.7, "repetition_penalty": 1.3}


BEAMS = {"num_beams": 2, "length_penalty": 2.0, "early_stopping": True, "do_sample": False}


@pytest.mark.parametrize(
    "settings",
    [{**SAMPLING, "do_sample": True}, {"no_repeat_ngram_size": 2, "do_sample": False}, BEAMS],
    ids=["sampling", "no-repeat", "beams"],
)
def test_every_setting_reaches_generate(run, capsys, settings):
    flags = [f"--{name}={value}" for name, value in settings.items()]
    assert main(["generate", str(run.folder), PROMPT, "--max_new_tokens", "12", "--seed", "3", *flags]) == 0
    torch.manual_seed(3)
    assert capsys.readouterr().out == by_hand(run.folder, PROMPT, max_new_tokens=12, **settings) + "\n"


def test_stop_string_ends_the_answer_and_is_not_shown(run, capsys):
    whole = by_hand(run.folder, PROMPT, max_new_tokens=20, do_sample=False)
    stop = whole.removeprefix(PROMPT)[6:9]
    flags = ["--max_new_tokens", "20", "--do_sample", "false", "--stop_strings", stop]
    assert main(["generate", str(run.folder), PROMPT, *flags]) == 0
    added = whole.removeprefix(PROMPT)
    assert capsys.readouterr().out == PROMPT + added[: added.index(stop)] + "\n"


def test_defaults_are_those_of_generation_config(run, model_copy, capsys):
    model = AutoModelForCausalLM.from_pretrained(model_copy)
    model.generation_config.do_sample = False
    model.generation_config.num_beams = 2
    model.generation_config.max_new_tokens = 7
    model.generation_config.temperature = model.generation_config.top_p = None
    model.generation_config.save_pretrained(model_copy)
    assert main(["generate", str(model_copy), PROMPT]) == 0
    assert (
        capsys.readouterr().out == by_hand(run.folder, PROMPT, num_beams=2, max_new_tokens=7, do_sample=False) + "\n"
    )


def file_flags(run, tmp_path, *flags) -> list[str]:
    path = tmp_path / "prompts.jsonl"
    rows = [{"id": n, "prompt": prompt} for n, prompt in enumerate(["the cat", "the dog sees the bird", "a", "the"])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    output = ["--input_file", str(path), "--output_file", str(tmp_path / "answers.jsonl")]
    return ["generate", str(run.folder), *output, "--max_new_tokens", "6", "--do_sample", "false", *flags]


@pytest.mark.parametrize("batch_size", ["1", "3"])
def test_file_of_prompts_is_answered_row_by_row(run, tmp_path, capsys, batch_size):
    assert main(file_flags(run, tmp_path, "--batch_size", batch_size)) == 0
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text("utf-8").splitlines()]
    assert [row["id"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        whole = by_hand(run.folder, row["prompt"], max_new_tokens=6, do_sample=False)
        assert row["completion"] == whole.removeprefix(row["prompt"])
    assert "4/4" in capsys.readouterr().err


def test_interrupted_file_is_gone_on_with(run, tmp_path, fails):
    argv = file_flags(run, tmp_path, "--batch_size", "2")
    assert main(argv) == 0
    path = tmp_path / "answers.jsonl"
    whole = path.read_bytes()
    lines = whole.split(b"\n")
    path.write_bytes(lines[0].replace(b'"id": 0', b'"id": 9') + b"\n" + lines[1][:10])
    assert main(argv) == 0
    assert path.read_bytes() == whole.replace(b'"id": 0', b'"id": 9')
    path.write_bytes(lines[1] + b"\n")
    assert "other prompts (line 1)" in fails(*argv)


def test_an_answer_is_not_cut_where_its_neighbour_has_to_be(run, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    long = tokenizer.decode(tokenizer("the dog sees the bird " * 60)["input_ids"][:120], skip_special_tokens=True)
    prompts = ["the", long, "the cat", "a"]
    expected = [by_hand(run.folder, p, max_new_tokens=8 if p == long else 30, do_sample=False) for p in prompts]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    answers = ["--output_file", str(tmp_path / "answers.jsonl"), "--max_new_tokens", "30", "--do_sample", "false"]
    assert main(["generate", str(run.folder), "--input_file", str(path), *answers, "--batch_size", "4"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text("utf-8").splitlines()]
    assert [row["prompt"] + row["completion"] for row in rows] == expected


def test_a_file_that_holds_something_else_is_not_gone_on_with(run, model_copy, tmp_path, fails):
    argv, path = file_flags(run, tmp_path), tmp_path / "answers.jsonl"
    assert main(argv) == 0
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    prompts = argv[argv.index("--input_file") + 1]
    one = [word if word != str(path) else prompts for word in argv]
    assert "are one file" in fails(*one)
    other = AutoModelForCausalLM.from_pretrained(model_copy)
    other.lm_head.weight.data.normal_()
    other.save_pretrained(model_copy)
    another = [argv[0], str(model_copy), *argv[2:]]
    for part in (whole, lines[0]):
        path.write_bytes(part)
        assert "another model or of other settings (line 1)" in fails(*another)
        assert "another model or of other settings (line 1)" in fails(*argv, "--repetition_penalty", "1.2")
    row = json.loads(lines[0])
    del row["completion"]
    begun = '{"id": 0, "prompt": "the cat", "mine": 1'
    for foreign in (json.dumps(row), "[1]", "a note of mine", begun, lines[0].decode() + "x"):
        path.write_text(foreign, encoding="utf-8")
        assert "is no answer of this command" in fails(*argv)
        assert path.read_text("utf-8") == foreign
    path.write_bytes(whole + lines[0])
    assert "other prompts (line 5)" in fails(*argv)


def test_a_file_is_gone_on_with_wherever_it_was_cut(run, tmp_path):
    argv, path = file_flags(run, tmp_path), tmp_path / "answers.jsonl"
    assert main(argv) == 0
    whole = path.read_bytes()
    first, second, *_ = whole.splitlines(keepends=True)
    for end in (0, 5, len(first) - 1, len(first), len(first) + len(second) - 4):
        path.write_bytes(whole[:end])
        assert main([*argv, "--batch_size", "2"]) == 0
        assert path.read_bytes() == whole
    path.write_bytes(first.replace(b'"id": 0', b'"id": 9')[:-1])  # whole, but an editor took the end of its line
    assert main(argv) == 0
    assert path.read_bytes() == whole.replace(b'"id": 0', b'"id": 9')


def test_chats_of_a_file_end_with_their_turn(run, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = AutoModelForCausalLM.from_pretrained(run.folder)
    seen = {}
    generate = type(model).generate

    def spy(self, inputs, **kwargs):
        seen["prompt"], seen["ends"] = tokenizer.decode(inputs[0]), kwargs["eos_token_id"]
        return generate(self, inputs, **kwargs)

    monkeypatch.setattr(type(model), "generate", spy)
    assert main(file_flags(run, tmp_path, "--chat", "--system", "Be kind.", "--batch_size", "1")) == 0
    assert seen["ends"] == sorted({tokenizer.eos_token_id, end})
    assert seen["prompt"] == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"
    )


def test_texts_and_chats_of_one_file_end_as_each_does(model_copy, tmp_path, monkeypatch):
    path, model = tmp_path / "prompts.jsonl", AutoModelForCausalLM.from_pretrained(model_copy)
    model.generation_config.eos_token_id = AutoTokenizer.from_pretrained(model_copy).eos_token_id
    model.generation_config.save_pretrained(model_copy)
    rows = [{"prompt": "the"}, {"prompt": [{"role": "user", "content": "the"}]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ends, generate = [], type(model).generate

    def spy(self, *args, **kwargs):
        ends.append(len(kwargs["eos_token_id"]))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "generate", spy)
    flags = ["--output_file", str(tmp_path / "o"), "--max_new_tokens", "3"]
    assert main(["generate", str(model_copy), "--input_file", str(path), *flags]) == 0
    assert ends == [1, 2]


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--input_file", "prompts.txt"], "--output_file"),
        (["a prompt", "--input_file", "prompts.txt", "--output_file", "o"], "not both"),
        (["--input_file", "nowhere.txt", "--output_file", "o"], "nowhere.txt"),
        (["--input_file", "empty.txt", "--output_file", "o"], "1 of 2 prompts are empty, first row 2"),
        (["--input_file", "prompts.txt", "--output_file", "o", "--prompt_column", "ask"], "'ask'"),
    ],
)
def test_batch_flags(fails, run, tmp_path, monkeypatch, flags, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("one\ntwo\n", encoding="utf-8")
    (tmp_path / "empty.txt").write_text("one\n\n", encoding="utf-8")
    assert reason in fails("generate", str(run.folder), *flags)
    assert not (tmp_path / "o").exists()
