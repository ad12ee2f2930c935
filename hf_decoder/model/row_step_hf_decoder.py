"""The decoding step of one row on a CPU, uncompiled, in as few calls of torch as it takes.

A call costs some microseconds whatever it computes, and a module's norm or rotation is a dozen of them: on two slow
AVX2 cores 70 and 65 to 95 microseconds of a single token, where those here take 6 to 15 and 7 to 14. (Of two rows and
more the same in few calls has been no faster.) Rounded where the modules round, but for the sum of a rotation.
Shapes: D hidden_size, H query heads, G key/value heads, E head_dim, R its rotated part, K cached tokens and the new
one, V vocab_size.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from .loss_hf_decoder import softcap
from .products_hf_decoder import multiply_row


def decode_row(
    step: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, bias: torch.Tensor | None, store: Callable
) -> torch.Tensor:
    """The logits (1, 1, V) of one token.

    Args:
        step: a `DecodingStep`.
        hidden: its embedding, (1, 1, D).
        cos: (1, 1, R), as `sin`.
        bias: (1, 1, 1, K), minus infinity for padding.
        store: takes a layer's new key and value (1, G, 1, E) and its index, and gives all of them, (1, G, K, E).
    """
    hidden = hidden.view(-1)
    heads, groups, width = step.groups * step.heads_per_group, step.groups, step.head_dim
    turning, rotated = heads + groups, cos.shape[-1]
    cos, sin = cos.view(2, -1), sin.view(2, -1)
    sin = torch.stack((-sin[0], sin[1]))  # of the other half, to be added
    for index, layer in enumerate(step.layers):
        x = _normed(layer.input_norm, hidden)
        all_heads = torch.cat([multiply_row(x, weights) for weights in layer.heads]).view(-1, width)
        both, value = all_heads.narrow(0, 0, turning), all_heads.narrow(0, turning, groups)
        if layer.query_norm is not None:
            queries, keys = both.split((heads, groups))
            queries, keys = normed_in_few_calls(layer.query_norm, queries), normed_in_few_calls(layer.key_norm, keys)
            both = torch.cat((queries, keys))
        if layer.use_rope:
            halves = (both if rotated == width else both[:, :rotated]).view(turning, 2, -1)
            turned = torch.addcmul(halves * cos, halves.flip(1), sin).view(turning, rotated)
            both = turned if rotated == width else torch.cat((turned, both[:, rotated:]), 1)
        query, key = both.narrow(0, 0, heads), both.narrow(0, heads, groups)
        key, value = store(key.view(1, groups, 1, width), value.view(1, groups, 1, width), index)
        if layer.window is not None and key.shape[2] > layer.window:
            key, value = key[:, :, -layer.window :], value[:, :, -layer.window :]
        seen = bias if bias is None else bias[..., -key.shape[2] :]
        attended = attention_by_groups(query.view(1, groups, -1, width), key, value, seen, step.scaling)
        hidden = hidden + multiply_row(attended.reshape(-1), layer.output)
        x = _normed(layer.mlp_norm, hidden)
        x = layer.activation(multiply_row(x, layer.gate)) * multiply_row(x, layer.up)
        hidden = hidden + multiply_row(x, layer.down)
    logits = multiply_row(_normed(step.norm, hidden), step.head)
    return softcap(logits.view(1, 1, -1), step.cap)


def attention_by_groups(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """query (B, G, H / G, E), key and value (B, G, K, E) -> (B, G, H / G, E): a group's heads as rows of one head."""
    return scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling)


def _normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """x (D,) as the module norms it."""
    module, wide = norm.__self__, x.float()
    mean = torch.dot(wide, wide).item() / x.shape[0] + module.variance_epsilon
    return module.weight * (x * (mean**-0.5 if mean else math.inf))


def normed_in_few_calls(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """x (..., D or E) as the module norms it, with half the kernels."""
    module = norm.__self__
    return module.weight * rms_norm(x.float(), (x.shape[-1],), eps=module.variance_epsilon).to(x.dtype)


__all__ = ["attention_by_groups", "decode_row", "normed_in_few_calls"]
