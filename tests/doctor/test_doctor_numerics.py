"""Each way of computing wrong is caught, by the row that is there for it."""

import pytest
import torch
from patients import PROCESS_ROWS, ROWS, copy, examine, of, patient, randomise, save, shape
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.doctor.numerics import judge
from hf_decoder.doctor.subject import Subject
from hf_decoder.interop import quantization

# defect -> rows that fail; a defect that reaches into several computations is caught by several
CAUGHT = {
    "future": {"causal", "packing", "dynamic_cache", "static_cache", "generate"},
    "batch": {"batching", "padding", "attention", "generate"},
    "padding": {"padding", "generate"},
    "packing": {"packing"},
    "eager": {"attention"},
    "shift": {"loss"},
    "dynamic": {"dynamic_cache", "generate"},
    "static": {"static_cache"},
    "penalty": {"generate"},
    "nan": {"half"},
    "rope": {"rope"},
    "merge": {"lora"},
}
# what stock Llama, whose class the patient extends, is warned of too
LLAMA_WARNINGS = {"packing", "rope_cast"}


@pytest.mark.process
@pytest.mark.parametrize("name", ["ours", "llama", "qwen3", "patient"])
def test_healthy_checkpoints_pass(name, healthy):
    rows = examine(healthy[name])
    assert of("fail", rows) == {}
    expected = (
        set() if name == "ours" else LLAMA_WARNINGS | ({"export", "lora", "backends"} if name == "patient" else set())
    )
    assert set(of("warn", rows)) == expected
    assert set(rows) == set(ROWS) and of("skip", rows) == {}


@pytest.mark.process
@pytest.mark.parametrize("defect", CAUGHT)
def test_a_defect_is_caught(defect, tokenizer, tmp_path):
    rows = examine(patient(tokenizer, tmp_path / "model", defect))
    assert set(of("fail", rows)) == CAUGHT[defect]
    for name in CAUGHT[defect]:
        assert rows[name].means and rows[name].remedy


# families that differ from Llama in what the doctor measures -> what marks them, rows that are skipped
OTHERS = {
    "gpt2": ({"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128}, {"rope"}),  # learned positions
    "gpt_neox": ({}, set()),  # a part of each head rotates
    "cohere": ({}, set()),  # rotates neighbours, not halves
    "gemma2": (
        {"head_dim": 16, "sliding_window": 20, "attn_logit_softcapping": None},
        {"attention"},
    ),  # eager only, layers with a window
    "bloom": ({"n_layer": 2, "n_head": 4}, {"rope", "attention"}),  # ALiBi: no positions, cannot pack
    "opt": ({"ffn_dim": 80, "word_embed_proj_dim": 48}, {"rope"}),  # dropout in training mode
}


@pytest.mark.parametrize("model_type", OTHERS)
def test_no_false_alarm_about_other_families(model_type, tokenizer, tmp_path):
    fields, skipped = OTHERS[model_type]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**shape(tokenizer), **fields}))
    names = ("load", "causal", "padding", "packing", "attention", "loss", "dynamic_cache", "generate", "rope", "tied")
    rows = examine(save(randomise(model), tokenizer, tmp_path / model_type), names)
    if model._supports_sdpa:  # as Gemma 2 of transformers 5.17 says of itself
        skipped = skipped - {"attention"}
    assert of("fail", rows) == {}
    assert set(of("skip", rows)) == skipped and set(of("warn", rows)) <= {"packing"}


def test_weights_that_give_no_numbers_are_no_fault_of_the_class(healthy, tmp_path):
    """The rows that say so say so; those that would compare logits are skipped."""
    folder = copy(healthy["ours"], tmp_path / "ours")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][1, 2] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rows = examine(folder)
    assert set(of("fail", rows)) == {"weights", "load", "half"}
    assert rows["load"].detail == "the logits are not finite"
    skipped = of("skip", rows)
    assert {"causal", "padding", "packing", "loss", "generate", "generation_config", "lora"} <= set(skipped)
    assert all("not finite" in rows[name].detail for name in skipped)
    # finite, and all of them 0: nothing is proven, and nothing contradicts itself
    tensors["model.layers.0.mlp.up_proj.weight"][1, 2] = 0
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor.zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rows = examine(folder, ("load", "causal", "padding", "generate"))
    assert of("fail", rows) == {}
    assert "not proven" in rows["causal"].detail and rows["generate"].status == "pass"


