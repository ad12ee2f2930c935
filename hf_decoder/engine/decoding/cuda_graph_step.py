"""The decode step on CUDA: Triton kernels for one row on a static cache, captured into one graph.

Launched one by one, the kernels of a step take longer to launch than to run. The graph is launched at once. It reads
the addresses of keys and values from a table, so it serves every cache. For greedy text it chooses the next token too,
so that the device need not wait for the host.

Shapes: D hidden_size, H query heads, G key/value heads, E head_dim, V vocab_size, L layers.
"""

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch

from hf_decoder.engine.assumptions import DTYPES
from hf_decoder.engine.decoding.products import Weights
from hf_decoder.engine.decoding.static_step import Ends, StaticStep, is_for_kernels
from hf_decoder.engine.training.loss import softcap

STEPS_AHEAD = 8  # steps launched before the host looks whether the text has ended
WHOLE_ROW = 2048  # the most inputs of a product that one block holds
BLOCK = 1024  # inputs per block of longer products
MIN_BLOCKS = 1024  # of a product, so that every multiprocessor of a large GPU has several
MAX_BLOCK_ELEMENTS = 8192
MIN_LATE_INPUTS = 1024  # a product of so many inputs hides the launch of the next kernel
BLOCK_KEYS = {torch.float32: 32}  # keys per block of attention; half precision chooses by the width of the heads
PRECISION = "ieee"  # of attention in fp32: never tf32


