"""Configuration of the HfDecoder model.

Field names are the canonical ones of transformers, so that tools which read a Llama, Mistral, Qwen or SmolLM config
read this one too. All validation of a model's shape happens here, once: whatever a user can get wrong ends in a
`ValueError` of one line that names the field, the value and what would be right.
"""

from functools import wraps
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

# What each RoPE type needs besides `rope_theta`. `rope_theta`, and the original context length where it is missing,
# are filled in by transformers.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
# The numbers among them, all positive, and the least that each can be.
ROPE_NUMBERS = {
    "factor": 1.0,
    "rope_theta": 0.0,
    "original_max_position_embeddings": 1.0,
    "low_freq_factor": 0.0,
    "high_freq_factor": 0.0,
    "beta_fast": 0.0,
    "beta_slow": 0.0,
    "attention_factor": 0.0,
    "mscale": 0.0,
    "mscale_all_dim": 0.0,
}
# Pairs of parameters with their defaults. The second one must be larger than the first.
ROPE_ORDER: dict[str, dict[str, float]] = {
    "yarn": {"beta_slow": 1.0, "beta_fast": 32.0},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
LAYER_TYPES = ("full_attention", "sliding_attention")
# What `auto_map` says in a saved config: auto class -> class in the files beside it.
AUTO_MAP = {
    "AutoConfig": "configuration_hf_decoder.HfDecoderConfig",
    "AutoModel": "modeling_hf_decoder.HfDecoderModel",
    "AutoModelForCausalLM": "modeling_hf_decoder.HfDecoderForCausalLM",
    "AutoModelForSequenceClassification": "modeling_hf_decoder.HfDecoderForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_hf_decoder.HfDecoderForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_hf_decoder.HfDecoderForQuestionAnswering",
}
RANGES = {
    "attention_dropout": (lambda x: 0 <= x < 1, "must be at least 0 and below 1"),
    "initializer_range": (lambda x: 0 <= x <= 1, "must be between 0 and 1"),
    "rms_norm_eps": (lambda x: 0 < x <= 1, "must be above 0 and at most 1"),
    "z_loss_coef": (lambda x: 0 <= x <= 1, "must be between 0 (off) and 1; 1e-5 to 1e-4 is usual"),
    "final_logit_softcapping": (lambda x: 0 < x < float("inf"), "must be positive and finite, or None for no cap"),
}
# Every size and the largest it may be: ten times what any published model has, so that a config from elsewhere is
# refused before anything of its size is built.
LARGEST_SIZES = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 19,
    "intermediate_size": 1 << 21,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "max_position_embeddings": 1 << 31,
    "sliding_window": 1 << 31,
}


def _raise_value_error(cls: type) -> type:
    """Turns the errors of `strict`, which are no `ValueError`, into one of a single line."""

    def wrap(method: Any) -> Any:
        @wraps(method)
        def wrapper(self, *args, **kwargs):
            try:
                return method(self, *args, **kwargs)
            except StrictDataclassError as error:
                raise ValueError(f"{cls.__name__}: {error.__cause__ or error}") from error.__cause__

        return wrapper

    cls.__init__ = wrap(cls.__init__)  # type: ignore[misc]
    cls.__setattr__ = wrap(cls.__setattr__)  # type: ignore[method-assign,assignment]
    return cls


