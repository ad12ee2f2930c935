"""The conditions of vLLM's and SGLang's transformers backends: they hold, and each is noticed where it does not."""

import pytest
import torch
import transformers
from transformers import (
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM, HfDecoderModel, HfDecoderPreTrainedModel
from hf_decoder.interop.backends import SMALL, backend_conditions
from hf_decoder.model import modeling_hf_decoder
from hf_decoder.model.configuration_hf_decoder import AUTO_MAP

NAMES = [
    "auto_map",
    "is_backend_compatible",
    "arguments",
    "attention interface",
    "keyword arguments",
    "hidden states",
    "tensor parallel plan",
    "pipeline parallel plan",
    "head",
]
SHAPES = {
    "plain": {},
    "tied, one key/value head": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "QK-norm and biases": {"qk_norm": True, "attention_bias": True, "mlp_bias": True},
    "windows and NoPE": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
    | {"no_rope_layers": [1, 0]},
    "capped logits": {"final_logit_softcapping": 2.0},
    "YaRN": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}


def build(**fields) -> HfDecoderForCausalLM:
    torch.manual_seed(0)
    return HfDecoderForCausalLM(HfDecoderConfig(**{**SMALL, "initializer_range": 0.3, **fields})).eval()


def failed(model) -> dict[str, str]:
    return {condition.name: condition.why for condition in backend_conditions(model) if not condition.ok}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_conditions_hold(shape: str, dtype: torch.dtype):
    conditions = backend_conditions(build(**SHAPES[shape]).to(dtype))
    assert [condition.name for condition in conditions] == NAMES
    assert all(condition.ok for condition in conditions), conditions


@pytest.mark.parametrize("model_class", [HfDecoderForCausalLM, LlamaForCausalLM, Qwen3ForCausalLM])
def test_a_class_by_itself_holds_them_as_the_stock_classes_do(model_class):
    assert failed(model_class) == {}


# the size of a window, which these configs give without a list of layers; experts; ids that fit the small vocabulary
STOCK = {
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "mistral, window": (MistralForCausalLM, MistralConfig, {"sliding_window": 5}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {}),
    "phi3, window": (Phi3ForCausalLM, Phi3Config, {"sliding_window": 5}),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, {}),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4, "sliding_window": 5}),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {"num_experts": 4, "num_experts_per_tok": 2}),
}


def build_stock(case: str):
    torch.manual_seed(0)
    model_class, config_class, fields = STOCK[case]
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    return model_class(config_class(**{**SMALL, **ids, "initializer_range": 0.3, **fields})).eval()


@pytest.mark.parametrize("case", STOCK)
def test_stock_models_hold_them(case: str):
    """Windows for all layers, stacked matrices, outputs that are gathered, experts without a module of their own."""
    assert failed(build_stock(case)) == {}


@pytest.mark.parametrize(
    ("case", "changes", "why"),
    [
        ("phi3", {"layers.*.mlp.gate_up_proj": "colwise"}, "is colwise, and stacked; must be colwise_gather_output"),
        ("phi3", {"layers.*.self_attn.o_proj": "rowwise"}, "qkv_proj is colwise_gather_output, but layers.0"),
        ("olmo2", {"layers.*.self_attn.v_proj": "colwise"}, "v_proj is colwise, but layers.0.self_attn.o_proj is row"),
        ("olmo2", {"layers.*.self_attn.q_proj": "rowwise_rep"}, "is rowwise_split_input; must be colwise"),
        ("mixtral", {"layers.*.mlp.experts.w1": "colwise"}, "'layers.*.mlp.experts.w1' matches no module"),
    ],
)
def test_stock_plans_that_do_not_fit(case: str, changes: dict, why: str):
    model = build_stock(case)
    model.config.base_model_tp_plan = {**model.config.base_model_tp_plan, **changes}
    ((_, said),) = failed(model).items()
    assert why in said


def test_names_of_transformers_4_are_known():
    model = build_stock("olmo2")
    old = {"colwise_gather_output": "colwise_rep", "rowwise_split_input": "rowwise_rep"}
    plan = model.config.base_model_tp_plan
    model.config.base_model_tp_plan = {pattern: old.get(style, style) for pattern, style in plan.items()}
    assert failed(model) == {}


