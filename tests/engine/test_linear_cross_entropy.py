"""`linear_cross_entropy` against the formula in fp64, and in half precision against the stock operations."""

from typing import Any

import pytest
import torch
from tiny_models import SHAPE
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from hf_decoder.engine.precision import FAST_HALF_PRECISION
from hf_decoder.engine.training import loss as engine_loss
from hf_decoder.engine.training.loss import linear_cross_entropy

VOCAB = SHAPE["vocab_size"]


def written_out(
    rows: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    z_loss_coef: float = 0.0,
    final_logit_softcapping: float | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    logits = functional.linear(rows, weight, bias)
    if final_logit_softcapping is not None:
        logits = final_logit_softcapping * torch.tanh(logits / final_logit_softcapping)
    loss = functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    z = torch.logsumexp(logits, -1)[targets != -100]
    return loss + z_loss_coef * (z**2).sum()


OPTIONS = [
    {},
    {"final_logit_softcapping": 3.0},
    {"z_loss_coef": 0.01},
    {"label_smoothing": 0.1},
    {"z_loss_coef": 0.02, "final_logit_softcapping": 2.0, "label_smoothing": 0.3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 23])
def test_linear_cross_entropy_equals_the_formula(options: dict, bias: bool, rows: int, small_chunks):
    """Against fp64, forward and backward, and no further from it than the stock operations in fp32 are."""
    generator = torch.Generator().manual_seed(rows)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).float()

    inputs = [leaf(rows, 32), leaf(VOCAB, 32) * 0.5, *([leaf(VOCAB)] if bias else [])]
    targets = torch.randint(0, VOCAB, (rows,), generator=generator)
    targets[1::4] = -100

    def run(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        value = function(*leaves[:2], targets, *leaves[2:], **options)
        return [value.detach(), *torch.autograd.grad(value * 0.37, leaves)]

    truth = run(written_out, torch.float64)
    found, stock_operations = (run(function, torch.float32) for function in (linear_cross_entropy, written_out))
    for index, expected in enumerate(truth):
        assert found[index].dtype == torch.float32
        ours, theirs = (
            (values[index].double() - expected).abs().max() / expected.abs().max()
            for values in (found, stock_operations)
        )
        assert ours < max(1e-6, 2 * theirs)  # a saturated cap cancels digits in either


def test_linear_cross_entropy_passes_gradcheck_to_its_inputs(small_chunks):
    """Finite differences, in fp64 for the inputs; the softmax itself is fp32, hence the tolerance."""
    torch.manual_seed(0)
    rows, weight, bias = torch.randn(7, 4), torch.randn(VOCAB, 4), torch.randn(VOCAB)
    targets = torch.randint(0, VOCAB, (7,))
    leaves = [tensor.requires_grad_() for tensor in (rows, weight, bias)]

    def value(*tensors: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(
            *tensors[:2], targets, tensors[2], z_loss_coef=0.1, final_logit_softcapping=2.0, label_smoothing=0.2
        )

    found = torch.autograd.grad(value(*leaves), leaves)
    for index, gradient in enumerate(found):
        direction = torch.randn_like(leaves[index])
        step = 1e-2
        ahead, behind = ([t + s * direction if i == index else t for i, t in enumerate(leaves)] for s in (step, -step))
        slope = (value(*ahead) - value(*behind)).item() / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-2)


@pytest.fixture(params=[True, False], ids=["fast-half", "slow-half"])
def products_in_half_precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Those of this CPU, or none, whatever it has."""
    for dtype in FAST_HALF_PRECISION:
        monkeypatch.setitem(FAST_HALF_PRECISION, dtype, request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.usefixtures("products_in_half_precision")
def test_half_precision_is_at_least_as_close_to_the_truth_as_stock(dtype: torch.dtype, seed: int, monkeypatch):
    monkeypatch.setattr(engine_loss, "CHUNK_ELEMENTS", 64 * 509)
    monkeypatch.setattr(engine_loss, "MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(engine_loss, "BLOCK_ELEMENTS", 10 * 509)
    monkeypatch.setattr(engine_loss, "WEIGHT_ROWS", 100)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(200, 64, generator=generator).to(dtype)
    weight = (torch.randn(509, 64, generator=generator) * 0.3).to(dtype)
    targets = torch.randint(0, 509, (200,), generator=generator)

    def run(function: Any, kind: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.to(kind).requires_grad_() for tensor in (rows, weight)]
        value = function(*leaves, targets) / 200
        return [value.detach().double(), *(g.double() for g in torch.autograd.grad(value, leaves))]

    def stock_path(rows: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy((rows @ weight.T).float(), targets, reduction="sum")

    truth = run(written_out, torch.float64)
    ours, theirs = run(linear_cross_entropy, dtype), run(stock_path, dtype)
    for index, slack in enumerate((1e-4, 1e-3, 1e-3)):
        errors = [(found[index] - truth[index]).norm() / truth[index].norm() for found in (ours, theirs)]
        assert errors[0] < errors[1] * 1.05 + slack
    assert errors[1] > 1e-4  # stock is not exact, or the comparison would be empty


@pytest.mark.parametrize("with_bias", [True, False])
def test_under_autocast_gradients_of_fp32_tensors_are_not_rounded(
    with_bias: bool, small_chunks, products_in_half_precision: bool
):
    torch.manual_seed(0)
    leaves = [torch.randn(64, 32), torch.randn(VOCAB, 32) * 0.5, torch.randn(VOCAB)][: 3 if with_bias else 2]
    targets = torch.randint(0, VOCAB, (64,))
    kind = torch.bfloat16 if products_in_half_precision else torch.float32  # in which the factors are taken
    exact = [leaf.to(kind).double().requires_grad_() for leaf in leaves]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(leaves[0], leaves[1], targets, *leaves[2:])
    loss.backward()
    written_out(exact[0], exact[1], targets, *exact[2:]).backward()
    for leaf in leaves:
        assert leaf.grad.dtype == torch.float32
    of_weight = leaves[1].grad
    assert bool((of_weight != of_weight.bfloat16()).any())
    error = (of_weight.double() - exact[1].grad).norm() / exact[1].grad.norm()
    # a product is rounded before it is added up; the probabilities that it is made of are in half precision
    assert error < (4e-3 if products_in_half_precision else 1e-6)


def test_a_scaled_loss_keeps_small_gradients_in_fp16(small_chunks):
    """As GradScaler does: multiplies the loss, divides the gradients."""
    torch.manual_seed(0)
    rows = torch.randn(64, 32, dtype=torch.float16)
    weight = torch.randn(VOCAB, 32).mul(0.5).half()
    targets = torch.randint(0, VOCAB, (64,))
    tokens = 2.0**16  # the loss's denominator on a large batch: unscaled gradients would underflow
    scale = 2.0**14
    leaves = [rows.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = linear_cross_entropy(*leaves, targets) / tokens
    (loss * scale).backward()
    exact = [rows.double().requires_grad_(), weight.double().requires_grad_()]
    (written_out(*exact, targets) / tokens).backward()
    for found, truth in zip(leaves, exact, strict=True):
        assert found.grad.dtype == torch.float16 and found.grad.isfinite().all()
        assert (found.grad.double() / scale - truth.grad).norm() < 5e-3 * truth.grad.norm()


def test_a_small_factor_is_applied_in_fp32():
    """1e-7 vanishes in fp16, but its product with a large gradient does not."""
    rows, weight = torch.full((4096, 8), 4.0, dtype=torch.float16), torch.zeros(VOCAB, 8, dtype=torch.float16)
    weight.requires_grad_()
    (linear_cross_entropy(rows, weight, torch.zeros(4096, dtype=torch.long)) * 1e-7).backward()
    expected = 4096 * 4.0 * (1 / VOCAB - 1) * 1e-7
    torch.testing.assert_close(weight.grad[0].float(), torch.full((8,), expected), rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_that_is_kept_can_be_walked_again(dtype: torch.dtype, small_chunks):
    """The first backward pass consumes the gradients of the forward pass; a second one forms its own."""
    torch.manual_seed(0)
    targets = torch.randint(0, VOCAB, (23,))
    shapes = ((23, 32), (VOCAB, 32), (VOCAB,))
    leaves = [torch.randn(*shape).mul(0.5).to(dtype).requires_grad_() for shape in shapes]
    rows, weight, bias = leaves
    loss = linear_cross_entropy(rows, weight, targets, bias)

    def passed(factor: float, **kwargs: bool) -> list[torch.Tensor]:
        for leaf in leaves:
            leaf.grad = None
        loss.backward(torch.tensor(factor), **kwargs)
        return [leaf.grad for leaf in leaves]

    first = passed(0.25, retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.zero_()
    second = passed(0.5, retain_graph=True)
    assert all(grad.equal(2 * of_first) for grad, of_first in zip(second, kept, strict=True))
    third = passed(0.25)
    assert all(grad.equal(of_first) for grad, of_first in zip(third, kept, strict=True))
    assert all(grad.equal(2 * of_first) for grad, of_first in zip(second, kept, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss = linear_cross_entropy(rows, weight, targets, bias)
        loss.backward(retain_graph=True)
        with torch.no_grad():
            weight += 1.0
        loss.backward()


class LargeTensors(TorchDispatchMode):
    """Collects the storages of fp32 tensors that are as large as a weight, its own aside."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight, self.storages = weight, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float32 and made.numel() == self.weight.numel():
            storage = made.untyped_storage()  # kept alive, so that no two have the same address
            self.storages[storage.data_ptr()] = storage
        self.storages.pop(self.weight.untyped_storage().data_ptr(), None)
        return made


def test_the_weights_gradient_is_not_copied(monkeypatch):
    """It is as large as the weight, and fresh memory is slow: one fp32 tensor of that size is made, and no more."""
    monkeypatch.setattr(engine_loss, "WEIGHT_ROWS", 8)
    weight = torch.randn(VOCAB, 32, requires_grad=True)
    rows = torch.randn(9, 32).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), LargeTensors(weight) as made:
        linear_cross_entropy(rows, weight, torch.arange(9)).backward()
    assert made.storages.keys() == {weight.grad.untyped_storage().data_ptr()}


def test_many_chunks_add_up_in_fp32(monkeypatch):
    """In bf16 a running sum stops growing after 256 equal terms."""
    monkeypatch.setattr(engine_loss, "CHUNK_ELEMENTS", VOCAB)
    monkeypatch.setattr(engine_loss, "MIN_CHUNK_ROWS", 1)
    rows, weight = torch.ones(2000, 8, dtype=torch.bfloat16), torch.zeros(VOCAB, 8, dtype=torch.bfloat16)
    bias = torch.zeros(VOCAB, dtype=torch.bfloat16)
    for leaf in (weight, bias):
        leaf.requires_grad_()
    linear_cross_entropy(rows, weight, torch.zeros(2000, dtype=torch.long), bias).backward()
    expected = torch.full((9,), 2000 * (1 / VOCAB - 1))
    found = torch.cat([weight.grad[0], bias.grad[:1]]).float()
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
