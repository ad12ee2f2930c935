"""`import hf_decoder` registers the Auto classes and the tables of names, and nothing else."""

import importlib
import importlib.util
import json
import re
import sys

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto import modeling_auto

import hf_decoder
from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM, moved
from hf_decoder.registration import once_imported

HEADS = {
    AutoModel: "HfDecoderModel",
    AutoModelForCausalLM: "HfDecoderForCausalLM",
    AutoModelForSequenceClassification: "HfDecoderForSequenceClassification",
    AutoModelForTokenClassification: "HfDecoderForTokenClassification",
    AutoModelForQuestionAnswering: "HfDecoderForQuestionAnswering",
}


def tiny_config(**overrides):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return HfDecoderConfig(**{"vocab_size": 300, "pad_token_id": 1, "eos_token_id": 0} | shape | overrides)


@pytest.mark.parametrize("auto_class", HEADS, ids=lambda auto_class: auto_class.__name__)
def test_auto_class_from_config_and_from_folder(auto_class, tmp_path):
    torch.manual_seed(0)
    model = auto_class.from_config(tiny_config()).eval()
    assert type(model) is getattr(hf_decoder, HEADS[auto_class])
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is HfDecoderConfig
    assert config.to_dict() == model.config.to_dict() | {"_name_or_path": config._name_or_path}
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    ids = torch.arange(2, 14)[None]
    for ours, theirs in zip(loaded(ids).to_tuple(), model(ids).to_tuple(), strict=True):
        if isinstance(ours, torch.Tensor):
            assert torch.equal(ours, theirs)


def test_what_from_pretrained_builds_and_fills_is_what_the_constructor_makes(tmp_path):
    """Linear maps of torch's own class; what no file holds is initialized as transformers initializes it."""
    config = tiny_config(tie_word_embeddings=False, initializer_range=0.5)
    model = HfDecoderForCausalLM(config)
    with torch.device("meta"):
        empty = HfDecoderForCausalLM(config)
    assert [type(module) for module in empty.modules()] == [type(module) for module in model.modules()]
    assert str(empty) == str(model)
    model.model.save_pretrained(tmp_path)  # without the head
    loaded = HfDecoderForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.lm_head) is torch.nn.Linear
    assert loaded.lm_head.weight.std().item() == pytest.approx(0.5, rel=0.1)
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)


def test_config_by_model_type():
    config = AutoConfig.for_model("hf_decoder", hidden_size=48, num_attention_heads=3, num_key_value_heads=1)
    assert type(config) is HfDecoderConfig and config.hidden_size == 48


def test_tokenizer_of_a_checkpoint_folder(tokenizer, tmp_path):
    # The tokenizer is a stock class that names itself in tokenizer_config.json: nothing is registered for our config.
    HfDecoderForCausalLM(tiny_config()).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "def main(argv):\n\treturn 'é'"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert HfDecoderConfig not in transformers.TOKENIZER_MAPPING


def test_tables_of_names():
    tables = {
        "MODEL_MAPPING_NAMES": "HfDecoderModel",
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "HfDecoderForCausalLM",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "HfDecoderForSequenceClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "HfDecoderForTokenClassification",
        "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "HfDecoderForQuestionAnswering",
    }
    for table, name in tables.items():
        assert getattr(modeling_auto, table)["hf_decoder"] == name


def test_names_without_a_module_of_transformers_break_no_lookup():
    # The tables of classes are built lazily from those names and would import `transformers.models.hf_decoder`.
    for mapping in ("MODEL_MAPPING", "MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"):
        mapping = getattr(transformers, mapping)
        assert mapping[HfDecoderConfig].__module__.startswith("hf_decoder.")
        assert transformers.LlamaConfig in mapping and transformers.BertConfig in mapping


def test_transformers_serve_knows_the_modality():
    manager = pytest.importorskip("transformers.cli.serving.model_manager", exc_type=ImportError)
    from transformers.cli.serving.utils import Modality

    assert manager.ModelManager.get_model_modality(HfDecoderForCausalLM(tiny_config())) == Modality.LLM


