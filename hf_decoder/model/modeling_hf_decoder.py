"""The HfDecoder model: RMSNorm, RoPE, grouped-query attention, SwiGLU, and the heads on top.

Shapes: B batch, S query tokens, K key tokens, D hidden_size, H query heads, G key/value heads, E head_dim, R the part
of it that RoPE rotates, V vocab_size. Parameter names and their layout on disk are Llama's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_kernel_forward_from_hub
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_hf_decoder import AUTO_MAP, HfDecoderConfig
from .loss_hf_decoder import causal_lm_loss, is_traced, linear_causal_lm_loss, softcap

# transformers calls the cache `cache` from 5.24 on, and `past_key_values` before.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"

# Trainer's label smoothing, pipelines and `transformers serve` look a class up by its name in these tables.
for table, auto_class in {
    "MODEL_MAPPING_NAMES": "AutoModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "AutoModelForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "AutoModelForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "AutoModelForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "AutoModelForQuestionAnswering",
}.items():
    getattr(modeling_auto, table)[HfDecoderConfig.model_type] = AUTO_MAP[auto_class].partition(".")[2]


def takes_either_cache_name(forward: Callable) -> Callable:
    """Lets callers of `forward`, which takes `cache`, name it `past_key_values`, as older transformers does."""
    if CACHE_NAME == "cache":
        return deprecate_kwarg("past_key_values", "5.40.0", new_name="cache", raise_if_both_names=True)(forward)

    @wraps(forward)
    def renamed(*args, **kwargs):
        if (cache := kwargs.pop("past_key_values", None)) is not None:
            kwargs["cache"] = cache
        return forward(*args, **kwargs)

    return renamed


@use_kernel_forward_from_hub("RMSNorm")
class HfDecoderRMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019), with the statistics in fp32."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class HfDecoderRotaryEmbedding(nn.Module):
    """Computes the cosines and sines of RoPE (Su et al. 2021).

    transformers restores the buffers of a class whose name holds `RotaryEmbedding` from `original_inv_freq`.
    """

    def __init__(self, config: HfDecoderConfig):
        super().__init__()
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    def _apply(self, fn, recurse=True):
        # `.to(dtype)` changes the type of every buffer, but angles far into a text need frequencies in fp32
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    @staticmethod
    def compute_default_rope_parameters(
        config: HfDecoderConfig, device: torch.device | None = None, seq_len: int | None = None, **kwargs
    ) -> tuple[torch.Tensor, float]:
        """Returns the inverse frequencies theta**(-2i/R) of the R rotated dimensions, (R/2,), and the scale 1."""
        rotary_dim = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).to(device=device, dtype=torch.float) / rotary_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids (B or 1, S) -> cos, sin (B or 1, S, R) in x's dtype; angles in fp32 whatever that dtype is."""
        # an outer product written as a multiplication: autocast leaves it in fp32
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Turns (a, b) halves of the last dimension into (-b, a)."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def apply_rotary_pos_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first R dimensions of x (B, heads, S, E) by cos and sin (B or 1, S, R)."""
    rotary_dim = cos.shape[-1]
    if rotary_dim < x.shape[-1]:
        return torch.cat((apply_rotary_pos_emb(x[..., :rotary_dim], cos, sin), x[..., rotary_dim:]), dim=-1)
    return x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1)


class HfDecoderMLP(nn.Module):
    """SwiGLU: down(act(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: HfDecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,  # (B, H, S, E)
    key: torch.Tensor,  # (B, G, K, E)
    value: torch.Tensor,  # (B, G, K, E)
    attention_mask: torch.Tensor | None,  # (B, 1, S, K), added to the scores
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, softmax in fp32. Returns the output (B, S, H, E) and the weights (B, H, S, K)."""
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class LayerMask:
    """Takes the place of a layer's attention mask; its `attend` calls the attention function."""

    def attend(self, attention: Callable, module, query, key, value, **kwargs) -> tuple[torch.Tensor, None]:
        """Takes query (B, H, S, E), key and value (B, G, S, E); returns the output (B, S, H, E) and no weights."""
        raise NotImplementedError


