"""Tiled attention for whole sequences (causal, windowed or packed) without an S x S mask.

The matmuls of a tile run at full speed and the heads of a group share theirs, so keys and values are never repeated.
Memory is linear in the length: a tile's weights live only while the tile is computed, and the backward pass computes
them again (Dao et al. 2022, section 3.1). `choice` says where that is faster than torch's flash kernel.
Shapes: B batch, S tokens, H query heads, G key/value heads, E head_dim, T rows of a tile, K keys that a tile sees.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from hf_decoder.engine.calibration import bucket
from hf_decoder.engine.operators import operator
from hf_decoder.engine.precision import autocast_dtype, fast_dtype
from hf_decoder.engine.training.kernels import applied
from hf_decoder.model.modeling_hf_decoder import LayerMask

LONG, STEPS = 2048, 16  # rows of more tokens have that many numbers of keys; shorter ones, one for each tile

aten = torch.ops.aten


@dataclass(frozen=True)
class Tile:
    """Queries `start` to `stop`, which see keys `first_key` to `last_key`."""

    start: int
    stop: int
    first_key: int
    last_key: int
    bias: torch.Tensor  # added to the scores of the last columns: (1 or B, 1, T, columns), 0 or -inf


@dataclass(frozen=True)
class TilePlan(LayerMask):
    """Which query sees which key, planned once per forward pass; used in place of a layer's attention mask."""

    tiles: tuple[Tile, ...]

    def attend(self, attention, module, query, key, value, **kwargs) -> tuple[torch.Tensor, None]:
        return tiled_attention_forward(module, query, key, value, self, kwargs["scaling"])


@dataclass
class CausalTiles(LayerMask):
    """A plan for compiled graphs, where the operator makes it: one document per row."""

    window: int | None
    rows: int  # of a tile

    def attend(self, attention, module, query, key, value, **kwargs) -> tuple[torch.Tensor, None]:
        return tiled_attention_forward(module, query, key, value, self, kwargs["scaling"])


class CausalInFp32(LayerMask):
    """Rows of one document without a window, by torch's kernel in fp32."""

    def attend(self, attention, module, query, key, value, **kwargs) -> tuple[torch.Tensor, None]:
        return tiled_attention_forward(module, query, key, value, self, kwargs["scaling"])


def document_starts(position_ids: torch.Tensor) -> torch.Tensor:
    """(B, S) positions -> (B, S) column at which each token's document starts; a jump in positions starts one."""
    columns = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=-1) != 1
    return torch.where(starts, columns, 0).cummax(dim=-1).values


