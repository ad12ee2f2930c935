"""The loss with the kernel of cross-entropy against fp64: on a GPU, or interpreted on a CPU."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional
from triton_kernels import DEVICE, DTYPES, HALF, NEVER, counted, kernels, leaf, random, take_from  # noqa: F401

from hf_decoder.engine.training import kernels as training_kernels
from hf_decoder.engine.training import loss as engine_loss
from hf_decoder.engine.training.loss import chunk_rows_of, linear_cross_entropy
from hf_decoder.engine.triton import training as triton_training

LOSS_OPTIONS = [
    {},
    {"final_logit_softcapping": 3.0},
    {"z_loss_coef": 0.01},
    {"label_smoothing": 0.1},
    {"z_loss_coef": 0.02, "final_logit_softcapping": 2.0, "label_smoothing": 0.3},
]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch):
    """Six rows a chunk, and rows of the vocabulary in pieces."""
    monkeypatch.setattr(engine_loss, "KERNEL_CHUNK_ELEMENTS", 6 * 61)
    monkeypatch.setattr(engine_loss, "MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(engine_loss, "TILE_ROWS", 2)
    monkeypatch.setattr(triton_training, "VOCABULARY_BLOCK", 32)


def loss_in_fp64(rows, weight, targets, bias, z_loss_coef=0.0, final_logit_softcapping=None, label_smoothing=0.0):
    logits = functional.linear(rows, weight, bias)
    if final_logit_softcapping is not None:
        logits = final_logit_softcapping * torch.tanh(logits / final_logit_softcapping)
    loss = functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    return loss + z_loss_coef * logits.logsumexp(-1)[targets != -100].square().sum()


@DTYPES
@pytest.mark.parametrize("options", LOSS_OPTIONS, ids=str)
def test_loss(options, dtype, small_chunks, monkeypatch):
    """Against fp64, and against what there is without kernels."""
    leaves = [leaf(15, 32, dtype=dtype), leaf(61, 32, dtype=dtype, seed=1), leaf(61, dtype=dtype, seed=2)]
    targets = torch.randint(61, (15,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets[1::4] = -100

    def run(function: Callable, kind: torch.dtype) -> list[torch.Tensor]:
        inputs = [(tensor.detach() / 4).to(dtype).to(kind).requires_grad_() for tensor in leaves]
        total = function(inputs[0], inputs[1], targets, inputs[2], **options)
        return [total.detach(), *torch.autograd.grad(total * 0.37, inputs)]

    calls = counted(monkeypatch)
    mine = run(linear_cross_entropy, dtype)
    assert calls == ["cross_entropy"] * 3
    monkeypatch.setattr(training_kernels, "kernels_run_on", lambda device: False)
    plain = run(linear_cross_entropy, dtype)
    for a, b, true in zip(mine, plain, run(loss_in_fp64, torch.float64), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        errors = [float((tensor.double() - true).norm() / true.norm()) for tensor in (a, b)]
        assert errors[0] <= errors[1] * 1.25 + 2e-6, errors


@pytest.mark.parametrize("dtype", HALF)
def test_loss_under_autocast(dtype, small_chunks):
    rows, weight = leaf(11, 32), leaf(61, 32, seed=1)
    targets = torch.arange(11, device=DEVICE)
    with torch.autocast(DEVICE, dtype):
        total = linear_cross_entropy(rows, weight, targets)
    grads = torch.autograd.grad(total, (rows, weight))
    exact = [tensor.detach().double().requires_grad_() for tensor in (rows, weight)]
    expected = loss_in_fp64(*exact, targets, None)
    for mine, true in zip((total, *grads), (expected, *torch.autograd.grad(expected, exact)), strict=True):
        assert mine.dtype == torch.float32
        assert (mine.double() - true).norm() < 5e-2 * true.norm()


def test_loss_without_gradient_leaves_the_logits_alone():
    logits = random(5, 40)
    targets = torch.tensor([3, -100, 39, 0, 7], device=DEVICE)
    before = logits.clone()
    losses = triton_training.cross_entropy(logits, targets, -100, 0.0, None, 0.0, needs_gradient=False)
    assert torch.equal(logits, before)
    torch.testing.assert_close(losses, functional.cross_entropy(logits, targets, reduction="none"))


def test_loss_of_logits_far_apart():
    logits = torch.full((3, 40), float("-inf"), device=DEVICE)
    logits[:, 20:] = 100 * random(3, 20)
    targets = torch.tensor([20, 30, 39], device=DEVICE)
    expected = functional.cross_entropy(logits, targets, reduction="none")
    gradient = logits.softmax(-1) - functional.one_hot(targets, 40)
    losses = triton_training.cross_entropy(logits, targets, -100, 0.0, None, 0.0, needs_gradient=True)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(logits, gradient)


def test_loss_of_rows_without_a_label_is_nothing(small_chunks):
    rows, weight = leaf(7, 32), leaf(61, 32, seed=1)
    for count in (7, 0):
        total = linear_cross_entropy(rows[:count], weight, torch.full((count,), -100, device=DEVICE))
        grads = torch.autograd.grad(total, (rows, weight))
        assert total.item() == 0 and not any(grad.any() for grad in grads)


def test_many_chunks_add_up_in_fp32(small_chunks, monkeypatch):
    """In bf16 a running sum stops growing after 256 equal terms."""
    monkeypatch.setattr(triton_training, "VOCABULARY_BLOCK", 64)
    monkeypatch.setattr(engine_loss, "KERNEL_CHUNK_ELEMENTS", 61)
    rows = torch.ones(300, 8, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.zeros(61, 8, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    linear_cross_entropy(rows, weight, torch.zeros(300, dtype=torch.long, device=DEVICE)).backward()
    expected = torch.full((8,), 300 * (1 / 61 - 1), device=DEVICE)
    torch.testing.assert_close(weight.grad[0].float(), expected, rtol=2**-7, atol=0)


@pytest.mark.skipif(DEVICE == "cuda", reason="an assertion of the device ends the process")
def test_a_label_outside_the_vocabulary_stops_the_run():
    for wrong in (61, -1):
        with pytest.raises(RuntimeError, match="outside the vocabulary"):
            linear_cross_entropy(random(2, 8), random(61, 8), torch.tensor([0, wrong]))


def test_chunks_are_large_and_of_about_one_size():
    sizes = {vocab: chunk_rows_of(8192, vocab, True) for vocab in (32_000, 128_256, 256_000)}
    assert sizes == {32_000: 4096, 128_256: 1024, 256_000: 512}
    assert chunk_rows_of(4100, 32_768, True) == 2176
    assert chunk_rows_of(100, 32_768, True) == 100
    assert chunk_rows_of(0, 32_768, True) == 1


def test_a_compiled_loss_takes_the_kernel(small_chunks, monkeypatch):
    rows, weight = leaf(13, 32), leaf(61, 32, seed=1)
    targets = torch.arange(13, device=DEVICE)
    targets[3] = -100
    calls = counted(monkeypatch)
    total = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)(rows, weight, targets)
    grads = torch.autograd.grad(total, (rows, weight))
    assert calls and set(calls) == {"cross_entropy"}
    exact = [tensor.detach().double().requires_grad_() for tensor in (rows, weight)]
    expected = loss_in_fp64(*exact, targets, None)
    for mine, true in zip((total, *grads), (expected, *torch.autograd.grad(expected, exact)), strict=True):
        torch.testing.assert_close(mine, true.float(), rtol=1e-5, atol=1e-4)
