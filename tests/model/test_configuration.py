"""The config: defaults, derived values, older keys, and one clear ValueError for everything that cannot be built."""

import copy
import json
import random
from typing import Any

import pytest
import torch
from tiny_models import SHAPE, tiny_config
from transformers import AutoConfig

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM


def build_on_meta(config: HfDecoderConfig) -> HfDecoderForCausalLM:
    with torch.device("meta"):
        return HfDecoderForCausalLM(config)


def test_the_defaults_give_about_125m_parameters():
    model = build_on_meta(HfDecoderConfig())
    assert 115e6 < sum(parameter.numel() for parameter in model.parameters()) < 135e6


@pytest.mark.parametrize(("width", "expected"), [(64, 192), (96, 256), (768, 2048), (800, 2176), (4096, 10944)])
def test_intermediate_size_is_eight_thirds_rounded_up_to_64(width: int, expected: int):
    # worked out by hand: 8/3 * width = 170.7, 256, 2048, 2133.3, 10922.7
    config = tiny_config(hidden_size=width, intermediate_size=None)
    assert config.intermediate_size == expected
    assert build_on_meta(config).model.layers[0].mlp.up_proj.weight.shape == (expected, width)


def test_values_derived_from_others():
    config = tiny_config(head_dim=None, num_key_value_heads=None)
    assert config.head_dim == 8
    assert config.num_key_value_heads == 4
    assert config.layer_types == ["full_attention"] * 2
    assert tiny_config(sliding_window=4).layer_types == ["sliding_attention"] * 2


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 777.0},
        {"rope_theta": 777.0, "rope_scaling": None},
        {"rope_theta": 777.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
        {"rope_theta": None, "rope_scaling": None},
        {"partial_rotary_factor": 0.5, "rope_theta": 50.0},
        {
            "rope_theta": 777.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ],
)
def test_keys_of_transformers_4_are_read(keys: dict, tmp_path):
    """In the constructor and in a config.json, with the same result as `rope_parameters`."""
    scaling = keys.get("rope_scaling") or {}
    expected = {"rope_type": scaling.get("type", "default"), "rope_theta": keys.get("rope_theta") or 10000.0} | scaling
    if "partial_rotary_factor" in keys:
        expected["partial_rotary_factor"] = keys["partial_rotary_factor"]
    assert tiny_config(**copy.deepcopy(keys)).rope_parameters == expected

    saved = SHAPE | keys | {"model_type": "hf_decoder"}
    (tmp_path / "config.json").write_text(json.dumps(saved), encoding="utf-8")
    assert HfDecoderConfig.from_pretrained(tmp_path).rope_parameters == expected
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == expected


def test_layer_types_decide_over_the_window():
    """Qwen configs name a window that no layer uses."""
    config = tiny_config(sliding_window=4, layer_types=["full_attention"] * 2)
    attention = build_on_meta(config).model.layers[0].self_attn
    assert attention.sliding_window is None


def test_the_given_rope_dictionary_stays_as_it_was():
    shared = {"rope_type": "linear", "factor": 2.0}
    first, second = (tiny_config(rope_parameters=shared, rope_theta=theta) for theta in (10.0, 20.0))
    assert shared == {"rope_type": "linear", "factor": 2.0}
    assert (first.rope_parameters["rope_theta"], second.rope_parameters["rope_theta"]) == (10.0, 20.0)


def test_save_and_load_round_trip(tmp_path):
    config = tiny_config(
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 99.0,
            "short_factor": [1.0] * 3,
            "long_factor": [2.0] * 3,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 32,
        },
        no_rope_layers=[1, 0],
        qk_norm=True,
        attention_bias="qkv",
        attention_dropout=0.1,
        mlp_bias=True,
        sliding_window=7,
        layer_types=["full_attention", "sliding_attention"],
        final_logit_softcapping=30.0,
        z_loss_coef=1e-4,
        initializer_range=0.03,
        rms_norm_eps=1e-5,
        use_cache=False,
        hidden_act="gelu",
        tie_word_embeddings=False,
        eos_token_id=[1, 5],
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is HfDecoderConfig
    before, after = config.to_dict(), loaded.to_dict()
    assert {name: after[name] for name in before if before[name] != after[name]} == {"_name_or_path": str(tmp_path)}
    # and every field of the class is in the file or at its default
    defaults = HfDecoderConfig().to_dict()
    saved = json.loads((tmp_path / "config.json").read_text("utf-8"))
    for name in HfDecoderConfig.__annotations__:
        assert name in saved or before[name] == defaults[name], name


LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.0] * 6}
YARN = {"rope_type": "yarn", "factor": 2.0}
# overrides of one valid config, then what the message has to contain besides the value
INVALID: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    *(({name: value}, (name, str(value))) for name in SHAPE for value in (0, -1, -64)),
    *(({name: value}, (name, str(value))) for name in SHAPE for value in ("many", 1.5, [2], {"a": 1}, float("nan"))),
    *(
        ({name: None}, (name, "None"))
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        )
    ),
    ({"num_key_value_heads": 3}, ("num_attention_heads", "num_key_value_heads", "4", "3")),
    ({"num_key_value_heads": 8}, ("num_attention_heads", "num_key_value_heads", "4", "8")),
    ({"head_dim": 7}, ("head_dim", "7")),
    ({"head_dim": 1}, ("head_dim", "1")),
    ({"head_dim": None, "hidden_size": 33}, ("hidden_size", "33", "num_attention_heads", "4")),
    ({"head_dim": None, "hidden_size": 36}, ("head_dim", "9")),
    ({"hidden_act": "swish-ish"}, ("hidden_act", "swish-ish", "silu")),
    ({"hidden_act": 3}, ("hidden_act", "3")),
    ({"hidden_act": None}, ("hidden_act", "None")),
    *(
        ({name: value}, (name, str(value)))
        for name in ("attention_dropout", "initializer_range", "rms_norm_eps", "z_loss_coef")
        for value in (-0.1, 1.5, float("nan"), float("inf"), "low", None, [0.1])
    ),
    ({"attention_dropout": 1.0}, ("attention_dropout", "1.0")),
    ({"rms_norm_eps": 0.0}, ("rms_norm_eps", "0.0")),
    *(
        ({"final_logit_softcapping": value}, ("final_logit_softcapping", str(value)))
        for value in (0.0, -30.0, float("nan"), float("inf"), "30")
    ),
    *(
        ({name: value}, (name, str(value)))
        for name in ("use_cache", "tie_word_embeddings", "qk_norm", "mlp_bias")
        for value in ("yes", 1, None, 0.5)
    ),
    *(({"attention_bias": value}, ("attention_bias", str(value))) for value in ("all", "", 2, None, ["qkv"])),
    *(({"sliding_window": value}, ("sliding_window", str(value))) for value in (0, 1, -4, 2.5, "4", [4])),
    ({"layer_types": ["sliding_attention"] * 2}, ("layer_types", "sliding_window", "None")),
    ({"layer_types": ["full_attention"] * 3}, ("layer_types", "3", "num_hidden_layers", "2")),
    ({"layer_types": []}, ("layer_types", "0", "num_hidden_layers", "2")),
    ({"layer_types": ["full_attention", "linear_attention"]}, ("layer_types", "linear_attention")),
    ({"layer_types": ["full_attention", None]}, ("layer_types", "None")),
    ({"layer_types": "full_attention"}, ("layer_types", "full_attention")),
    ({"no_rope_layers": [1]}, ("no_rope_layers", "1", "num_hidden_layers", "2")),
    ({"no_rope_layers": [1, 2]}, ("no_rope_layers", "[1, 2]")),
    ({"no_rope_layers": [1, -1]}, ("no_rope_layers", "-1")),
    ({"no_rope_layers": "10"}, ("no_rope_layers", "10")),
    ({"no_rope_layers": 4}, ("no_rope_layers", "4")),
    ({"pad_token_id": SHAPE["vocab_size"]}, ("pad_token_id", "61", "60")),
    ({"pad_token_id": -2}, ("pad_token_id", "-2")),
    *(({name: "<s>"}, (name, "<s>")) for name in ("pad_token_id", "bos_token_id", "eos_token_id")),
    ({"eos_token_id": [1, "x"]}, ("eos_token_id", "x")),
    # RoPE, under its new and its old name
    *(
        ({key: {"rope_type": value}}, ("rope_type", str(value), "yarn"))
        for key in ("rope_parameters", "rope_scaling")
        for value in ("rotary", "", 4, [], "Default")
    ),
    *(({"rope_scaling": {"type": value}}, ("rope_type", value)) for value in ("su", "mrope")),
    *(
        ({key: value}, (key, str(value)))
        for key in ("rope_parameters", "rope_scaling")
        for value in (5, "yarn", [1.0])
    ),
    *(
        ({"rope_parameters": {name: value for name, value in full.items() if name != gone}}, (gone, full["rope_type"]))
        for full in (
            LLAMA3,
            LONGROPE,
            YARN,
            {"rope_type": "linear", "factor": 2.0},
            {"rope_type": "dynamic", "factor": 2},
        )
        for gone in full
        if gone != "rope_type"
    ),
    *(
        ({"rope_parameters": YARN | {"factor": value}}, ("factor", str(value)))
        for value in (0.5, -1, 0, "4", float("nan"), float("inf"), True, [2.0])
    ),
    *(({"rope_theta": value}, ("rope_theta", str(value))) for value in (0, -1.0, "big", float("nan"), True)),
    *(({"rope_parameters": YARN | {name: -1}}, (name, "-1")) for name in ("beta_fast", "attention_factor", "mscale")),
    ({"rope_parameters": YARN | {"beta_fast": 1, "beta_slow": 32}}, ("beta_fast", "beta_slow", "32")),
    ({"rope_parameters": YARN | {"truncate": "no"}}, ("truncate", "no")),
    ({"rope_parameters": YARN | {"original_max_position_embeddings": 0}}, ("original_max_position_embeddings", "0")),
    ({"rope_parameters": LLAMA3 | {"high_freq_factor": 0.5}}, ("high_freq_factor", "0.5", "low_freq_factor")),
    ({"rope_parameters": LONGROPE | {"short_factor": [1.0] * 5}}, ("short_factor", "5", "6")),
    ({"rope_parameters": LONGROPE | {"long_factor": [1.0] * 12}}, ("long_factor", "12", "6")),
    ({"rope_parameters": LONGROPE | {"long_factor": [0.0] * 6}}, ("long_factor", "0.0")),
    ({"rope_parameters": LONGROPE | {"short_factor": 2.0}}, ("short_factor", "2.0")),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ("rope_parameters", "full_attention")),
    ({"rope_parameters": {3: 4}}, ("rope_parameters", "3")),
    *(
        ({"partial_rotary_factor": value}, ("partial_rotary_factor", str(value)))
        for value in (0.0, -0.5, 1.5, "half", float("nan"), True)
    ),
    ({"partial_rotary_factor": 0.25}, ("partial_rotary_factor", "0.25", "head_dim", "12")),
    ({"partial_rotary_factor": 0.05}, ("partial_rotary_factor", "0.05", "head_dim", "12")),
]


