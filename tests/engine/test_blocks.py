"""What is done in blocks, rotations, gates and shared casts, against the same written out whole and in fp64."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from tiny_models import random_ids, tiny_model
from transformers.activations import ACT2FN

from hf_decoder.engine.training import blocks, gate, rotation, shared_cast
from hf_decoder.engine.training.blocks import blocks, is_for_blocks
from hf_decoder.engine.training.gate import gated_for
from hf_decoder.engine.training.rotation import apply_rotary_pos_emb, rotate_half
from hf_decoder.engine.training.shared_cast import shared_input

NEVER = 2**30
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
SILU = ACT2FN["silu"]
gated = partial(gated_for, torch.nn.Identity())


@pytest.fixture(params=[50, 2**17])
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Blocks however short the tensor: of a few rows, or all in one."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", request.param)
    monkeypatch.setattr(blocks, "MIN_BLOCKED_ELEMENTS", 1)


def both_ways(monkeypatch, function: Callable, leaves: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Output and gradients in blocks, and written out whole."""
    results = []
    for least in (1, NEVER):
        monkeypatch.setattr(blocks, "MIN_BLOCKED_ELEMENTS", least)
        output = function(*leaves)
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
        results.append([output.detach(), *torch.autograd.grad(output, leaves, grad)])
    return results


def check_as_exact(mine: list[torch.Tensor], whole: list[torch.Tensor], function: Callable, leaves, dtype):
    """The same output to the bit, and gradients no further from those in fp64 than those of the whole are."""
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


def rotated_by(cos: torch.Tensor, sin: torch.Tensor, **kwargs) -> Callable:
    """Queries and keys laid out as projections leave them, (B, S, H, E) -> the rotated ones side by side."""

    def rotate(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        out = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cos, sin, **kwargs)
        return torch.cat(out, dim=1)

    return rotate


@DTYPES
@pytest.mark.parametrize("rows", [1, 3], ids=["positions of all rows", "positions by row"])
@pytest.mark.parametrize("rotary_dim", [8, 6], ids=["whole heads", "a part of each head"])
@pytest.mark.parametrize("angle_dtype", [None, torch.float32], ids=["own type", "angles in fp32"])
def test_rotation(dtype, rows, rotary_dim, angle_dtype, small_blocks, monkeypatch):
    cos, sin = angles(rows, 7, rotary_dim, angle_dtype or dtype)
    leaves = [leaf(3, 7, 4, 8, dtype=dtype), leaf(3, 7, 2, 8, dtype=dtype, seed=3)]
    mine, whole = both_ways(monkeypatch, rotated_by(cos, sin), leaves)
    check_as_exact(mine, whole, rotated_by(cos.double(), sin.double()), leaves, dtype)


def test_rotation_for_attention_alone_rounds_as_autocast_does(small_blocks, monkeypatch):
    cos, sin = angles(1, 7, 8, torch.float32)
    leaves = [leaf(3, 7, 4, 8, dtype=torch.bfloat16), leaf(3, 7, 2, 8, dtype=torch.bfloat16, seed=3)]
    with torch.autocast("cpu", torch.bfloat16):
        mine, whole = both_ways(monkeypatch, rotated_by(cos, sin, for_cache=False), leaves)
        cached = rotated_by(cos, sin)(*leaves)
    assert mine[0].dtype == torch.bfloat16 and whole[0].dtype == cached.dtype == torch.float32
    assert torch.equal(mine[0], whole[0].bfloat16())


def test_rotation_keeps_the_layout_of_the_projection(small_blocks):
    query = leaf(2, 7, 4, 8)
    cos, sin = angles(1, 7, 8, torch.float32)
    out, _ = apply_rotary_pos_emb(query.transpose(1, 2), query.transpose(1, 2), cos, sin)
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, query.transpose(1, 2) * cos + rotate_half(query.transpose(1, 2)) * sin)


@DTYPES
def test_gate(dtype, small_blocks, monkeypatch):
    # whole vectors of 512 bits, in pairs: torch's SiLU of fewer numbers, the last of a block, differs in the last bit
    leaves = [leaf(2, 5, 64, dtype=dtype), leaf(2, 5, 64, dtype=dtype, seed=1)]
    mine, whole = both_ways(monkeypatch, lambda gate, up: gated(gate, up, SILU), leaves)
    check_as_exact(mine, whole, lambda gate, up: gate * gate.sigmoid() * up, leaves, dtype)


def test_gate_of_another_activation_or_one_that_is_watched_is_written_out(small_blocks, monkeypatch):
    monkeypatch.setattr(gate._BlockedGatedSiLU, "apply", None)
    gate, up = leaf(3, 16), leaf(3, 16, seed=1)
    assert torch.equal(gated(gate, up, ACT2FN["gelu"]), torch.nn.functional.gelu(gate) * up)
    watched, seen = torch.nn.SiLU(), []
    watched.register_forward_hook(lambda *args: seen.append(1))
    assert torch.equal(gated(gate, up, watched), torch.nn.functional.silu(gate) * up)
    assert seen == [1]


def test_gradients_of_what_is_asked_for_alone(small_blocks):
    gate, up = leaf(3, 16), leaf(3, 16, seed=1)
    grad = torch.randn(3, 16)
    both = torch.autograd.grad(gated(gate, up, SILU), (gate, up), grad)
    assert torch.equal(torch.autograd.grad(gated(gate, up.detach(), SILU), gate, grad)[0], both[0])
    assert torch.equal(torch.autograd.grad(gated(gate.detach(), up, SILU), up, grad)[0], both[1])


