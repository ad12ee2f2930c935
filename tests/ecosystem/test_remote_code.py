"""A saved folder is a whole model: it loads, runs, trains, pipes and saves again where this package does not exist."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers import logging as transformers_logging
from transformers.dynamic_module_utils import get_imports

import hf_decoder
from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM

MODEL_CLASSES = {
    "AutoModel": "HfDecoderModel",
    "AutoModelForCausalLM": "HfDecoderForCausalLM",
    "AutoModelForSequenceClassification": "HfDecoderForSequenceClassification",
    "AutoModelForTokenClassification": "HfDecoderForTokenClassification",
    "AutoModelForQuestionAnswering": "HfDecoderForQuestionAnswering",
}
AUTO_MAP = {"AutoConfig": "configuration_hf_decoder.HfDecoderConfig"} | {
    auto_class: f"modeling_hf_decoder.{name}" for auto_class, name in MODEL_CLASSES.items()
}
IDS = torch.tensor([[7, 21, 3, 40, 5, 77, 12]])


def tiny_config(**overrides):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"vocab_size": 300, "pad_token_id": 1, "eos_token_id": 0, "initializer_range": 0.2, "qk_norm": True}
    return HfDecoderConfig(**shape | overrides)


def check_folder(folder: Path) -> None:
    """Checks that the auto_map is complete and names exactly the code files of the folder."""
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    package = Path(hf_decoder.__file__).parent / "model"
    files = {file.name for file in package.glob("*.py")} - {"__init__.py"}
    assert {file.name for file in folder.glob("*.py")} == files
    for name in files:
        assert (folder / name).read_text() == (package / name).read_text()


def outputs(model) -> list[torch.Tensor]:
    with torch.no_grad():
        result = model.eval()(IDS, use_cache=False).to_tuple()
    return [tensor for tensor in result if isinstance(tensor, torch.Tensor)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    """A folder for each class and a Trainer's checkpoint, with what the models said and generated before saving."""
    root = tmp_path_factory.mktemp("saved")
    expected = {}
    for auto_class, name in MODEL_CLASSES.items():
        torch.manual_seed(0)
        model = getattr(hf_decoder, name)(tiny_config(num_labels=3))
        model.save_pretrained(root / auto_class)
        expected[auto_class] = outputs(model)
        if auto_class == "AutoModelForCausalLM":
            tokenizer.save_pretrained(root / auto_class)
            expected["generated"] = model.generate(IDS, max_new_tokens=8, do_sample=False)
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    model = HfDecoderForCausalLM(tiny_config(tie_word_embeddings=False))
    args = TrainingArguments(
        root / "run", max_steps=1, save_steps=1, learning_rate=0.1, report_to="none", use_cpu=True, disable_tqdm=True
    )
    Trainer(model, args, train_dataset=rows, processing_class=tokenizer).train()
    expected["checkpoint"] = outputs(model)
    torch.save(expected, root / "expected.pt")
    return root


def test_folders_hold_all_code_and_the_whole_auto_map(saved):
    for folder in [*MODEL_CLASSES, "run/checkpoint-1"]:
        check_folder(saved / folder)


def test_code_needs_only_torch_and_transformers(saved):
    for file in (saved / "AutoModel").glob("*.py"):
        # transformers' own reading of what a folder of remote code asks its receiver to install
        required = {name for name in get_imports(file) if name not in sys.stdlib_module_names}
        assert required <= {"torch", "transformers", "huggingface_hub"}, file.name