@_raise_value_error
@strict
class HfDecoderConfig(PreTrainedConfig):
    r"""Configuration of [`HfDecoderModel`] and its heads. The defaults give a model of about 125M parameters.

    Args:
        vocab_size (`int`, defaults to 65536):
            Number of rows of the embedding table; every token id is below it.
        hidden_size (`int`, defaults to 768):
            Width of the residual stream.
        intermediate_size (`int`, *optional*):
            Width of the SwiGLU layer. `None` means 8/3 of `hidden_size` rounded up to a multiple of 64, as many
            parameters as an MLP without a gate of width `4 * hidden_size` (Shazeer 2020, section 3).
        num_hidden_layers (`int`, defaults to 12):
            Number of decoder layers.
        num_attention_heads (`int`, defaults to 12):
            Number of query heads.
        num_key_value_heads (`int`, *optional*, defaults to 4):
            Number of key/value heads (grouped-query attention, Ainslie et al. 2023). `None`: as many as query heads.
        head_dim (`int`, *optional*):
            Width of a head; need not be `hidden_size / num_attention_heads`, which `None` stands for.
        hidden_act (`str`, defaults to `"silu"`):
            Activation of the gate, any name of transformers' `ACT2FN`.
        max_position_embeddings (`int`, defaults to 2048):
            Longest sequence the model is meant for, in tokens.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the initial weights.
        rms_norm_eps (`float`, defaults to 1e-6):
            Added to the mean square before the root (Zhang and Sennrich 2019).
        use_cache (`bool`, defaults to `True`):
            Whether the model returns its key/value cache.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*):
            Ids of the special tokens.
        tie_word_embeddings (`bool`, defaults to `True`):
            Whether the output projection is the embedding table.
        rope_parameters (`dict`, *optional*):
            RoPE (Su et al. 2021) in transformers' form: `rope_type` (default, linear, dynamic, yarn, longrope or
            llama3), `rope_theta`, `partial_rotary_factor` and what the type needs. The older keys `rope_theta`,
            `rope_scaling` and `partial_rotary_factor` are read too.
        no_rope_layers (`list[int]`, *optional*):
            One entry a layer, 1 where the layer rotates and 0 where it does not (NoPE), as in SmolLM3. `None`: all do.
        qk_norm (`bool`, defaults to `False`):
            RMSNorm over each query and key head, before RoPE, as in Qwen3.
        attention_bias (`bool` or `"qkv"`, defaults to `False`):
            Biases in the attention projections: in all four, or with `"qkv"` in query, key and value as in Qwen2.
        attention_dropout (`float`, defaults to 0.0):
            Dropout probability of the attention weights, in [0, 1).
        mlp_bias (`bool`, defaults to `False`):
            Biases in the three MLP projections.
        sliding_window (`int`, *optional*):
            Window in tokens: in a `sliding_attention` layer a token sees itself and the `sliding_window - 1` before.
        layer_types (`list[str]`, *optional*):
            `full_attention` or `sliding_attention`, one entry a layer. `None`: all of them sliding if there is a
            `sliding_window`, else all full.
        final_logit_softcapping (`float`, *optional*):
            Logits become `c * tanh(logits / c)` (Gemma 2).
        z_loss_coef (`float`, defaults to 0.0):
            Weight of the squared log-partition added to the training loss (PaLM, section 5).

    Raises:
        ValueError: for a value that no model can be built from.
    """

    model_type = "hf_decoder"
    _auto_class = "AutoConfig"  # so that the code travels with what is saved
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        # every rank sees only its own heads, so the gradients of the shared per-head scales are summed
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 65536
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = 4
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    rope_parameters: RopeParameters | dict | None = None
    no_rope_layers: list[int] | None = None
    qk_norm: bool = False
    attention_bias: bool | str = False
    attention_dropout: float | int = 0.0
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    final_logit_softcapping: float | int | None = None
    z_loss_coef: float | int = 0.0

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in transformers, whose private names for the attention, which it never saves, a file cannot set."""
        private = ("_attn_implementation", "_attn_implementation_internal")
        return super().from_dict({name: value for name, value in config_dict.items() if name not in private}, **kwargs)

    def __post_init__(self, **kwargs):
        # before anything is derived from them
        for name, largest in LARGEST_SIZES.items():
            # transformers' caches of a sliding window hold one token less than the window, but never none
            value, least = getattr(self, name), 2 if name == "sliding_window" else 1
            if value is not None and not least <= value <= largest:
                raise ValueError(f"{name}={value} is not possible; it must be at least {least} and at most {largest}")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads="
                    f"{self.num_attention_heads}; change one of them or set head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // (3 * 64)) * 64
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        if self.pad_token_id == -1:  # how older configs write none
            self.pad_token_id = None
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id={self.pad_token_id} must be None, or from 0 to {self.vocab_size - 1}")
        rope_scaling = kwargs.pop("rope_scaling", None)
        if rope_scaling is not None and not isinstance(rope_scaling, dict):
            raise ValueError(f"rope_scaling={rope_scaling!r} is not possible; it must be a dictionary, or None")
        # a copy without what is not set, because transformers completes the dictionary in place
        rope_parameters = rope_scaling or self.rope_parameters or {}
        self.rope_parameters = {name: value for name, value in rope_parameters.items() if value is not None}
        if kwargs.get("rope_theta") is None:
            kwargs.pop("rope_theta", None)
        self._check_rope_parameters({"rope_theta": kwargs.get("rope_theta")} | self.rope_parameters)
        super().__post_init__(**kwargs)
        if not self.qk_norm:  # a plan names only modules that are there
            plan = self.base_model_tp_plan
            self.base_model_tp_plan = {k: v for k, v in plan.items() if not k.endswith(("q_norm", "k_norm"))}

    def validate_architecture(self):
        """Checks what depends on more than one field, and every number whose range is not plain."""
        from transformers.activations import ACT2FN  # most of a second, for which importing the config does not wait

        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of num_key_value_heads="
                f"{self.num_key_value_heads}; every key/value head serves the same number of query heads"
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown; choose one of {', '.join(sorted(ACT2FN))}")
        if self.attention_bias not in (True, False, "qkv"):
            raise ValueError(f"attention_bias={self.attention_bias!r} is unknown; choose True, False or 'qkv'")
        for name, (fits, rule) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not fits(value):  # nor does NaN
                raise ValueError(f"{name}={value} is out of range; it {rule}")
        self._check_layers()
        self._check_rotary_dim()

    def _check_layers(self):
        for name in ("layer_types", "no_rope_layers"):
            entries = getattr(self, name)
            if entries is not None and len(entries) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} has {len(entries)} entries but num_hidden_layers={self.num_hidden_layers}; "
                    "give one entry a layer"
                )
        unknown = sorted(set(self.layer_types) - set(LAYER_TYPES))
        if unknown:
            raise ValueError(f"layer_types holds {unknown[0]!r}; choose among {', '.join(LAYER_TYPES)}")
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("layer_types has sliding_attention but sliding_window=None; set the window in tokens")
        if self.no_rope_layers is not None and not set(self.no_rope_layers) <= {0, 1}:
            raise ValueError(f"no_rope_layers={self.no_rope_layers} is not possible; use 1 for RoPE, 0 for none")

    def _check_rotary_dim(self):
        factor = self.rope_parameters.get("partial_rotary_factor")
        factor = 1.0 if factor is None else factor
        if isinstance(factor, bool) or not isinstance(factor, float | int) or not 0.0 < factor <= 1.0:
            raise ValueError(f"partial_rotary_factor={factor!r} is out of range; it must be above 0 and at most 1")
        rotary_dim = int(self.head_dim * factor)
        if rotary_dim == 0 or rotary_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} with partial_rotary_factor={factor} rotates {rotary_dim} dimensions; "
                "RoPE turns pairs, so that number must be even and positive"
            )
        for name in ("short_factor", "long_factor"):
            factors = self.rope_parameters.get(name)
            if factors is not None and len(factors) != rotary_dim // 2:
                raise ValueError(f"rope_parameters[{name!r}] has {len(factors)} entries for {rotary_dim // 2} pairs")

    @staticmethod
    def _check_rope_parameters(rope_parameters: dict[str, Any]):
        """Checks what transformers would only warn of, or answer with a `KeyError`, before it reads the dictionary."""
        unnamed = [name for name in rope_parameters if not isinstance(name, str)]
        if unnamed:
            raise ValueError(f"rope_parameters has the key {unnamed[0]!r}; keys must be names of parameters")
        nested = [name for name, value in rope_parameters.items() if isinstance(value, dict)]
        if nested:
            raise ValueError(f"rope_parameters[{nested[0]!r}] is a dictionary; all layers share the same parameters")
        rope_type = rope_parameters.get("rope_type", rope_parameters.get("type", "default"))
        if rope_type not in tuple(ROPE_TYPES):
            raise ValueError(f"rope_type={rope_type!r} is unknown; choose one of {', '.join(ROPE_TYPES)}")
        for name in ROPE_TYPES[rope_type]:
            if rope_parameters.get(name) is None:
                raise ValueError(f"rope_parameters of type {rope_type!r} lack {name!r}; add it")
        for name in ("short_factor", "long_factor"):
            factors = rope_parameters.get(name)
            if factors is not None and not (
                isinstance(factors, list) and all(isinstance(x, float | int) and 0 < x < float("inf") for x in factors)
            ):
                raise ValueError(f"rope_parameters[{name!r}] must be a list of positive numbers, not {factors!r}")
        for name, low in ROPE_NUMBERS.items():
            value = rope_parameters.get(name)
            if value is not None and (
                isinstance(value, bool)
                or not isinstance(value, float | int)
                or not low <= value < 1e18  # also where a whole number is too large for a tensor
                or not value
            ):
                raise ValueError(
                    f"rope_parameters[{name!r}]={value!r} is out of range; it must be a positive number"
                    + (f" of at least {low:g}" if low else "")
                )
        if not isinstance(rope_parameters.get("truncate", True), bool):
            raise ValueError(f"rope_parameters['truncate']={rope_parameters['truncate']!r} must be True or False")
        if rope_type in ROPE_ORDER:
            (low_name, low), (high_name, high) = ROPE_ORDER[rope_type].items()
            low, high = rope_parameters.get(low_name, low), rope_parameters.get(high_name, high)
            if high <= low:
                raise ValueError(f"rope_parameters[{high_name!r}]={high} must be above {low_name}={low}")


__all__ = ["HfDecoderConfig"]
