"""Tables of the transformers classes that share our architecture: which config fields and weights each one has.

A table says which of our fields a class has and which it fixes. The config in either direction follows from it, or the
field that has no counterpart. Weights have our names, which are Llama's, except where a family fuses projections.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from hf_decoder.interop.checkpoint import read_config_values
from hf_decoder.model.configuration_hf_decoder import ROPE_TYPES, HfDecoderConfig
from hf_decoder.safety.terminal import first_line

OURS = HfDecoderConfig.model_type
# An `HfDecoderConfig` once built: its optional fields then have values, which its annotations do not say.
BuiltConfig: TypeAlias = Any

# Our fields that every stock class has under the same name.
COMMON_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
)
FLAG = (False, True)


@dataclass(frozen=True)
class Family:
    """What one stock class can express.

    `holds`: our fields that it has under the same name, with the values it can take (None: any).
    `fixes`: our fields that it lacks, with the value that its computation implies.
    `windows`: "none", "uniform" (all layers or none) or "layers" (each layer as `layer_types` says).
    `needs`: its own fields that must have this value, because we have no counterpart for another.
    `fused`: names of its matrices, with our matrices whose rows they stack.
    """

    config_class: type[PreTrainedConfig]
    model_class: str
    holds: dict[str, tuple[Any, ...] | None]
    fixes: dict[str, Any]
    windows: str = "none"
    rope_types: tuple[str, ...] = tuple(ROPE_TYPES)
    partial_rotary: bool = False
    needs: dict[str, Any] = field(default_factory=dict)
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        return self.config_class.model_type


PLAIN = {"qk_norm": False, "no_rope_layers": None, "final_logit_softcapping": None}
NO_BIAS = {"attention_bias": False, "mlp_bias": False}

# In the order in which `--to auto` tries them.
FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            LlamaConfig,
            "LlamaForCausalLM",
            holds={"head_dim": None, "attention_bias": FLAG, "mlp_bias": FLAG},
            fixes=PLAIN,
        ),
        Family(
            Qwen3Config,
            "Qwen3ForCausalLM",
            holds={"head_dim": None, "attention_bias": FLAG},
            fixes=PLAIN | {"qk_norm": True, "mlp_bias": False},
            windows="layers",
        ),
        Family(
            Qwen2Config,
            "Qwen2ForCausalLM",
            holds={},
            fixes=PLAIN | {"attention_bias": "qkv", "mlp_bias": False},
            windows="layers",
        ),
        Family(
            MistralConfig,
            "MistralForCausalLM",
            holds={"head_dim": None},
            fixes=PLAIN | NO_BIAS,
            windows="uniform",
        ),
        Family(
            SmolLM3Config,
            "SmolLM3ForCausalLM",
            holds={"attention_bias": FLAG, "mlp_bias": FLAG, "no_rope_layers": None},
            fixes={"qk_norm": False, "final_logit_softcapping": None},
            windows="layers",
        ),
        Family(
            Phi3Config,
            "Phi3ForCausalLM",
            holds={},
            fixes=PLAIN | NO_BIAS,
            windows="uniform",
            rope_types=("default", "longrope"),
            partial_rotary=True,
            needs={"resid_pdrop": 0.0},
            fused={
                "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
            },
        ),
    )
}

# Fields that only other architectures set -> what they stand for, as the error says.
FOREIGN_FIELDS = {
    "quantization_config": "quantized weights; convert the unquantized checkpoint",
    "vision_config": "images",
    "audio_config": "audio",
    "num_local_experts": "a mixture of experts",
    "num_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "kv_lora_rank": "multi-head latent attention",
    "linear_num_value_heads": "linear attention",
    "state_size": "a state space",
    "attn_logit_softcapping": "capped attention scores",
    "query_pre_attn_scalar": "its own scale of attention scores",
    "hidden_activation": "a GeGLU layer, scaled embeddings and norms of 1 + weight",
    "attention_multiplier": "its own scale of attention scores",
    "embedding_multiplier": "scaled embeddings",
    "residual_multiplier": "a scaled residual stream",
    "logits_scaling": "scaled logits",
    "logit_scale": "scaled logits",
    "clip_qkv": "clipped projections",
    "alibi": "ALiBi in place of RoPE",
    "use_parallel_residual": "attention and MLP side by side",
    "parallel_attn": "attention and MLP side by side",
    "layer_norm_eps": "LayerNorm in place of RMSNorm",
    "layer_norm_epsilon": "LayerNorm in place of RMSNorm",
    "norm_epsilon": "LayerNorm in place of RMSNorm",
}


def read_config(folder: Path) -> tuple[BuiltConfig, Family | None]:
    """Reads the config of a checkpoint folder as ours, and its family, which is None for our own.

    Raises:
        ValueError: if there is no readable config.json, or it sets something that we have no field for.
    """
    path, values = folder / "config.json", read_config_values(folder)
    model_type = values["model_type"]
    for name, meaning in FOREIGN_FIELDS.items():
        if values.get(name):
            raise ValueError(
                f"{path} ({model_type}) sets {name}={_short(values[name])}, that is {meaning}: not supported"
            )
    if model_type != OURS and model_type not in FAMILIES:
        raise ValueError(
            f"{path} has model_type={model_type!r}, which is not supported; supported are {', '.join(FAMILIES)}"
        )
    config_class = HfDecoderConfig if model_type == OURS else FAMILIES[model_type].config_class
    try:
        config = config_class.from_dict(values)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ValueError(f"{path} is not a valid {config_class.__name__}: {first_line(error)}") from None
    if model_type == OURS:
        return config, None
    return to_ours(FAMILIES[model_type], config), FAMILIES[model_type]


def to_ours(family: Family, stock: PreTrainedConfig) -> BuiltConfig:
    """Our config for the computation of `stock`, a config of `family`.

    Raises:
        ValueError: naming the field that we cannot express.
    """
    for name, value in family.needs.items():
        if getattr(stock, name, value) != value:
            raise ValueError(f"{name}={getattr(stock, name)} of {family.model_type} is not supported, only {value} is")
    rope = dict(stock.rope_parameters)
    factor = rope.get("partial_rotary_factor") or 1.0
    if factor != 1.0 and not family.partial_rotary:
        raise ValueError(f"{family.model_class} does not compute partial_rotary_factor={factor}; remove it")
    values = {name: getattr(stock, name) for name in COMMON_FIELDS}
    values |= family.fixes | {name: getattr(stock, name) for name in family.holds}
    # Classes without the field still read it from config.json.
    values["head_dim"] = getattr(stock, "head_dim", None) or stock.hidden_size // stock.num_attention_heads
    if family.windows != "none":
        values["sliding_window"] = stock.sliding_window
    if family.windows == "layers":
        values["layer_types"] = list(stock.layer_types)
    return HfDecoderConfig(**values, rope_parameters=rope, dtype=stock.dtype)


def obstacle(family: Family, config: BuiltConfig) -> str | None:
    """The first field of `config`, as `name=value`, that `family` cannot express; None if it expresses all."""
    for name, value in family.fixes.items():
        if _value(config, name) != value:
            return f"{name}={_short(getattr(config, name))}"
    for name, choices in family.holds.items():
        if choices is not None and _value(config, name) not in choices:
            return f"{name}={getattr(config, name)!r}"
    kinds = set(config.layer_types)
    if family.windows == "none" and "sliding_attention" in kinds:
        return f"sliding_window={config.sliding_window}"
    if family.windows == "uniform" and len(kinds) > 1:
        return "layer_types with both full_attention and sliding_attention"
    if "head_dim" not in family.holds and config.head_dim * config.num_attention_heads != config.hidden_size:
        return f"head_dim={config.head_dim}"
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in family.rope_types:
        return f"rope_type={rope_type!r}"
    factor = config.rope_parameters.get("partial_rotary_factor") or 1.0
    if factor != 1.0 and not family.partial_rotary:
        return f"partial_rotary_factor={factor}"
    try:
        _stock_config(family, config)
    except (ValueError, StrictDataclassError) as error:
        return first_line(error)
    return None


def to_stock(config: BuiltConfig, to: str = "auto") -> tuple[Family, PreTrainedConfig]:
    """The family `to`, or the first that expresses `config` exactly, with its config.

    `z_loss_coef` is dropped: it belongs to training, and no stock class has it.

    Raises:
        ValueError: naming the field that stands in the way.
    """
    if to != "auto":
        reason = obstacle(FAMILIES[to], config)
        if reason is not None:
            raise ValueError(f"{FAMILIES[to].model_class} cannot express {reason}; --to auto finds a class that can")
        return FAMILIES[to], _stock_config(FAMILIES[to], config)
    reasons = []
    for family in FAMILIES.values():
        reason = obstacle(family, config)
        if reason is None:
            return family, _stock_config(family, config)
        reasons.append(f"{family.model_type}: {reason}")
    raise ValueError(f"no stock class expresses this config: {'; '.join(reasons)}")


def _stock_config(family: Family, config: BuiltConfig) -> PreTrainedConfig:
    slides = "sliding_attention" in config.layer_types
    rope = dict(config.rope_parameters)
    values = {name: getattr(config, name) for name in (*COMMON_FIELDS, *family.holds)}
    if "no_rope_layers" in values:
        values["no_rope_layers"] = config.no_rope_layers or [1] * config.num_hidden_layers
    if family.windows == "uniform":
        values["sliding_window"] = config.sliding_window if slides else None
    elif family.windows == "layers":
        values |= {
            "use_sliding_window": config.sliding_window is not None,
            "sliding_window": config.sliding_window,
            "layer_types": list(config.layer_types),
        }
    if family.partial_rotary:
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        values["original_max_position_embeddings"] = original
    else:
        rope.pop("partial_rotary_factor", None)
    config_class: Any = family.config_class
    return config_class(**values, rope_parameters=rope, dtype=config.dtype, architectures=[family.model_class])


def fused_names(family: Family, names: list[str]) -> dict[str, list[str]]:
    """Name in a checkpoint of `family` -> those of our `names` whose rows it stacks, in order."""
    held = {part: whole for whole, parts in family.fused.items() for part in parts}
    table: dict[str, list[str]] = {}
    for name in names:
        module, _, kind = name.rpartition(".")
        prefix, _, part = _split_layer(module)
        whole = f"{prefix}{held[part]}.{kind}" if part in held else name
        table.setdefault(whole, []).append(name)
    for whole, ours in table.items():
        if len(ours) > 1:
            order = family.fused[_split_layer(whole.rpartition(".")[0])[2]]
            ours.sort(key=lambda name: order.index(_split_layer(name.rpartition(".")[0])[2]))
    return table


def _split_layer(module: str) -> tuple[str, str, str]:
    """`model.layers.3.mlp.up_proj` -> `model.layers.3.`, `3`, `mlp.up_proj`."""
    parts = module.split(".")
    if parts[:2] == ["model", "layers"]:
        return ".".join(parts[:3]) + ".", parts[2], ".".join(parts[3:])
    return "", "", module


def _value(config: BuiltConfig, name: str) -> Any:
    value = getattr(config, name)
    return None if name == "no_rope_layers" and value is not None and all(value) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
