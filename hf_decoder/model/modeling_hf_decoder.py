"""The HfDecoder model: RMSNorm, RoPE, grouped-query attention, SwiGLU, and the heads on top.

Legend of shapes: B batch, S query tokens, K key tokens, D hidden_size, H query heads, G key/value heads, E head_dim,
V vocab_size. Parameter names and their layout on disk are Llama's.
"""

import os
from collections.abc import Callable
from functools import partial, wraps

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.dynamic_module_utils import custom_object_save
from transformers.generation import GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .bitsandbytes_hf_decoder import settle_layers, settle_tied_head, unpack_layers
from .cache_name_hf_decoder import CACHE_NAME, takes_either_cache_name
from .configuration_hf_decoder import HfDecoderConfig
from .fast_products_hf_decoder import fast_products
from .generation_hf_decoder import Decoding
from .loss_hf_decoder import causal_lm_loss, linear_causal_lm_loss, softcap
from .masks_hf_decoder import layer_masks, own_attention
from .norm_hf_decoder import HfDecoderRMSNorm
from .registry_hf_decoder import AUTO_MAP, register_names
from .rotary_hf_decoder import HfDecoderRotaryEmbedding, apply_rotary_pos_emb
from .shared_input_hf_decoder import normed_for, shared_input
from .sizes_hf_decoder import check_loaded_sizes
from .swiglu_hf_decoder import gated_for

register_names()

LOSS_KWARGS = {"num_items_in_batch", "shift_labels", "ignore_index"}


class _EmptyLinear(nn.Linear):
    def reset_parameters(self) -> None:
        pass


def linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
    """A linear map; without torch's initialization where there is nothing to fill, which `from_pretrained` then loads.

    On the meta device that is a fifth of the time that 40M parameters take to be built.
    """
    if torch.get_default_device().type != "meta":
        return nn.Linear(inputs, outputs, bias=bias)
    module = _EmptyLinear(inputs, outputs, bias=bias)
    module.__class__ = nn.Linear
    return module


