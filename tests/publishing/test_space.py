"""`hf-decoder push --space` against a Hub on 127.0.0.1: three files, pinned, that answer as the model does."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
import yaml
from loopback import Repo
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from hf_decoder.cli.main import main
from hf_decoder.publishing import push as hub_module

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'hf-decoder[demo]'")

# What a Space does with app.py, but for the page that it then serves.
VISITOR = """
import json, runpy, sys
app = runpy.run_path(sys.argv[1])
answer = app["load"]()
app["build"](answer)
history = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": "ho"}]
answers = [list(answer("def main(", []))[-1], list(answer("def main(", history))[-1]]
with open("answers.json", "w") as file:
    json.dump(answers, file)
"""


@pytest.fixture
def unexamined(monkeypatch):
    """Without the doctor and the receiver of the model, which `test_push.py` looks at."""
    for step in ("_examine", "_receive"):
        monkeypatch.setattr(hub_module, step, lambda *args: None)


@pytest.mark.process
def test_a_space_answers_as_the_model_does(client, hub_env, unexamined, folder, capsys, tmp_path):
    assert main(["push", str(folder), "--space", "owner/talk", "--private"]) == 0
    said = capsys.readouterr().out
    assert f"{client.endpoint}/spaces/owner/talk" in said and "HF_TOKEN" in said
    model, space = client.repos["owner/talk"], client.repos["owner/talk@space"]
    assert model.private and space.private
    files = client.files("owner/talk@space")
    assert set(files) == {"app.py", "requirements.txt", "README.md", ".gitattributes"}
    commit = model.refs["main"]
    assert f"'owner/talk', '{commit}', True" in files["app.py"].decode()
    assert b"hf_owner" not in b"".join(files.values())
    pins = dict(line.split("==") for line in files["requirements.txt"].decode().splitlines())
    assert pins == {name: version(name).partition("+")[0] for name in ("gradio", "transformers", "torch")}
    head = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert (head["sdk"], head["sdk_version"], head["app_file"]) == ("gradio", pins["gradio"], "app.py")
    assert head["models"] == ["owner/talk"] and head["python_version"] == sys.version[:4]

    (tmp_path / "app.py").write_bytes(files["app.py"])
    environment = {**hub_env, "HF_HOME": str(tmp_path / "home")}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", VISITOR, str(tmp_path / "app.py")],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "custom code" not in done.stdout + done.stderr  # a question that nobody answers there
    tokenizer, torch_model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    turns = [{"role": "user", "content": "def main("}]
    before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "ho"}]
    expected = []
    for chat in (turns, before + turns):
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = torch_model.generate(**inputs, max_length=128)[0, inputs["input_ids"].shape[1] :]
        expected.append(tokenizer.decode(out, skip_special_tokens=True))
    assert json.loads((tmp_path / "answers.json").read_text()) == expected
    assert len(expected[0]) > 3


def test_what_cannot_be_a_space_is_refused_before_anything_is_sent(client, tmp_path, folder, capsys, monkeypatch):
    LlamaForSequenceClassification(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path / "classifier")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    before = len(client.requests)
    for argv, words in (
        ([tmp_path / "classifier", "--space", "owner/x"], "ForSequenceClassification"),
        ([tmp_path / "adapter", "--space", "owner/x"], "merge it with its base first"),
        ([folder, "--space", "owner"], "names no owner"),
        ([folder], "--space user/name"),
    ):
        assert main(["push", *map(str, argv)]) == 2
        assert words in capsys.readouterr().err
    assert len(client.requests) == before


def test_a_public_space_is_not_taken_for_a_private_one(client, unexamined, folder, capsys):
    client.repos["owner/open@space"] = Repo(private=False)
    client.repos["owner/open@space"].commit("main", {"app.py": b"old"}, "public")
    assert main(["push", str(folder), "--space", "owner/open", "--private"]) == 2
    assert "Space owner/open exists and is public" in capsys.readouterr().err
    assert "owner/open" not in client.repos and set(client.files("owner/open@space")) == {"app.py"}


def test_a_page_that_does_not_answer_is_not_sent(client, unexamined, folder, capsys, monkeypatch, tmp_path):
    app = tmp_path / "app.py"
    app.write_text("MODEL, REVISION, X = 1, 2, 3\nraise SystemExit('no such gradio')\n")
    monkeypatch.setattr("hf_decoder.publishing.space.APP", app)
    assert main(["push", str(folder), "--space", "owner/broken"]) == 1
    assert "no such gradio" in capsys.readouterr().err
    assert "owner/broken" in client.repos and "owner/broken@space" not in client.repos