@dataclass(frozen=True)
class PackedDocuments(LayerMask):
    """Attends within each document of packed rows: memory grows with the longest document, not with the row."""

    lengths: list[int]  # of all documents of all rows, which add up to B * S
    masks: dict[int, torch.Tensor]  # of each length that a sliding window cuts, (length, length), True where one sees

    @classmethod
    def of(cls, lengths: list[int], window: int | None, device: torch.device) -> "PackedDocuments":
        cut = {length for length in lengths if window is not None and length > window}
        seen = {n: torch.ones(n, n, dtype=torch.bool, device=device).tril().triu(1 - window) for n in cut}
        return cls(lengths, seen)

    def attend(self, attention: Callable, module, query, key, value, **kwargs) -> tuple[torch.Tensor, None]:
        batch, _, length, _ = query.shape
        # all rows one after the other, then apart at the documents: (1, heads, document, E) each
        rows = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))
        documents = zip(*(x.split(self.lengths, dim=2) for x in rows), strict=True)
        masks = [self.masks[length].to(query.device) if length in self.masks else None for length in self.lengths]
        parts = [attention(module, *x, mask, **kwargs)[0] for x, mask in zip(documents, masks, strict=True)]
        return torch.cat(parts, dim=1).view(batch, length, *parts[0].shape[2:]), None


def hides_nothing(attention_mask: Any) -> bool:
    """Whether a mask (B, K) has no padding. Such a mask is dropped: transformers looks for documents without one."""
    return isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 and bool(attention_mask.all())


def document_starts(position_ids: torch.Tensor) -> torch.Tensor:
    """Marks in rows of positions (B, S) where a document starts: a position that is not its predecessor + 1."""
    return nn.functional.pad(position_ids.diff(dim=-1) != 1, (1, 0), value=True)


def document_lengths(position_ids: torch.Tensor) -> list[int]:
    """Lengths of the documents in rows of positions (B, S)."""
    starts = document_starts(position_ids).flatten()
    return nn.functional.pad(starts.nonzero().flatten(), (0, 1), value=starts.numel()).diff().tolist()


class HfDecoderAttention(nn.Module):
    """Grouped-query attention with RoPE, optional QK-norm, sliding window and NoPE."""

    def __init__(self, config: HfDecoderConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        self.use_rope = config.no_rope_layers is None or bool(config.no_rope_layers[layer_idx])

        width, key_value_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        qkv_bias, output_bias = bool(config.attention_bias), config.attention_bias is True
        self.q_proj = nn.Linear(config.hidden_size, width, bias=qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_width, bias=qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_width, bias=qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=output_bias)
        self.use_qk_norm = config.qk_norm
        if self.use_qk_norm:
            self.q_norm = HfDecoderRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = HfDecoderRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, S, D)
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | LayerMask | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cache: Cache | None = kwargs.pop(CACHE_NAME, None)
        head_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(head_shape)  # (B, S, H, E)
        key = self.k_proj(hidden_states).view(head_shape)  # (B, S, G, E)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)
        if self.use_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if self.use_rope:
            query, key = (apply_rotary_pos_emb(x, *position_embeddings) for x in (query, key))
        attn_output, attn_weights = self.attend(query, key, value, attention_mask, cache, **kwargs)
        return self.o_proj(attn_output), attn_weights

    def attend(
        self,
        query: torch.Tensor,  # (B, H, S, E)
        key: torch.Tensor,  # (B, G, S, E)
        value: torch.Tensor,  # (B, G, S, E)
        attention_mask: torch.Tensor | LayerMask | None,
        cache: Cache | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Adds to the cache and attends, by the function the config names. Returns (B, S, H * E) and the weights."""
        if CACHE_NAME != "cache" and not isinstance(cache, (Cache, type(None))):
            kwargs["cache"] = cache  # a paged cache, which before 5.24 the attention function updates
        elif cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)  # a paged one changes kwargs
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        inputs = [query, key, value]
        if isinstance(attention_mask, LayerMask):
            attention = partial(attention_mask.attend, attention)
        else:
            inputs.append(attention_mask)  # by position: attention functions differ in the parameter's name
        dropout = self.attention_dropout if self.training else 0.0
        settings = {"dropout": dropout, "scaling": self.scaling, "sliding_window": self.sliding_window}
        attn_output, attn_weights = attention(self, *inputs, **settings, **kwargs)
        return attn_output.flatten(2).contiguous(), attn_weights


class HfDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, config: HfDecoderConfig, layer_idx: int):
        super().__init__()
        self.self_attn = HfDecoderAttention(config, layer_idx)
        self.mlp = HfDecoderMLP(config)
        self.input_layernorm = HfDecoderRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = HfDecoderRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, S, D)
        attention_mask: torch.Tensor | LayerMask | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        attn_output, _ = self.self_attn(hidden_states=normed, attention_mask=attention_mask, **kwargs)
        hidden_states = hidden_states + attn_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class HfDecoderPreTrainedModel(PreTrainedModel):
    """What transformers asks a model class to declare."""

    config: HfDecoderConfig
    config_class = HfDecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HfDecoderLayer"]
    _skip_keys_device_placement = [CACHE_NAME]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": HfDecoderLayer, "attentions": HfDecoderAttention}

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Saves as transformers does; the config names every auto class, whatever head is saved."""
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)