@pytest.mark.parametrize("accumulation", [1, 2])
def test_label_smoothing_shifts_the_labels(accumulation, tmp_path):
    torch.manual_seed(0)
    epsilon, num_rows, length = 0.1, 4, 9
    model = HfDecoderForCausalLM(tiny_config(initializer_range=0.2))
    ids = torch.randint(2, 300, (num_rows, length))
    labels = ids.clone()
    labels[0, 5:] = -100
    with torch.no_grad():
        log_probs = model.eval()(input_ids=ids).logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    losses = [
        -(1 - epsilon) * log_probs[row, place, targets[row, place]] - epsilon * log_probs[row, place].mean()
        for row, place in (targets != -100).nonzero().tolist()
    ]
    args = TrainingArguments(
        tmp_path,
        label_smoothing_factor=epsilon,
        per_device_train_batch_size=num_rows // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.0,
        max_steps=1,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
    )
    rows = [{"input_ids": ids[row], "labels": labels[row]} for row in range(num_rows)]
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(torch.stack(losses).mean().item(), abs=1e-4)


def test_registering_again_is_harmless():
    before = {table: dict(getattr(modeling_auto, table)) for table in dir(modeling_auto) if table.endswith("_NAMES")}
    finders = list(sys.meta_path)
    importlib.import_module("hf_decoder.registration").register()
    importlib.reload(hf_decoder)
    assert before == {table: dict(getattr(modeling_auto, table)) for table in before}
    assert sys.meta_path == finders
    assert type(AutoModelForCausalLM.from_config(tiny_config())) is HfDecoderForCausalLM


@pytest.mark.peers
def test_import_is_light_and_needs_no_optional_package(run_python):
    run_python(
        """
        import torch, transformers
        from transformers.models.llama.modeling_llama import LlamaForCausalLM
        before = set(sys.modules)
        import hf_decoder
        assert {name.partition(".")[0] for name in set(sys.modules) - before} <= {"hf_decoder"}
        hf_decoder.HfDecoderForCausalLM
        new = {name.partition(".")[0] for name in set(sys.modules) - before} - {"hf_decoder"}
        heavy = {"peft", "datasets", "matplotlib", "accelerate", "pandas", "pyarrow", "tensorboard", "wandb", "triton"}
        assert not heavy & {name.partition(".")[0] for name in sys.modules if name not in before}, new
        added = sorted(name for name in set(sys.modules) - before if not name.startswith("hf_decoder"))
        assert len(added) < 40, added

        # PEFT comes later, and finds its tables complete
        assert not any(name.partition(".")[0] == "peft" for name in sys.modules)
        import peft
        from peft.utils import constants
        from peft.tuners.lora import model as lora
        tables = {k: v for k, v in vars(constants).items() if k.startswith("TRANSFORMERS_MODELS_TO_")}
        with_llama = {k for k, v in tables.items() if "llama" in v}
        assert len(with_llama) > 20
        assert all(tables[k]["hf_decoder"] == tables[k]["llama"] for k in with_llama)
        assert all("hf_decoder" not in v for k, v in tables.items() if k not in with_llama)
        assert "hf_decoder" in lora.LoraModel.target_module_mapping
        assert not any(type(finder).__name__ == "_Awaiting" for finder in sys.meta_path)
        """
    )


@pytest.mark.peers
def test_import_needs_neither_torch_nor_transformers(run_python):
    """So `hf-decoder --help` answers at once."""
    run_python(
        """
        from hf_decoder.cli.main import main
        import hf_decoder
        assert main(["--help"]) == 0 and main(["no-such-verb"]) == 2
        assert set(hf_decoder.__all__) <= set(dir(hf_decoder))
        loaded = {name.partition(".")[0] for name in sys.modules}
        assert not loaded & {"torch", "transformers", "huggingface_hub", "numpy"}, loaded

        from hf_decoder import *
        assert HfDecoderForCausalLM is hf_decoder.HfDecoderForCausalLM and "torch" in sys.modules
        assert HfDecoderForCausalLM.config_class is HfDecoderConfig
        try:
            hf_decoder.HfDecoder
        except AttributeError as error:
            assert "no attribute 'HfDecoder'" in str(error)
        else:
            raise AssertionError
        """
    )


FIRST_IMPORTS = {
    "package": "import hf_decoder",
    "config": "from transformers import AutoConfig; import hf_decoder",
    "models": "from transformers import AutoModelForCausalLM; import hf_decoder",
    "class": "from hf_decoder.model.modeling_hf_decoder import HfDecoderForCausalLM; import hf_decoder",
    "between": "from transformers import AutoConfig; import hf_decoder; from transformers import AutoModel",
}