def plan_tiles(
    position_ids: torch.Tensor, dtype: torch.dtype, sliding_window: int | None = None, rows: int = 64
) -> TilePlan:
    """Lays out the tiles for rows of one or more documents each.

    Tiles see some keys more than they need, which are masked, so that few numbers of keys occur. oneDNN compiles a
    product anew for each of them: 3 to 8 ms in bf16, where the product takes 0.1 to 1.

    Args:
        position_ids: (B, S); positions that do not go up by one mark the start of a document.
        dtype: of the scores that the tiles' biases are added to.
        sliding_window: last tokens that a token sees, itself included; all of its document when `None`.
        rows: of a tile.
    """
    length = position_ids.shape[1]
    starts = document_starts(position_ids)
    # one transfer from the device for all tiles
    first_documents, last_documents = starts[:, ::rows].amin(0).tolist(), starts.amax(0)[rows - 1 :: rows].tolist()
    last_documents.append(int(starts[:, -1].max()))
    columns = torch.arange(length, device=position_ids.device)
    step = rows if length <= LONG else bucket(length // STEPS, rows, length)
    causal: dict[tuple[int, int], torch.Tensor] = {}

    tiles = []
    for index, start in enumerate(range(0, length, rows)):
        stop = min(start + rows, length)
        first_key = first_documents[index]
        windowed = False
        if sliding_window is not None and stop - sliding_window > first_key:
            windowed = True
            first_key = max(first_key, start - sliding_window + 1)
        elif first_key > 0 and stop - first_key <= LONG and dtype != torch.float32:
            first_key = first_key // rows * rows
        last_key = stop
        if last_documents[index] <= first_key and not windowed:  # one document: only the last columns have a mask
            last_key = min(-(-stop // step) * step, length) if first_key == 0 else stop
            sizes = stop - start, last_key - start
            if sizes not in causal:
                hidden = torch.ones(sizes, dtype=torch.bool, device=position_ids.device).triu(1)
                causal[sizes] = _bias(hidden, dtype)[None, None]
            bias = causal[sizes]
        else:
            query, key = columns[start:stop, None], columns[None, first_key:stop]
            hidden = (key > query) | (key < starts[:, start:stop, None])
            if sliding_window is not None:
                hidden |= key <= query - sliding_window
            bias = _bias(hidden, dtype)[:, None]
        tiles.append(Tile(start, stop, first_key, last_key, bias))
    return TilePlan(tuple(tiles))


def _bias(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


def tiled_attention_forward(
    module: nn.Module,
    query: torch.Tensor,  # (B, H, S, E)
    key: torch.Tensor,  # (B, G, S, E)
    value: torch.Tensor,  # (B, G, S, E)
    attention_mask: TilePlan | CausalTiles | CausalInFp32,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention with the signature of transformers' attention interface; returns (B, S, H, E)."""
    dtype = autocast_dtype(query.device)
    if dtype is not None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    with torch.autocast(query.device.type, enabled=False):
        if isinstance(attention_mask, CausalTiles):
            tiles = attention_mask.window, attention_mask.rows
            return _CompiledTiledAttention.apply(query, key, value, *tiles, scaling), None
        if isinstance(attention_mask, CausalInFp32):
            return applied(_StockCausalAttention, query, key, value, scaling), None
        return applied(_TiledAttention, query, key, value, attention_mask, scaling), None


def _weights(query, key, tile: Tile, scaling: float, rooms: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
    """Softmax of a tile's scores, (B * G, H / G * T, K); in one of two `rooms` of that many numbers, or more."""
    batch, heads, _, head_dim = query.shape
    groups, rows, keys = key.shape[1], tile.stop - tile.start, tile.last_key - tile.first_key
    tile_query = (query[:, :, tile.start : tile.stop] * scaling).reshape(batch * groups, -1, head_dim)
    tile_key = key[:, :, tile.first_key : tile.last_key].reshape(batch * groups, keys, head_dim)
    shape = batch * groups, heads // groups * rows, keys
    places = [None, None] if rooms is None else [room[: math.prod(shape)].view(shape) for room in rooms]
    scores = torch.bmm(tile_query, tile_key.transpose(1, 2), out=places[0])
    bias = tile.bias.to(scores.dtype)  # half precision may be multiplied in fp32
    scores.view(batch, heads, rows, keys)[..., keys - bias.shape[-1] :].add_(bias)
    return torch.softmax(scores, dim=-1, out=places[1])  # in fp32 inside, whatever the dtype


def _in_fast_precision(*tensors: torch.Tensor) -> list[torch.Tensor]:
    dtype = fast_dtype(tensors[0].device, tensors[0].dtype)
    return [tensor.to(dtype) for tensor in tensors]


def _attend(query, key, value, plan: TilePlan, scaling: float) -> torch.Tensor:
    batch, heads, length, head_dim = query.shape
    groups = key.shape[1]
    output = query.new_empty(batch, length, heads, head_dim)
    query, key, value = _in_fast_precision(query, key, value)
    most = max((tile.stop - tile.start) * (tile.last_key - tile.first_key) for tile in plan.tiles)
    rooms = query.new_empty(2, batch * heads * most)  # large ones that are new for each tile cost more than the tile
    for tile in plan.tiles:
        tile_value = value[:, :, tile.first_key : tile.last_key].reshape(batch * groups, -1, head_dim)
        tile_output = torch.bmm(_weights(query, key, tile, scaling, rooms), tile_value)
        output[:, tile.start : tile.stop] = tile_output.view(batch, heads, -1, head_dim).transpose(1, 2)
    return output


def _gradients(
    grad_output, query, key, value, plan: TilePlan, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, _, head_dim = query.shape
    groups = key.shape[1]
    dtype, grad_query = query.dtype, torch.empty_like(query)
    grad_output, query, key, value = _in_fast_precision(grad_output, query, key, value)
    # fp32 whatever the dtype: many tiles are added up
    grad_key = torch.zeros_like(key, dtype=torch.float32)
    grad_value = torch.zeros_like(value, dtype=torch.float32)
    for tile in plan.tiles:
        rows, keys = slice(tile.start, tile.stop), slice(tile.first_key, tile.last_key)
        count = tile.last_key - tile.first_key
        weights = _weights(query, key, tile, scaling)
        tile_query = query[:, :, rows].reshape(batch * groups, -1, head_dim)
        tile_key = key[:, :, keys].reshape(batch * groups, count, head_dim)
        tile_value = value[:, :, keys].reshape(batch * groups, count, head_dim)
        tile_grad = grad_output[:, rows].transpose(1, 2).reshape(batch * groups, -1, head_dim)
        shape = (batch, groups, count, head_dim)
        grad_value[:, :, keys] += torch.bmm(weights.transpose(1, 2), tile_grad).view(shape)
        grad_weights = torch.bmm(tile_grad, tile_value.transpose(1, 2))
        grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_scores *= scaling
        grad_query[:, :, rows] = torch.bmm(grad_scores, tile_key).view(batch, heads, -1, head_dim)
        grad_key[:, :, keys] += torch.bmm(grad_scores.transpose(1, 2), tile_query).view(shape)
    return grad_query, grad_key.to(dtype), grad_value.to(dtype)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, plan, scaling):
        ctx.save_for_backward(query, key, value)
        ctx.plan, ctx.scaling = plan, scaling
        return _attend(query, key, value, plan, scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        with torch.autocast(grad_output.device.type, enabled=False):
            return *_gradients(grad_output, *ctx.saved_tensors, ctx.plan, ctx.scaling), None, None


class _StockCausalAttention(torch.autograd.Function):
    """Torch's flash kernel in fp32; keeps the inputs in their own dtype, and keys and values unrepeated.

    Forward and backward on two AVX2 cores, 8 and 4 heads of 64: 206 ms for 2,048 tokens, against 280 in tiles; equal
    for 512 tokens (14 and 2 heads: 43 against 40). In half precision the kernel's backward pass is slow: 151 ms for
    512 tokens, 1,461 for 2,048.
    """

    @staticmethod
    def forward(ctx, query, key, value, scaling):
        inputs = _repeated_in_fp32(query, key, value)
        output, log_sums = aten._scaled_dot_product_flash_attention_for_cpu(*inputs, 0.0, True, scale=scaling)
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.scaling = scaling
        return output.transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        query, key, value, output, log_sums = ctx.saved_tensors
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_output.transpose(1, 2).float(),
            *_repeated_in_fp32(query, key, value),
            output.float(),
            log_sums,
            0.0,
            True,
            scale=ctx.scaling,
        )
        of_groups = (grad.unflatten(1, (key.shape[1], -1)).sum(2) for grad in grads[1:])
        return *(grad.to(query.dtype) for grad in (grads[0], *of_groups)), None


def _repeated_in_fp32(query, key, value) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Casts to fp32 and repeats keys and values for every query head."""
    of_group = query.shape[1] // key.shape[1]
    key, value = (x.float().repeat_interleave(of_group, 1) if of_group > 1 else x.float() for x in (key, value))
    return query.float(), key, value


@lru_cache(maxsize=16)
def _causal_plan(length: int, dtype: torch.dtype, window: int | None, rows: int) -> TilePlan:
    return plan_tiles(torch.arange(length).unsqueeze(0), dtype, window, rows)


def _attend_causal(query, key, value, window: int | None, rows: int, scaling: float) -> torch.Tensor:
    return _attend(query, key, value, _causal_plan(query.shape[2], query.dtype, window, rows), scaling)


def _gradients_causal(grad_output, query, key, value, window: int | None, rows: int, scaling: float):
    plan = _causal_plan(query.shape[2], query.dtype, window, rows)
    return [gradient.contiguous() for gradient in _gradients(grad_output, query, key, value, plan, scaling)]


_attend_operator = operator(
    "tiled_attention(Tensor query, Tensor key, Tensor value, int? window, int rows, float scaling) -> Tensor",
    _attend_causal,
    lambda query, key, value, window, rows, scaling: query.new_empty(
        query.shape[0], query.shape[2], query.shape[1], query.shape[3]
    ),
)
_gradients_operator = operator(
    "tiled_attention_gradients(Tensor grad_output, Tensor query, Tensor key, Tensor value, int? window, int rows, "
    "float scaling) -> Tensor[]",
    _gradients_causal,
    lambda grad_output, query, key, value, window, rows, scaling: [x.new_empty(x.shape) for x in (query, key, value)],
)


class _CompiledTiledAttention(torch.autograd.Function):
    """Tiled attention as two operators, because tracing would compile every tile."""

    @staticmethod
    def forward(ctx, query, key, value, window, rows, scaling):
        ctx.save_for_backward(query, key, value)
        ctx.settings = window, rows, scaling
        return _attend_operator(query, key, value, window, rows, scaling)

    @staticmethod
    def backward(ctx, grad_output):
        return *_gradients_operator(grad_output, *ctx.saved_tensors, *ctx.settings), None, None, None


__all__ = ["CausalInFp32", "CausalTiles", "TilePlan", "document_starts", "plan_tiles", "tiled_attention_forward"]
