"""Rotations, gates, norms and losses in C++, against the plain formulas and fp64."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sanitizers import run_sanitized
from torch.nn import functional
from torch.nn.functional import silu
from vector_widths import CAPABILITY, WIDTHS

from hf_decoder.engine.cpp import build
from hf_decoder.engine.training import compiled
from hf_decoder.engine.training.gate import fused_gate
from hf_decoder.engine.training.norm import fused_rms_norm, rms_norm
from hf_decoder.engine.training.rotation import fused_rotation
from hf_decoder.model.modeling_hf_decoder import apply_rotary_pos_emb

pytestmark = pytest.mark.usefixtures("cpp_library")
BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16])
gated = partial(fused_gate, torch.nn.Identity())


def gated_whole(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return silu(gate) * up


def gradient_of(output: torch.Tensor) -> torch.Tensor:
    """The same numbers in all types."""
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(BF16).to(output.dtype)


def results(function: Callable, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients."""
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient_of(output))]


def check_as_exact(
    function: Callable,
    plain: Callable,
    leaves: Sequence[torch.Tensor],
    exact: Callable,
    sizes: Callable = lambda *_: (0, 0, 0),
):
    """Checks output and gradients to be as close to fp64 as those of the plain formula, or as rounding allows.

    exact: takes fp64. sizes: of the terms whose sum a result is, by which its error counts where they cancel out.
    """
    mine, whole = (results(way, leaves) for way in (function, plain))
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = results(exact, doubles)
    sizes = sizes(gradient_of(truth[0]), *doubles)
    eps = max(torch.finfo(x.dtype).eps for x in (*leaves, mine[0]))
    for a, b, true, size in zip(mine, whole, truth, sizes, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        size = max(float(true.norm()), float(size), 1e-30)
        errors = [float((x.double() - true).norm()) / size for x in (a, b)]
        assert errors[0] <= max(errors[1] * 1.05, 1.5 * eps if eps > 1e-3 else 1e-6)


def leaf(*shape: int, dtype: torch.dtype = FP32, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype).requires_grad_()


def angles(rows: int, length: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    half = torch.rand(rows, length, head_dim // 2, generator=torch.Generator().manual_seed(2)) * 6
    both = torch.cat((half, half), -1)
    return both.cos().to(dtype), both.sin().to(dtype)


def rotated_by(cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype | None = None) -> Callable:
    """Queries and keys laid out as projections leave them, (B, S, H, E) -> the rotated ones side by side."""

    def rotate(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return torch.cat(fused_rotation(query.transpose(1, 2), key.transpose(1, 2), cos, sin, dtype), dim=1)

    return rotate


def rotated_whole(cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype | None = None) -> Callable:
    def rotate(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        found = torch.cat([apply_rotary_pos_emb(x.transpose(1, 2), cos, sin) for x in (query, key)], dim=1)
        return found if dtype is None else found.to(dtype)

    return rotate


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return fused_rms_norm(x, weight, 1e-6)


def normed_whole(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, weight, 1e-6)


def normed_exactly(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def check_rotation(batch, length, heads, width, rotary_dim, dtype, angle_dtype, per_row, to=None):
    cos, sin = angles(batch if per_row else 1, length, rotary_dim, angle_dtype)
    leaves = [leaf(batch, length, count, width, dtype=dtype, seed=count) for count in (heads, 1)]
    exact = rotated_whole(cos.double(), sin.double())
    check_as_exact(rotated_by(cos, sin, to), rotated_whole(cos, sin, to), leaves, exact)


@pytest.mark.kernels
@settings(max_examples=300, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(0, 9), st.integers(1, 3)),
    half=st.integers(1, 40),
    rest=st.integers(0, 35),
    dtypes=st.tuples(*[st.sampled_from([FP32, BF16])] * 2),
    per_row=st.booleans(),
    for_attention=st.booleans(),
)
def test_rotations_of_any_shape(sizes, half, rest, dtypes, per_row, for_attention):
    check_rotation(*sizes, 2 * half + rest, 2 * half, *dtypes, per_row, BF16 if for_attention else None)


@pytest.mark.kernels
@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 150),
    dtypes=st.tuples(*[st.sampled_from([FP32, BF16])] * 2),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 2**16),
)
def test_norms_of_any_shape(rows, width, dtypes, scale, seed):
    leaves = [leaf(rows, width, dtype=dtypes[0], seed=seed, scale=scale), leaf(width, dtype=dtypes[1], seed=seed + 1)]

    def sizes(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple:
        scale = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return 0, (grad * weight * scale).norm(), (grad * x * scale).norm()

    check_as_exact(normed, normed_whole, leaves, normed_exactly, sizes)


@pytest.mark.kernels
@settings(max_examples=300, deadline=None)
@given(
    shape=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    dtype=st.sampled_from([FP32, BF16]),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    turned=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_gates_of_any_shape(shape, dtype, scale, turned, seed):
    leaves = [leaf(*shape, dtype=dtype, seed=seed + i, scale=scale) for i in range(2)]

    def of(function: Callable, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return function(x.mT, y.mT) if turned and x.ndim > 1 else function(x, y)

    exact = partial(of, lambda gate, up: gate * gate.sigmoid() * up)
    check_as_exact(
        partial(of, gated), partial(of, gated_whole), leaves, exact, lambda grad, gate, up: (0, up.norm(), 0)
    )


@pytest.mark.kernels
@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(0, 6),
    entries=st.integers(1, 90),
    dtype=st.sampled_from([FP32, BF16]),
    scale=st.sampled_from([0.0, 1.0, 50.0]),
    z_loss=st.sampled_from([0.0, 0.02]),
    seed=st.integers(0, 2**16),
)
def test_losses_of_any_shape(rows, entries, dtype, scale, z_loss, seed):
    logits = leaf(rows, entries, dtype=dtype, seed=seed, scale=scale).detach()
    targets = torch.randint(-1, entries, (rows,), generator=torch.Generator().manual_seed(seed))
    exact = logits.double().requires_grad_()
    losses = functional.cross_entropy(exact, targets, ignore_index=-1, reduction="none")
    losses = losses + z_loss * exact.logsumexp(-1).square() * (targets >= 0)
    (expected,) = torch.autograd.grad(losses.sum(), exact)
    alone = compiled.cross_entropy(logits, targets, -1, z_loss, needs_gradient=False)
    found = compiled.cross_entropy(logits, targets, -1, z_loss, needs_gradient=True)
    assert found.equal(alone)
    torch.testing.assert_close(found.double(), losses.detach(), rtol=2e-6, atol=2e-6)
    error = torch.finfo(dtype).eps if dtype == BF16 else 2e-6
    torch.testing.assert_close(logits.double(), expected, rtol=error, atol=2e-6)


@DTYPES
@pytest.mark.parametrize("rows", [False, True], ids=["positions of all rows", "positions by row"])
@pytest.mark.parametrize("rotary_dim", [8, 6], ids=["whole heads", "a part of each head"])
@pytest.mark.parametrize("angle_dtype", [None, FP32], ids=["own type", "angles in fp32"])
def test_rotation(dtype, rows, rotary_dim, angle_dtype):
    check_rotation(3, 7, 4, 8, rotary_dim, dtype, angle_dtype or dtype, rows)


def test_rotation_for_attention_alone_rounds_once():
    cos, sin = angles(1, 7, 8, FP32)
    leaves = [leaf(3, 7, 4, 8, dtype=BF16), leaf(3, 7, 2, 8, dtype=BF16, seed=3)]
    whole = rotated_whole(cos.double(), sin.double())(*(x.double() for x in leaves))
    torch.testing.assert_close(rotated_by(cos, sin, BF16)(*leaves).double(), whole, rtol=2**-8, atol=1e-6)


def test_rotation_keeps_the_layout_of_the_projection():
    query = leaf(2, 7, 4, 8)
    out, _ = fused_rotation(query.transpose(1, 2), query.transpose(1, 2), *angles(1, 7, 8, FP32), None)
    assert out.transpose(1, 2).is_contiguous()


def test_rotation_takes_gradients_that_are_one_number():
    leaves = [leaf(1, 7, 2, 8), leaf(1, 7, 1, 8, seed=1)]
    found, expected = (
        torch.autograd.grad(way(*angles(1, 7, 8, FP32))(*leaves).sum(), leaves) for way in (rotated_by, rotated_whole)
    )
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.kernels
@pytest.mark.skipif("AVX" not in CAPABILITY, reason="not a CPU with AVX2")
@pytest.mark.parametrize("width", WIDTHS)
def test_vectors_of_all_widths(width, monkeypatch):
    library = build.load(WIDTHS[width] + (build.HERE / compiled.FILE).read_text("utf-8"))
    monkeypatch.setattr(compiled, "load_file", lambda *_: library)
    found = compiled._library.__wrapped__()
    monkeypatch.setattr(compiled, "_library", lambda: found)
    for dtype in (FP32, BF16):
        test_gate(dtype)
        check_rotation(3, 7, 4, 77, 70, dtype, dtype, per_row=True)
        check_as_exact(normed, normed_whole, [leaf(5, 77, dtype=dtype), leaf(77, dtype=dtype, seed=1)], normed_exactly)
        test_losses_of_any_shape.hypothesis.inner_test(5, 77, dtype, 50.0, 0.02, 3)


@DTYPES
def test_gate(dtype):
    leaves = [leaf(2, 5, 61, dtype=dtype), leaf(2, 5, 61, dtype=dtype, seed=1)]
    check_as_exact(gated, gated_whole, leaves, lambda gate, up: gate * gate.sigmoid() * up)


def test_gate_of_two_types_or_shapes():
    """As an adapter may make them."""
    gate, up = leaf(3, 16), leaf(3, 16, seed=1)
    for other in (up.bfloat16(), up[:1]):
        assert torch.equal(gated(gate, other), gated_whole(gate, other))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, -3e38])
def test_what_is_no_number_stays_so(value):
    gate, up, weight = leaf(1, 19).detach(), leaf(1, 19, seed=1).detach(), torch.ones(19)
    gate[0, 3] = value
    for function, plain, other in ((gated, gated_whole, up), (normed, normed_whole, weight)):
        found, expected = function(gate, other), plain(gate, other)
        torch.testing.assert_close(found, expected, equal_nan=True)
    logits = gate.clone()
    loss = compiled.cross_entropy(logits, torch.tensor([0]), -100, 0.0, needs_gradient=True)
    expected = functional.cross_entropy(gate, torch.tensor([0]))
    torch.testing.assert_close(loss[0], expected, equal_nan=True)


def test_gradients_of_what_is_asked_for_alone():
    for function, leaves in ((gated, [leaf(3, 16), leaf(3, 16, seed=1)]), (normed, [leaf(3, 16), leaf(16, seed=1)])):
        x, y = leaves
        grad = torch.randn(3, 16)
        both = torch.autograd.grad(function(x, y), leaves, grad)
        assert torch.equal(torch.autograd.grad(function(x, y.detach()), x, grad)[0], both[0])
        assert torch.equal(torch.autograd.grad(function(x.detach(), y), y, grad)[0], both[1])


@pytest.mark.parametrize("of", ["gate", "rotation", "norm"])
def test_there_is_a_second_derivative(of):
    cos, sin = angles(1, 7, 8, FP32)
    functions = {
        "gate": (gated, gated_whole),
        "rotation": (rotated_by(cos, sin), rotated_whole(cos, sin)),
        "norm": (normed, normed_whole),
    }[of]
    leaves = [leaf(3, 7, 2, 8), leaf(8, seed=3) if of == "norm" else leaf(3, 7, 2, 8, seed=3)]
    found = []
    for function in functions:
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)
        found.append([*first, *second])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("used", [[0], [0, 1], [0, 1, 2]], ids=str)
def test_one_cast_for_several_maps(used):
    maps = [torch.nn.Linear(16, width, bias=False) for width in (8, 4, 4)]
    leaves = [leaf(2, 5, 16), leaf(16, seed=1)]

    def read(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        with torch.autocast("cpu", BF16):
            return torch.cat([maps[i](inputs[i]) for i in used], -1).float()

    def once(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        inputs = fused_rms_norm(x, weight, 1e-6, BF16, 3)
        assert len({tensor.data_ptr() for tensor in inputs}) == 1
        return read(inputs)

    mine, whole = (results(function, leaves) for function in (once, lambda *inputs: read([normed_whole(*inputs)] * 3)))
    for a, b in zip(mine, whole, strict=True):
        assert a.dtype == FP32
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("threads", [1, 3, 7])
def test_threads_share_the_rows(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_as_exact(normed, normed_whole, [leaf(11, 24), leaf(24, seed=1)], normed_exactly)
        check_rotation(2, 5, 3, 16, 16, FP32, FP32, per_row=True)
    finally:
        torch.set_num_threads(before)


def test_what_does_not_go_together_is_refused():
    x, cos = torch.ones(1, 1, 3, 8), torch.ones(1, 2, 8)
    with pytest.raises(ValueError, match="do not go together"):
        fused_rms_norm(x, torch.ones(4), 1e-6)
    with pytest.raises(ValueError, match="do not go together"):
        fused_rotation(x, x, cos, cos, None)
    with pytest.raises(ValueError, match="do not go together"):
        compiled.gated_silu(x, x[..., :4])
    with pytest.raises(TypeError, match="fp32 and bf16"):
        compiled.gated_silu(x.double(), x.double())
    for target in (-1, 8):
        with pytest.raises(IndexError, match="outside of the vocabulary"):
            compiled.cross_entropy(torch.ones(1, 8), torch.tensor([target]), -100, 0.0, needs_gradient=True)


SANITIZED = r"""
#include "training.cpp"
typedef std::vector<char> Room;
static Room room(int64_t count, bool is_half) { return Room(count * (is_half ? 2 : 4), 1); }
static void norm_and_rotation(int64_t rows, int64_t width, bool a, bool b, bool c) {
    Room x = room(rows * width, a), weight = room(width, b), output = room(rows * width, c), grad = x;
    std::vector<float> scales(rows), grads(2 * width);
    rms_norm(x.data(), weight.data(), output.data(), scales.data(), rows, width, 1e-6, a, b, c, 2);
    const void *readers[] = {output.data(), output.data(), output.data()};
    rms_norm_gradients(readers, 3, x.data(), weight.data(), scales.data(), grad.data(), grads.data(), rows, width, a,
                       b, c, 2);
    const int64_t turned = width / 2 * 2;
    const Rotation of{2, 3, rows, width, turned, 3 * rows * width, rows * width, width, 0, c, 2};
    Room heads = room(6 * rows * width, a), angles = room(rows * turned, b), result = room(6 * rows * width, c);
    rotate(&of, heads.data(), angles.data(), angles.data(), result.data(), a, b, c);
}
int main() {
    for (int kinds = 0; kinds < 8; kinds++)
        for (int64_t width : {1, 7, 8, 33, 130})
            for (int64_t rows : {0, 1, 5}) {
                norm_and_rotation(rows, width, kinds & 1, kinds & 2, kinds & 4);
                Room x = room(rows * width, kinds & 1), up = x, grad = x, to_gate = x, to_up = x;
                for (const void *of : {(void *)nullptr, (void *)grad.data()})
                    gate(x.data(), up.data(), of, to_gate.data(), to_up.data(), rows * width, kinds & 1, 2);
                std::vector<int64_t> targets(rows, width - 1);
                if (rows > 1) targets[1] = -100;
                std::vector<float> losses(rows);
                for (bool needs : {false, true})
                    cross_entropy(x.data(), targets.data(), losses.data(), rows, width, -100, 0.1, needs, kinds & 1,
                                  2);
            }
}
"""


@pytest.mark.kernels
def test_memory_is_touched_where_it_may_be(tmp_path):
    run_sanitized(SANITIZED, tmp_path)
