"""Chooses the masks of a call's layers that make them use our own attention."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from hf_decoder.engine.assumptions import attends_as_stock
from hf_decoder.engine.attention.choice import chosen_masks, masks_in_graph
from hf_decoder.engine.attention.varlen import varlen_masks
from hf_decoder.engine.stock import fields_of
from hf_decoder.model.modeling_hf_decoder import LayerMask


def engine_masks(
    decoder: Any,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
) -> Mapping[str, LayerMask | None] | None:
    """Masks for types of layer; None, or without a type, if attention uses torch's kernel and the plain masks.

    Args:
        decoder: an `HfDecoderModel`, or a stock one that is attached.
        inputs_embeds: (B, S, D).
        attention_mask: (B, K), 1 for tokens, 0 for padding, or a prepared mask.
        position_ids: (B, S), as the caller gave them; a document starts where they do not go up by one.
        cache: of the previous tokens.
    """
    config, training = fields_of(decoder.config), decoder.training
    windows = {kind: config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types}
    if torch.compiler.is_compiling():
        # a graph cannot look for documents and padding in the data
        whole = position_ids is None and attention_mask is None and cache is None
        is_taken = whole and training and inputs_embeds.device.type == "cpu"
        return _if_stock(decoder, masks_in_graph(config, inputs_embeds, windows)) if is_taken else None
    if cache is not None and (type(cache) is not DynamicCache or cache.get_seq_length()):
        return None
    if attention_mask is not None and attention_mask.ndim != 2:
        return None
    if attention_mask is not None and position_ids is not None and cache is None and bool(attention_mask.all()):
        attention_mask = None  # a mask of ones must not hide documents
    documents = position_ids if cache is None and attention_mask is None else None
    inputs = inputs_embeds, attention_mask, documents, windows
    return _if_stock(decoder, varlen_masks(*inputs, config.head_dim, training) or chosen_masks(config, *inputs))


def _if_stock(decoder: Any, masks: Mapping[str, Any] | None) -> Mapping[str, LayerMask | None] | None:
    """These masks, if there are any and attention is torch's own; to look at all layers takes the longest."""
    return masks if masks and attends_as_stock(decoder) else None


__all__ = ["engine_masks"]