# What both processes run: loads every folder under `root` and compares it with the outputs of the first process.
LOAD_AND_COMPARE = """
import json, logging, os, sys
import torch, transformers
from transformers import AutoConfig, AutoTokenizer

root = sys.argv[1]
expected = torch.load(os.path.join(root, "expected.pt"))
warnings = []

class Collect(logging.Handler):
    def emit(self, record):
        warnings.append(record.getMessage())

transformers.logging.get_logger().addHandler(Collect(logging.WARNING))
ids = torch.tensor({ids})

def load(auto_class, folder, **kwargs):
    path = os.path.join(sys.argv[2], folder)
    model, info = getattr(transformers, auto_class).from_pretrained(
        path, trust_remote_code=True, output_loading_info=True, **kwargs
    )
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    return model.eval(), info

models = {{}}
for folder in [{folders}]:
    auto_class = folder if folder.startswith("Auto") else "AutoModelForCausalLM"
    model, info = load(auto_class, folder)
    assert not any(info.values()), info
    with torch.no_grad():
        said = [x for x in model(ids, use_cache=False).to_tuple() if isinstance(x, torch.Tensor)]
    key = folder if folder in expected else "checkpoint"
    assert len(said) == len(expected[key])
    assert all(torch.equal(a, b) for a, b in zip(said, expected[key])), folder
    models[folder] = model
lm = models["AutoModelForCausalLM"]
assert torch.equal(lm.generate(ids, max_new_tokens=8, do_sample=False), expected["generated"])
assert lm.lm_head.weight is lm.model.embed_tokens.weight
assert "hf_decoder" not in sys.modules
assert not warnings, warnings
"""


def load_and_compare(folders) -> str:
    return LOAD_AND_COMPARE.format(ids=IDS.tolist(), folders=", ".join(map(repr, folders)))


@pytest.mark.process
def test_round_trip_where_the_package_is_not_installed(saved, run_python, tmp_path):
    second = load_and_compare([*MODEL_CLASSES, "run/checkpoint-1"]) + (
        """
# the tokenizer is a stock class: it runs no remote code of its own, though AutoTokenizer also reads the config
tokenizer = AutoTokenizer.from_pretrained(os.path.join(root, "AutoModelForCausalLM"), trust_remote_code=True)
assert type(tokenizer).__module__.startswith("transformers.") and not warnings

# new heads on the causal model's body
for auto_class in ("AutoModelForSequenceClassification", "AutoModelForTokenClassification"):
    model, info = load(auto_class, "AutoModelForCausalLM", num_labels=5)
    assert set(info["missing_keys"]) <= {"score.weight", "score.bias"} and not info["mismatched_keys"], info
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, lm.model.layers[1].mlp.up_proj.weight)
    assert model(ids).logits.shape[-1] == 5
model, _ = load("AutoModel", "AutoModelForCausalLM")
assert torch.equal(model.norm.weight, lm.model.norm.weight)

# a config alone builds each model
config = AutoConfig.from_pretrained(os.path.join(root, "AutoModel"), trust_remote_code=True)
for auto_class in config.auto_map:
    if auto_class != "AutoConfig":
        built = getattr(transformers, auto_class).from_config(config, trust_remote_code=True)
        assert type(built).__name__ == config.auto_map[auto_class].split(".")[1]

# pipelines, which ask tables of names
warnings.clear()
said = transformers.pipeline("text-generation", model=lm, tokenizer=tokenizer)(
    "def main(", max_new_tokens=8, do_sample=False, return_full_text=True
)[0]["generated_text"]
text_ids = tokenizer("def main(", return_tensors="pt")
mine = lm.generate(**text_ids, max_new_tokens=8, do_sample=False)
assert said == tokenizer.decode(mine[0], skip_special_tokens=True), said
classifier = models["AutoModelForSequenceClassification"]
assert len(transformers.pipeline("text-classification", model=classifier, tokenizer=tokenizer)("def")) == 1
assert not any("not supported" in line for line in warnings), warnings

# adapters; PEFT's default targets are known where the package is installed
import peft
config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj", "v_proj"])
tuned = peft.get_peft_model(lm, config).eval()
assert tuned.targeted_module_names == [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"]
assert not torch.equal(tuned(ids).logits, expected["AutoModelForCausalLM"][0])
tuned.save_pretrained("adapter")
again, _ = load("AutoModelForCausalLM", "AutoModelForCausalLM")
again = peft.PeftModel.from_pretrained(again, "adapter").eval()
assert torch.equal(tuned(ids).logits, again(ids).logits)
said = transformers.pipeline("text-generation", model=tuned, tokenizer=tokenizer)("def", max_new_tokens=2)
assert not any("not supported" in line for line in warnings), warnings

# the folders of the next process
for folder, model in models.items():
    if folder != "AutoModelForCausalLM":  # LoRA has gone into that one
        model.save_pretrained(os.path.join(sys.argv[3], folder))
lm, _ = load("AutoModelForCausalLM", "AutoModelForCausalLM")
lm.save_pretrained(os.path.join(sys.argv[3], "AutoModelForCausalLM"))
"""
    )
    again = tmp_path / "again"
    run_python(second, saved, saved, again, hide=("hf_decoder",))
    folders = [*MODEL_CLASSES, "run/checkpoint-1"]
    for folder in folders:
        check_folder(again / folder)
    run_python(load_and_compare(folders), saved, again, hide=("hf_decoder",))


