"""Any config gives a model that trains and survives a round trip, or an error of one line."""

import json
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM

SHAPE = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
BUILT_UP_TO = 200_000  # parameters; what is larger is a valid config that no test needs to allocate

numbers = st.one_of(
    st.integers(-3, 40),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, 0.5, 1.0, 1e-5, 1e4, True, False]),
)
texts = st.one_of(st.text(max_size=8), st.sampled_from(["silu", "gelu", "qkv", "../../etc", "__import__('os')", "0"]))
layer_types = st.lists(st.sampled_from(["full_attention", "sliding_attention", "other", "", None]), max_size=3)
rope = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.one_of(
            st.sampled_from(["default", "linear", "dynamic", "yarn", "longrope", "llama3"]), texts, st.none()
        ),
        "type": texts,
        **dict.fromkeys(
            ("factor", "rope_theta", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"), numbers
        ),
        **dict.fromkeys(("original_max_position_embeddings", "attention_factor", "mscale"), numbers),
        "partial_rotary_factor": numbers,
        "short_factor": st.one_of(st.just([1.0] * 4), st.lists(numbers, max_size=5), numbers),
        "long_factor": st.one_of(st.just([2.0] * 4), st.lists(numbers, max_size=5)),
        "truncate": st.one_of(st.booleans(), numbers),
    },
)
junk = st.one_of(
    st.none(),
    st.booleans(),
    numbers,
    texts,
    st.binary(max_size=3),
    st.lists(numbers, max_size=3),
    st.dictionaries(texts, numbers, max_size=2),
)
sizes = st.one_of(st.integers(1, 40), st.sampled_from([2, 4, 8, 16, 32]), junk)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(SHAPE, sizes),
    "hidden_act": st.one_of(st.sampled_from(["silu", "gelu", "relu", "tanh"]), texts, junk),
    **{name: st.one_of(st.floats(0, 1), junk) for name in ("initializer_range", "rms_norm_eps", "attention_dropout")},
    **{name: st.one_of(st.floats(0, 100), junk) for name in ("final_logit_softcapping", "z_loss_coef")},
    **{name: st.one_of(st.integers(-2, 40), junk) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    **{name: st.one_of(st.booleans(), junk) for name in ("use_cache", "tie_word_embeddings", "qk_norm", "mlp_bias")},
    "attention_bias": st.one_of(st.booleans(), st.just("qkv"), junk),
    "sliding_window": st.one_of(st.integers(1, 8), junk),
    "layer_types": st.one_of(layer_types, junk),
    "no_rope_layers": st.one_of(st.lists(st.integers(0, 2), max_size=3), junk),
    "rope_parameters": st.one_of(rope, junk),
    "rope_scaling": st.one_of(rope, junk),
    "rope_theta": numbers,
    "partial_rotary_factor": numbers,
}
overrides = st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=4, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: FIELDS[name] for name in names})
)
COUNTS = {"built": 0, "large": 0, "refused": 0}


def parameters(config: HfDecoderConfig) -> int:
    """About as many as the model would have: worked out without building it."""
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    layer = config.hidden_size * (2 * heads + 3 * config.intermediate_size)
    return 2 * config.vocab_size * config.hidden_size + config.num_hidden_layers * layer


def check(values: dict[str, Any]) -> None:
    try:
        config = HfDecoderConfig(**SHAPE | values)
    except ValueError as error:
        assert "\n" not in str(error)
        COUNTS["refused"] += 1
        return
    saved = json.loads(config.to_json_string())
    assert HfDecoderConfig.from_dict(saved).to_dict() == config.to_dict()
    if parameters(config) > BUILT_UP_TO:
        COUNTS["large"] += 1
        return
    model = HfDecoderForCausalLM(config)
    ids = torch.tensor([[0, config.vocab_size - 1, 0]])
    output = model.train()(input_ids=ids, labels=ids)
    output.loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert model.eval()(input_ids=ids).logits.shape == (1, 3, config.vocab_size)
    COUNTS["built"] += 1


def run(cases: int, *, derandomize: bool) -> None:
    for name in COUNTS:
        COUNTS[name] = 0
    checks = list(HealthCheck)
    bound = settings(
        max_examples=cases, deadline=None, database=None, derandomize=derandomize, suppress_health_check=checks
    )
    bound(given(overrides)(check))()


def test_any_config_builds_or_is_a_value_error():
    run(250, derandomize=True)
    assert COUNTS["built"] > 20 and COUNTS["refused"] > 50


@pytest.mark.soak
def test_ten_thousand_configs_build_or_are_a_value_error(figures):
    run(10_000, derandomize=False)
    figures(
        f"configs: {sum(COUNTS.values()):,} drawn by hypothesis; {COUNTS['refused']:,} refused with a ValueError "
        f"of one line, {COUNTS['built']:,} built and trained a step, {COUNTS['large']:,} valid but too large to build"
    )


@pytest.mark.parametrize("field", sorted({*SHAPE, "hidden_size"}))
@pytest.mark.parametrize("value", [10**12, 2**63, 10**400], ids=["1e12", "2**63", "1e400"])
def test_oversized_is_refused_before_anything_is_built(field, value):
    with pytest.raises(ValueError, match=field) as caught:
        HfDecoderConfig(**SHAPE | {field: value})
    assert "at most" in str(caught.value)
