"""The norm in blocks of rows against the module, and against its definition in fp64."""

import pytest
import torch

from hf_decoder.engine.training import blocks
from hf_decoder.engine.training.norm import fused_rms_norm
from hf_decoder.model.modeling_hf_decoder import HfDecoderRMSNorm

TYPES = [(kind, kind) for kind in (torch.float32, torch.bfloat16, torch.float16)] + [(torch.bfloat16, torch.float32)]
BY_TYPE = pytest.mark.parametrize("dtype, weight_dtype", TYPES)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    """Of three rows of 16."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 50)


def fused(norm: HfDecoderRMSNorm):
    return lambda x: fused_rms_norm(x, norm.weight, norm.variance_epsilon)


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


def found(function, norm: HfDecoderRMSNorm, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    output = function(x)
    return [output.detach(), *torch.autograd.grad(output, (x, norm.weight), grad.to(output.dtype))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("way", ["module", "blocks"])
def test_statistics_are_fp32(dtype: torch.dtype, way: str):
    norm = HfDecoderRMSNorm(256).to(dtype)
    values = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)) * 3000  # squares overflow fp16
    x = values.to(dtype)
    truth = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    output = norm(x) if way == "module" else fused(norm)(x)
    assert output.dtype == dtype
    # one rounding of the result and no more: half a unit in the last place
    torch.testing.assert_close(output.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-6)


@BY_TYPE
def test_blocks_give_what_the_module_gives(dtype, weight_dtype):
    norm, x = inputs(dtype, weight_dtype)
    grad = torch.randn(x.shape)
    in_blocks, whole = (found(function, norm, x, grad) for function in (fused(norm), norm))
    truth = exact(norm, x, grad.to(torch.result_type(x, norm.weight)))
    assert torch.equal(in_blocks[0], whole[0])
    for mine, other, true in zip(in_blocks, whole, truth, strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        errors = [float((tensor.double() - true).norm() / true.norm()) for tensor in (mine, other)]
        assert errors[0] <= errors[1] * 1.05 + 1e-7
        assert errors[0] < 3 * torch.finfo(dtype).eps


def test_a_view_that_lies_apart_in_memory():
    norm, x = inputs()
    apart, grad = x.transpose(0, 1), torch.randn(5, 2, 16)
    for mine, true in zip(found(fused(norm), norm, apart, grad), exact(norm, apart, grad), strict=True):
        torch.testing.assert_close(mine, true.float())


def test_what_is_frozen_gets_no_gradient():
    norm, x = inputs()
    grad = torch.randn(x.shape)
    _, for_x, for_weight = exact(norm, x, grad)
    (alone,) = torch.autograd.grad(fused(norm)(x.detach()), norm.weight, grad)
    torch.testing.assert_close(alone, for_weight.float())
    norm.requires_grad_(False)
    (alone,) = torch.autograd.grad(fused(norm)(x), x, grad)
    torch.testing.assert_close(alone, for_x.float())


def test_there_is_a_second_derivative():
    norm, x = inputs()
    grad = torch.randn(x.shape).requires_grad_()
    results = []
    for function in (fused(norm), norm):
        first = torch.autograd.grad(function(x), (x, norm.weight), grad, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), (x, norm.weight, grad))
        results.append([*first, *second])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)
