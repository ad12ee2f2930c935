"""Variable-length attention for packed, padded or windowed rows on a CUDA device, without an S x S mask.

The kernel reads documents laid end to end in one long row. It skips padding, other documents, and tokens outside of a
window. Its memory is linear in the length.
Shapes: B batch, S tokens, H query heads, G key/value heads, E head_dim, N documents, T tokens of all documents.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers.utils.import_utils import is_tracing

from hf_decoder.engine.attention.tiles import document_starts
from hf_decoder.engine.precision import product_dtype
from hf_decoder.engine.training.kernels import is_nvidia_with_bf16
from hf_decoder.model.modeling_hf_decoder import LayerMask

MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Documents(LayerMask):
    """Which tokens of a batch attend to each other; used in place of a layer's attention mask."""

    bounds: torch.Tensor  # (N + 1,) int32: where each document starts among the T tokens, and T
    longest: int
    tokens: torch.Tensor | None  # (T,) positions in the flattened batch of B * S; `None`: all, T = B * S
    dtype: torch.dtype  # of the kernel's inputs
    window: int | None = None  # how many last tokens a token sees, itself included; `None`: all of its document

    def attend(self, attention, module, query, key, value, **kwargs) -> tuple[torch.Tensor, None]:
        return varlen_attention_forward(module, query, key, value, self, kwargs["scaling"])


def varlen_masks(
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    document_positions: torch.Tensor | None,
    windows: dict[str, int | None],
    head_dim: int,
    training: bool,
) -> dict[str, Documents | None] | None:
    """A mask for each type of layer; reads the data with one transfer from the device.

    Args:
        inputs_embeds: (B, S, D); the cache must be empty.
        attention_mask: (B, S), 1 for tokens, 0 for padding, where the output is zero. Used only in training, where
            nobody reads the outputs of padding.
        document_positions: (B or 1, S); a document starts where they do not go up by one.
        windows: the window of each type of layer.

    Returns:
        The documents of each type of layer, or `None` for a type for which the stock kernel needs no mask. `None`
        for all if the kernel does not support these inputs.
    """
    if not kernel_takes(inputs_embeds, head_dim) or is_tracing(inputs_embeds):
        return None
    batch, length = inputs_embeds.shape[:2]
    device, dtype = inputs_embeds.device, product_dtype(inputs_embeds)
    documents: Documents | None
    if document_positions is not None:
        documents = _packed_documents(document_positions.to(device).expand(batch, -1), dtype)
    elif attention_mask is None:
        bounds = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
        documents = Documents(bounds, length, None, dtype)
    elif training and attention_mask.shape == (batch, length):
        documents = _padded_documents(attention_mask.to(device, torch.bool), dtype)
    else:
        return None
    if documents is None:
        return None
    one_a_row = documents.tokens is None and len(documents.bounds) == batch + 1
    return {
        kind: None if one_a_row and (window is None or window >= length) else replace(documents, window=window)
        for kind, window in windows.items()
    }


def kernel_takes(inputs_embeds: torch.Tensor, head_dim: int) -> bool:
    """Whether the kernel supports attention of a model with these inputs (B, S, D)."""
    return (
        is_nvidia_with_bf16(inputs_embeds.device)
        and product_dtype(inputs_embeds) in (torch.bfloat16, torch.float16)
        and head_dim <= MAX_HEAD_DIM
        and head_dim % 8 == 0
    )


def _packed_documents(position_ids: torch.Tensor, dtype: torch.dtype) -> Documents:
    """The documents of packed rows (B, S)."""
    columns = torch.arange(position_ids.shape[1], device=position_ids.device)
    starts = document_starts(position_ids)
    first = (starts == columns).flatten()
    count, longest = torch.stack([first.sum(), (columns - starts).max() + 1]).tolist()
    return Documents(_bounds(first, count), longest, None, dtype)


def _padded_documents(mask: torch.Tensor, dtype: torch.dtype) -> Documents | None:
    """The documents (True) of rows (B, S) with padding on either side; `None` if a row has a hole or all are empty."""
    first = mask & ~nn.functional.pad(mask[:, :-1], (1, 0))
    lengths = mask.sum(1)
    numbers = torch.stack([lengths.sum(), first.sum(), (lengths > 0).sum(), lengths.max()])
    total, count, rows, longest = numbers.tolist()
    if count != rows or not rows:  # a hole in a document would shorten the distances in a window
        return None
    if total == mask.numel():
        return Documents(_bounds(first.flatten(), count), longest, None, dtype)
    tokens = _places(mask.flatten(), total)
    return Documents(_bounds(first.flatten()[tokens], count), longest, tokens, dtype)


def _bounds(first: torch.Tensor, count: int) -> torch.Tensor:
    """(T,) whether a token is the first of its document -> (count + 1,) starts of documents, and T."""
    return nn.functional.pad(_places(first, count), (0, 1), value=first.shape[0]).to(torch.int32)


def _places(flags: torch.Tensor, count: int) -> torch.Tensor:
    """Positions (count,) of what is True, without waiting for the device as `nonzero` does."""
    return flags.nonzero_static(size=count).flatten()


def varlen_attention_forward(
    module: nn.Module,
    query: torch.Tensor,  # (B, H, S, E)
    key: torch.Tensor,  # (B, G, S, E)
    value: torch.Tensor,  # (B, G, S, E)
    attention_mask: Documents,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention with the signature of transformers' attention interface; returns (B, S, H, E)."""
    batch, heads, length, head_dim = query.shape
    documents, tokens = attention_mask, attention_mask.tokens
    query, key, value = (x.to(documents.dtype).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if tokens is None:
        output = attend_documents(query, key, value, documents, scaling)
    else:
        query, key, value = (x.index_select(0, tokens) for x in (query, key, value))
        output = attend_documents(query, key, value, documents, scaling)
        output = output.new_zeros(batch * length, heads, head_dim).index_copy(0, tokens, output)
    return output.view(batch, length, heads, head_dim), None


def attend_documents(
    query: torch.Tensor,  # (T, H, E)
    key: torch.Tensor,  # (T, G, E)
    value: torch.Tensor,  # (T, G, E)
    documents: Documents,
    scaling: float,
) -> torch.Tensor:
    """Causal attention (T, H, E) within each document."""
    bounds, longest, window = documents.bounds, documents.longest, documents.window
    # tokens before a token, and after it
    size = (-1 if window is None else window - 1, 0)
    return _kernel()(query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=size)


@lru_cache
def _kernel() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn  # imported late, because this imports torch's compiler

    # the kernel always shares keys between heads; since torch 2.12 the caller must ask for it
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
    return partial(varlen_attn, **grouped)


__all__ = ["Documents", "varlen_attention_forward", "varlen_masks"]