class CudaGraphStep(StaticStep):
    """The step as one graph, and as a second one that also chooses the next token."""

    def __init__(self, step: Any, rows: int = 1):
        """step: a `DecodingStep` that `is_capturable`. Compiles the kernels and captures them."""
        super().__init__(step, rows)
        weight = step.embedding
        device, dtype, groups = weight.device, weight.dtype, step.groups
        heads = groups * step.heads_per_group
        self._hidden = torch.empty(weight.shape[1], dtype=dtype, device=device)
        self._heads = torch.empty((heads + 2 * groups) * step.head_dim, dtype=dtype, device=device)
        self._attended = torch.empty(heads * step.head_dim, dtype=dtype, device=device)
        self._gated = torch.empty(step.layers[0].gate.weight.shape[0], dtype=dtype, device=device)
        self._launches = self._plan()
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        if device.type == "cuda":
            self._capture()

    def _write(self, text: torch.Tensor, made: int, ends: Ends) -> int:
        (row,) = text
        looking: _Copy | None = None
        while made < len(row):
            before, made = made, min(made + STEPS_AHEAD, len(row))
            for _ in range(before, made):
                self._run(chooses=True)
            if ends.tokens:  # the host looks for them while the device computes the next tokens
                found, looking = looking, _Copy(row, before, made)
                stop = None if found is None else found.first_of(ends.tokens)
                if stop is not None:
                    return stop
        stop = None if looking is None else looking.first_of(ends.tokens)
        return len(row) if stop is None else stop

    def _run(self, chooses: bool) -> None:
        if self._graphs:
            self._graphs[chooses].replay()
        else:  # the interpreter of Triton
            self._launch(chooses)

    def _launch(self, chooses: bool) -> None:
        from hf_decoder.engine.triton.decoding import advance_kernel

        for launch in self._launches:
            launch()
        if self._step.cap is not None:
            self._logits.copy_(softcap(self._logits, self._step.cap))
        chosen = torch.argmax(self._logits) if chooses else self._ids
        layers = len(self._buffers)
        advance_kernel[(1,)](chosen, self._ids, self._state, self._buffers, layers, chooses, _power_of_2(layers))

    @torch.no_grad()
    def _capture(self) -> None:
        step, device = self._step, self._state.device
        # a cache of two tokens and a text for the first run, which compiles the kernels
        room = torch.zeros(2, step.groups * 2 * step.head_dim, dtype=step.embedding.dtype, device=device)
        numbers = torch.zeros(3, dtype=torch.int64, device=device)
        row = [room[0].data_ptr(), room[1].data_ptr(), numbers.data_ptr(), 2]
        self._buffers.copy_(torch.tensor([row] * len(step.layers)))
        with torch.cuda.device(device):
            for chooses in (False, True):
                self._state.copy_(torch.tensor([0, 0, 0, numbers.data_ptr()]))
                self._launch(chooses)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    self._launch(chooses)
                self._graphs[chooses] = graph

    def _plan(self) -> list[Callable[[], Any]]:
        """The launches of a step: kernels with their arguments."""
        from hf_decoder.engine.triton.decoding import embedding_kernel, head_kernel

        step, size, norm = self._step, self._hidden.shape[0], self._step.norm
        embedding = embedding_kernel[(_blocks(size, BLOCK),)]
        launches: list[Callable[[], Any]] = [
            partial(embedding, self._ids, step.embedding, self._hidden, size, BLOCK_N=BLOCK, **_early(size))
        ]
        for layer in self._plan_layers():
            launches += layer
        outputs = self._logits.shape[1]
        blocks, settings = _settings(outputs, size)
        normed = (self._hidden, norm.weight, norm.variance_epsilon)
        launches.append(
            partial(head_kernel[(blocks,)], *normed, step.head.weight, self._logits, outputs, size, **settings)
        )
        return launches

    def _plan_layers(self) -> Iterator[list[Callable[[], Any]]]:
        attend = self._attention()
        for layer, buffers in zip(self._step.layers, self._buffers, strict=True):
            yield [
                self._project(layer),
                attend(layer, buffers),
                self._residual(self._attended, layer.output),
                self._gate(layer),
                self._residual(self._gated, layer.down),
            ]

    def _project(self, layer: Any) -> Callable[[], Any]:
        from hf_decoder.engine.triton.decoding import heads_kernel

        (query, key, value), norm, size = layer.heads, layer.input_norm, self._hidden.shape[0]
        width, group_width = query.weight.shape[0], key.weight.shape[0]
        _, settings = _settings(width, size)
        rows = settings["BLOCK_M"]
        blocks = _blocks(width, rows) + 2 * _blocks(group_width, rows)
        normed = (self._hidden, norm.weight, norm.variance_epsilon)
        maps = (query.weight, key.weight, value.weight, *map(_bias, layer.heads))
        shape = (self._heads, size, width, group_width, query.bias is not None)
        return partial(heads_kernel[(blocks,)], *normed, *maps, *shape, **settings)

    def _attention(self) -> Callable[[Any, torch.Tensor], Callable[[], Any]]:
        """Gives the launch of attention of a layer with its buffers."""
        from hf_decoder.engine.triton.attention import KEYS_PER_SPLIT, SPLITS, attention_kernel

        step, device, hidden = self._step, self._state.device, self._hidden
        heads, groups, head_dim = step.groups * step.heads_per_group, step.groups, step.head_dim
        rotary = step.rotary
        frequencies = rotary.inv_freq.to(device=device, dtype=torch.float32).contiguous()
        # results that programs of attention exchange; layers run one after the other and share them
        sums = torch.empty(SPLITS, heads * head_dim, dtype=torch.float32, device=device)
        weights = torch.empty(SPLITS, 2, heads, dtype=torch.float32, device=device)
        arrived = torch.zeros(groups, dtype=torch.int32, device=device)
        between = (self._attended, sums, weights, arrived)
        sizes = {
            "H": heads,
            "G": groups,
            "E": head_dim,
            "R": 2 * frequencies.shape[0],
            "BLOCK_H": max(16, _power_of_2(step.heads_per_group)),
            "BLOCK_K": BLOCK_KEYS.get(hidden.dtype, 128 if head_dim <= 64 else 64),
            "BLOCK_E": max(16, _power_of_2(head_dim)),
            "SPLITS": SPLITS,
            "KEYS_PER_SPLIT": KEYS_PER_SPLIT,
            "PRECISION": PRECISION,
            **_early(hidden.shape[0]),
        }

        def launch(layer: Any, buffers: torch.Tensor) -> Callable[[], Any]:
            norm = layer.input_norm
            head_norms: tuple[Any, ...] = (norm.weight, norm.weight, 0.0)  # placeholders, which are not read
            if layer.query_norm is not None:
                norms = layer.query_norm, layer.key_norm
                head_norms = (norms[0].weight, norms[1].weight, norms[0].variance_epsilon)
            scales = (frequencies, float(rotary.attention_scaling), step.scaling, self._state, buffers)
            kinds = {"NORMED": layer.query_norm is not None, "ROPE": layer.attention.use_rope}
            attention = attention_kernel[(groups, SPLITS)]
            return partial(attention, self._heads, *head_norms, *scales, *between, **kinds, **sizes)

        return launch

    def _gate(self, layer: Any) -> Callable[[], Any]:
        from hf_decoder.engine.triton.decoding import gate_kernel

        inner, size, norm = self._gated.shape[0], self._hidden.shape[0], layer.mlp_norm
        blocks, settings = _settings(inner, size)
        normed = (self._hidden, norm.weight, norm.variance_epsilon)
        maps = (layer.gate.weight, layer.up.weight, _bias(layer.gate), _bias(layer.up))
        shape = (self._gated, inner, size, layer.gate.bias is not None)
        return partial(gate_kernel[(blocks,)], *normed, *maps, *shape, **settings)

    def _residual(self, x: torch.Tensor, of: Weights) -> Callable[[], Any]:
        from hf_decoder.engine.triton.decoding import residual_kernel

        size, width = self._hidden.shape[0], x.shape[0]
        blocks, settings = _settings(size, width)
        product = residual_kernel[(blocks,)]
        return partial(product, x, of.weight, _bias(of), self._hidden, size, width, of.bias is not None, **settings)