@pytest.mark.process
def test_package_and_remote_code_in_one_process(saved, run_python):
    # The remote copy first, then the package, with PEFT's tables filled before both.
    run_python(
        """
        import importlib, os, sys
        import peft, torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.models.auto import modeling_auto

        folder = os.path.join(sys.argv[1], "AutoModelForCausalLM")
        ids = torch.arange(9)[None]
        remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert type(remote).__module__.startswith("transformers_modules.")
        expected = remote(ids).logits

        import hf_decoder
        assert "hf_decoder" in peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        importlib.reload(hf_decoder)
        importlib.reload(sys.modules["hf_decoder.registration"])
        finders = [f for f in sys.meta_path if type(f).__name__ == "_Awaiting"]
        assert not finders
        for trust in (None, True):
            local = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
            assert type(local) is hf_decoder.HfDecoderForCausalLM
            assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)) is hf_decoder.HfDecoderConfig
            assert torch.equal(local(ids).logits, expected)
        # the copy lives on, and each saves its own code
        rebuilt = AutoModelForCausalLM.from_config(remote.config, trust_remote_code=True)
        assert type(rebuilt) is type(remote)
        assert torch.equal(remote(ids).logits, expected)
        for name, model in (("remote", remote), ("local", local)):
            model.save_pretrained(name)
            assert type(AutoModelForCausalLM.from_pretrained(name)) is hf_decoder.HfDecoderForCausalLM
        assert peft.get_peft_model(remote, peft.LoraConfig()).targeted_module_names
        assert peft.get_peft_model(local, peft.LoraConfig()).targeted_module_names
        assert list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()).count("HfDecoderForCausalLM") == 1
        """,
        saved,
    )


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
def test_the_installed_package_wins_and_says_nothing(saved, trust_remote_code, caplog, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("asked for trust, or ran remote code")

    monkeypatch.setattr("builtins.input", refuse)
    monkeypatch.setattr("transformers.models.auto.auto_factory.get_class_from_dynamic_module", refuse)
    monkeypatch.setattr("transformers.models.auto.configuration_auto.get_class_from_dynamic_module", refuse)
    monkeypatch.setattr(transformers_logging.get_logger("transformers"), "propagate", True)
    kwargs = {} if trust_remote_code is None else {"trust_remote_code": trust_remote_code}
    with caplog.at_level("WARNING", logger="transformers"):
        model = AutoModelForCausalLM.from_pretrained(saved / "AutoModelForCausalLM", **kwargs)
    assert type(model) is HfDecoderForCausalLM
    assert not caplog.records


def test_a_stale_auto_map_is_replaced(tmp_path):
    # transformers writes "repo--module.Class" into configs that came from the Hub.
    model = HfDecoderForCausalLM(tiny_config())
    model.config.auto_map = {"AutoModelForCausalLM": "someone/else--modeling_old.Old", "AutoModelForMaskedLM": "x.Y"}
    model.save_pretrained(tmp_path)
    check_folder(tmp_path)


@pytest.mark.process
def test_a_model_sharded_by_fsdp2_saves_its_own_code(run_python, tmp_path):
    run_python(
        """
        import sys, torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM

        dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=0, world_size=1)
        config = HfDecoderConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                 num_key_value_heads=1)
        model = HfDecoderForCausalLM(config)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert type(model).__name__ == "FSDPHfDecoderForCausalLM"
        state_dict = {name: value.full_tensor() for name, value in model.state_dict().items()}
        model.save_pretrained(sys.argv[1], state_dict=state_dict)
        dist.destroy_process_group()
        """,
        tmp_path / "sharded",
        tmp_path / "store",
    )
    check_folder(tmp_path / "sharded")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")) is HfDecoderForCausalLM
