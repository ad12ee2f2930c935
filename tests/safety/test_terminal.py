"""A stranger's text reaches a terminal as text: it commands, hides and reorders nothing."""

import io
import json
import os
import shutil
import sys
import threading
import unicodedata

import pytest
from tqdm import tqdm

from hf_decoder.cli.main import main
from hf_decoder.reporting.model_card import write_conversion_card
from hf_decoder.safety.terminal import guard_streams, printable

ATTACKS = {
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://evil.example\x1b\\here\x1b]8;;\x1b\\",
    "clipboard": "\x1b]52;c;cm0gLXJm\x07",
    "clear": "\x1b[2J\x1b[H",
    "hidden": "\x1b[8m",
    "one byte": "\x9b31m\x9d0;owned\x9c",
    "over the line": "evil\rgood",
    "backspaces": "evil\x08\x08\x08\x08good",
    "reordered": "\u202egood\u202c\u2066\u2069",
    "unseen": "a\u200bb\u2060c\ufeffd\u3164e" + "".join(chr(0xE0000 + ord(letter)) for letter in "hidden"),
    "half": "\ud800",
    "line separator": "one\u2028two\x85three",
}
ATTACK = "".join(ATTACKS.values())


def harmless(text: str) -> bool:
    return all(c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in text)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_what_commands_or_deceives_is_spelt_out(attack):
    shown = printable(f"before\n\t{attack} after")
    assert harmless(shown) and "\\" in shown
    assert shown.startswith("before\n\t") and shown.endswith(" after")
    assert shown == "".join(map(printable, f"before\n\t{attack} after"))  # in any pieces


@pytest.mark.parametrize(
    "text",
    [
        "déjà vu 日本語\u3000全角",
        "a\u00a0b",
        "می\u200cخواهم",  # noqa: RUF001
        "क\u094d\u200dष",
        "👩\u200d💻 ❤\ufe0f",
        "1\r\n2\n\t3",
        "שלום",
    ],
)
def test_text_stays_as_it_is(text):
    assert printable(text) == text


def on_a_terminal(argv: list[str]) -> tuple[int, str]:
    """Runs a command on a terminal; returns its exit code and output."""
    leader, follower = os.openpty()
    chunks: list[bytes] = []

    def read() -> None:
        try:
            while chunk := os.read(leader, 4096):
                chunks.append(chunk)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with open(follower, "w", encoding="utf-8") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        code = main(argv)
    reader.join(10)
    os.close(leader)
    return code, b"".join(chunks).decode("utf-8").replace("\r\n", "\n")


SPOKEN = ATTACK.replace("\ud800", "")  # neither tokenizers nor file names can hold it


@pytest.mark.parametrize("stream", [True, False])
def test_generated_text_does_not_command_the_terminal(saved, stream):
    flags = ["--max_new_tokens", "2", *([] if stream else ["--num_beams", "2"])]
    code, printed = on_a_terminal(["generate", str(saved), SPOKEN, *flags])
    assert code == 0 and harmless(printed) and "\\x1b]0;owned\\x07" in printed


def test_generated_text_in_a_pipe_is_the_model_s_own(saved, capsys):
    assert main(["generate", str(saved), SPOKEN, "--max_new_tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith(SPOKEN)


def test_an_error_quotes_a_stranger_as_text(saved, tmp_path, capsys):
    folder = shutil.copytree(saved, tmp_path / f"model{SPOKEN}".replace("/", ""))
    values = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(values | {"model_type": ATTACK}), encoding="utf-8")
    assert main(["generate", str(folder), "x"]) == 2
    line = capsys.readouterr().err
    assert harmless(line) and line.count("\n") == 1 and "\\x1b]0;owned\\x07" in line


@pytest.mark.parametrize("count", [1, 2])
def test_the_doctor_s_report_quotes_a_stranger_as_text(saved, tmp_path, capsys, count):
    folder = shutil.copytree(saved, tmp_path / f"model{SPOKEN}[red]".replace("/", ""))
    values = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(values | {"architectures": [ATTACK]}), encoding="utf-8")
    main(["doctor", *[str(folder)] * count, "--rows", "formats", "card"])
    streams = capsys.readouterr()
    assert harmless(streams.out) and "\\x1b]0;owned\\x07" in streams.out.replace("\n", "")
    assert harmless(streams.err)


def test_a_card_quotes_a_stranger_as_text(tmp_path):
    words = {"title": f"title {ATTACK}", "kind": "LlamaForCausalLM", "source": f"a/{ATTACK}", "source_kind": ATTACK}
    write_conversion_card(tmp_path, words, parameters=1, context_length=1, measured={}, source_card=None)
    text = (tmp_path / "README.md").read_text("utf-8")
    assert harmless(text) and "\\x1b]0;owned\\x07" in text


def test_progress_bars_still_move(monkeypatch):
    raw = io.StringIO()
    monkeypatch.setattr(sys, "stderr", raw)
    guard_streams()
    guard_streams()  # a second time changes nothing
    for _ in tqdm(range(2), desc="outer \x1b[2J", mininterval=0):
        for _ in tqdm(range(2), desc="inner", mininterval=0, leave=False):
            pass
    drawn = raw.getvalue()
    assert (
        "\router \\x1b[2J" in drawn and "\x1b[A" in drawn and harmless(drawn.replace("\r", "").replace("\x1b[A", ""))
    )
