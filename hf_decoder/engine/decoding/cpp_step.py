"""The decode step of a few rows on a CPU as one call of a C++ function.

It reads weights in fp32, bf16 or torchao's int8 or int4 in place. A graph of torch.compile spends about as long on
buffers and guards as a small model's step takes (RESULTS.md). The function also runs the prefill of short prompts
where it is faster than the modules.
"""

import copy
import ctypes
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from transformers.cache_utils import StaticCache

from hf_decoder.engine.calibration import bucket, choose, numbers
from hf_decoder.engine.cpp.build import Later, load_file
from hf_decoder.engine.decoding.growing_cache import Buffers
from hf_decoder.engine.decoding.products import AnyWeights, Weights
from hf_decoder.engine.decoding.static_step import (
    Ends,
    StaticStep,
    is_for_kernels,
    outputs_of,
    weights_of_products,
)
from hf_decoder.engine.int4 import Int4Weights
from hf_decoder.engine.int8 import Int8Weights
from hf_decoder.engine.quantized.layers import Table
from hf_decoder.engine.quantized.products import BlockWeights
from hf_decoder.engine.switches import settings

DTYPES = (torch.float32, torch.bfloat16)
WIDE_VECTORS = torch.backends.cpu.get_cpu_capability() == "AVX512"  # of 512 bits
MAX_PROMPT_LINES = 128  # of all rows: with more, the products of a library are as fast, and their attention faster
MAX_PACKED_PROMPT_LINES = 512  # of GGUF weights, which no library multiplies, and of int4, at which torch is slow
READS = {  # ways to read weights for one line, by what vectors.h is compiled with
    "unasked": (),
    "asked for, kept in no cache": ("PREFETCH_LOCALITY=0",),
    "asked for": ("PREFETCH_LOCALITY=2",),
    "asked for, in four streams": ("PREFETCH_LOCALITY=2", "STREAMS=4"),
    "asked for early, kept in no cache": ("PREFETCH_LOCALITY=0", "AHEAD_BYTES=2048"),
}
LINES_READS = {  # for several lines
    "unasked": (),
    "asked for": ("LINES_AHEAD_BYTES=512",),
    "asked for early": ("LINES_AHEAD_BYTES=2048",),
}
PROBE_SHAPE = 2**15, 2**10  # 64 MiB
PROBE_LINES = 8
HEAD_OUTPUTS = 16  # where the layers of a prompt are measured


