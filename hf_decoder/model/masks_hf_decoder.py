"""Which token sees which: one mask for each type of layer, or what stands in its place for an attention of our own."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .attention_hf_decoder import (
    CausalTiles,
    TilePlan,
    may_be_faster_in_tiles,
    stock_kernel_is_faster,
    tile_masks,
    tiled_attention_forward,
)
from .cache_name_hf_decoder import CACHE_NAME
from .operators_hf_decoder import may_call_operators, runs_as_written
from .varlen_hf_decoder import Documents, varlen_attention_forward, varlen_masks

LayerMask = torch.Tensor | TilePlan | CausalTiles | Documents | None

OWN_ATTENTION: dict[type, Callable[..., Any]] = {
    TilePlan: tiled_attention_forward,
    CausalTiles: tiled_attention_forward,
    Documents: varlen_attention_forward,
}


def own_attention(mask: LayerMask) -> Callable[..., Any] | None:
    """What attends by this mask in place of the attention that the model is set to, if anything does."""
    return OWN_ATTENTION.get(type(mask))


def layer_masks(
    decoder: Any,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | dict[str, LayerMask] | None,
    document_positions: torch.Tensor | None,
    cache: Cache | None,
) -> Mapping[str, LayerMask]:
    """One for each type of layer that the decoder has.

    Args:
        decoder: an `HfDecoderModel`.
        inputs_embeds: (B, S, D).
        attention_mask: (B, K), 1 for tokens, 0 for padding, or a prepared mask; or, as `generate()` may have prepared
            them, all that are asked for.
        document_positions: (B, S), where positions mark packed documents.
        cache: of the tokens before.
    """
    if isinstance(attention_mask, dict):
        return attention_mask
    config, training = decoder.config, decoder.training
    of_kind = {"full_attention": None, "sliding_attention": config.sliding_window}
    windows = {kind: of_kind[kind] for kind in config.layer_types}
    if torch.compiler.is_compiling():
        # documents and padding would have to be looked for in the data, which a graph cannot do
        whole = document_positions is None and attention_mask is None and cache is None
        if (
            whole
            and training
            and may_call_operators()
            and _may_replace_stock_kernel(config, training)
            and may_be_faster_in_tiles(inputs_embeds)
            and not stock_kernel_is_faster(inputs_embeds, windows)
        ):
            return {kind: CausalTiles(window) for kind, window in windows.items()}
    elif _may_replace_stock_kernel(config, training) and runs_as_written() and _starts_rows(attention_mask, cache):
        inputs = inputs_embeds, attention_mask, document_positions, windows
        masks = varlen_masks(*inputs, config.head_dim, training) or tile_masks(*inputs)
        if masks is not None:
            return masks
    mask_kwargs = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        # transformers looks for documents only without a cache; one that this call created is empty
        CACHE_NAME: cache if document_positions is None else None,
        "position_ids": document_positions,
    }
    create = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
    return {kind: create[kind](**mask_kwargs) for kind in windows}


def _may_replace_stock_kernel(config: Any, training: bool) -> bool:
    return (
        config._attn_implementation == "sdpa"
        and getattr(config, "is_causal", True)
        and not (training and config.attention_dropout)
    )


def _starts_rows(attention_mask: torch.Tensor | None, cache: Cache | None) -> bool:
    """Whether a call is for rows from their start, and marks no more than their padding."""
    if cache is not None and (type(cache) is not DynamicCache or cache.get_seq_length()):
        return False
    return attention_mask is None or attention_mask.ndim == 2


__all__ = ["LayerMask", "layer_masks", "own_attention"]
