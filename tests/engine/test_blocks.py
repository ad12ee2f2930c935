"""Rotations, gates and shared casts in blocks, against the plain formulas and fp64."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.nn.functional import silu

from hf_decoder.engine.training import blocks
from hf_decoder.engine.training.gate import fused_gate
from hf_decoder.engine.training.rotation import fused_rotation
from hf_decoder.engine.training.shared_cast import cast_once
from hf_decoder.model.modeling_hf_decoder import apply_rotary_pos_emb

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
gated = partial(fused_gate, torch.nn.Identity())


def gated_whole(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return silu(gate) * up


@pytest.fixture(params=[50, 2**17], autouse=True)
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Blocks of a few rows, or all in one."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", request.param)


def results(function: Callable, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients."""
    output = function(*leaves)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def check_as_exact(mine: list[torch.Tensor], whole: list[torch.Tensor], function: Callable, leaves, dtype):
    """Checks bit-equal outputs, and gradients at least as close to fp64 as those of the plain formula."""
    assert torch.equal(mine[0], whole[0])
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    output = function(*exact_leaves)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(mine[0].dtype)
    for a, b, true in zip(mine[1:], whole[1:], torch.autograd.grad(output, exact_leaves, grad.double()), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        errors = [float((tensor.double() - true).norm() / true.norm()) for tensor in (a, b)]
        assert errors[0] <= errors[1] * 1.05 + 1e-7
        assert errors[0] < 3 * torch.finfo(dtype).eps


def leaf(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype).requires_grad_()


def angles(rows: int, length: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    half = torch.rand(rows, length, head_dim // 2, generator=torch.Generator().manual_seed(2)) * 6
    both = torch.cat((half, half), -1)
    return both.cos().to(dtype), both.sin().to(dtype)


def rotated_by(cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype | None = None) -> Callable:
    """Queries and keys laid out as projections leave them, (B, S, H, E) -> the rotated ones side by side."""

    def rotate(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return torch.cat(fused_rotation(query.transpose(1, 2), key.transpose(1, 2), cos, sin, dtype), dim=1)

    return rotate


def rotated_whole(cos: torch.Tensor, sin: torch.Tensor) -> Callable:
    def rotate(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return torch.cat([apply_rotary_pos_emb(x.transpose(1, 2), cos, sin) for x in (query, key)], dim=1)

    return rotate


@DTYPES
@pytest.mark.parametrize("rows", [1, 3], ids=["positions of all rows", "positions by row"])
@pytest.mark.parametrize("rotary_dim", [8, 6], ids=["whole heads", "a part of each head"])
@pytest.mark.parametrize("angle_dtype", [None, torch.float32], ids=["own type", "angles in fp32"])
def test_rotation(dtype, rows, rotary_dim, angle_dtype):
    cos, sin = angles(rows, 7, rotary_dim, angle_dtype or dtype)
    leaves = [leaf(3, 7, 4, 8, dtype=dtype), leaf(3, 7, 2, 8, dtype=dtype, seed=3)]
    mine, whole = results(rotated_by(cos, sin), leaves), results(rotated_whole(cos, sin), leaves)
    check_as_exact(mine, whole, rotated_whole(cos.double(), sin.double()), leaves, dtype)


def test_rotation_for_attention_alone_rounds_once():
    cos, sin = angles(1, 7, 8, torch.float32)
    leaves = [leaf(3, 7, 4, 8, dtype=torch.bfloat16), leaf(3, 7, 2, 8, dtype=torch.bfloat16, seed=3)]
    mine, whole = results(rotated_by(cos, sin, torch.bfloat16), leaves), results(rotated_whole(cos, sin), leaves)
    assert mine[0].dtype == torch.bfloat16 and whole[0].dtype == torch.float32
    assert torch.equal(mine[0], whole[0].bfloat16())


def test_rotation_keeps_the_layout_of_the_projection():
    query = leaf(2, 7, 4, 8)
    out, _ = fused_rotation(query.transpose(1, 2), query.transpose(1, 2), *angles(1, 7, 8, torch.float32), None)
    assert out.transpose(1, 2).is_contiguous()


@DTYPES
def test_gate(dtype):
    # whole vectors of 512 bits, in pairs: torch's SiLU of fewer numbers, the last of a block, differs in the last bit
    leaves = [leaf(2, 5, 64, dtype=dtype), leaf(2, 5, 64, dtype=dtype, seed=1)]
    mine, whole = results(gated, leaves), results(gated_whole, leaves)
    check_as_exact(mine, whole, lambda gate, up: gate * gate.sigmoid() * up, leaves, dtype)


def test_gate_of_two_types_or_shapes():
    """As an adapter may make them."""
    gate, up = leaf(3, 16), leaf(3, 16, seed=1)
    for other in (up.bfloat16(), up[:1]):
        assert torch.equal(gated(gate, other), gated_whole(gate, other))


def test_gradients_of_what_is_asked_for_alone():
    gate, up = leaf(3, 16), leaf(3, 16, seed=1)
    grad = torch.randn(3, 16)
    both = torch.autograd.grad(gated(gate, up), (gate, up), grad)
    assert torch.equal(torch.autograd.grad(gated(gate, up.detach()), gate, grad)[0], both[0])
    assert torch.equal(torch.autograd.grad(gated(gate.detach(), up), up, grad)[0], both[1])


@pytest.mark.parametrize("of", ["gate", "rotation"])
def test_there_is_a_second_derivative(of):
    cos, sin = angles(1, 7, 8, torch.float32)
    functions = {"gate": (gated, gated_whole), "rotation": (rotated_by(cos, sin), rotated_whole(cos, sin))}[of]
    leaves = [leaf(3, 7, 2, 8), leaf(3, 7, 2, 8, seed=3)]
    found = []
    for function in functions:
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)
        found.append([*first, *second])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


def linears(*widths: int) -> list[torch.nn.Linear]:
    torch.manual_seed(0)
    return [torch.nn.Linear(16, width, bias=False) for width in widths]


def test_one_cast_for_several_maps():
    maps, x = linears(8, 4, 4), leaf(2, 5, 16)

    def with_one_cast(x: torch.Tensor) -> torch.Tensor:
        inputs = cast_once(x, torch.bfloat16, 3)
        assert len({tensor.data_ptr() for tensor in inputs}) == 1
        return torch.cat([module(mine) for module, mine in zip(maps, inputs, strict=True)], -1)

    def with_a_cast_for_each(x: torch.Tensor) -> torch.Tensor:
        x = x * 1  # autocast would keep the cast of a leaf
        return torch.cat([module(x) for module in maps], -1)

    with torch.autocast("cpu", torch.bfloat16):
        mine, whole = results(with_one_cast, [x]), results(with_a_cast_for_each, [x])
    assert torch.equal(mine[0], whole[0])
    assert mine[1].dtype == torch.float32
    torch.testing.assert_close(mine[1], whole[1], rtol=1e-6, atol=1e-6)  # three sums in fp32, in another order


def test_a_cast_of_which_a_part_is_used():
    maps, x, alone = linears(8, 4), leaf(5, 16), leaf(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        first, second = cast_once(x, torch.bfloat16, 2)
        maps[1](second).sum().backward()
        maps[1](alone).sum().backward()
    assert first.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad, alone.grad)


def test_a_cast_has_a_second_derivative():
    x = leaf(5, 16)
    found = []
    for cast in (lambda x: cast_once(x, torch.bfloat16, 2), lambda x: (x.bfloat16(), x.bfloat16())):
        a, b = cast(x)
        (first,) = torch.autograd.grad((a.float().pow(3) + b.float()).sum(), x, create_graph=True)
        found.append([first, *torch.autograd.grad(first.square().sum(), x)])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=2**-6, atol=1e-3)


def test_blocks_cover_every_row_once():
    for count, width in ((10, 2**16), (3, 2**20), (1, 1), (7, 2**17)):
        covered = [row for block in blocks.blocks(count, width) for row in range(count)[block]]
        assert covered == list(range(count))
