"""What `push` runs, sends and vouches for, when a folder, a base or a repository holds what it should not."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from loopback import GITATTRIBUTES, Repo, is_lfs, oid_of
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hf_decoder import HfDecoderForCausalLM
from hf_decoder.doctor import DoctorReport

CARD = """---
license: mit
library_name: peft
pipeline_tag: text-generation
---
# An adapter

`AutoModelForCausalLM.from_pretrained(...)`
"""
# Code that leaves a mark where it is run, with what it can see of its owner's secrets.
PLANTED = """
import os as _os
from huggingface_hub import get_token as _get_token
with open({mark!r}, "w") as _file:
    _file.write(" ".join(f"{{n}}={{v}}" for n, v in _os.environ.items()) + f" token:{{_get_token()}}")
"""


@pytest.fixture(scope="module")
def healthy_adapter(folder, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = HfDecoderForCausalLM.from_pretrained(folder)
    to = tmp_path_factory.mktemp("adapters") / "adapter"
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).save_pretrained(to)
    (to / "README.md").write_text(CARD, encoding="utf-8")
    return to


@pytest.fixture
def adapter(healthy_adapter, tmp_path) -> Path:
    return Path(shutil.copytree(healthy_adapter, tmp_path / "adapter"))


def host(hub, name: str, folder: Path, **others: bytes) -> None:
    """Puts a folder on the Hub as anybody may, past `push`."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | others
    repo = hub.repos[name] = Repo(private=False)
    repo.commit("main", {".gitattributes": GITATTRIBUTES, **files}, "by hand")
    hub.stored |= {oid_of(path, data): data for path, data in files.items() if is_lfs(path)}


# ------------------------------------------------------------------------------------------------ what is run


@pytest.mark.process
def test_code_of_an_adapter_s_base_runs_only_if_trusted_and_sees_no_token(
    client, copy, adapter, tmp_path, pushes, monkeypatch
):
    lines = (copy / "modeling_hf_decoder.py").read_text(encoding="utf-8").splitlines(keepends=True)
    start = next(n for n, line in enumerate(lines) if line.startswith("import "))
    planted = PLANTED.format(mark=str(tmp_path / "ran"))
    (copy / "modeling_hf_decoder.py").write_text("".join([*lines[:start], planted, *lines[start:]]), encoding="utf-8")
    host(client, "owner/planted", copy)
    for name in ("HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, "hf_stolen")
    token_file = Path(os.environ["HF_HOME"]) / "token"
    token_file.write_text("hf_owner", encoding="utf-8")
    monkeypatch.setenv("HF_TOKEN_PATH", str(token_file))
    code, said = pushes(adapter, "owner/tuned", "--base_model", "owner/planted")
    assert code == 2 and "owner/planted brings code" in said and "--trust_remote_code" in said
    assert "modeling_hf_decoder.py" in said and "owner/tuned" not in client.repos
    assert not (tmp_path / "ran").exists()
    code, said = pushes(adapter, "owner/tuned", "--base_model", "owner/planted", "--trust_remote_code", "--private")
    assert code == 0, said
    seen = (tmp_path / "ran").read_text(encoding="utf-8")
    assert "token:None" in seen and "hf_owner" not in seen and "hf_stolen" not in seen and str(token_file) not in seen


@pytest.mark.parametrize(
    "file, values, words",
    [
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "someone/else--modeling.Model"}}, "someone/else"),
        ("config.json", {"configuration_files": ["config.5.0.0.json"]}, "config.5.0.0.json"),
        ("adapter_config.json", {"base_model_name_or_path": "someone/else"}, "adapter_config.json"),
    ],
)
def test_a_base_that_leads_elsewhere_is_not_loaded(client, copy, adapter, pushes, file, values, words):
    old = json.loads((copy / file).read_text(encoding="utf-8")) if (copy / file).is_file() else {}
    (copy / file).write_text(json.dumps(old | values), encoding="utf-8")
    host(client, "owner/leads", copy)
    code, said = pushes(adapter, "owner/led", "--base_model", "owner/leads", "--trust_remote_code")
    assert code == 2 and words in said and "owner/led" not in client.repos


