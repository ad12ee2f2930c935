"""What the README says is so: its code runs, its commands and flags exist, its layout map is the layout."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("python scripts/")]


def test_the_tour_runs(tmp_path, monkeypatch, tokenizer):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    special_tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = HfDecoderConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape, **special_tokens)
    HfDecoderForCausalLM(config).save_pretrained(tmp_path / "runs/quickstart")
    tokenizer.save_pretrained(tmp_path / "runs/quickstart")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert {"config.json", "model.safetensors", "modeling_hf_decoder.py"} <= {
        file.name for file in (tmp_path / "runs/merged").iterdir()
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_a_command_exists(command, capsys):
    script, *flags = shlex.split(command)[1:]
    assert (ROOT / script).is_file()
    with pytest.raises(SystemExit) as stop:
        main([Path(script).stem, "--help-all" if "serve" not in script else "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in flags:
        if flag.startswith("--"):
            assert re.search(rf"{flag}\b", text), f"{script} has no {flag}"


def test_the_layout_map_is_the_layout():
    tree = next(block for block in re.findall(r"```\n(hf_decoder/\n.*?)```", README, flags=re.DOTALL))
    package, model = tree.split("scripts/ ")[0], re.findall(r"^    (\w+_hf_decoder\.py)", tree, flags=re.MULTILINE)
    named = set(re.findall(r"^  (\w+(?:\.py|\.md|\.typed|/))", package, flags=re.MULTILINE))
    folder = ROOT / "hf_decoder"
    found = {path.name + ("/" if path.is_dir() else "") for path in folder.iterdir() if path.name != "__pycache__"}
    assert named == found
    assert set(model) == {path.name for path in (folder / "model").glob("*.py")} - {"__init__.py"}


@pytest.mark.parametrize("room", sorted(path.parent.name for path in (ROOT / "hf_decoder").glob("*/__init__.py")))
def test_the_readme_of_a_room_names_its_files(room: str):
    folder = ROOT / "hf_decoder" / room
    text = (folder / "README.md").read_text(encoding="utf-8")
    files = [
        path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc" and path.stem != "__init__"
    ]
    named = [path.relative_to(folder).as_posix() if path.name == "README.md" else path.name for path in files]
    assert not [name for name in named if name != "README.md" and name.removesuffix(".py") not in text]
    assert len(text.splitlines()) <= 60
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (folder / link).exists(), link


def test_the_front_page_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 250
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link


def test_ci_runs_the_readme_s_test_command():
    install, tests = (
        command for block in blocks("bash") for command in re.findall(r"^pip install torch.*", block, re.M)
    )
    assert install.endswith("python scripts/pretrain.py")
    steps = (ROOT / ".ci/run").read_text(encoding="utf-8")
    for step in tests.split(" && "):
        assert step.removeprefix("pip install ") in steps


def test_the_tests_that_ci_and_contributors_are_told_of_are_there():
    for file in [*(ROOT / ".ci").iterdir(), ROOT / ".github/CONTRIBUTING.md"]:
        for path in re.findall(r"tests/[\w/.]+", file.read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), f"{file.name}: {path}"


def test_every_script_is_a_door():
    for script in (ROOT / "scripts").glob("*.py"):
        assert f'main(["{script.stem}"' in script.read_text(encoding="utf-8"), script
        assert len(script.read_text(encoding="utf-8").splitlines()) <= 12
