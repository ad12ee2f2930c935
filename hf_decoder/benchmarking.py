"""Ours against the stock class of the same shape: same weights, one process, alternating, medians.

Every measurement first checks that the two agree; what disagrees is not timed. The stock class is Llama, which has the
same parameters under the same names.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_decoder.accounting import flops_per_token
from hf_decoder.model.configuration_hf_decoder import HfDecoderConfig
from hf_decoder.model.loss_hf_decoder import linear_causal_lm_loss
from hf_decoder.model.modeling_hf_decoder import HfDecoderForCausalLM


@dataclass(frozen=True)
class Setting:
    """Where and on what is measured."""

    shape: dict[str, Any]  # keyword arguments of either config
    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    repeats: int = 5


@dataclass(frozen=True)
class Row:
    """One comparison. `ours` and `stock` are seconds; `share` is ours of the matmul rate measured in the same run."""

    suite: str
    case: str
    ours: float
    stock: float
    share: float | None = None
    ours_bytes: int | None = None  # peak of device memory, where the device counts it
    stock_bytes: int | None = None

    @property
    def ratio(self) -> float:
        return self.stock / self.ours


class Disagreement(RuntimeError):
    """The two gave different results, so that their times mean nothing."""


def _synchronise(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def seconds(function: Callable[[], Any], device: str) -> float:
    _synchronise(device)
    start = time.perf_counter()
    function()
    _synchronise(device)
    return time.perf_counter() - start


def alternate(ours: Callable[[], Any], stock: Callable[[], Any], setting: Setting) -> tuple[float, float]:
    """Median seconds of each, measured in turn after one warm-up call of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for function in (ours, stock):
        function()
    for _ in range(setting.repeats):
        for function, seen in zip((ours, stock), times, strict=True):
            seen.append(seconds(function, setting.device))
    return statistics.median(times[0]), statistics.median(times[1])


