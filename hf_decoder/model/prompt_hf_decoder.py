"""Any number of tokens a row through the whole decoder, by the functions of its modules without their calls.

A prompt, above all, which waits for the Python about thirteen modules a layer. What is computed is the same, and by
the same functions, but for the products, which are those of a decoding step, or under autocast those of the modules.

Shapes: B rows, S new tokens of each, T = B * S, K cached and new ones, D hidden_size, H query heads, E head_dim, V
vocab_size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .decoding_hf_decoder import reading_weights_once
from .loss_hf_decoder import softcap
from .masks_hf_decoder import LayerMask, layer_masks, own_attention
from .parts_hf_decoder import autocast_dtype
from .products_hf_decoder import multiply
from .rotary_hf_decoder import apply_rotary_pos_emb
from .swiglu_hf_decoder import gated_for


def prompt_logits(
    step: Any,
    decoder: Any,
    input_ids: torch.Tensor,
    attention_mask: Any,
    position_ids: torch.Tensor | None,
    cache: Any,
    keep: int,
    product: Callable = multiply,
) -> torch.Tensor | None:
    """The logits (B, keep or S, V) of the last tokens, or of all for 0; None, nothing done, where modules are needed.

    Args:
        step: a `DecodingStep`.
        decoder: the `HfDecoderModel` that it is of.
        input_ids: (B, S).
        attention_mask: (B, K), 1 for tokens, 0 for padding, or what transformers has prepared.
        position_ids: (B or 1, S).
        cache: of any kind, of the tokens before; it holds S tokens more then. None where nothing is kept.
        keep: of how many tokens.
        product: of rows (T, 1, N) and weights.
    """
    dtype = autocast_dtype(input_ids.device)
    with reading_weights_once(input_ids, step.embedding.dtype), step.below_autograd():
        try:
            hidden = nn.functional.embedding(input_ids, step.embedding)
        except IndexError:  # the model says it in words
            return None
        rows, tokens, width = hidden.shape
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(past, past + tokens, device=hidden.device)[None]
        masks = layer_masks(decoder, hidden, attention_mask, None, cache)
        rotation = step.rotary(hidden, position_ids)
        hidden = hidden.view(-1, 1, width)
        for index, (layer, kind) in enumerate(zip(step.layers, decoder.config.layer_types, strict=False)):
            store = None if cache is None else partial(cache.update, layer_idx=index)
            x = _cast_once(layer.input_norm(hidden), dtype).view(rows, tokens, width)
            attended = _attended(step, layer, x, rotation, masks[kind], store, product)
            hidden = hidden + product(attended, layer.output)
            x = _cast_once(layer.mlp_norm(hidden), dtype)
            down = partial(product, weights=layer.down)
            hidden = hidden + gated_for(down, product(x, layer.gate), product(x, layer.up), layer.activation)
        last = hidden.view(rows, tokens, width)[:, -keep:].reshape(-1, 1, width)
        logits = softcap(product(_cast_once(step.norm(last), dtype), step.head), step.cap)
        return logits.view(rows, -1, logits.shape[-1])


def _cast_once(x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """x as autocast, to this dtype, would cast it for each product that reads it."""
    return x if dtype is None or x.dtype != torch.float32 else x.to(dtype)


def _attended(
    step: Any,
    layer: Any,
    x: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    mask: LayerMask,
    store: Callable | None,
    product: Callable,
) -> torch.Tensor:
    """A layer's normed x (B, S, D) -> what its heads see, (T, 1, H * E); their projections are gone with this call."""
    rows, tokens, width = x.shape
    x = x.view(-1, 1, width)
    projected = step.apart([product(x, weights) for weights in layer.heads])
    query, key, value = (heads.view(rows, tokens, -1, step.head_dim) for heads in projected)
    if layer.query_norm is not None:
        query, key = layer.query_norm(query), layer.key_norm(key)
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    if layer.use_rope:
        query, key = apply_rotary_pos_emb(query, key, *rotation, for_cache=store is not None)
    value = value.transpose(1, 2)
    if store is not None:
        key, value = store(key, value)
    attend = own_attention(mask) or ALL_ATTENTION_FUNCTIONS["sdpa"]
    attended, _ = attend(layer.attention, query, key, value, mask, scaling=step.scaling)
    return attended.reshape(len(x), 1, -1)


__all__ = ["prompt_logits"]
