"""Times our class against the stock class: same shape and weights, one process, alternating calls, medians.

Every measurement first checks that the two agree. The stock class is Llama, which has the same parameters under the
same names.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.costs.accounting import flops_per_token
from hf_decoder.data.packing import IGNORE_INDEX
from hf_decoder.data.tokenization import train_tokenizer
from hf_decoder.engine.calibration import taken
from hf_decoder.engine.precision import fast_dtype
from hf_decoder.engine.single_precision import multiply_rows
from hf_decoder.engine.training.loss import linear_causal_lm_loss
from hf_decoder.evaluation.llama_cpp import LlamaCppPeer, Seconds
from hf_decoder.interop.conversion import convert


@dataclass(frozen=True)
class Setting:
    """Shape, device, dtype and repeats of a measurement."""

    shape: dict[str, Any]  # keyword arguments of either config
    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    repeats: int = 5
    peer_timeout: float = 600.0  # seconds that llama.cpp may take to load, or to decode one text


@dataclass(frozen=True)
class Row:
    """One comparison. `ours` and `stock` are seconds; `share` is ours of the machine's `limit` in the same run."""

    suite: str
    case: str
    ours: float
    stock: float
    share: float | None = None
    limit: str = "matmul"  # or "read": bytes per second that can be read from memory
    ours_bytes: int | None = None  # peak memory of a call, where the system counts it
    stock_bytes: int | None = None
    llama_cpp: float | None = None  # seconds, where llama-cpp-python is installed
    text: str = field(default="", kw_only=True)  # why llama.cpp has no time; the ways that the engine took

    @property
    def ratio(self) -> float:
        return self.stock / self.ours


class Disagreement(RuntimeError):
    """Raised when the two classes give different results, so that their times mean nothing."""