class _Copy:
    """An asynchronous copy of tokens to the host."""

    def __init__(self, text: torch.Tensor, start: int, stop: int):
        self._start = start
        on_device = text.device.type == "cuda"
        self._tokens = torch.empty(stop - start, dtype=text.dtype, pin_memory=on_device)
        self._tokens.copy_(text[start:stop], non_blocking=True)
        self._arrived = torch.cuda.Event() if on_device else None
        if self._arrived is not None:
            self._arrived.record()

    def first_of(self, ends: Collection[int]) -> int | None:
        """The number of tokens up to the first of `ends`, if there is one."""
        if self._arrived is not None:
            self._arrived.synchronize()
        for place, token in enumerate(self._tokens.tolist(), self._start):
            if token in ends:
                return place + 1
        return None


def is_capturable(step: Any) -> bool:
    """Whether the kernels support this step."""
    head_norms = [[norm for norm in (layer.query_norm, layer.key_norm) if norm is not None] for layer in step.layers]
    return (
        is_for_kernels(step, Weights)
        and all(layer.window is None for layer in step.layers)
        and step.embedding.dtype in DTYPES
        and step.head_dim <= 256
        and all(len({norm.variance_epsilon for norm in norms}) < 2 for norms in head_norms)
    )


def _bias(of: Weights) -> torch.Tensor:
    return of.weight if of.bias is None else of.bias  # without a bias, a placeholder that is not read


def _early(inputs: int) -> dict[str, bool]:
    """Options that start a kernel while the previous one ends, which is faster if both are short."""
    pdl = inputs < MIN_LATE_INPUTS and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def _settings(outputs: int, inputs: int) -> tuple[int, dict[str, Any]]:
    """The number of blocks of a product, and the options of its kernel."""
    whole = inputs <= WHOLE_ROW
    columns = max(16, _power_of_2(inputs)) if whole else BLOCK
    rows = 1
    while rows < 16 and outputs // (2 * rows) >= MIN_BLOCKS and 2 * rows * columns <= MAX_BLOCK_ELEMENTS:
        rows *= 2
    return _blocks(outputs, rows), {"WHOLE": whole, "BLOCK_M": rows, "BLOCK_N": columns, **_early(inputs)}


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


__all__ = ["CudaGraphStep", "is_capturable"]