@pytest.mark.process
@pytest.mark.parametrize("tokens", [4, 8, 11, 12, 13])
def test_a_short_context_is_no_fault(tokens: int, tokenizer, tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**{**shape(tokenizer), "max_position_embeddings": tokens}))
    rows = examine(save(randomise(model), tokenizer, tmp_path / "model"))
    assert of("fail", rows) == {}
    too_short = {"padding", "attention", "dynamic_cache", "static_cache"}
    assert too_short & set(of("skip", rows)) == (too_short if tokens < 12 else set())


@pytest.mark.process
@pytest.mark.parametrize("method", ["bitsandbytes_nf4", "bitsandbytes_int8", "torchao_int8"])
def test_the_rounding_of_quantized_products_is_no_fault(method: str, healthy, tokenizer, tmp_path):
    if not quantization.installed(method):
        pytest.skip(f"{method} is not installed")
    config = quantization.quantization_config(method)
    # without this package, bitsandbytes multiplies on a CPU with AVX512-BF16 only what 32 divides
    sizes = {**shape(tokenizer), "hidden_size": 64, "intermediate_size": 128}
    plain = HfDecoderForCausalLM(HfDecoderConfig(**sizes, qk_norm=True, tie_word_embeddings=True))
    source = save(randomise(plain), tokenizer, tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16)
    folder = copy(source, tmp_path / "quantized")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    rows = examine(folder, (*ROWS, *PROCESS_ROWS))
    assert of("fail", rows) == {}
    assert rows["reload"].status == "pass"
    # what a library rounds depends on it and on the machine; a mistake is larger, and still found
    verdicts = {gap: judge(Subject(folder), gap, "another").status for gap in (1e-5, 0.02, 0.06, float("nan"))}
    assert list(verdicts.values()) == ["pass", "warn", "fail", "fail"]
    assert judge(Subject(healthy["ours"]), 0.02, "another").status == "fail"


@pytest.mark.process
def test_overflow_in_fp16_is_no_fault_of_the_padding(tokenizer, tmp_path):
    rows = examine(patient(tokenizer, tmp_path / "model", "overflow"))
    assert of("fail", rows) == {}
    assert "overflows in float16" in rows["half"].detail


@pytest.mark.process
def test_a_model_without_context_proves_nothing(tokenizer, tmp_path):
    rows = examine(patient(tokenizer, tmp_path / "model", "context"))
    assert {"causal", "padding", "packing", "dynamic_cache"} <= set(of("warn", rows))
    assert "not proven" in rows["packing"].detail


def test_casting_llama_rounds_its_angles_and_ours_not(healthy):
    """Warned of where it is so: the angles after .to(bfloat16), against the definition, by hand."""
    for name, status in (("ours", "pass"), ("llama", "warn")):
        assert examine(healthy[name], ("rope_cast",))["rope_cast"].status == status
        model = AutoModelForCausalLM.from_pretrained(healthy[name]).to(torch.bfloat16)
        cos, _ = model.model.rotary_emb(torch.zeros(1, 1), torch.tensor([[100]]))
        exact = torch.cos(100 * 10000.0 ** -(torch.arange(0, 12, 2, dtype=torch.float64) / 12))
        assert ((cos[0, 0, :6].double() - exact).abs().max() < 1e-4) == (status == "pass")


def test_angles_of_scaled_frequencies(tokenizer, tmp_path):
    """The scalings that transformers has are followed; a class with one of its own is caught."""
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    rows = examine(patient(tokenizer, tmp_path / "yarn", "none", rope_parameters=yarn), ("rope",))
    assert rows["rope"].status == "pass" and "yarn" in rows["rope"].detail
    plain = {"rope_type": "default", "rope_theta": 700.0}
    rows = examine(patient(tokenizer, tmp_path / "fixed", "rope", rope_parameters=plain), ("rope",))
    assert rows["rope"].status == "fail" and "rope_theta=700.0" in rows["rope"].detail
