"""Every field of the config changes what it says it changes; a field without effect would be a defect."""

from typing import Any

import pytest
import torch
from tiny_models import SHAPE, random_ids, randomise, tiny_config, tiny_model

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM, HfDecoderForSequenceClassification, HfDecoderModel

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}

# Fields that change the function of the same weights: a value, another value, the rest of the config.
VALUE_FIELDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "hidden_act": ("silu", "gelu", {}),
    # the base of dynamic RoPE grows past this length
    "max_position_embeddings": (64, 8, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    "rms_norm_eps": (1e-6, 0.1, {}),
    "rope_parameters": (None, LINEAR, {}),
    "rope_theta": (10000.0, 100.0, {}),
    "rope_scaling": (None, LINEAR, {}),
    "partial_rotary_factor": (1.0, 0.5, {}),
    "no_rope_layers": (None, [1, 0], {}),
    "sliding_window": (4, 5, {}),
    "layer_types": (["sliding_attention", "full_attention"], ["sliding_attention"] * 2, {"sliding_window": 4}),
    "final_logit_softcapping": (None, 2.0, {}),
}
# Fields that change which parameters there are: two values, a parameter, its shape with either (None: it is gone).
ATTENTION = "model.layers.1.self_attn."
SHAPE_FIELDS: dict[str, tuple[Any, Any, str, tuple[int, ...] | None, tuple[int, ...] | None]] = {
    "vocab_size": (61, 70, "model.embed_tokens.weight", (61, 32), (70, 32)),
    "hidden_size": (32, 40, "model.norm.weight", (32,), (40,)),
    "intermediate_size": (44, 50, "model.layers.1.mlp.down_proj.weight", (32, 44), (32, 50)),
    "num_hidden_layers": (2, 1, "model.layers.1.input_layernorm.weight", (32,), None),
    "num_attention_heads": (4, 6, f"{ATTENTION}q_proj.weight", (48, 32), (72, 32)),
    "num_key_value_heads": (2, 1, f"{ATTENTION}k_proj.weight", (24, 32), (12, 32)),
    "head_dim": (12, 10, f"{ATTENTION}o_proj.weight", (32, 48), (32, 40)),
    "qk_norm": (True, False, f"{ATTENTION}k_norm.weight", (12,), None),
    "attention_bias": (True, "qkv", f"{ATTENTION}o_proj.bias", (32,), None),
    "mlp_bias": (True, False, "model.layers.1.mlp.gate_proj.bias", (44,), None),
}
# Fields of behaviour, one test each below.
BEHAVIOUR_FIELDS = {
    "initializer_range",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
    "z_loss_coef",
}
OLD_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor"}


def test_no_field_is_forgotten():
    fields = {name for name in HfDecoderConfig.__annotations__ if name in HfDecoderConfig.__dataclass_fields__}
    fields -= {"model_type", "keys_to_ignore_at_inference"}
    assert fields | OLD_KEYS == VALUE_FIELDS.keys() | SHAPE_FIELDS.keys() | BEHAVIOUR_FIELDS


@torch.no_grad()
@pytest.mark.parametrize("field", VALUE_FIELDS)
def test_the_value_changes_the_logits_of_the_same_weights(field: str):
    first, second, rest = VALUE_FIELDS[field]
    ids = random_ids(2, 20)
    one, same, other = (tiny_model(**{**rest, field: value})(ids).logits for value in (first, first, second))
    assert torch.equal(one, same)
    assert (one - other).abs().max() > 1e-2


@pytest.mark.parametrize("field", SHAPE_FIELDS)
def test_the_value_changes_the_parameters(field: str):
    first, second, parameter, *expected = SHAPE_FIELDS[field]
    shapes = []
    for value in (first, second):
        model = tiny_model(**{field: value})
        found = dict(model.named_parameters()).get(parameter)
        shapes.append(found if found is None else tuple(found.shape))
        assert model(random_ids(1, 5)).logits.shape == (1, 5, model.config.vocab_size)
    assert shapes == expected