class HfDecoderModel(HfDecoderPreTrainedModel):
    """The decoder without a head: token ids or embeddings in, hidden states (B, S, D) out."""

    _auto_class = "AutoModel"

    def __init__(self, config: HfDecoderConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(HfDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.norm = HfDecoderRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = HfDecoderRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @takes_either_cache_name
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(B, S)`, *optional*): token ids; either these or `inputs_embeds`.
            attention_mask (`torch.Tensor`, *optional*): `(B, K)` 1 for tokens, 0 for padding, or a prepared mask.
            position_ids (`torch.LongTensor` of shape `(B, S)`, *optional*): positions. If `cache` is `None` and no
                token is padding, a position that is not its predecessor plus one starts another packed document.
                Documents do not see each other. Llama looks for them only without a mask and without a cache.
            cache (`Cache`, *optional*): keys and values of earlier tokens; `past_key_values` is its older name.
            inputs_embeds (`torch.FloatTensor` of shape `(B, S, D)`, *optional*): embeddings in place of `input_ids`.
            use_cache (`bool`, *optional*): whether to fill and return a cache; the config's value by default.

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given, for an id outside the
                vocabulary (on a CPU), and for a mask or positions of another length than the input.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            try:
                inputs_embeds = self.embed_tokens(input_ids)
            except IndexError as error:
                raise ValueError(
                    f"input_ids holds ids between {input_ids.min()} and {input_ids.max()}, but the vocabulary ends at "
                    f"{self.config.vocab_size - 1}; use the tokenizer that belongs to this model"
                ) from error
        length = inputs_embeds.shape[1]
        columns = length if position_ids is None else position_ids.shape[-1]
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 and columns == length:
            columns = attention_mask.shape[1] if cache is None else min(length, attention_mask.shape[1])
        if columns != length:
            raise ValueError(f"attention_mask or position_ids has {columns} columns, but the input {length} tokens")
        masks = self.layer_masks(inputs_embeds, attention_mask, position_ids, cache)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen_tokens = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(length, device=inputs_embeds.device) + seen_tokens).unsqueeze(0)
        hidden_states = self.run_layers(
            inputs_embeds,
            masks,
            position_ids=position_ids,
            use_cache=use_cache,
            position_embeddings=self.rotary_emb(inputs_embeds, position_ids),
            **{CACHE_NAME: cache},
            **kwargs,
        )
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE_NAME: cache})

    def layer_masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
    ) -> Mapping[str, torch.Tensor | LayerMask | None]:
        """Returns a mask for each type of layer from the arguments of `forward`; with sdpa, documents attend apart."""
        if isinstance(attention_mask, dict):  # prepared by `generate()`
            return attention_mask
        config = self.config
        windows = {kind: config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types}
        traced = is_traced(inputs_embeds)
        may_be_packed = position_ids is not None and cache is None
        if may_be_packed and not traced and hides_nothing(attention_mask):
            attention_mask = None
        has_documents = may_be_packed and attention_mask is None
        if has_documents and not traced and getattr(config, "is_causal", True):
            lengths = document_lengths(position_ids.expand(inputs_embeds.shape[0], -1))
            has_documents = len(lengths) > inputs_embeds.shape[0]
            if has_documents and config._attn_implementation == "sdpa":
                device = inputs_embeds.device
                return {kind: PackedDocuments.of(lengths, window, device) for kind, window in windows.items()}
        create = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        inputs = {"config": config, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        inputs |= {CACHE_NAME: cache, "position_ids": position_ids if has_documents else None}
        if may_be_packed and traced and not has_documents:  # a mask whose values nobody can look at may be all ones
            starts = document_starts(position_ids.expand(inputs_embeds.shape[0], -1))
            documents = (starts & attention_mask.bool().all()).cumsum(-1)
            inputs["and_mask_function"] = lambda b, head, q, k: documents[b, q] == documents[b, k]
        return {kind: create[kind](**inputs) for kind in windows}

    def run_layers(
        self, hidden_states: torch.Tensor, masks: Mapping[str, torch.Tensor | LayerMask | None], **kwargs
    ) -> torch.Tensor:
        """(B, S, D) through all layers and the last norm, with the mask of each type of layer."""
        kinds = self.config.layer_types
        # a slice, because pipeline and early-exit tools shorten the model by its config
        for layer_idx, decoder_layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            hidden_states = decoder_layer(hidden_states, attention_mask=masks[kinds[layer_idx]], **kwargs)
        return self.norm(hidden_states)


class HfDecoderForCausalLM(HfDecoderPreTrainedModel, GenerationMixin):
    """The decoder with a language-modelling head."""

    _auto_class = "AutoModelForCausalLM"

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: HfDecoderConfig):
        super().__init__(config)
        self.model = HfDecoderModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def loss_function(self) -> Callable:
        """Our `causal_lm_loss`, or the function that was assigned to this attribute in its place."""
        if hasattr(self, "_loss_function"):
            return self._loss_function
        return partial(causal_lm_loss, z_loss_coef=self.z_loss_coef)

    @loss_function.setter
    def loss_function(self, value: Callable):
        self._loss_function = value

    @property
    def z_loss_coef(self) -> float:
        """Weight of the z-loss: a regulariser, which evaluation does not measure."""
        return self.config.z_loss_coef if self.training else 0.0

    def linear_loss(self, hidden_states: torch.Tensor, labels: torch.Tensor | None, **kwargs) -> torch.Tensor:
        """Returns the loss of hidden states (B, S, D) without holding their logits."""
        cap = self.config.final_logit_softcapping
        kwargs = {"z_loss_coef": self.z_loss_coef, "final_logit_softcapping": cap, **kwargs}
        return linear_causal_lm_loss(hidden_states, self.lm_head, labels, **kwargs)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., V)."""
        return softcap(self.lm_head(hidden_states), self.config.final_logit_softcapping)

    @takes_either_cache_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """
        Args:
            labels (`torch.LongTensor` of shape `(B, S)`, *optional*): the input ids, -100 where no loss is wanted;
                shifted here. `shift_labels` in the keyword arguments takes labels that are shifted already.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): logits of only the last so many positions, or of
                those at these indices; 0 means all.
            skip_logits (`bool`, *optional*): with labels, return `logits=None` and form the loss without ever holding
                the (B, S, V) logits. `None`: in training mode, the way that Liger kernels do it too. Pass `False` to
                have the logits while training, `True` to save their memory in an evaluation that reads only the loss.

        Raises:
            ValueError: for labels of another shape than the positions whose logits are wanted.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        hidden_states = keep_positions(outputs.last_hidden_state, logits_to_keep)
        targets = labels if kwargs.get("shift_labels") is None else kwargs["shift_labels"]
        is_shifted = targets is not labels or isinstance(logits_to_keep, int)  # positions of one's choice have no next
        if targets is not None and (targets.shape != hidden_states.shape[:-1] or not is_shifted):
            raise ValueError(
                f"labels of shape {list(targets.shape)} do not belong to logits of {list(hidden_states.shape[:-1])} "
                "positions; leave logits_to_keep out, or give shift_labels of just these positions"
            )
        skip_logits = self.training if skip_logits is None else skip_logits
        loss = logits = None
        if targets is not None and skip_logits and not hasattr(self, "_loss_function"):
            loss = self.linear_loss(hidden_states, labels, **kwargs)
        else:
            logits = self.compute_logits(hidden_states)
            if targets is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # generate() reads its signature
    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        """Prepares as transformers does; where LongRoPE changes its frequencies, cached keys have the former ones."""
        rope, cache = self.config.rope_parameters, kwargs.get(CACHE_NAME)
        if rope["rope_type"] == "longrope" and cache is not None:
            limit = rope["original_max_position_embeddings"]
            if input_ids.shape[1] > limit >= cache.get_seq_length() > 0:
                kwargs |= {CACHE_NAME: DynamicCache(config=self.config), "next_sequence_length": None}
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)


def keep_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Picks the last positions of (B, S, D), or those at indices (N,) or (B, N), or where a mask (B, S) is True."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.ndim == 2 and logits_to_keep.dtype != torch.bool:
        return hidden_states.gather(1, logits_to_keep[..., None].expand(-1, -1, hidden_states.shape[-1]))
    return hidden_states[logits_to_keep] if logits_to_keep.ndim == 2 else hidden_states[:, logits_to_keep]


def counts_labels(forward: Callable) -> Callable:
    """Rescales a head's mean loss, so that accumulated batches add up to the mean over all their labels."""

    @wraps(forward)
    def counting(self, *args, num_items_in_batch: Any = None, **kwargs):
        outputs = forward(self, *args, **kwargs)
        if num_items_in_batch is not None and kwargs.get("labels") is not None and not isinstance(outputs, tuple):
            counted = (kwargs["labels"] != -100).sum().to(outputs.loss.device)
            # the mean over no label is not a number
            outputs.loss = outputs.loss.where(counted > 0, 0.0) * (counted / num_items_in_batch)
        return outputs

    return counting


class HfDecoderForSequenceClassification(GenericForSequenceClassification, HfDecoderPreTrainedModel):
    """The decoder with a classifier on the last token that is not padding."""

    _auto_class = "AutoModelForSequenceClassification"
    forward = counts_labels(GenericForSequenceClassification.forward)

    # The Generic constructors ask AutoModel for the decoder, which a remote-code class is not registered with.
    def __init__(self, config: HfDecoderConfig):
        HfDecoderPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = HfDecoderModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class HfDecoderForTokenClassification(GenericForTokenClassification, HfDecoderPreTrainedModel):
    """The decoder with a classifier on every token."""

    _auto_class = "AutoModelForTokenClassification"
    forward = counts_labels(GenericForTokenClassification.forward)

    def __init__(self, config: HfDecoderConfig):
        HfDecoderPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = HfDecoderModel(config)
        dropouts = (getattr(config, "classifier_dropout", None), getattr(config, "hidden_dropout", None), 0.1)
        self.dropout = nn.Dropout(next(p for p in dropouts if p is not None))
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class HfDecoderForQuestionAnswering(GenericForQuestionAnswering, HfDecoderPreTrainedModel):
    """The decoder with a start and an end score for every token (extractive question answering)."""

    _auto_class = "AutoModelForQuestionAnswering"

    def __init__(self, config: HfDecoderConfig):
        HfDecoderPreTrainedModel.__init__(self, config)
        self.model = HfDecoderModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


__all__ = [
    "HfDecoderForCausalLM",
    "HfDecoderForQuestionAnswering",
    "HfDecoderForSequenceClassification",
    "HfDecoderForTokenClassification",
    "HfDecoderModel",
    "HfDecoderPreTrainedModel",
]