@pytest.mark.parametrize(("overrides", "contents"), INVALID, ids=lambda value: str(value)[:60])
def test_what_cannot_be_built_is_one_line_that_says_why(overrides: dict, contents: tuple[str, ...]):
    with pytest.raises(ValueError) as caught:
        tiny_config(**copy.deepcopy(overrides))
    message = str(caught.value)
    assert "\n" not in message
    assert [text for text in contents if text not in message] == []


@pytest.mark.parametrize(
    ("size", "largest"),
    [
        ("vocab_size", 16_777_216),
        ("hidden_size", 524_288),
        ("intermediate_size", 2_097_152),
        ("num_hidden_layers", 10_000),
        ("num_attention_heads", 16_384),
        ("num_key_value_heads", 16_384),
        ("head_dim", 16_384),
        ("max_position_embeddings", 2_147_483_648),
        ("sliding_window", 2_147_483_648),
    ],
)
def test_sizes_have_a_largest_value(size: str, largest: int):
    heads = {"num_attention_heads": largest} if size == "num_key_value_heads" else {}
    assert getattr(tiny_config(**heads | {size: largest}), size) == largest
    with pytest.raises(ValueError, match=f"{size}={largest + 1} is not possible"):
        tiny_config(**{size: largest + 1})


def test_a_wrong_value_in_a_saved_config_is_a_value_error(tmp_path):
    saved = SHAPE | {"model_type": "hf_decoder", "num_key_value_heads": 3}
    (tmp_path / "config.json").write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(ValueError, match="num_key_value_heads=3"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("hidden_size", "x"), ("rope_parameters", 3), ("qk_norm", None)])
def test_assigning_a_wrong_type_is_a_value_error(field: str, value: Any):
    config = tiny_config()
    with pytest.raises(ValueError, match=field):
        setattr(config, field, value)


VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 4, 6, 8, 12, 16, 64, -0.5, 0.0, 0.25, 0.5, 0.9, 1.0, 2.5, 1e-5, 1e4),
    *(float("nan"), float("inf"), float("-inf"), "", "x", "silu", "gelu", "qkv", b"silu", (1, 1), {1}, object()),
    *([], [1], [1, 0], [0, 0], [1.0] * 6, [None], ["full_attention"], ["full_attention"] * 2, torch.ones(2), int),
    *(["sliding_attention", "full_attention"], ["sliding_attention"] * 2, {}, {"factor": 2.0}, {"rope_type": None}),
    *({"rope_type": name, "factor": 2.0} for name in ("default", "linear", "dynamic", "yarn", "longrope", "su")),
    *(
        LLAMA3,
        LONGROPE,
        YARN,
        {"type": "linear", "factor": 4},
        {"rope_type": "linear", "factor": "x"},
        {"rope_type": 1},
    ),
    *({"rope_type": "yarn", "factor": 2.0, "beta_fast": value} for value in ("x", None, 0.5)),
]


def test_random_values_build_or_are_a_value_error():
    """Any values give a model that runs, or a ValueError of one line."""
    choose = random.Random(0)
    fields = [*HfDecoderConfig.__annotations__, "rope_theta", "rope_scaling", "partial_rotary_factor"]
    fields = [name for name in fields if name in tiny_config().to_dict() or name.startswith(("rope", "partial"))]
    assert len(fields) > 25
    built = refused = 0
    for _ in range(600):
        overrides = {name: choose.choice(VALUES) for name in choose.sample(fields, choose.choice((1, 1, 1, 2, 3)))}
        try:
            config = HfDecoderConfig(**SHAPE | copy.deepcopy(overrides))
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
        except Exception as error:
            pytest.fail(f"{overrides}: {type(error).__name__}: {error}")
        else:
            try:
                logits = HfDecoderForCausalLM(config)(torch.zeros(1, 3, dtype=torch.long)).logits
                config.to_json_string()
            except Exception as error:
                pytest.fail(f"{overrides} is accepted, but {type(error).__name__}: {error}")
            assert logits.shape == (1, 3, config.vocab_size)
            built += 1
    assert built > 40 and refused > 100