class CppStep(StaticStep):
    """The step computed by cpp/step.cpp."""

    max_rows = 32 if WIDE_VECTORS else 8  # with more, arithmetic limits products and libraries are as fast

    def __init__(self, step: Any, rows: int = 1):
        """step: a `DecodingStep` that `is_for_cpp`. Compiles the function unless an earlier process has.

        Raises:
            RuntimeError: if there is no compiler, or none with vectors.
        """
        super().__init__(step, rows)
        self._function = _function()
        size, heads, width = step.embedding.shape[1], step.groups * step.heads_per_group, step.head_dim
        inner = outputs_of(step.layers[0].gate)
        table = step.embedding
        rotary = step.rotary
        self._frequencies = rotary.inv_freq.float().contiguous()
        # the struct `Step` and those it points to
        self._layers = _table([_layer(layer) for layer in step.layers])
        self._struct = _table(
            [
                *(self._layers.data_ptr(), table.data_ptr(), table.module.form.kind if type(table) is Table else 0),
                *(*_norm(step.norm), *_product(step.head)),
                self._frequencies.data_ptr(),
                *map(_bits, (rotary.attention_scaling, step.scaling, step.cap or 0.0)),
                *(rows, len(step.layers), size, heads, step.groups, width, 2 * len(self._frequencies), inner),
            ]
        )
        rotated = 2 * len(self._frequencies)
        self._numbers = rotated + 2 * size + (2 * heads + 2 * step.groups) * width + 2 * inner  # per token
        self._room = torch.zeros(rows, self._numbers, dtype=torch.float32, device="cpu")
        self._is_half = step.embedding.dtype == torch.bfloat16
        self._is_packed = any(isinstance(of, BlockWeights) for of in weights_of_products(step))

    def _run(self, chooses: bool) -> None:
        self._call(self._ids, self._room, 1, chooses)

    def _call(self, ids: torch.Tensor, room: torch.Tensor, tokens: int, chooses: bool) -> None:
        places = (self._struct, self._buffers, self._state, ids, self._logits, room)
        self._function(
            *(place.data_ptr() for place in places), self._is_half, torch.get_num_threads(), tokens, chooses
        )

    def takes_prompts(self, rows: int, tokens: int) -> bool:
        if self._is_packed:
            return rows == self.rows and rows * tokens <= MAX_PACKED_PROMPT_LINES
        first = self._step.layers[0]
        most = MAX_PACKED_PROMPT_LINES if isinstance(first.gate, Int4Weights) else MAX_PROMPT_LINES
        if rows != self.rows or rows * tokens > most:
            return False
        lines = bucket(rows * tokens, 2, most)
        sizes = [bucket(size, 16, 2**15) for size in (self._step.embedding.shape[1], len(first.gate[0]))]
        key = (self._step.embedding.dtype, type(first.gate).__name__, lines, *sizes, self._step.groups)
        return choose("short prompt", key, PROMPT_WAYS, partial(_prompt_inputs, self._step, lines)) == "C++"

    def prompt(
        self,
        input_ids: torch.Tensor,
        cache: StaticCache | Buffers,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Prefills ids (B, S); returns the logits (B, 1, V) of the last tokens, or None, without effect, if it cannot.

        Mask and positions are those of `begin`.
        """
        rows, tokens = input_ids.shape
        layers: list[Any] = cache.layers
        if position_ids is not None and not _are_steady(position_ids, attention_mask):
            return None
        for layer in layers:
            if not layer.is_initialized:
                key = self._logits.new_empty(rows, self._step.groups, 0, self._step.head_dim)
                layer.lazy_initialization(key, key)
        if not self.begin(cache, attention_mask, position_ids, tokens=tokens):
            return None
        self._call(input_ids.contiguous(), self._room.new_empty(rows * tokens, self._numbers), tokens, chooses=False)
        self._extend(tokens)
        return self._logits.clone().unsqueeze(1)

    def _write(self, text: torch.Tensor, made: int, ends: Ends) -> int:
        for place in range(made, text.shape[1]):
            self._run(chooses=True)
            if ends.take(text, place):
                return place + 1
            if ends.rows:
                self._ids.copy_(text[:, place])
        return text.shape[1]


def _prompt_inputs(step: Any, tokens: int) -> tuple[Any, CppStep, torch.Tensor]:
    """The first layer, which stands for all, with so little of the head that it does not count; and a prompt."""
    layer = copy.copy(step)
    layer.layers, layer._parts = step.layers[:1], {}
    if not isinstance(step.head, Int4Weights):  # whose blocks are not cut
        layer.head = type(step.head)(*(of if of is None else of[:HEAD_OUTPUTS] for of in step.head))
    return layer, CppStep(layer), torch.arange(tokens, device="cpu")[None] % step.embedding.shape[0]


def _prompt_by_torch(layer: Any, cpp: CppStep, ids: torch.Tensor) -> torch.Tensor:
    decoder = SimpleNamespace(layer_masks=lambda *_, **__: dict.fromkeys(layer.kinds))  # those of torch's kernel
    with torch.no_grad():
        return layer.prompt_logits(decoder, ids, None, None, None, 1)


def _prompt_in_cpp(layer: Any, cpp: CppStep, ids: torch.Tensor) -> torch.Tensor | None:
    with torch.no_grad():
        buffers = Buffers.empty(1, 1, layer.groups, ids.shape[1], layer.head_dim, layer.embedding.dtype)
        return cpp.prompt(ids, buffers, None, None)


PROMPT_WAYS = {"torch": _prompt_by_torch, "C++": _prompt_in_cpp}


def _are_steady(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
    """Whether positions (B or 1, S) go up by one with each token that is not masked."""
    tokens = position_ids.shape[1]
    steady = position_ids[:, -1:] + torch.arange(1 - tokens, 1, device=position_ids.device)
    differs = position_ids != steady
    return not bool((differs if attention_mask is None else differs & (attention_mask[:, -tokens:] != 0)).any())


def is_for_cpp(step: Any) -> bool:
    """Whether the function supports this step."""
    return (
        sys.platform != "win32"  # its usual compiler lacks GCC's vectors
        and step.embedding.device.type == "cpu"
        and step.embedding.dtype in DTYPES
        and is_for_kernels(step, Weights, Int8Weights, Int4Weights, BlockWeights)
    )


def _function() -> Callable:
    kernel = load_file("step.cpp", *_reads()).kernel  # called without the interpreter's lock
    kernel.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 4
    kernel.restype = None
    return kernel


later = Later(_function, "The decoding step")


def _reads() -> tuple[str, ...]:
    """What the step is compiled with to read weights in the fastest ways here."""
    if settings.ways is None:
        with ThreadPoolExecutor(2) as pool:  # compiled before anything is measured, which others may wait for
            list(pool.map(lambda defines: load_file("probe.cpp", *defines), {*READS.values(), *LINES_READS.values()}))
    return (
        *READS[_fastest_read("reading weights in C++", READS, 1)],
        *LINES_READS[_fastest_read("reading weights for several rows in C++", LINES_READS, PROBE_LINES)],
    )


def _fastest_read(name: str, reads: dict[str, tuple[str, ...]], lines: int) -> str:
    candidates = {way: partial(_probe, defines) for way, defines in reads.items()}
    return choose(name, (), candidates, partial(_probe_inputs, lines))


def _probe(defines: tuple[str, ...], weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    function, y = load_file("probe.cpp", *defines).probe, x.new_empty(len(x), len(weight))
    function.argtypes, function.restype = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 4, None
    function(weight.data_ptr(), x.data_ptr(), y.data_ptr(), len(x), *weight.shape, torch.get_num_threads())
    return y


def _probe_inputs(lines: int) -> tuple[torch.Tensor, torch.Tensor]:
    """More than the caches hold, as wide as many models."""
    return numbers(*PROBE_SHAPE, dtype=torch.bfloat16), numbers(lines, PROBE_SHAPE[1])


def _table(fields: list) -> torch.Tensor:
    return torch.tensor(fields, dtype=torch.int64, device="cpu")


def _bits(number: float) -> int:
    return int(torch.tensor(number, dtype=torch.float64, device="cpu").view(torch.int64))


def _norm(norm: Any) -> list[int]:
    if norm is None:
        return [0, 0]
    return [norm.weight.data_ptr(), _bits(norm.variance_epsilon)]


def _product(of: AnyWeights) -> list[int]:
    bias = 0 if of.bias is None else of.bias.data_ptr()
    if isinstance(of, BlockWeights):
        return [of.blocks.data_ptr(), 0, bias, 0, of.outputs, of.inputs, of.form.kind, 0, 0]
    if isinstance(of, Int4Weights):
        outputs, pairs = of.codes.shape
        return [of.codes.data_ptr(), of.scales.data_ptr(), bias, 0, outputs, 2 * pairs, 0, of.group, of.block]
    scales = of.scales if isinstance(of, Int8Weights) else None
    places = [of[0].data_ptr(), 0 if scales is None else scales.data_ptr(), bias]
    return [*places, scales is not None and scales.dtype == torch.float32, *of[0].shape, 0, 0, 0]


def _layer(layer: Any) -> list[int]:
    norms = (layer.input_norm, layer.query_norm, layer.key_norm, layer.mlp_norm)
    products = (*layer.heads, layer.output, layer.gate, layer.up, layer.down)
    fields = [field for part in (*map(_norm, norms), *map(_product, products)) for field in part]
    return [*fields, layer.attention.use_rope, layer.window or 0]


__all__ = ["CppStep", "is_for_cpp", "later"]
