"""The decoding step on a CPU, uncompiled, in as few calls of torch as it takes.

A call costs some microseconds whatever it computes, and a module's norm or rotation is a dozen of them: on two slow
AVX2 cores 70 and 65 to 95 microseconds of a single token, where those here take 6 to 15 and 7 to 14. Rounded where the
modules round, but for the sum of a rotation.
Shapes: B rows, D hidden_size, H query heads, G key/value heads, E head_dim, R its rotated part, K cached tokens and
the new one, V vocab_size.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from .loss_hf_decoder import softcap
from .products_hf_decoder import AnyWeights, multiply, multiply_row


def decode_eagerly(
    step: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, bias: torch.Tensor | None, store: Callable
) -> torch.Tensor:
    """The logits (B, 1, V) of one token a row.

    Args:
        step: a `DecodingStep`.
        hidden: their embeddings, (B, 1, D).
        cos: (B or 1, 1, R), as `sin`.
        bias: (B, 1, 1, K), minus infinity for padding.
        store: takes a layer's new keys and values (B, G, 1, E) and its index, and gives all of them, (B, G, K, E).
    """
    rows = hidden.shape[0]
    hidden = hidden.view(rows, -1)
    heads, groups, width = step.groups * step.heads_per_group, step.groups, step.head_dim
    turning, rotated = heads + groups, cos.shape[-1]
    cos, sin = cos.view(-1, 1, 2, rotated // 2), sin.view(-1, 1, 2, rotated // 2)
    sin = torch.cat((-sin[:, :, :1], sin[:, :, 1:]), 2)  # of the other half, to be added
    for index, layer in enumerate(step.layers):
        x = _normed(layer.input_norm, hidden)
        products = [_product(x, weights) for weights in layer.heads]
        all_heads = products[0] if len(products) == 1 else torch.cat(products, -1)
        both, value = all_heads.view(rows, -1, width).split((turning, groups), 1)
        if layer.query_norm is not None:
            both = torch.cat((_normed(layer.query_norm, both[:, :heads]), _normed(layer.key_norm, both[:, heads:])), 1)
        if layer.use_rope:
            halves = both[..., :rotated].view(rows, turning, 2, -1)
            turned = torch.addcmul(halves * cos, halves.flip(2), sin).view(rows, turning, rotated)
            both = turned if rotated == width else torch.cat((turned, both[..., rotated:]), -1)
        query = both[:, :heads].view(rows, groups, -1, width)
        key, value = store(both[:, heads:].view(rows, groups, 1, width), value.view(rows, groups, 1, width), index)
        if layer.window is not None and key.shape[2] > layer.window:
            key, value = key[:, :, -layer.window :], value[:, :, -layer.window :]
        seen = bias if bias is None else bias[..., -key.shape[2] :]
        attended = attention_by_groups(query, key, value, seen, step.scaling)
        hidden = hidden + _product(attended.reshape(rows, -1), layer.output)
        x = _normed(layer.mlp_norm, hidden)
        x = layer.activation(_product(x, layer.gate)) * _product(x, layer.up)
        hidden = hidden + _product(x, layer.down)
    return softcap(_product(_normed(step.norm, hidden), step.head).unsqueeze(1), step.cap)


def attention_by_groups(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """query (B, G, H / G, E), key and value (B, G, K, E) -> (B, G, H / G, E): a group's heads as rows of one head."""
    return scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling)


def _product(x: torch.Tensor, weights: AnyWeights) -> torch.Tensor:
    """x (B, N) -> (B, M)."""
    if x.shape[0] == 1:
        return multiply_row(x.view(-1), weights).view(1, -1)
    return multiply(x.unsqueeze(1), weights).squeeze(1)


def _normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """x (..., D or E) as the module norms it."""
    module, wide, size = norm.__self__, x.float(), x.shape[-1]
    if x.numel() == size:
        row = wide.view(-1)
        mean = torch.dot(row, row).item() / size + module.variance_epsilon
        return module.weight * (x * (mean**-0.5 if mean else math.inf))
    scales = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(size).add_(module.variance_epsilon)
    return module.weight * (wide * scales.rsqrt_()).to(x.dtype)


__all__ = ["attention_by_groups", "decode_eagerly"]