@pytest.mark.parametrize("name", ["model.safetensors", "configuration_hf_decoder.py"])
def test_what_came_back_otherwise_is_not_loaded(client, unexamined, folder, tmp_path, pushes, monkeypatch, name):
    """A server that keeps another file than it was sent."""
    other = PLANTED.format(mark=str(tmp_path / "ran")).encode()
    monkeypatch.setattr(client, "replaced", {name: other})
    client.stored[oid_of("x.safetensors", other)] = other
    code, said = pushes(folder, f"owner/swapped-{name}")
    assert code == 1 and f"{name} is not the file that was sent" in said
    assert not (tmp_path / "ran").exists()


# ----------------------------------------------------------------------------------------------- what is sent


@pytest.mark.parametrize(
    "name", ["id_rsa", "LICENSE", "tokenizer.model", "custom_generate", "additional_chat_templates"]
)
def test_a_link_out_of_the_folder_is_refused(client, copy, tmp_path, pushes, name):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret", encoding="utf-8")
    is_folder = name in ("custom_generate", "additional_chat_templates")
    (copy / "inner").symlink_to(tmp_path / "private" if is_folder else tmp_path / "private" / "key")
    (copy / "inner").rename(copy / name)
    code, said = pushes(copy, "owner/linked")
    assert code == 2 and name in said and "link out of the folder" in said and "owner/linked" not in client.repos


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "loss_curve.png"])
def test_a_folder_that_changes_while_it_is_examined_is_refused(client, copy, pushes, monkeypatch, name):
    def slow_doctor(*args, **kwargs):
        (copy / name).write_bytes(b"x")
        return DoctorReport("", "", "quick", ())

    monkeypatch.setattr("hf_decoder.doctor.run_doctor", slow_doctor)
    code, said = pushes(copy, "owner/changing")
    assert code == 2 and f"{name} changed" in said and "owner/changing" not in client.repos


def test_of_an_adapter_only_the_adapter_is_sent(client, folder, adapter, pushes, unloaded):
    host(client, "owner/base_of_it", folder)
    private = (
        "optimizer.pt",
        "adapter_model.bin",
        "train.py",
        "modeling_hf_decoder.py",
        "credentials.json",
        "log.jsonl",
    )
    for name in private:
        (adapter / name).write_text("secret", encoding="utf-8")
    code, said = pushes(adapter, "owner/alone", "--base_model", "owner/base_of_it")
    assert code == 0, said
    names = set(client.files("owner/alone"))
    assert names == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert all(name in said for name in private)


def not_finite(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")


def edit(**values):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")

    return change


@pytest.mark.parametrize(
    "damage, words",
    [
        (not_finite, "not finite"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"cut"), "damaged"),
        (lambda folder: (folder / "README.md").unlink(), "no README.md"),
        (edit(auto_mapping={"base_model_class": "x", "parent_library": "antigravity"}), "antigravity"),
        (edit(tokenizer_kwargs={"trust_remote_code": True}), "tokenizer_kwargs"),
    ],
)
def test_an_adapter_is_examined(client, folder, adapter, pushes, damage, words):
    host(client, "owner/base_of_it", folder)
    damage(adapter)
    code, said = pushes(adapter, "owner/ill", "--base_model", "owner/base_of_it")
    assert code == 2 and "nothing was pushed" in said and words in said and "owner/ill" not in client.repos


# ------------------------------------------------------------------------------------------ what is vouched for


def test_what_lay_there_before_is_named_and_old_code_goes(client, unexamined, unloaded, copy, pushes):
    others = {
        "old_hf_decoder.py": b"x",
        "custom_generate/generate.py": b"x",
        "x.pkl": b"x",
        "sub/a_hf_decoder.py": b"x",
    }
    host(client, "owner/shared", copy, **others)
    code, said = pushes(copy, "owner/shared")
    assert code == 0 and "every file and every logit is the same" not in said
    assert "3 other files" in said and "custom_generate/generate.py, sub/a_hf_decoder.py, x.pkl" in said
    assert set(client.files("owner/shared")) & set(others) == set(others) - {"old_hf_decoder.py"}


def test_a_model_and_an_adapter_do_not_share_a_name(client, unexamined, folder, adapter, pushes):
    host(client, "owner/a_model", folder)
    host(client, "owner/an_adapter", adapter)
    code, said = pushes(adapter, "owner/a_model", "--base_model", "owner/a_model")
    assert code == 2 and "owner/a_model holds config.json" in said
    code, said = pushes(folder, "owner/an_adapter")
    assert code == 2 and "owner/an_adapter holds adapter_config.json" in said
    assert "config.json" not in client.files("owner/an_adapter")
