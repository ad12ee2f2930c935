"""`hf-decoder push` against a Hub on 127.0.0.1: what is sent, proved, refused, and completed later."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time

import huggingface_hub.utils
import pytest
from huggingface_hub import HfApi, ModelCard, constants
from packaging.version import Version
from safetensors.torch import load_file, save_file
from small_folder import write_folder

from hf_decoder.publishing.push import files_to_push, push

# where `ModelCard.validate` does, whatever HF_ENDPOINT says
ASKS_THE_REAL_HUB = Version(huggingface_hub.__version__) < Version("2")


@pytest.fixture
def fails(pushes):
    def check(*argv: object) -> str:
        code, said = pushes(*argv)
        (line,) = [text for text in said.splitlines() if "error" in text]
        assert code == 2 and line.startswith("hf-decoder push: error: ")
        return line

    return check


@pytest.mark.process
def test_the_whole_way(client, folder, pushes):
    """Doctor, upload, download, a fresh process without the package: the command as a user runs it."""
    code, said = pushes(folder, "owner/whole", "--private")
    assert code == 0
    repo = client.repos["owner/whole"]
    assert repo.private and repo.refs["main"] in said and "every file and every logit is the same" in said
    files = client.files("owner/whole")
    for path in folder.iterdir():
        if path.name != "README.md":
            assert files[path.name] == path.read_bytes(), path.name
    assert set(files) == {path.name for path in folder.iterdir()} | {".gitattributes"}
    # the card pins the commit before it, which holds all the rest
    card = files["README.md"].decode()
    (pin,) = set(re.findall(r'model="owner/whole", revision="([0-9a-f]{40})"', card))
    assert repo.files[pin]["model.safetensors"] == files["model.safetensors"] and "README.md" not in repo.files[pin]
    assert ModelCard(card).data.license == "apache-2.0"
    if not ASKS_THE_REAL_HUB:
        ModelCard(card).validate()  # asks the server


def test_a_second_push_sends_nothing_and_makes_no_commit(client, unexamined, unloaded, folder):
    first = push(folder, "owner/twice")
    before = (len(client.repos["owner/twice"].files), len(client.asked("PUT /lfs/")))
    assert push(folder, "owner/twice").commit == first.commit
    assert (len(client.repos["owner/twice"].files), len(client.asked("PUT /lfs/"))) == before


PRIVATE = (
    *("training_args.bin", "optimizer.pt", "trainer_state.json", "complete.json", ".secret", "rng.pth"),
    *("credentials.json", "env", "token", ".env", "train.jsonl", "events.out.tfevents.1", "notes.txt", "optimizer.md"),
    *("setup.py", "checkpoint-x.py", "CONFIG.JSON.pkl", "model.pkl", "other.safetensors", "id_rsa"),
    *(
        "checkpoint-5/model.safetensors",
        "__pycache__/a.pyc",
        ".cache/x.json",
        "runs/log/events",
        "wandb/run/config.json",
    ),
    *("extra/notes.md", "model/config.json", "Checkpoint-1/config.json", "additional_chat_templates/token.txt"),
)


def test_what_is_nobody_elses_business_stays_at_home_and_is_named(client, unexamined, unloaded, copy, capsys):
    for name in PRIVATE:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("secret", encoding="utf-8")
    for name in ("pictures/a.png", "tool.jinja", "docs/usage.md", ".pictures/b.png"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("shown", encoding="utf-8")
    with (copy / "README.md").open("a", encoding="utf-8") as file:
        file.write("![a](pictures/a.png) [usage](docs/usage.md) ![b](.pictures/b.png) [key](id_rsa)\n")
    before = {path.relative_to(copy).as_posix() for path in copy.rglob("*")}
    push(copy, "owner/business")
    files = client.files("owner/business")
    assert set(files) == {path.relative_to(copy).as_posix() for path in files_to_push(copy)} | {".gitattributes"}
    assert {"pictures/a.png", "docs/usage.md", "model.safetensors"} <= set(files)
    assert not set(PRIVATE) & set(files) and not any(data == b"secret" for data in files.values())
    said = capsys.readouterr().err
    for name in PRIVATE:
        assert name.partition("/")[0] in said, name
    assert "wandb/ (1 file)" in said and ".pictures/ (1 file)" in said
    assert before == {path.relative_to(copy).as_posix() for path in copy.rglob("*")}  # and the folder is as it was


def test_weights_of_an_earlier_push_go(client, unexamined, unloaded, folder, tmp_path, tokenizer):
    push(write_folder(tmp_path / "shards", tokenizer, max_shard_size="100KB"), "owner/stale")
    shards = [name for name in client.files("owner/stale") if re.fullmatch(r"model-\d+-of-\d+.safetensors", name)]
    assert len(shards) > 1
    push(folder, "owner/stale")
    weights = [name for name in client.files("owner/stale") if "safetensors" in name]
    assert weights == ["model.safetensors"]


def test_a_branch_and_a_pull_request(client, unexamined, unloaded, copy):
    push(copy, "owner/refs")
    main_before = client.repos["owner/refs"].refs["main"]
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    on_branch = push(copy, "owner/refs", revision="try/this")
    assert client.repos["owner/refs"].refs["try/this"] == on_branch.commit and on_branch.pr_url is None
    requested = push(copy, "owner/refs", create_pr=True)
    assert requested.pr_url == f"{client.endpoint}/owner/refs/discussions/1"
    assert client.repos["owner/refs"].refs["refs/pr/1"] == requested.commit
    assert client.files("owner/refs", "refs/pr/1")["model.safetensors"] == (copy / "model.safetensors").read_bytes()
    assert client.repos["owner/refs"].refs["main"] == main_before
    assert "refs/pr/2" not in client.repos["owner/refs"].refs


# --------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "token, name, words",
    [
        ("hf_nobody", "owner/new", ["does not accept the token", "hf auth login"]),
        ("", "owner/new", ["no token", "hf auth login"]),
        ("hf_other", "owner/new", ["does not let you write to owner/new", "403", "owner"]),
        ("hf_reader", "owner/new", ["does not let you write to owner/new", "403"]),
    ],
)
def test_the_server_refuses_the_token(client, unexamined, monkeypatch, folder, fails, token, name, words):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        monkeypatch.delenv("HF_TOKEN")
    line = fails(folder, name)
    assert all(word in line for word in words), line
    assert name not in client.repos


@pytest.mark.parametrize(
    "argv, words",
    [
        (["owner/a b"], ["owner/a b"]),
        (["a/b/c"], ["a/b/c"]),
        (["nameless"], ["'nameless' names no owner", "user/name"]),
        (["owner/x", "--create_pr", "--revision", "b"], ["--create_pr", "--revision"]),
        (["owner/x", "--base_model", "owner/y"], ["--base_model", "whole model"]),
        (["owner/x", "--privat"], ["--privat", "did you mean '--private'"]),
    ],
)
def test_what_is_asked_wrongly_is_one_line(client, unexamined, folder, fails, argv, words):
    line = fails(folder, *argv)
    assert all(word in line for word in words), line
    assert "owner/x" not in client.repos


def test_private_does_not_mean_public(client, unexamined, unloaded, folder, fails):
    push(folder, "owner/public")
    assert "is public" in fails(folder, "owner/public", "--private")


@pytest.mark.parametrize("damage", ["nowhere", "empty", "no config", "no weights", "pickle"])
def test_what_is_no_model_is_not_sent(client, unexamined, copy, fails, damage):
    if damage == "nowhere":
        shutil.rmtree(copy)
    elif damage == "empty":
        for path in copy.iterdir():
            path.unlink()
    elif damage == "no config":
        (copy / "config.json").unlink()
    else:
        (copy / "model.safetensors").unlink()
        if damage == "pickle":
            (copy / "pytorch_model.bin").write_bytes(b"x")
    line = fails(copy, "owner/none")
    assert str(copy) in line and "owner/none" not in client.repos


@pytest.mark.process
def test_the_doctor_comes_first(client, copy, fails):
    config = json.loads((copy / "config.json").read_text("utf-8"))
    config["auto_map"]["AutoModelForCausalLM"] = "someone/else--modeling.Model"
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    line = fails(copy, "owner/sick")
    assert "nothing was pushed" in line and "code" in line and "someone/else" in line
    assert f"hf-decoder doctor {copy}" in line
    assert "owner/sick" not in client.repos


def test_a_server_that_is_not_there(client, unexamined, monkeypatch, folder, fails):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    line = fails(folder, "owner/away")
    assert "http://127.0.0.1:9 cannot be reached" in line and "push again" in line


def test_a_server_without_xet_is_named_with_the_way_out(client, unexamined, monkeypatch, folder, fails):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert "HF_HUB_DISABLE_XET=1" in fails(folder, "owner/xet")


def test_a_card_that_the_server_refuses(client, unexamined, copy, fails):
    card = ModelCard.load(copy / "README.md")
    card.data.license = "no-such-licence"
    card.save(copy / "README.md")
    line = fails(copy, "owner/card")
    assert "metadata" in line and "README.md" in line and "no-such-licence" in line
    if not ASKS_THE_REAL_HUB:
        assert "the metadata of README.md is refused" in line
        assert "owner/card" not in client.repos  # before anything is sent
    else:  # by the upload, which sends it last
        assert "README.md" not in client.files("owner/card")


# ------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.process
def test_what_cannot_be_loaded_is_told(client, unexamined, copy, pushes):
    (copy / "loss_hf_decoder.py").unlink()
    code, said = pushes(copy, "owner/unloadable")
    assert code == 1 and "nothing but transformers cannot load it" in said and "loss_hf_decoder" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_push_that_is_stopped_says_how_to_go_on(client, unexamined, unloaded, folder, pushes, monkeypatch, number):
    name, upload = f"owner/stopped_by_{number.name}", HfApi.upload_folder

    def stopped(*args, **kwargs):
        monkeypatch.setattr(HfApi, "upload_folder", upload)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(HfApi, "upload_folder", stopped)
    code, said = pushes(folder, name)
    assert code == 128 + number and f"stopped by {number.name}; the same command goes on: what has arrived" in said
    assert pushes(folder, name)[0] == 0 and "model.safetensors" in client.files(name)


def test_an_upload_that_was_killed_is_made_up_for(client, unexamined, unloaded, tmp_path, tokenizer):
    """The first push is killed with one weights file stored and the next half sent; the second sends the rest."""
    folder = write_folder(tmp_path / "shards", tokenizer, max_shard_size="100KB", seed=7)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) >= 2
    known = set(client.stored)
    first, reached, over = threading.Lock(), threading.Event(), threading.Event()

    def hold(oid: str, size: int) -> None:
        if first.acquire(blocking=False):
            return
        while not set(client.stored) - known:
            time.sleep(0.01)
        reached.set()
        over.wait(60)
        raise ConnectionAbortedError

    client.before_store = hold
    huggingface_hub.utils.close_session()
    process = multiprocessing.get_context("fork").Process(target=push, args=(folder, "owner/killed"))
    process.start()
    assert reached.wait(60)
    process.kill()
    process.join()
    over.set()
    client.before_store = lambda oid, size: None
    arrived = set(client.stored) - known
    assert len(arrived) >= 1 and "README.md" not in client.files("owner/killed")
    sent_before = len(client.asked("PUT /lfs/"))
    push(folder, "owner/killed")
    again = {line.rpartition("/")[2] for line in client.asked("PUT /lfs/")[sent_before:]}
    assert again and not again & arrived
    files = client.files("owner/killed")
    assert all(files[path.name] == path.read_bytes() for path in shards)