def test_a_class_without_plans_is_told_so():
    assert list(failed(GPT2LMHeadModel)) == ["tensor parallel plan", "pipeline parallel plan"]


def test_the_model_is_left_as_it_was():
    model = build().train()
    state = torch.random.get_rng_state()
    backend_conditions(model)
    backend_conditions(HfDecoderForCausalLM)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training and model.config._attn_implementation == "sdpa"
    assert "hf_decoder_engine" not in ALL_ATTENTION_FUNCTIONS


def test_a_class_that_does_not_support_the_interface(monkeypatch):
    monkeypatch.setattr(HfDecoderPreTrainedModel, "_supports_attention_backend", False)
    assert list(failed(build())) == ["is_backend_compatible"]


def test_an_attention_of_its_own(monkeypatch):
    monkeypatch.setattr(
        modeling_hf_decoder.ALL_ATTENTION_FUNCTIONS,
        "get_interface",
        lambda *_: modeling_hf_decoder.eager_attention_forward,
        raising=False,
    )
    assert "ALL_ATTENTION_FUNCTIONS" in failed(build())["attention interface"]


def test_keyword_arguments_that_are_lost(monkeypatch):
    forward = modeling_hf_decoder.HfDecoderLayer.forward
    lost = ("attention_instances", "requests")

    def drop(self, *args, **kwargs):
        return forward(self, *args, **{key: value for key, value in kwargs.items() if key not in lost})

    monkeypatch.setattr(modeling_hf_decoder.HfDecoderLayer, "forward", drop)
    assert list(failed(build())) == ["keyword arguments"]


def test_a_mask_that_the_engine_did_not_ask_for(monkeypatch):
    create = modeling_hf_decoder.HfDecoderModel.layer_masks

    def always(self, *args):
        masks = create(self, *args)
        engine = self.config._attn_implementation not in ("sdpa", "eager")
        return {kind: torch.zeros(1, 1, 1, 1) if engine else mask for kind, mask in masks.items()}

    monkeypatch.setattr(modeling_hf_decoder.HfDecoderModel, "layer_masks", always)
    assert "passes a mask" in failed(build())["attention interface"]


def test_positions_that_are_ignored(monkeypatch):
    forward = modeling_hf_decoder.HfDecoderRotaryEmbedding.forward

    def from_zero(self, x, position_ids):
        return forward(self, x, torch.arange(position_ids.shape[1])[None])

    monkeypatch.setattr(modeling_hf_decoder.HfDecoderRotaryEmbedding, "forward", from_zero)
    assert list(failed(build())) == ["hidden states"]


@pytest.mark.parametrize(
    ("plan", "changes", "why"),
    [
        ("base_model_tp_plan", {"layers.*.self_attn.o_proj": "colwise"}, "must be rowwise"),
        ("base_model_tp_plan", {"layers.*.self_attn.qkv_proj": "colwise"}, "matches no module"),
        ("base_model_tp_plan", {"layers.*.mlp.up_proj": None}, "is none; must be colwise"),
        ("base_model_pp_plan", {"head": ([], [])}, "'head' is not a child"),
        ("base_model_pp_plan", {"norm": None}, "'norm' out"),
        ("base_model_pp_plan", {"layers": None}, "lists of layers: []"),
    ],
)
def test_plans_that_do_not_fit(plan: str, changes: dict, why: str):
    model = build()
    values = {key: value for key, value in {**getattr(model.config, plan), **changes}.items() if value is not None}
    setattr(model.config, plan, values)
    ((_, said),) = failed(model).items()
    assert why in said


def test_a_head_that_computes_more():
    model = build()
    forward = model.forward

    def scaled(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits * 0.5
        return outputs

    model.forward = scaled
    assert list(failed(model)) == ["head"]


def test_a_saved_config_without_the_base_class(monkeypatch):
    for cls in (HfDecoderModel, HfDecoderForCausalLM):  # a server in this process does that
        monkeypatch.setattr(transformers, cls.__name__, cls, raising=False)
    monkeypatch.delitem(AUTO_MAP, "AutoModel")
    assert "names no class under auto_map.AutoModel" in failed(build())["auto_map"]
    monkeypatch.setitem(AUTO_MAP, "AutoModel", "elsewhere.HfDecoderModel")
    assert "elsewhere.py is not saved beside it" in failed(build())["auto_map"]
