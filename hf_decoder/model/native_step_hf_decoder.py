"""The decoding step of a few rows on a CPU, as one call of a function in C++ that torch's compiler builds.

Its weights, of fp32, bf16 or torchao's int8, are read where they lie. A graph of torch.compile spends about as long
on its buffers and guards as a small model's step takes: see the README.
"""

import sys
from collections.abc import Collection
from ctypes import POINTER, Structure, byref, c_double, c_int64, c_void_p
from functools import cache
from typing import Any

import torch

from .products_hf_decoder import AnyWeights, Int8Weights, Weights
from .static_step_hf_decoder import StaticStep, is_for_kernels

FUNCTIONS = {torch.float32: "run_float32", torch.bfloat16: "run_bfloat16"}


class _Norm(Structure):
    _fields_ = [("weight", c_void_p), ("epsilon", c_double)]


class _Product(Structure):
    _fields_ = [
        ("weight", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        *((name, c_int64) for name in ("wide", "outputs", "inputs")),
    ]


class _Layer(Structure):
    _fields_ = [
        *((name, _Norm) for name in ("input_norm", "query_norm", "key_norm", "mlp_norm")),
        *((name, _Product) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        ("rotates", c_int64),
    ]


class _Step(Structure):
    _fields_ = [
        ("layers", POINTER(_Layer)),
        ("embedding", c_void_p),
        ("norm", _Norm),
        ("head", _Product),
        ("frequencies", c_void_p),
        *((name, c_double) for name in ("rotary_scale", "score_scale", "cap")),
        *((name, c_int64) for name in ("rows", "depth", "size", "heads", "groups", "width", "rotated", "inner")),
    ]


class NativeStep(StaticStep):
    """The step by `run` of native_source_hf_decoder.py."""

    max_rows = 8  # of more, products are bound by arithmetic, which libraries do faster

    def __init__(self, step: Any, rows: int = 1):
        """step: a `DecodingStep` that `is_for_native`. Compiles the function, if no process has before.

        Raises:
            RuntimeError: where there is no compiler, or not one that knows vectors.
        """
        super().__init__(step, rows)
        self._function = getattr(_library(), FUNCTIONS[step.embedding.dtype])
        size, heads, width = step.embedding.shape[1], step.groups * step.heads_per_group, step.head_dim
        inner = step.layers[0].gate[0].shape[0]
        rotary = step.rotary.__self__
        self._frequencies = rotary.inv_freq.float().contiguous()
        numbers = size + (2 * heads + 2 * step.groups) * width + 2 * inner
        self._room = torch.zeros(rows, numbers, dtype=torch.float32, device="cpu")
        self._layers = (_Layer * len(step.layers))(*map(_layer, step.layers))
        self._struct = _Step(
            self._layers,
            step.embedding.data_ptr(),
            _norm(step.norm),
            _product(step.head),
            self._frequencies.data_ptr(),
            rotary.attention_scaling,
            step.scaling,
            step.cap or 0.0,
            rows,
            len(step.layers),
            size,
            heads,
            step.groups,
            width,
            2 * len(self._frequencies),
            inner,
        )
        places = (self._buffers, self._state, self._ids, self._logits, self._room)
        self._inputs = (byref(self._struct), *(c_void_p(place.data_ptr()) for place in places))

    def _run(self, chooses: bool) -> None:
        self._function(*self._inputs, torch.get_num_threads(), chooses)

    def _write(self, text: torch.Tensor, made: int, ends: Collection[int], pad: int) -> int | None:
        ended = {row for row, token in enumerate(self._ids.tolist()) if token in ends}
        for place in range(made, text.shape[1]):
            self._run(chooses=True)
            if not ends:
                continue
            for row, token in enumerate(self._ids.tolist()):
                if row in ended:
                    self._ids[row] = text[row, place] = pad
                elif token in ends:
                    ended.add(row)
            if len(ended) == self.rows:
                return place + 1
        return None


def is_for_native(step: Any) -> bool:
    """Whether the function computes what this step does."""
    return (
        sys.platform != "win32"  # where torch's compiler is one without GCC's vectors
        and step.embedding.device.type == "cpu"
        and step.embedding.dtype in FUNCTIONS
        and is_for_kernels(step, Weights, Int8Weights)
    )


@cache
def _library() -> Any:
    from torch._inductor.codecache import CppCodeCache  # takes long to import

    from .native_source_hf_decoder import SOURCE

    # products and sums as one instruction, whatever torch's own kernels are compiled with
    library = CppCodeCache.load(SOURCE, device_type="cpu", extra_flags=("-ffp-contract=fast",))
    for name in FUNCTIONS.values():
        function = getattr(library, name)
        function.argtypes = [*[c_void_p] * 6, c_int64, c_int64]
        function.restype = None
    return library


def _norm(norm: Any) -> _Norm:
    if norm is None:
        return _Norm(None, 0.0)
    return _Norm(norm.__self__.weight.data_ptr(), norm.__self__.variance_epsilon)


def _product(of: AnyWeights) -> _Product:
    scales = of.scales if isinstance(of, Int8Weights) else None
    places = [None if tensor is None else tensor.data_ptr() for tensor in (of[0], scales, of.bias)]
    return _Product(*places, scales is not None and scales.dtype == torch.float32, *of[0].shape)


def _layer(layer: Any) -> _Layer:
    norms = (layer.input_norm, layer.query_norm, layer.key_norm, layer.mlp_norm)
    products = (*layer.heads, layer.output, layer.gate, layer.up, layer.down)
    return _Layer(*map(_norm, norms), *map(_product, products), layer.use_rope)


__all__ = ["NativeStep", "is_for_native"]
