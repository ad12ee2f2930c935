"""Any number of tokens a row through the whole decoder, by the functions of its modules without their calls.

A prompt, above all, which waits for the Python about thirteen modules a layer. What is computed is the same, and by
the same functions, but for the products, which are those of a decoding step.

Shapes: B rows, S new tokens of each, T = B * S, K cached and new ones, D hidden_size, H query heads, E head_dim, V
vocab_size.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .decoding_hf_decoder import reading_weights_once
from .loss_hf_decoder import softcap
from .masks_hf_decoder import LayerMask, layer_masks, own_attention
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
) -> torch.Tensor | None:
    """The logits (B, keep or S, V) of the last tokens, or of all for 0; None, nothing done, where modules are needed.

    Args:
        step: a `DecodingStep`.
        decoder: the `HfDecoderModel` that it is of.
        input_ids: (B, S).
        attention_mask: (B, K), 1 for tokens, 0 for padding, or what transformers has prepared.
        position_ids: (B or 1, S).
        cache: of any kind, of the tokens before; it holds S tokens more then.
        keep: of how many tokens.
    """
    if cache is None or torch.is_autocast_enabled(input_ids.device.type):
        return None
    with reading_weights_once(input_ids, step.embedding.dtype), step.below_autograd():
        try:
            hidden = nn.functional.embedding(input_ids, step.embedding)
        except IndexError:  # the model says it in words
            return None
        rows, tokens, width = hidden.shape
        if position_ids is None:
            position_ids = torch.arange(tokens, device=hidden.device)[None] + cache.get_seq_length()
        masks = layer_masks(decoder, hidden, attention_mask, None, cache)
        rotation = step.rotary(hidden, position_ids)
        hidden = hidden.view(-1, 1, width)
        for index, (layer, kind) in enumerate(zip(step.layers, decoder.config.layer_types, strict=False)):
            attended = _attended(step, layer, layer.input_norm(hidden), rotation, masks[kind], rows, cache, index)
            hidden = hidden + multiply(attended, layer.output)
            x = layer.mlp_norm(hidden)
            down = partial(multiply, weights=layer.down)
            hidden = hidden + gated_for(down, multiply(x, layer.gate), multiply(x, layer.up), layer.activation)
        last = hidden.view(rows, tokens, width)[:, -keep:].reshape(-1, 1, width)
        logits = softcap(multiply(step.norm(last), step.head), step.cap)
        return logits.view(rows, -1, logits.shape[-1])


def _attended(
    step: Any,
    layer: Any,
    x: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    mask: LayerMask,
    rows: int,
    cache: Any,
    index: int,
) -> torch.Tensor:
    """A layer's normed x (T, 1, D) -> what its heads see, (T, 1, H * E); their projections are gone with this call."""
    products = step.apart([multiply(x, weights) for weights in layer.heads])
    query, key, value = (product.view(rows, len(x) // rows, -1, step.head_dim) for product in products)
    if layer.query_norm is not None:
        query, key = layer.query_norm(query), layer.key_norm(key)
    query, key = query.transpose(1, 2), key.transpose(1, 2)
    if layer.use_rope:
        query, key = apply_rotary_pos_emb(query, key, *rotation)
    key, value = cache.update(key, value.transpose(1, 2), index)
    attend = own_attention(mask) or ALL_ATTENTION_FUNCTIONS["sdpa"]
    attended, _ = attend(layer.attention, query, key, value, mask, scaling=step.scaling)
    return attended.reshape(len(x), 1, -1)


__all__ = ["prompt_logits"]
