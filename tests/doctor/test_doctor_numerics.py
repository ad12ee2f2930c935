"""Each way of computing wrong is caught, by the row that is there for it."""

import pytest
from patients import ROWS, examine, of, patient, randomise, save, shape

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


@pytest.mark.parametrize("name", ["ours", "llama", "qwen3", "patient"])
def test_healthy_checkpoints_pass(name, healthy):
    rows = examine(healthy[name])
    assert of("fail", rows) == {}
    expected = (
        set() if name == "ours" else LLAMA_WARNINGS | ({"export", "lora", "backends"} if name == "patient" else set())
    )
    assert set(of("warn", rows)) == expected
    assert set(rows) == set(ROWS) and of("skip", rows) == {}


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
    from transformers import AutoConfig, AutoModelForCausalLM

    fields, skipped = OTHERS[model_type]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**shape(tokenizer), **fields}))
    names = ("load", "causal", "padding", "packing", "attention", "loss", "dynamic_cache", "generate", "rope", "tied")
    rows = examine(save(randomise(model), tokenizer, tmp_path / model_type), names)
    if model._supports_sdpa:  # as Gemma 2 of transformers 5.17 says of itself
        skipped = skipped - {"attention"}
    assert of("fail", rows) == {}
    assert set(of("skip", rows)) == skipped and set(of("warn", rows)) <= {"packing"}


def test_overflow_in_fp16_is_no_fault_of_the_padding(tokenizer, tmp_path):
    rows = examine(patient(tokenizer, tmp_path / "model", "overflow"))
    assert of("fail", rows) == {}
    assert "overflows in float16" in rows["half"].detail


def test_a_model_without_context_proves_nothing(tokenizer, tmp_path):
    rows = examine(patient(tokenizer, tmp_path / "model", "context"))
    assert {"causal", "padding", "packing", "dynamic_cache"} <= set(of("warn", rows))
    assert "not proven" in rows["packing"].detail


def test_casting_llama_rounds_its_angles_and_ours_not(healthy):
    """Warned of where it is so: the angles after .to(bfloat16), against the definition, by hand."""
    import torch
    from transformers import AutoModelForCausalLM

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