@pytest.mark.peers
@pytest.mark.parametrize("first", FIRST_IMPORTS.values(), ids=FIRST_IMPORTS)
def test_tables_are_complete_whatever_is_imported_first(first, tmp_path, run_python):
    HfDecoderForCausalLM(tiny_config()).save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    del config["auto_map"]  # nothing but the registration can find the classes then
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    run_python(
        """
        exec(sys.argv[2])
        assert ("hf_decoder.model.modeling_hf_decoder" in sys.modules) == ("HfDecoderFor" in sys.argv[2])
        import hf_decoder
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
        from transformers.models.auto import modeling_auto
        config = AutoConfig.from_pretrained(sys.argv[1])
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        assert type(config) is hf_decoder.HfDecoderConfig and type(model) is hf_decoder.HfDecoderForCausalLM
        assert modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["hf_decoder"] == "HfDecoderForCausalLM"
        assert not any(type(finder).__name__ == "_Awaiting" and finder.name.startswith("transformers")
                       for finder in sys.meta_path)
        """,
        tmp_path / "saved",
        first,
    )


def test_the_tables_of_classes_hold_classes():
    """However they are read, for example by pipelines."""
    for auto_class, name in HEADS.items():
        table, model_class = auto_class._model_mapping, getattr(hf_decoder, name)
        entries = table._extra_content
        assert table[HfDecoderConfig] is table.get(HfDecoderConfig, None) is model_class
        assert HfDecoderConfig in table and HfDecoderConfig in list(entries)
        assert model_class in list(entries.values()) and (HfDecoderConfig, model_class) in list(entries.items())


@pytest.fixture
def unknown_module(tmp_path, monkeypatch):
    """A module that can be imported, and has not been; the first time it fails."""
    code = (
        "import builtins\nvalue = 1\nif not hasattr(builtins, 'hf_decoder_again'):\n    raise RuntimeError('once')\n"
    )
    (tmp_path / "unknown_of_hf_decoder.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "unknown_of_hf_decoder"
    sys.modules.pop("unknown_of_hf_decoder", None)


def test_a_module_is_completed_once_by_each_who_waits(unknown_module, monkeypatch):
    before, seen = list(sys.meta_path), []

    def first(module):
        seen.append(("first", module.value))

    def second(module):
        seen.append(("second", module.value))

    for complete in (first, second, first):
        once_imported(unknown_module, complete)
    assert len(sys.meta_path) == len(before) + 2
    assert importlib.util.find_spec(unknown_module) is not None and not seen  # somebody asks whether it is there
    with pytest.raises(RuntimeError, match="once"):
        importlib.import_module(unknown_module)
    assert not seen
    monkeypatch.setattr("builtins.hf_decoder_again", True, raising=False)
    module = importlib.import_module(unknown_module)
    assert sorted(seen) == [("first", 1), ("second", 1)]
    assert sys.meta_path == before
    once_imported(unknown_module, first)  # now at once
    assert len(seen) == 3 and importlib.import_module(unknown_module) is module


@pytest.mark.peers
def test_works_without_optional_packages(run_python):
    run_python(
        """
        import hf_decoder, torch, transformers
        from transformers.utils import is_datasets_available, is_peft_available
        assert not is_peft_available() and not is_datasets_available()
        config = hf_decoder.HfDecoderConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
        )
        model = transformers.AutoModelForCausalLM.from_config(config)
        model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        model.save_pretrained("saved")
        model = transformers.AutoModelForCausalLM.from_pretrained("saved")
        assert model.generate(torch.arange(8)[None], max_new_tokens=3, do_sample=False).shape == (1, 11)
        """,
        hide=("peft", "datasets", "matplotlib"),
    )


OLD_PATHS = {
    "import hf_decoder.recipe": "hf_decoder.recipe is now hf_decoder.training.optimizers",
    "from hf_decoder.corpus import load_text": "hf_decoder.corpus is now hf_decoder.data.documents",
    "from hf_decoder.training import plot_loss_curve": (
        "hf_decoder.training.plot_loss_curve is now hf_decoder.training.callbacks.plot_loss_curve"
    ),
    "from hf_decoder.evaluation import perplexity": (
        "hf_decoder.evaluation.perplexity is now hf_decoder.evaluation.metrics.perplexity"
    ),
}


@pytest.mark.parametrize("statement", OLD_PATHS)
def test_an_old_import_path_names_the_new_one(statement: str):
    with pytest.raises(ImportError, match=re.escape(OLD_PATHS[statement])):
        exec(statement)


def test_every_moved_module_is_where_its_error_says():
    for name, path in moved.MOVED.items():
        assert importlib.util.find_spec(f"hf_decoder.{path}"), name
    with pytest.raises(ImportError, match="cannot import name"):
        exec("from hf_decoder.training import nothing_of_that_name")