class HfDecoderMLP(nn.Module):
    """SwiGLU: down(act(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: HfDecoderConfig):
        super().__init__()
        self.gate_proj = linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def input_maps(self) -> tuple[nn.Module, ...]:
        return self.gate_proj, self.up_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_proj, up_proj = maps = self.input_maps()
        for_gate, for_up = shared_input(x, *maps)
        return gated_for(self.down_proj, gate_proj(for_gate), up_proj(for_up), self.act_fn)


def repeat_kv(hidden_states: torch.Tensor, n_rep: int) -> torch.Tensor:
    """(B, G, K, E) -> (B, G * n_rep, K, E), each head n_rep times in a row."""
    if n_rep == 1:
        return hidden_states
    return hidden_states[:, :, None].expand(-1, -1, n_rep, -1, -1).flatten(1, 2)


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
        self.q_proj = linear(config.hidden_size, width, bias=qkv_bias)
        self.k_proj = linear(config.hidden_size, key_value_width, bias=qkv_bias)
        self.v_proj = linear(config.hidden_size, key_value_width, bias=qkv_bias)
        self.o_proj = linear(width, config.hidden_size, bias=output_bias)
        self.use_qk_norm = config.qk_norm
        if self.use_qk_norm:
            self.q_norm = HfDecoderRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = HfDecoderRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def input_maps(self) -> tuple[nn.Module, ...]:
        return self.q_proj, self.k_proj, self.v_proj

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, S, D)
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        past_key_values: Cache | None = kwargs.pop(CACHE_NAME, None)
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        q_proj, k_proj, v_proj = maps = self.input_maps()
        for_query, for_key, for_value = shared_input(hidden_states, *maps)
        query = q_proj(for_query).view(head_shape)  # (B, S, H, E)
        key = k_proj(for_key).view(head_shape)  # (B, S, G, E)
        value = v_proj(for_value).view(head_shape).transpose(1, 2)
        if self.use_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if self.use_rope:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings, for_cache=past_key_values is not None)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, kwargs=kwargs)

        attention_interface = own_attention(attention_mask) or ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        return self.o_proj(attn_output), attn_weights


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
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        with fast_products(hidden_states, self.mlp.down_proj):
            attn_output, _ = self.self_attn(
                hidden_states=normed_for(self.self_attn, self.input_layernorm, hidden_states),
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                **kwargs,
            )
            hidden_states = hidden_states + attn_output
            return hidden_states + self.mlp(normed_for(self.mlp, self.post_attention_layernorm, hidden_states))


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

    @classmethod
    def is_remote_code(cls) -> bool:
        # FSDP2 gives a sharded model a class of torch's making: transformers would save torch's files as the model's.
        return super().is_remote_code() and not cls.__module__.startswith("torch.")

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """Refuses sizes that the weights do not have before transformers makes room for them, and then says so."""
        loaded = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
        if state_dict is None:
            where = load_config.pretrained_model_name_or_path
            check_loaded_sizes(model, loaded[0], f"{where}", load_config.ignore_mismatched_sizes)
        return loaded

    def train(self, mode: bool = True):
        """As in torch; the layers of bitsandbytes are made fit for either mode. `from_pretrained` ends with it too."""
        settle_tied_head(self)
        settle_layers(self, training=mode)
        return super().train(mode)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers; the saved config names every auto class, whatever head is saved."""
        unpack_layers(self)
        self.config.auto_map = dict(AUTO_MAP)
        if not self.is_remote_code():
            os.makedirs(save_directory, exist_ok=True)
            custom_object_save(HfDecoderPreTrainedModel, save_directory)
        if kwargs.get("state_dict") is not None:  # gathered from shards, tied weights are copies of each other
            tied, state = self.all_tied_weights_keys, kwargs["state_dict"]
            kwargs["state_dict"] = {name: value for name, value in state.items() if tied.get(name) not in state}
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
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(B, S)`, *optional*): token ids; either these or `inputs_embeds`.
            attention_mask (`torch.Tensor`, *optional*): `(B, K)` 1 for tokens, 0 for padding, or a prepared mask.
            position_ids (`torch.LongTensor` of shape `(B, S)`, *optional*): positions. Without an `attention_mask` and
                cached tokens, positions that restart inside a row mark packed documents, which do not see each other.
            past_key_values (`Cache`, *optional*): keys and values of earlier tokens; `cache` is another name for it.
            inputs_embeds (`torch.FloatTensor` of shape `(B, S, D)`, *optional*): embeddings in place of `input_ids`.
            use_cache (`bool`, *optional*): whether to fill and return a cache; the config's value by default.

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given.
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
        # only positions that the caller gives can mark documents, and only where no earlier tokens are cached
        document_positions = position_ids if past_key_values is None and attention_mask is None else None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen_tokens
            position_ids = position_ids.unsqueeze(0)

        masks = layer_masks(self, inputs_embeds, attention_mask, document_positions, past_key_values)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        kinds = self.config.layer_types
        # a slice, because pipeline and early-exit tools shorten the model by its config
        for layer_idx, decoder_layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=masks[kinds[layer_idx]],
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **{CACHE_NAME: past_key_values},
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: past_key_values})


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
        self.lm_head = linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def loss_function(self) -> Callable:
        """Our `causal_lm_loss`, or the function that was assigned to this attribute in its place."""
        if hasattr(self, "_loss_function"):
            return self._loss_function
        return partial(causal_lm_loss, z_loss_coef=self._z_loss_coef())

    @loss_function.setter
    def loss_function(self, value: Callable):
        self._loss_function = value

    def _z_loss_coef(self) -> float:
        return self.config.z_loss_coef if self.training else 0.0  # a regulariser, no part of what evaluation measures

    @takes_either_cache_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
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
        """
        config = self.config
        wants_loss = labels is not None or kwargs.get("shift_labels") is not None
        if skip_logits is None:
            skip_logits = self.training
        skip_logits = wants_loss and skip_logits and not hasattr(self, "_loss_function")
        loss = logits = None
        if inputs_embeds is None and not skip_logits and kwargs.keys() <= LOSS_KWARGS:
            cache, use_cache = past_key_values, config.use_cache if use_cache is None else use_cache
            inputs = input_ids, attention_mask, position_ids, cache, use_cache, logits_to_keep
            if (found := Decoding.of_call(self, *inputs)) is not None:
                logits, cache = found
                if wants_loss:
                    loss = self.loss_function(logits=logits, labels=labels, vocab_size=config.vocab_size, **kwargs)
                return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_NAME: cache})

        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden_states = hidden_states[:, keep, :]

        if skip_logits:
            cap = config.final_logit_softcapping
            loss_kwargs = {"z_loss_coef": self._z_loss_coef(), "final_logit_softcapping": cap, **kwargs}
            loss = linear_causal_lm_loss(hidden_states, self.lm_head, labels, **loss_kwargs)
        else:
            with fast_products(hidden_states, self.lm_head):
                logits = self.lm_head(hidden_states)
            logits = softcap(logits, config.final_logit_softcapping)
            if wants_loss:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=config.vocab_size, **kwargs)

        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        with Decoding(self):
            return super().generate(*args, **kwargs)

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        inputs = None
        if not args and (decoding := Decoding.of(self)) is not None:
            inputs = decoding.prepare_inputs(input_ids, **kwargs)
        if inputs is None:
            inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        # PEFT puts its own method in place of this one, and, to 0.21, looks for the cache by the older name alone
        if "prepare_inputs_for_generation" in self.__dict__ and CACHE_NAME in inputs:
            inputs["past_key_values"] = inputs.pop(CACHE_NAME)
        return inputs

    @wraps(GenerationMixin._sample)
    def _sample(self, *args, **kwargs):
        if (decoding := Decoding.of(self)) is not None:
            return decoding.sample(super()._sample, *args, **kwargs)
        return super()._sample(*args, **kwargs)

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        whole_model = super()._valid_auto_compile_criteria(model_kwargs, generation_config)
        if (decoding := Decoding.of(self)) is not None:
            if whole_model:
                if not generation_config.compile_config and decoding.has_static_step(model_kwargs.get(CACHE_NAME)):
                    return False
                decoding.step = None  # transformers compiles the call of the modules, for which it prepares the masks
            elif self.device.type == "cpu" and not generation_config.disable_compile:  # our step compiles itself
                decoding.compiles = True
                decoding.has_static_step(model_kwargs.get(CACHE_NAME))
        return whole_model


class HfDecoderForSequenceClassification(GenericForSequenceClassification, HfDecoderPreTrainedModel):
    """The decoder with a classifier on the last token that is not padding."""

    _auto_class = "AutoModelForSequenceClassification"

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

    def __init__(self, config: HfDecoderConfig):
        HfDecoderPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = HfDecoderModel(config)
        self.dropout = nn.Dropout(0.1)
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
