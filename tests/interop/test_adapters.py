"""Adapters on their base: merged, unmerged, several at once, on tied and resized embeddings; and on a wrong base."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.cli import load_classifier, load_model
from hf_decoder.data.label_names import save_label_names
from hf_decoder.interop.adapters import CLASSIFIER, LANGUAGE_MODEL, base_of, is_adapter, load_adapter, merge, task_of

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = torch.arange(3, 40)[None]


def make(tied: bool = True, **changes) -> HfDecoderForCausalLM:
    torch.manual_seed(0)
    return HfDecoderForCausalLM(HfDecoderConfig(**{**SHAPE, "tie_word_embeddings": tied, **changes})).eval()


def adapt(model, seed: int = 1, **kwargs) -> PeftModel:
    """An adapter that changes something: a fresh one does not, its B is zero."""
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **kwargs)).eval()
    randomise(adapted, seed)
    return adapted


def randomise(adapted, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    make().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("resized", [False, True], ids=["as-is", "resized"])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"use_dora": True}, {"target_modules": ["embed_tokens", "q_proj"]}, {"modules_to_save": ["lm_head"]}],
    ids=["lora", "dora", "embeddings", "trained-head"],
)
def test_merged_and_saved_is_unmerged(tmp_path, tied, resized, kwargs):
    model = make(tied)
    if resized:
        model.resize_token_embeddings(70, mean_resizing=False)
    if tied and kwargs.keys() & {"target_modules", "modules_to_save"}:
        kwargs = {**kwargs, "ensure_weight_tying": True}
    adapted = adapt(model, **kwargs)
    plain, expected = logits(make(tied)), logits(adapted)
    merge(adapted).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded.eval()), expected, rtol=1e-4, atol=1e-5)
    assert loaded.config.vocab_size == (70 if resized else 60)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert (expected[..., :60] - plain).abs().max() > 1e-3


def test_an_adapter_on_the_embedding_alone_unties_it_from_the_head(tmp_path):
    adapted = adapt(make(), target_modules=["embed_tokens"])
    expected = logits(adapted)
    merge(adapted).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight


def test_unmerging_gives_the_base_back():
    adapted = adapt(make())
    expected = logits(adapted)
    adapted.merge_adapter()
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-5)
    adapted.unmerge_adapter()
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-5)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), logits(make()), rtol=1e-4, atol=1e-5)


def test_several_adapters_on_one_base_are_told_apart_by_name(base, tmp_path):
    expected = {}
    for seed, name in enumerate(("python", "poems")):
        adapted = adapt(make(), seed=seed)
        expected[name] = logits(adapted)
        adapted.save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "python", "python").eval()
    model.load_adapter(tmp_path / "poems", "poems")
    for name in ("poems", "python", "poems"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), expected[name])
    assert (expected["python"] - expected["poems"]).abs().max() > 1e-3


def test_an_adapters_folder_is_enough_to_load_it_with_its_base(base, tmp_path):
    adapted = adapt(AutoModelForCausalLM.from_pretrained(base))
    adapted.save_pretrained(tmp_path / "adapter")
    assert is_adapter(tmp_path / "adapter") and not is_adapter(base)
    assert base_of(tmp_path / "adapter") == str(base)
    torch.testing.assert_close(logits(load_model(str(tmp_path / "adapter")).eval()), logits(adapted))
    named = load_model(str(base), adapter=str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(named), logits(adapted))


@pytest.mark.parametrize(
    "changes, difference",
    [
        ({"hidden_size": 64}, r"q_proj has in_features=64 here and 32 there"),
        ({"num_hidden_layers": 1}, r"layers\.1\..*which this model lacks"),
        ({"num_key_value_heads": 1}, r"v_proj has out_features=8 here and 16 there"),
    ],
)
def test_adapter_for_another_base_is_refused(base, tmp_path, changes, difference):
    adapt(AutoModelForCausalLM.from_pretrained(base), target_modules=["q_proj", "v_proj"]).save_pretrained(
        tmp_path / "a"
    )
    with pytest.raises(ValueError, match=difference) as error:
        load_adapter(make(**changes), str(tmp_path / "a"))
    assert str(base) in str(error.value) and "\n" not in str(error.value)


def test_damaged_adapters(base, tmp_path):
    folder = tmp_path / "adapter"
    with pytest.raises(ValueError, match=r"no adapter that PEFT can read|is damaged or cut short"):
        load_adapter(make(), str(base))
    adapt(make()).save_pretrained(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"no adapter that PEFT can read|is damaged or cut short"):
        load_adapter(make(), str(folder))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA"}), encoding="utf-8")
    with pytest.raises(ValueError, match="names no base model"):
        base_of(folder)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is damaged"):
        base_of(folder)


def test_an_adapter_of_another_name_is_loaded_with_a_warning(base, tmp_path, capsys):
    adapt(AutoModelForCausalLM.from_pretrained(base)).save_pretrained(tmp_path / "adapter")
    twin = tmp_path / "twin"
    make().save_pretrained(twin)
    load_model(str(twin), adapter=str(tmp_path / "adapter"))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert str(base) in line and str(twin) in line
    load_model(str(base), adapter=str(tmp_path / "adapter"))
    moved = tmp_path / "elsewhere" / "base"
    moved.parent.mkdir()
    base.rename(moved)  # a base that is no longer where it was
    load_model(str(moved), adapter=str(tmp_path / "adapter"))
    load_adapter(make(), str(tmp_path / "adapter"))  # a model without a name
    assert "warning" not in capsys.readouterr().err


def test_an_adapter_goes_on_the_head_it_was_trained_with(base, tmp_path):
    adapt(AutoModelForCausalLM.from_pretrained(base)).save_pretrained(tmp_path / "writer")
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    head = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", r=4))
    head.save_pretrained(tmp_path / "judge")
    with pytest.raises(ValueError, match="writer belongs to a language model, and cannot be put on a sequence"):
        load_adapter(AutoModelForSequenceClassification.from_pretrained(base), str(tmp_path / "writer"))
    with pytest.raises(ValueError, match="judge belongs to a sequence classifier, and cannot be put on a language"):
        load_adapter(make(), str(tmp_path / "judge"))
    assert task_of(str(tmp_path / "writer")) == LANGUAGE_MODEL and task_of(str(tmp_path / "judge")) == CLASSIFIER
    with pytest.raises(ValueError, match="judge is a sequence classifier, which writes no text"):
        load_model(str(tmp_path / "judge"))
    with pytest.raises(ValueError, match=r"nothing names its classes.*id2label\.json"):
        load_classifier(str(tmp_path / "judge"))
    save_label_names(tmp_path / "judge", {0: "no", 1: "yes", 2: "größer"})
    loaded = load_classifier(str(base), adapter=str(tmp_path / "judge")).eval()
    assert loaded.config.id2label == {0: "no", 1: "yes", 2: "größer"}
    assert loaded.config.label2id == {"no": 0, "yes": 1, "größer": 2}
    torch.testing.assert_close(logits(loaded), logits(head.eval()))
    (tmp_path / "judge" / "id2label.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"id2label\.json is damaged"):
        load_classifier(str(tmp_path / "judge"))