def peak_bytes(function: Callable[[], Any], device: str) -> int | None:
    """Peak device memory of one call above what was held before, or None on a CPU, which does not count it."""
    if not device.startswith("cuda"):
        return None
    _synchronise(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    _synchronise(device)
    return torch.cuda.max_memory_allocated() - before


def matmul_rate(setting: Setting, size: int = 2048) -> float:
    """FLOP/s of a square matrix product in the setting's dtype: the limit that arithmetic runs into."""
    a, b = (torch.randn(size, size, device=setting.device).to(setting.dtype) for _ in range(2))
    torch.mm(a, b)
    times = [seconds(lambda: torch.mm(a, b), setting.device) for _ in range(max(setting.repeats, 5))]
    return 2 * size**3 / min(times)


def twins(setting: Setting, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Our model and the stock one with the same random weights."""
    torch.manual_seed(0)
    config = HfDecoderConfig(**setting.shape)
    ours = HfDecoderForCausalLM(config)
    stock = LlamaForCausalLM(LlamaConfig(**{**setting.shape, "intermediate_size": config.intermediate_size}))
    stock.load_state_dict(ours.state_dict())
    for model in (ours, stock):
        nn.Module.to(model, device=setting.device, dtype=dtype)
    return ours, stock


def check(ours: torch.Tensor, stock: torch.Tensor, tolerance: float, what: str) -> None:
    """Raises `Disagreement` where the two differ by more than `tolerance` times the stock result's norm."""
    ours, stock = ours.detach().float(), stock.detach().float()
    difference = ((ours - stock).norm() / stock.norm().clamp(min=1e-12)).item()
    if not difference <= tolerance:
        raise Disagreement(f"{what}: ours and stock differ by {difference:.2e} of their size")


def measure_loss(setting: Setting, tokens: int = 4096, width: int = 512) -> Iterator[Row]:
    """Head and cross-entropy, forward and backward."""
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
        times = alternate(ours, stock, setting)
        share = 6 * tokens * width * vocab_size / times[0] / rate
        memory = (peak_bytes(ours, setting.device), peak_bytes(stock, setting.device))
        yield Row("loss", f"vocabulary {vocab_size:,}", *times, share, *memory)


def _loss_and_gradient(
    model: PreTrainedModel, setting: Setting, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of one forward and backward pass, and the gradient of the first layer's matrices, the furthest from it."""
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


def _measure_training(suite: str, case: str, setting: Setting, inputs: dict[str, torch.Tensor]) -> Row:
    models = twins(setting, torch.float32)
    (our_loss, our_gradient), (their_loss, their_gradient) = (
        _loss_and_gradient(model.train(), setting, inputs) for model in models
    )
    check(our_loss, their_loss, 0.01, f"{suite}, {case}, loss")
    check(our_gradient, their_gradient, 0.1, f"{suite}, {case}, gradient")  # bf16 rounds along the way
    ours, stock = (_training_step(model, setting, inputs) for model in models)
    times = alternate(ours, stock, setting)
    length = inputs["input_ids"].shape[1]
    flops = flops_per_token(HfDecoderConfig(**setting.shape), length) * inputs["input_ids"].numel()
    memory = (peak_bytes(ours, setting.device), peak_bytes(stock, setting.device))
    return Row(suite, case, *times, flops / times[0] / matmul_rate(setting), *memory)


def measure_train(setting: Setting, batch_size: int = 8, length: int = 512) -> Iterator[Row]:
    """A training step under autocast, eager; with and without 70% of the labels masked."""
    torch.manual_seed(0)
    ids = torch.randint(setting.shape["vocab_size"], (batch_size, length), device=setting.device)
    yield _measure_training("train", f"{batch_size} x {length}", setting, {"input_ids": ids, "labels": ids})
    masked = ids.clone()
    masked[:, : int(0.7 * length)] = -100
    yield _measure_training("train", "70% of labels masked", setting, {"input_ids": ids, "labels": masked})


def measure_packed(setting: Setting, documents: int = 8, length: int = 4096) -> Iterator[Row]:
    """A training step on one row of several documents that do not see each other."""
    torch.manual_seed(0)
    ids = torch.randint(setting.shape["vocab_size"], (1, length), device=setting.device)
    positions = torch.arange(length, device=setting.device) % (length // documents)
    inputs = {"input_ids": ids, "labels": ids, "position_ids": positions.unsqueeze(0)}
    yield _measure_training("packed", f"{documents} documents in {length}", setting, inputs)


@torch.no_grad()
def measure_prefill(setting: Setting) -> Iterator[Row]:
    """The prompt's forward pass, filling a cache."""
    ours, stock = (model.eval() for model in twins(setting, setting.dtype))
    for length in (128, 512, 2048):
        torch.manual_seed(0)
        ids = torch.randint(setting.shape["vocab_size"], (1, length), device=setting.device)
        check(ours(ids).logits, stock(ids).logits, 0.05, f"prefill, {length} tokens")
        times = alternate(partial(ours, ids, logits_to_keep=1), partial(stock, ids, logits_to_keep=1), setting)
        yield Row("prefill", f"{length} tokens", *times)


@torch.no_grad()
def measure_generate(setting: Setting, prompt: int = 32, new_tokens: int = 64) -> Iterator[Row]:
    """Greedy `generate`, one row and eight rows with left padding."""
    ours, stock = (model.eval() for model in twins(setting, setting.dtype))
    for batch_size in (1, 8):
        torch.manual_seed(0)
        ids = torch.randint(1, setting.shape["vocab_size"], (batch_size, prompt), device=setting.device)
        mask = torch.ones_like(ids)
        for row in range(1, batch_size):
            mask[row, : 2 * row] = 0
        settings = {"attention_mask": mask, "max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        fast, slow = (partial(model.generate, ids, eos_token_id=None, **settings) for model in (ours, stock))
        # random weights leave near-ties, which bf16 rounding breaks either way: only the first token must agree
        check(fast()[:, : prompt + 1], slow()[:, : prompt + 1], 0.0, f"generate, batch {batch_size}")
        yield Row("generate", f"{batch_size} x {new_tokens} tokens", *alternate(fast, slow, setting))


def measure_load(setting: Setting) -> Iterator[Row]:
    """`from_pretrained` of a saved folder, files in the page cache."""
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
        yield Row("load", "from_pretrained", *alternate(*calls, setting))


SUITES: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "loss": measure_loss,
    "train": measure_train,
    "packed": measure_packed,
    "prefill": measure_prefill,
    "generate": measure_generate,
    "load": measure_load,
}
