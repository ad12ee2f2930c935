"""Each way of computing wrong is caught, by the row that is there for it."""

import pytest
from patients import ROWS, examine, of, patient

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
