"""Nothing of a folder runs unless its code is the installed package's to the byte, or the caller trusts it."""

import json
import shutil

import pytest
from patients import edit_json, examine, of

from hf_decoder.safety.fresh_process import run_fresh

ROWS = ("formats", "code", "remote_code", "tokenizer")
OURS = "AutoModelForCausalLM"


def trap(folder, name, mark):
    """Code that leaves a mark where it is run; its class is the one that every attacker's config names."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"open({str(mark)!r}, 'w').close()\n" + (path.read_text() if path.is_file() else ""))


def other_map(name):
    def plan(folder, mark):
        trap(folder, name, mark)
        edit_json(folder / "config.json", auto_map={OURS: f"{name.removesuffix('.py')}.Model", "AutoConfig": "x.C"})

    return plan


def beside(name):
    return lambda folder, mark: trap(folder, name, mark)


def behind_a_link(folder, mark):
    trap(folder.parent, "elsewhere/generate.py", mark)
    (folder / "custom_generate").symlink_to(folder.parent / "elsewhere")


def other_config(folder, mark):
    trap(folder, "checkpoint-1/x.py", mark)
    shutil.copy(folder / "config.json", folder / "config.4.0.0.json")
    edit_json(folder / "config.4.0.0.json", auto_map={OURS: "checkpoint-1/x.Model"})
    edit_json(folder / "config.json", configuration_files=["config.4.0.0.json"])


def of_the_tokenizer(folder, mark):
    trap(folder, ".git/x.py", mark)
    edit_json(folder / "tokenizer_config.json", auto_map=[".git/x.T", None])


def of_a_pipeline(folder, mark):
    trap(folder, "checkpoint-1/x.py", mark)
    edit_json(folder / "config.json", custom_pipelines={"text-generation": {"impl": "checkpoint-1/x.P", "pt": []}})


def another_repository(folder, mark):
    edit_json(folder / "processor_config.json", auto_map={"AutoProcessor": "some/one--x.P"})


def nested(folder, mark):
    edit_json(folder / "config.json", vision={"auto_map": {OURS: "some/one--x.M"}})


def an_adapter_beside(folder, mark):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/one"}')


PLANS = {
    "changed model code": beside("modeling_hf_decoder.py"),
    "a script": beside("setup.py"),
    "named as a checkpoint": other_map("checkpoint-x.py"),
    "named as git's": other_map(".gitx.py"),
    "named as a cache": other_map(".cachex.py"),
    "in a checkpoint": other_map("checkpoint-5/x.py"),
    "in a folder that is none": beside("checkpoint-/x.py"),
    "in another case": beside("Checkpoint-1/x.py"),
    "another suffix": beside("tool.PY"),
    "in a hidden folder": beside(".hidden/x.py"),
    "in git's name in capitals": beside(".GIT/x.py"),
    "generate": beside("custom_generate/generate.py"),
    "compiled": beside("__pycache__/modeling_hf_decoder.cpython-311.pyc"),
    "a foreign name like ours": beside("sub/modeling_hf_decoder.py"),
    "behind a link": behind_a_link,
    "another config": other_config,
    "the tokenizer's": of_the_tokenizer,
    "a pipeline's": of_a_pipeline,
    "a processor's": another_repository,
    "nested": nested,
    "an adapter beside": an_adapter_beside,
}


@pytest.mark.parametrize("plan", PLANS)
def test_planted_code_is_found_and_not_run(plan, ours, tmp_path):
    mark = tmp_path / "it ran"
    (ours / "processor_config.json").write_text("{}")
    PLANS[plan](ours, mark)
    rows = examine(ours, ROWS)
    assert rows["code"].status == "fail", rows["code"]
    assert rows["remote_code"].status == "skip" and not mark.exists()


def test_a_stranger_s_class_is_not_run(llama, tmp_path):
    mark = tmp_path / "it ran"
    trap(llama, "modeling_x.py", mark)
    auto_map = {"AutoConfig": "modeling_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"}
    edit_json(llama / "config.json", model_type="x", auto_map=auto_map)
    edit_json(llama / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_x.XTokenizer", None]})
    rows = examine(llama, ("code", "load", "tokenizer", "padding", "generation_config"))
    assert {"code", "load"} <= set(of("fail", rows)) and rows["padding"].status == "skip"
    assert not mark.exists()


@pytest.mark.parametrize("name", ["checkpoint-x.pkl", ".gitx.pt", ".cachex/y.bin", "Weights.PKL", "__pycache__/x.pkl"])
def test_pickles_have_no_hiding_place(name, llama):
    (llama / name).parent.mkdir(exist_ok=True)
    (llama / name).write_bytes(b"x")
    row = examine(llama, ("formats",))["formats"]
    assert row.status == "fail" and name in row.detail


def test_what_is_not_looked_at_is_named(llama):
    for name in ("checkpoint-10/optimizer.pt", ".git/x.pkl"):
        (llama / name).parent.mkdir()
        (llama / name).write_bytes(b"x")
    row = examine(llama, ("formats",))["formats"]
    assert row.status == "pass" and "not examined: .git/, checkpoint-10/" in row.detail


def test_code_of_another_version_is_called_so(ours, tmp_path):
    trap(ours, "heads_hf_decoder.py", tmp_path / "it ran")
    trap(ours, "loss_hf_decoder.py", tmp_path / "it ran")
    (ours / "configuration_hf_decoder.py").unlink()
    edit_json(ours / "config.json", auto_map={OURS: "heads_hf_decoder.HfDecoderForCausalLM"})
    rows = examine(ours, ("code", "remote_code"))
    assert rows["code"].status == "fail" and "of another version or changed" in rows["code"].detail
    for words in ("differs: loss_hf_decoder.py", "not of this version: heads_hf_decoder.py", "absent: configuration_"):
        assert words in rows["code"].detail
    assert "save it again" in rows["code"].remedy
    assert rows["remote_code"].status == "skip" and not (tmp_path / "it ran").exists()


SHOW = """
import json, os, sys
from huggingface_hub import get_token
print(json.dumps({"environment": dict(os.environ), "token": get_token(), "here": os.listdir(), "said": sys.argv[1]}))
"""


@pytest.mark.parametrize("hidden", [True, False])
def test_a_child_process_gets_no_secret(hidden, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text("hf_secret")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_ID_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
    for name in (*names, "GITHUB_TOKEN", "PGPASSWORD", "HTTPS_PROXY", "DATABASE_URL", "PYTHON_KEYRING", "TORCH_TOKEN"):
        monkeypatch.setenv(name, "hf_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "show.py").write_text(SHOW)
    printed = run_fresh(tmp_path / "show.py", "word", hidden=hidden, hub_cache=tmp_path / "cache", timeout=60)
    seen = json.loads(printed)
    assert "hf_secret" not in printed and str(tmp_path / "home") not in printed
    assert seen["token"] is None and seen["here"] == [] and seen["said"] == "word"
    assert seen["environment"]["OMP_NUM_THREADS"] == "1" and seen["environment"]["HF_HUB_OFFLINE"] == "1"
    assert seen["environment"]["HF_HUB_CACHE"] == str(tmp_path / "cache")