@torch.no_grad()
@pytest.mark.parametrize("field", ["qk_norm", "attention_bias", "mlp_bias"])
def test_the_optional_parameters_change_the_logits(field: str):
    """The same weights with and without them."""
    model, plain = tiny_model(**{field: True}), tiny_model()
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert unexpected and not missing
    ids = random_ids(1, 9)
    assert (model(ids).logits - plain(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("std", [0.02, 0.3])
def test_initializer_range_is_the_spread_of_the_initial_weights(std: float):
    torch.manual_seed(0)
    for cls in (HfDecoderForCausalLM, HfDecoderForSequenceClassification):
        model = cls(
            tiny_config(
                initializer_range=std, tie_word_embeddings=False, attention_bias=True, num_labels=50, qk_norm=True
            )
        )
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any(), name
            elif "norm" in name:
                assert torch.equal(parameter, torch.ones_like(parameter)), name
            else:
                values = parameter.data if "embed" not in name else parameter.data[1:]  # without the padding row
                assert abs(values.std() / std - 1) < 0.15, name
                assert abs(values.mean()) < 0.15 * std, name


def test_use_cache_decides_whether_a_cache_comes_back():
    ids = random_ids(1, 4)
    assert tiny_model(use_cache=True)(ids).past_key_values.get_seq_length() == 4
    assert tiny_model(use_cache=False)(ids).past_key_values is None
    assert tiny_model(use_cache=False)(ids, use_cache=True).past_key_values is not None


def test_pad_token_id_is_the_row_without_gradient_and_the_filler_of_generate():
    for pad in (0, 7):
        model = tiny_model(pad_token_id=pad, tie_word_embeddings=False)
        model(torch.tensor([[5, pad, 9]])).logits.sum().backward()
        assert not model.model.embed_tokens.weight.grad[pad].any()
        assert model.model.embed_tokens.weight.grad[5].any()

        ids = random_ids(2, 5)
        free = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=pad)
        stop = next(t for t in free[0, 5:].tolist() if t not in free[1, 5:].tolist())
        ended = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=stop)
        position = ended[0].tolist().index(stop, 5)
        assert position < ended.shape[1] - 1
        assert set(ended[0, position + 1 :].tolist()) == {pad}


def test_bos_token_id_begins_a_text_from_nothing():
    for bos in (2, 9):
        assert tiny_model(bos_token_id=bos).generate(max_new_tokens=2)[0, 0] == bos


def test_eos_token_id_ends_the_text():
    ids = random_ids(1, 5)
    free = tiny_model(eos_token_id=None).generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()
    third = free[7]
    for eos in (third, [third, 60]):
        ended = tiny_model(eos_token_id=eos).generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()
        assert ended == free[: free.index(third, 5) + 1]


def test_tie_word_embeddings_shares_one_tensor(tmp_path):
    tied, untied = (tiny_model(tie_word_embeddings=value) for value in (True, False))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight.data_ptr() != untied.model.embed_tokens.weight.data_ptr()
    assert untied.num_parameters() - tied.num_parameters() == SHAPE["vocab_size"] * SHAPE["hidden_size"]
    for model in (tied, untied):
        model.save_pretrained(tmp_path / str(model is tied))
        loaded = HfDecoderForCausalLM.from_pretrained(tmp_path / str(model is tied), attn_implementation="eager")
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (model is tied)
        ids = random_ids(1, 4)
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_dropout_acts_in_training_only(attention: str):
    ids = random_ids(1, 12)

    def hidden(rate: float, training: bool, seed: int) -> torch.Tensor:
        model = randomise(HfDecoderModel(tiny_config(attention_dropout=rate, attn_implementation=attention)))
        torch.manual_seed(seed)
        return model.train(training)(ids).last_hidden_state

    assert torch.equal(hidden(0.0, True, 0), hidden(0.0, True, 1))
    torch.testing.assert_close(hidden(0.5, False, 0), hidden(0.0, False, 1))
    assert torch.equal(hidden(0.5, True, 0), hidden(0.5, True, 0))
    assert (hidden(0.5, True, 0) - hidden(0.5, True, 1)).abs().max() > 1e-2


@pytest.mark.parametrize("skip_logits", [True, False])
def test_z_loss_adds_the_mean_squared_log_partition_in_training(skip_logits: bool):
    ids = random_ids(2, 9)
    without, with_z = (tiny_model(z_loss_coef=coefficient) for coefficient in (0.0, 0.01))
    logits = without(ids).logits[:, :-1]
    plain = without(ids, labels=ids).loss
    # what is measured outside training is the cross-entropy
    torch.testing.assert_close(with_z(ids, labels=ids, skip_logits=skip_logits).loss, plain)
    expected = plain + 0.01 * logits.exp().sum(-1).log().square().mean()
    assert expected > plain + 0.01
    torch.testing.assert_close(with_z.train()(ids, labels=ids, skip_logits=skip_logits).loss, expected)
