"""Chooses the attention of whole, windowed and packed rows on a CPU: torch's, or tiles, whichever is faster here.

Shapes: B batch, S tokens, D hidden_size, H query heads, G key/value heads, E head_dim.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_decoder.engine.attention.tiles import CausalInFp32, CausalTiles, TilePlan, plan_tiles
from hf_decoder.engine.calibration import bucket, choose, numbers
from hf_decoder.engine.precision import product_dtype
from hf_decoder.engine.switches import settings
from hf_decoder.model.modeling_hf_decoder import LayerMask, PackedDocuments

TILE_ROWS = {"tiles of 64": 64, "tiles of 128": 128}
# of the rows that are measured, without gradients and with: longer ones are like these, and take longer to measure
MOST_TOKENS = {False: 2048, True: 1024}
GRAPH_TOKENS = 512  # of the row that stands for all lengths in a compiled graph, where lengths may be symbols
DOCUMENTS = 4  # of a packed row that is measured
MOST_KEPT_TOKENS = 2048  # of a row whose tiles are laid out once: up to 5 MB with a window


def chosen_masks(
    config: Any,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    document_positions: torch.Tensor | None,
    windows: dict[str, int | None],
) -> dict[str, LayerMask]:
    """What stands in for the mask of those types of layer that attend faster in another way than the plain one.

    Args:
        config: the decoder's.
        inputs_embeds: (B, S, D), before which nothing is cached.
        attention_mask: (B, S), 1 for tokens, 0 for padding, which is left to the plain masks.
        document_positions: (B or 1, S); positions that do not go up by one mark the start of a document.
        windows: the window of each type of layer.
    """
    length = inputs_embeds.shape[1]
    if not inputs_embeds.is_cpu or (attention_mask is not None and not bool(attention_mask.all())):
        return {}
    documents = document_positions  # None where each row is one
    if documents is not None and not bool((documents.diff(dim=-1) != 1).any()):
        documents = None
    dtype = product_dtype(inputs_embeds)
    masks: dict[str, LayerMask] = {}
    for kind, window in windows.items():
        window = None if window is None or window >= length else window
        rows = "packed" if documents is not None else "whole" if window is None else "windowed"
        way = attention_way(_sizes(config), rows, dtype, length, window, torch.is_grad_enabled())
        if way == "torch in fp32":
            masks[kind] = CausalInFp32()
        elif way in TILE_ROWS:
            layout = dtype, window, TILE_ROWS[way]
            if documents is not None:
                masks[kind] = plan_tiles(documents, *layout)
            elif length <= MOST_KEPT_TOKENS:
                masks[kind] = _kept_plan(length, *layout)
            else:
                masks[kind] = plan_tiles(_columns(length), *layout)
    return masks


@lru_cache(maxsize=8)
def _kept_plan(length: int, *layout: Any) -> TilePlan:
    """Of rows of one document: it takes 0.3 of the 8 ms of a small model and 128 tokens."""
    return plan_tiles(_columns(length), *layout)


def _columns(length: int) -> torch.Tensor:
    """The positions (1, S) of one document."""
    return torch.arange(length, device="cpu")[None]


def masks_in_graph(config: Any, inputs_embeds: torch.Tensor, windows: dict[str, int | None]) -> dict[str, LayerMask]:
    """The same for a compiled graph of rows of one document each, by what is known before it is traced."""
    masks: dict[str, LayerMask] = {}
    for kind, window in windows.items():
        rows = "whole" if window is None else "windowed"
        way = _known_way(_sizes(config), rows, product_dtype(inputs_embeds), window)
        if way in TILE_ROWS:
            masks[kind] = CausalTiles(window, TILE_ROWS[way])
    return masks


def measure_for_graphs(config: Any, dtype: torch.dtype) -> None:
    """Measures what `masks_in_graph` asks for, under autocast as well, since nothing is measured within a trace."""
    if config._attn_implementation == "sdpa":
        for rows, window in (("whole", None), ("windowed", config.sliding_window)):
            if rows == "whole" or window is not None:
                for product in {dtype, torch.bfloat16 if dtype == torch.float32 else dtype}:
                    _known_way(_sizes(config), rows, product, window)


@torch.compiler.assume_constant_result
def _known_way(sizes: tuple[int, int, int], rows: str, dtype: torch.dtype, window: int | None) -> str:
    return attention_way(sizes, rows, dtype, GRAPH_TOKENS, window, trains=True)


def _sizes(config: Any) -> tuple[int, int, int]:
    """H, G and E."""
    return config.num_attention_heads, config.num_key_value_heads, config.head_dim


def attention_way(
    sizes: tuple[int, int, int], rows: str, dtype: torch.dtype, length: int, window: int | None, trains: bool
) -> str:
    """How rows that are `whole`, `windowed` or `packed` are attended to: a name of CANDIDATES.

    Args:
        sizes: H, G and E.
        rows: their kind.
        dtype: that products have.
        length: S.
        window: if they have one, packed or not.
        trains: whether gradients are wanted.
    """
    if rows != "whole" and settings.ways is not None and settings.ways.get("attention") == "torch in fp32":
        return "tiles of 64"  # that one is for whole rows
    heads, groups, width = sizes
    tokens = bucket(length, 16, MOST_TOKENS[trains])
    if window is not None:  # as large a part of the row that is measured
        window = bucket(min(window * tokens // max(length, tokens), tokens // 2), 8, tokens)
    key = (rows, dtype, tokens, window, heads // groups, groups, width, "training" if trains else "inference")
    candidates = {way: run for way, run in CANDIDATES.items() if rows == "whole" or way != "torch in fp32"}
    return choose("attention", key, candidates, partial(_inputs, sizes, rows, dtype, tokens, window, trains))


def _inputs(
    sizes: tuple[int, int, int], rows: str, dtype: torch.dtype, tokens: int, window: int | None, trains: bool
) -> tuple[Any, ...]:
    """One row of as many heads as keep all threads busy, and the mask of each candidate."""
    heads, groups, width = sizes
    of_group = heads // groups
    groups = min(groups, -(-torch.get_num_threads() // of_group))
    of_each = (of_group * groups, groups, groups)
    heads_of = [numbers(1, tokens, size, width, dtype=dtype).transpose(1, 2).detach() for size in of_each]
    for x in heads_of:
        x.requires_grad_(trains)
    grad = numbers(1, tokens, of_each[0], width, dtype=dtype) if trains else None
    positions = _columns(tokens)
    masks: dict[str, Any] = {"torch": None, "torch in fp32": CausalInFp32()}
    if rows == "packed":
        length = tokens // DOCUMENTS
        positions = positions % length
        masks["torch"] = PackedDocuments.of([length] * DOCUMENTS, window, torch.device("cpu"))
    elif window is not None:
        masks["torch"] = torch.ones(tokens, tokens, dtype=torch.bool, device="cpu").tril().triu(1 - window)[None, None]
    masks |= {way: plan_tiles(positions, dtype, window, size) for way, size in TILE_ROWS.items()}
    module = SimpleNamespace(num_key_value_groups=of_group, is_causal=True, training=trains)
    return module, heads_of, grad, masks


def _run(way: str, module: Any, heads: list[torch.Tensor], grad: torch.Tensor | None, masks: Mapping[str, Any]) -> Any:
    mask, inputs = masks[way], {"scaling": heads[0].shape[-1] ** -0.5, "dropout": 0.0}
    if isinstance(mask, LayerMask):
        output = mask.attend(sdpa_attention_forward, module, *heads, **inputs)[0]
    else:
        query, key, value = heads
        output = sdpa_attention_forward(module, query, key, value, mask, **inputs)[0]
    return output if grad is None else (output, *torch.autograd.grad(output, heads, grad))


CANDIDATES: dict[str, Callable] = {way: partial(_run, way) for way in ("torch", "torch in fp32", *TILE_ROWS)}

__all__ = ["attention_way", "chosen_masks", "masks_in_graph", "measure_for_graphs"]