@pytest.mark.parametrize("of", ["gate", "rotation"])
def test_there_is_a_second_derivative(of, small_blocks, monkeypatch):
    cos, sin = angles(1, 7, 8, torch.float32)
    function = {"gate": lambda a, b: gated(a, b, SILU), "rotation": rotated_by(cos, sin)}[of]
    leaves = [leaf(3, 7, 2, 8), leaf(3, 7, 2, 8, seed=3)]
    found = []
    for least in (1, NEVER):
        monkeypatch.setattr(blocks, "MIN_BLOCKED_ELEMENTS", least)
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)
        found.append([*first, *second])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


def linears(*widths: int) -> list[torch.nn.Linear]:
    torch.manual_seed(0)
    return [torch.nn.Linear(16, width, bias=False) for width in widths]


def test_shared_input(small_blocks, monkeypatch):
    maps, x = linears(8, 4, 4), leaf(2, 5, 16)

    def all_maps(x: torch.Tensor) -> torch.Tensor:
        inputs = shared_input(x * 1, *maps)  # autocast would keep the cast of a leaf
        assert len({tensor.data_ptr() for tensor in inputs}) == 1
        return torch.cat([module(mine) for module, mine in zip(maps, inputs, strict=True)], -1)

    with torch.autocast("cpu", torch.bfloat16):
        mine, whole = both_ways(monkeypatch, all_maps, [x])
    assert torch.equal(mine[0], whole[0])
    assert mine[1].dtype == torch.float32
    torch.testing.assert_close(mine[1], whole[1], rtol=1e-6, atol=1e-6)  # three sums in fp32, in another order


def test_shared_input_of_which_a_part_is_used_or_nothing(small_blocks):
    maps, x = linears(8, 4), leaf(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        first, second = shared_input(x, *maps)
        maps[1](second).sum().backward()
        alone = leaf(5, 16)
        maps[1](alone).sum().backward()
    assert first.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad, alone.grad)


def test_shared_input_leaves_to_each_module_what_only_it_knows(small_blocks):
    class Quantized(torch.nn.Linear):
        pass

    plain, x = linears(8, 8), leaf(5, 16)
    half = x.detach().bfloat16()
    assert all(mine is x for mine in shared_input(x, *plain))  # no autocast
    with torch.autocast("cpu", torch.bfloat16):
        assert all(mine is x for mine in shared_input(x, plain[0], Quantized(16, 8)))
        assert all(mine is half for mine in shared_input(half, *plain))
        plain[1].register_forward_pre_hook(lambda module, args: args[0].mul_(2))
        assert all(mine is x for mine in shared_input(x, *plain))


def test_blocks_cover_every_row_once():
    for count, width in ((10, 2**16), (3, 2**20), (1, 1), (7, 2**17)):
        covered = [row for block in blocks(count, width) for row in range(count)[block]]
        assert covered == list(range(count))


def test_only_long_plain_tensors_that_nothing_looks_inside(monkeypatch):
    long = torch.empty(blocks.MIN_BLOCKED_ELEMENTS)
    assert is_for_blocks(long, torch.empty(1))
    assert not is_for_blocks(long[:-1])
    assert not is_for_blocks(long.double()) and not is_for_blocks(long, torch.empty(1, dtype=torch.int64))
    assert not is_for_blocks(long.to("meta")) and not is_for_blocks(long, torch.empty(1, device="meta"))
    asked = []
    torch.func.vmap(lambda x: asked.append(is_for_blocks(x)) or x)(long.expand(2, -1))
    torch.jit.trace(lambda x: asked.append(is_for_blocks(x)) or x * 1, long, check_trace=False)
    assert asked == [False, False]
    compiled = torch.compile(lambda x: x + is_for_blocks(x), backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros_like(long)), torch.zeros_like(long))


def test_a_training_step_takes_all_of_them(monkeypatch, small_blocks):
    from hf_decoder.model.configuration_hf_decoder import HfDecoderConfig
    from hf_decoder.model.modeling_hf_decoder import HfDecoderForCausalLM

    taken = []
    for function in (
        rotation._BlockedRotation,
        gate._BlockedGatedSiLU,
        shared_cast._SharedCast,
    ):
        monkeypatch.setattr(
            function,
            "apply",
            lambda *args, apply=function.apply, name=function.__name__: taken.append(name) or apply(*args),
        )
    config = HfDecoderConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    model = HfDecoderForCausalLM(config).train()
    ids = torch.randint(64, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, labels=ids).loss.backward()
    layer = ["_SharedCast", "_BlockedRotation", "_BlockedRotation", "_SharedCast", "_BlockedGatedSiLU"]
    assert taken == 2 * layer


def test_no_compiler_is_led_into_the_question_for_kernels(monkeypatch):
    """Which asks the device and launches one: a graph would end there."""
    model, ids = tiny_model(attn_implementation="sdpa").train(), random_ids(2, 9)
    monkeypatch.setattr(shared_cast, "has_kernels", lambda x: pytest.fail("asked within a graph"))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(ids, labels=ids, use_cache=False).loss.isfinite()
