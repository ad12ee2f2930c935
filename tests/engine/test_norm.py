"""RMSNorm against its definition, written out whole and in blocks of rows."""

import pytest
import torch

from hf_decoder.engine.training import blocks, norm
from hf_decoder.engine.training.norm import HfDecoderRMSNorm

TYPES = [(kind, kind) for kind in (torch.float32, torch.bfloat16, torch.float16)] + [(torch.bfloat16, torch.float32)]
BY_TYPE = pytest.mark.parametrize("dtype, weight_dtype", TYPES)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    """Blocks of three rows of 16."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 50)
    monkeypatch.setattr(blocks, "MIN_BLOCKED_ELEMENTS", 1)


def inputs(dtype=torch.float32, weight_dtype=torch.float32) -> tuple[HfDecoderRMSNorm, torch.Tensor]:
    torch.manual_seed(0)
    norm = HfDecoderRMSNorm(16)
    torch.nn.init.normal_(norm.weight)
    return norm.to(weight_dtype), (torch.randn(2, 5, 16) * 3).to(dtype).requires_grad_()


def exact(norm: HfDecoderRMSNorm, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients in fp64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, norm.weight)]
    scale = (leaves[0].square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    output = leaves[0] * scale * leaves[1]
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.double())]


def found(norm: HfDecoderRMSNorm, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    output = norm(x)
    return [output.detach(), *torch.autograd.grad(output, (x, norm.weight), grad.to(output.dtype))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("blocks", [True, False])
def test_statistics_are_fp32(dtype: torch.dtype, blocks: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blocks, "MIN_BLOCKED_ELEMENTS", 1 if blocks else 2**30)
    norm = HfDecoderRMSNorm(256).to(dtype)
    values = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)) * 3000  # squares overflow fp16
    x = values.to(dtype)
    truth = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    output = norm(x)
    assert output.dtype == dtype
    # one rounding of the result and no more: half a unit in the last place
    torch.testing.assert_close(output.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-6)


@BY_TYPE
def test_blocks_give_what_the_whole_gives(dtype, weight_dtype, small_blocks, monkeypatch):
    norm, x = inputs(dtype, weight_dtype)
    grad = torch.randn(x.shape)
    in_blocks, truth = found(norm, x, grad), exact(norm, x, grad.to(torch.result_type(x, norm.weight)))
    monkeypatch.setattr(blocks, "MIN_BLOCKED_ELEMENTS", 2**30)
    whole = found(norm, x, grad)
    assert torch.equal(in_blocks[0], whole[0])
    for mine, other, true in zip(in_blocks, whole, truth, strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        errors = [float((tensor.double() - true).norm() / true.norm()) for tensor in (mine, other)]
        assert errors[0] <= errors[1] * 1.05 + 1e-7
        assert errors[0] < 3 * torch.finfo(dtype).eps


def test_a_view_that_lies_apart_in_memory(small_blocks):
    norm, x = inputs()
    apart, grad = x.transpose(0, 1), torch.randn(5, 2, 16)
    for mine, true in zip(found(norm, apart, grad), exact(norm, apart, grad), strict=True):
        torch.testing.assert_close(mine, true.float())


def test_what_is_frozen_gets_no_gradient(small_blocks):
    norm, x = inputs()
    grad = torch.randn(x.shape)
    _, for_x, for_weight = exact(norm, x, grad)
    (alone,) = torch.autograd.grad(norm(x.detach()), norm.weight, grad)
    torch.testing.assert_close(alone, for_weight.float())
    norm.requires_grad_(False)
    (alone,) = torch.autograd.grad(norm(x), x, grad)
    torch.testing.assert_close(alone, for_x.float())


def test_there_is_a_second_derivative(small_blocks, monkeypatch):
    norm, x = inputs()
    grad = torch.randn(x.shape).requires_grad_()
    results = []
    for least in (1, 2**30):
        monkeypatch.setattr(blocks, "MIN_BLOCKED_ELEMENTS", least)
        first = torch.autograd.grad(norm(x), (x, norm.weight), grad, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), (x, norm.weight, grad))
        results.append([*first, *second])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


def test_blocks_are_for_long_inputs_and_for_nothing_that_looks_inside(monkeypatch):
    calls = []
    apply = norm._BlockedRMSNorm.apply
    monkeypatch.setattr(norm._BlockedRMSNorm, "apply", lambda *args: calls.append(1) or apply(*args))
    norm = HfDecoderRMSNorm(512)
    x = torch.randn(blocks.MIN_BLOCKED_ELEMENTS // 512, 512)
    expected = norm(x)
    assert calls == [1]
    calls.clear()
    torch.testing.assert_close(torch.func.functional_call(norm, {"weight": norm.weight}, (x,)), expected)
    assert calls == [1]
    calls.clear()
    norm(x[:-1])
    torch.testing.assert_close(torch.func.vmap(norm)(x[None])[0], expected)
    torch.testing.assert_close(torch.compile(norm, backend="eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.jit.trace(norm, x, check_trace=False)(x), expected)
    norm.to("meta")(x.to("meta"))
    assert not calls