def _synchronise(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def seconds(function: Callable[[], Any], device: str) -> float:
    """The time of a call; a call that measures itself returns `Seconds`."""
    _synchronise(device)
    start = time.perf_counter()
    result = function()
    _synchronise(device)
    return float(result) if isinstance(result, Seconds) else time.perf_counter() - start


def alternate(setting: Setting, *functions: Callable[[], Any]) -> tuple[float, ...]:
    """Median seconds of each function, called in turn after one warm-up call of each.

    Every round starts with another function, so that what a call leaves behind (caches, waiting threads) affects all.
    """
    times: tuple[list[float], ...] = tuple([] for _ in functions)
    for function in functions:
        function()
    for turn in range(setting.repeats):
        for place in range(len(functions)):
            index = (turn + place) % len(functions)
            times[index].append(seconds(functions[index], setting.device))
    return tuple(statistics.median(seen) for seen in times)


def peak_bytes(function: Callable[[], Any], device: str) -> int | None:
    """Peak memory that one call adds; None where neither CUDA nor Linux counts it."""
    if device.startswith("cuda"):
        _synchronise(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        _synchronise(device)
        return torch.cuda.max_memory_allocated() - before
    if device != "cpu" or not Path("/proc/self/clear_refs").exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # the call would reuse freed memory that the allocator keeps
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets the peak
    before = _status_bytes("VmRSS")
    function()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def matmul_rate(setting: Setting, size: int = 2048) -> float:
    """FLOP/s of a square matrix product in the setting's dtype, the limit of training."""
    dtype = fast_dtype(torch.device(setting.device), setting.dtype)
    a, b = (torch.randn(size, size, device=setting.device, dtype=dtype) for _ in range(2))
    multiply_rows(a, b)
    times = [seconds(lambda: multiply_rows(a, b), setting.device) for _ in range(max(setting.repeats, 5))]
    return 2 * size**3 / min(times)


def read_rate(setting: Setting, num_bytes: int = 2**29) -> float:
    """Bytes per second at which a large buffer is read and summed, the limit of decoding."""
    buffer = torch.ones(num_bytes // 8, dtype=torch.int64, device=setting.device)
    buffer.sum()
    times = [seconds(lambda: buffer.sum(), setting.device) for _ in range(max(setting.repeats, 5))]
    return num_bytes / min(times)


def twins(setting: Setting, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Our model and the stock one with the same random weights."""
    torch.manual_seed(0)
    config = HfDecoderConfig(**setting.shape)
    with torch.device(setting.device):  # a GPU draws random weights much faster
        ours = HfDecoderForCausalLM(config)
        stock = LlamaForCausalLM(LlamaConfig(**{**setting.shape, "intermediate_size": config.intermediate_size}))
    stock.load_state_dict(ours.state_dict())
    for model in (ours, stock):
        nn.Module.to(model, device=setting.device, dtype=dtype)
    return ours, stock


def check(ours: torch.Tensor, stock: torch.Tensor, tolerance: float, what: str) -> None:
    """Raises `Disagreement` if the two differ by more than `tolerance` times the norm of the stock result."""
    ours, stock = ours.detach().float(), stock.detach().float()
    difference = ((ours - stock).norm() / stock.norm().clamp(min=1e-12)).item()
    if not difference <= tolerance:
        raise Disagreement(f"{what}: ours and stock differ by {difference:.2e} of their size")


def measure_loss(setting: Setting, tokens: int = 4096, width: int = 512) -> Iterator[Row]:
    """Times head and cross-entropy, forward and backward."""
    rate = matmul_rate(setting)
    for vocab_size in (4096, 32000, 131072):
        torch.manual_seed(0)
        hidden = torch.randn(1, tokens, width, device=setting.device).to(setting.dtype).requires_grad_()
        head = nn.Linear(width, vocab_size, bias=False, device=setting.device, dtype=setting.dtype)
        labels = torch.randint(vocab_size, (1, tokens), device=setting.device)
        found: dict[str, tuple[torch.Tensor, ...]] = {}

        def ours(hidden=hidden, head=head, labels=labels, found=found):
            hidden.grad = head.weight.grad = None
            loss = linear_causal_lm_loss(hidden, head, None, shift_labels=labels)
            loss.backward()
            found["ours"] = (loss, hidden.grad, head.weight.grad)

        def stock(hidden=hidden, head=head, labels=labels, found=found):
            hidden.grad = head.weight.grad = None
            loss = nn.functional.cross_entropy(head(hidden).float().view(-1, head.out_features), labels.view(-1))
            loss.backward()
            found["stock"] = (loss, hidden.grad, head.weight.grad)

        ours(), stock()
        for a, b, what in zip(
            found["ours"], found["stock"], ("loss", "hidden gradient", "head gradient"), strict=True
        ):
            check(a, b, 0.02, f"loss, vocabulary {vocab_size}, {what}")
        fast, slow = alternate(setting, ours, stock)
        share = 6 * tokens * width * vocab_size / fast / rate
        memory = (peak_bytes(ours, setting.device), peak_bytes(stock, setting.device))
        yield Row("loss", f"vocabulary {vocab_size:,}", fast, slow, share, "matmul", *memory)


def _loss_and_gradient(
    model: PreTrainedModel, setting: Setting, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of one forward and backward pass, and the gradient of the first layer, the furthest from the loss."""
    with torch.autocast(setting.device, setting.dtype, enabled=setting.dtype != torch.float32):
        loss = model(**inputs, use_cache=False).loss
    loss.backward()
    first = model.get_decoder().layers[0].parameters()
    gradient = torch.cat([parameter.grad.flatten() for parameter in first if parameter.grad is not None])
    model.zero_grad()
    return loss, gradient


def _training_step(model: PreTrainedModel, setting: Setting, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(setting.device, setting.dtype, enabled=setting.dtype != torch.float32):
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _measure_training(
    suite: str, case: str, setting: Setting, inputs: dict[str, torch.Tensor], compiled: bool = False
) -> Row:
    models = twins(setting, torch.float32)
    if compiled:  # in place, so that what is checked is what is measured
        for model in models:
            model.compile()
    (our_loss, our_gradient), (their_loss, their_gradient) = (
        _loss_and_gradient(model.train(), setting, inputs) for model in models
    )
    check(our_loss, their_loss, 0.01, f"{suite}, {case}, loss")
    check(our_gradient, their_gradient, 0.1, f"{suite}, {case}, gradient")  # bf16 rounds along the way
    ours, stock = (_training_step(model, setting, inputs) for model in models)
    before = matmul_rate(setting)
    fast, slow = alternate(setting, ours, stock)
    rate = max(before, matmul_rate(setting))  # the rate of a shared machine changes from minute to minute
    memory = (peak_bytes(ours, setting.device), peak_bytes(stock, setting.device))
    return Row(suite, case, fast, slow, training_flops(setting, inputs) / fast / rate, "matmul", *memory)


def training_flops(setting: Setting, inputs: dict[str, torch.Tensor]) -> int:
    """FLOPs that a step needs: attention within documents only, and the head only where there is a label."""
    config, length = HfDecoderConfig(**setting.shape), inputs["input_ids"].shape[1]
    if "position_ids" in inputs:
        length = int(inputs["position_ids"].max()) + 1
    without_label = int((inputs["labels"][:, 1:] == IGNORE_INDEX).sum())
    per_token = flops_per_token(config, length)
    return per_token * inputs["input_ids"].numel() - 6 * config.vocab_size * config.hidden_size * without_label


def measure_train(setting: Setting, batch_size: int = 8, length: int = 512) -> Iterator[Row]:
    """Times a training step under autocast: three batch sizes, 70% of the labels masked, and both models compiled."""
    torch.manual_seed(0)
    ids = torch.randint(setting.shape["vocab_size"], (batch_size, length), device=setting.device)
    for rows in (batch_size // 4, batch_size // 2, batch_size):
        inputs = {"input_ids": ids[:rows], "labels": ids[:rows]}
        yield _measure_training("train", f"{rows} x {length}", setting, inputs)
    masked = ids.clone()
    masked[:, : int(0.7 * length)] = IGNORE_INDEX
    yield _measure_training("train", "70% of labels masked", setting, {"input_ids": ids, "labels": masked})
    whole = {"input_ids": ids, "labels": ids}
    yield _measure_training("train", f"{batch_size} x {length}, compiled", setting, whole, compiled=True)


def measure_packed(setting: Setting, documents: int = 8, length: int = 4096) -> Iterator[Row]:
    """Times a training step on one row of several packed documents."""
    torch.manual_seed(0)
    ids = torch.randint(setting.shape["vocab_size"], (1, length), device=setting.device)
    positions = torch.arange(length, device=setting.device) % (length // documents)
    inputs = {"input_ids": ids, "labels": ids, "position_ids": positions.unsqueeze(0)}
    yield _measure_training("packed", f"{documents} documents in {length}", setting, inputs)


@torch.no_grad()
def measure_prefill(setting: Setting) -> Iterator[Row]:
    """Times the prefill of a prompt, and the first token of `generate`."""
    ours, stock = (model.eval() for model in twins(setting, setting.dtype))

    def prompt(length: int) -> torch.Tensor:
        torch.manual_seed(0)
        return torch.randint(1, setting.shape["vocab_size"], (1, length), device=setting.device)

    for length in (128, 512, 2048):
        ids = prompt(length)
        check(ours(ids).logits, stock(ids).logits, 0.05, f"prefill, {length} tokens")
        calls = [partial(model, ids, logits_to_keep=1) for model in (ours, stock)]
        fast, slow = alternate(setting, *calls)
        memory = [peak_bytes(call, setting.device) for call in calls]
        yield Row("prefill", f"{length} tokens", fast, slow, None, "matmul", *memory)
    for length in (8, 64, 512):
        ids = prompt(length)
        mask, case = torch.ones_like(ids), f"first token of generate, {length}"
        calls = [partial(model.generate, ids, **_greedily(mask, 1)) for model in (ours, stock)]
        check_greedy(stock, calls[0](), mask, f"prefill, {case}")
        fast, slow = alternate(setting, *calls)
        yield Row("prefill", case, fast, slow)


def _greedily(mask: torch.Tensor, new_tokens: int) -> dict[str, Any]:
    """Settings of greedy `generate` for exactly so many tokens."""
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return {"attention_mask": mask, **settings}


def check_greedy(
    stock: PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor, what: str, exact: PreTrainedModel | None = None
) -> None:
    """Raises `Disagreement` unless every generated token has the highest logit of the stock model, or nearly so.

    Half precision breaks near-ties either way. A tenth of the logits' standard deviation is a tie. If `exact` is the
    stock model in fp32, so is twice the stock model's largest error at that position.
    """
    prompt = mask.shape[1]
    mask = torch.cat((mask, mask.new_ones(mask.shape[0], tokens.shape[1] - prompt)), 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    logits = stock(**inputs).logits[:, prompt - 1 : -1].float()
    chosen = logits.gather(-1, tokens[:, prompt:, None]).squeeze(-1)
    tie = 0.1 * logits.std(-1)
    if exact is not None:
        tie = tie.maximum(2 * (logits - exact(**inputs).logits[:, prompt - 1 : -1]).abs().amax(-1))
    below = logits.amax(-1) - chosen
    wrong = ~(below <= tie)
    if wrong.any():
        gap = (below / logits.std(-1))[wrong].max().item()
        raise Disagreement(f"{what}: a token is {gap:.2f} standard deviations below the stock model's best")


@torch.no_grad()
def _measure_decoding(
    suite: str, setting: Setting, batch_size: int, prompt: int, lengths: Sequence[int], int8: bool = False
) -> Iterator[Row]:
    ours, stock = (model.eval() for model in twins(setting, setting.dtype))
    torch.manual_seed(0)
    ids = torch.randint(1, setting.shape["vocab_size"], (batch_size, prompt), device=setting.device)
    mask = torch.ones_like(ids)
    for row in range(1, batch_size):
        mask[row, : 2 * row] = 0
    rate = read_rate(setting)
    with contextlib.ExitStack() as stack:
        exact = None if int8 or setting.dtype == torch.float32 else copy.deepcopy(stock).float()
        peer, failure = None, ""
        if batch_size == 1 and setting.device == "cpu" and importlib.util.find_spec("llama_cpp") is not None:
            try:
                peer = stack.enter_context(_llama_cpp(ours, setting, "q8_0" if int8 else None))
            except (ValueError, OSError, ImportError) as error:
                failure = " ".join(str(error).split())
        if int8:
            for model in (ours, stock):
                _quantize_int8(model)
        weights = sum(_nbytes(parameter) for parameter in ours.parameters())
        for new_tokens in lengths:
            fixed = _greedily(mask, new_tokens)
            ways: list[tuple[str, str | None, str | None]] = [("", None, None), (", compiled", "static", None)]
            if setting.device != "cpu":  # transformers compiles nothing on a CPU
                ways.append((", both compiled", "static", "static"))
            for name, our_cache, their_cache in ways:
                case = f"{batch_size} x {new_tokens} tokens" + (", int8" if int8 else "") + name
                fast = partial(ours.generate, ids, cache_implementation=our_cache, **fixed)
                slow = partial(stock.generate, ids, cache_implementation=their_cache, **fixed)
                check_greedy(stock, fast(), mask, f"{suite}, {case}", exact)
                calls = [fast, slow]
                if peer is not None and peer.failure is None:
                    calls.append(partial(peer, ids[0].tolist(), new_tokens))
                times = alternate(setting, *calls)
                failure = failure if peer is None else peer.failure or ""
                # every step reads every weight; a lower bound, because the time includes the prefill
                share = weights * new_tokens / times[0] / rate
                third = times[2] if len(times) > 2 and not failure else None
                text = f"llama.cpp: {failure}" if failure else ""
                yield Row(suite, case, times[0], times[1], share, "read", llama_cpp=third, text=text)


def _quantize_int8(model: PreTrainedModel) -> None:
    """Quantizes all linear layers but the head, as transformers does on load."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model.get_decoder(), Int8WeightOnlyConfig())


def _nbytes(parameter: torch.Tensor) -> int:
    values = getattr(parameter, "qdata", None)
    return parameter.nbytes if values is None else values.nbytes + parameter.scale.nbytes  # type: ignore[attr-defined]


def measure_generate(setting: Setting, prompt: int = 32, lengths: Sequence[int] = (64, 256, 1024)) -> Iterator[Row]:
    """Times greedy `generate` of one row at three lengths, ours with and without `cache_implementation="static"`.

    The stock class runs uncompiled, and compiled too where transformers compiles it. With torchao, the shortest length
    also runs with int8 weights, beside llama.cpp's q8_0.
    """
    yield from _measure_decoding("generate", setting, 1, prompt, lengths)
    if importlib.util.find_spec("torchao") is not None:
        yield from _measure_decoding("generate", setting, 1, prompt, lengths[:1], int8=True)


def measure_batch(setting: Setting, prompt: int = 32, new_tokens: int = 64) -> Iterator[Row]:
    """Times greedy `generate` of eight rows with left padding."""
    yield from _measure_decoding("batch", setting, 8, prompt, (new_tokens,))


def with_ways(rows: Iterator[Row]) -> Iterator[Row]:
    """The rows, each with the ways that the engine took for it."""
    taken.clear()
    for row in rows:
        ways = ", ".join(f"{name}: {way}" for name, way in sorted(taken.items()))
        yield replace(row, text="; ".join(filter(None, (row.text, ways))))
        taken.clear()


@contextlib.contextmanager
def _llama_cpp(model: PreTrainedModel, setting: Setting, outtype: str | None = None) -> Iterator[LlamaCppPeer]:
    """Starts llama.cpp with the same weights, in the setting's dtype or in `outtype`.

    Raises:
        ValueError: if the weights cannot be converted.
    """
    outtype = outtype or {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[setting.dtype]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/model")
        # any tokenizer will do, but llama.cpp needs one
        train_tokenizer(["llama.cpp reads no file without a tokenizer"], vocab_size=300).save_pretrained(
            f"{folder}/model"
        )
        file = Path(folder, "model.gguf")
        convert(f"{folder}/model", file, to="gguf", outtype=outtype)
        with LlamaCppPeer(file, torch.get_num_threads(), setting.peer_timeout) as peer:
            yield peer


def measure_load(setting: Setting) -> Iterator[Row]:
    """Times `from_pretrained` of a saved folder whose files are in the page cache."""
    ours, stock = twins(setting, setting.dtype)
    with tempfile.TemporaryDirectory() as folder:
        for model, name in ((ours, "ours"), (stock, "stock")):
            model.save_pretrained(f"{folder}/{name}")
        calls = (
            lambda: HfDecoderForCausalLM.from_pretrained(f"{folder}/ours", dtype=setting.dtype),
            lambda: LlamaForCausalLM.from_pretrained(f"{folder}/stock", dtype=setting.dtype),
        )
        for a, b in zip(calls[0]().parameters(), calls[1]().parameters(), strict=True):
            check(a, b, 0.0, "load")
        fast, slow = alternate(setting, *calls)
        yield Row("load", "from_pretrained", fast, slow)


SUITES: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "loss": measure_loss,
    "train": measure_train,
    "packed": measure_packed,
    "prefill": measure_prefill,
    "generate": measure_generate,
    "batch": measure_batch,
    "load": measure_load,
}
