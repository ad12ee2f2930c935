"""The kernels of training against the formulas in fp64 and written out whole: on a GPU, or interpreted on a CPU."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from triton_kernels import DEVICE, DTYPES, HALF, NEVER, counted, kernels, leaf, random, take_from  # noqa: F401

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.engine.assumptions import SILU as SILU_KINDS
from hf_decoder.engine.precision import autocast_dtype
from hf_decoder.engine.training import kernels as training_kernels
from hf_decoder.engine.training.gate import fused_gate
from hf_decoder.engine.training.kernels import has_kernels
from hf_decoder.engine.training.norm import fused_rms_norm
from hf_decoder.engine.training.rotation import fused_rotation
from hf_decoder.engine.triton import training as triton_training
from hf_decoder.model.modeling_hf_decoder import HfDecoderRMSNorm, apply_rotary_pos_emb

SILU = ACT2FN["silu"]


def is_long(x: torch.Tensor) -> bool:
    return x.numel() >= training_kernels.MIN_KERNEL_ELEMENTS


class Norm(HfDecoderRMSNorm):
    """Uses the kernel for long tensors, and the plain formula for short ones."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if is_long(hidden_states):
            return fused_rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return super().forward(hidden_states)


def gated_for(reader: Callable, gate: torch.Tensor, up: torch.Tensor, act: torch.nn.Module) -> torch.Tensor:
    if is_long(gate) and type(act) in SILU_KINDS:
        return fused_gate(reader, gate, up)
    return reader(act(gate) * up)


gated = partial(gated_for, torch.nn.Identity())


def rotated(query, key, cos, sin, for_cache: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    if is_long(query):
        return fused_rotation(query, key, cos, sin, None if for_cache else autocast_dtype(query.device))
    return apply_rotary_pos_emb(query, cos, sin), apply_rotary_pos_emb(key, cos, sin)


def normed_for(norm: HfDecoderRMSNorm, x: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    if not is_long(x):
        return (norm(x),) * count
    return fused_rms_norm(x, norm.weight, norm.variance_epsilon, autocast_dtype(x.device), count)


def results(function: Callable, leaves: list[torch.Tensor], kind: torch.dtype | None = None) -> list[torch.Tensor]:
    """Output and gradients; the gradient that comes in has values of `kind`."""
    output = function(*leaves)
    grad = random(*output.shape, seed=9).to(kind or output.dtype).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def check(
    function: Callable, leaves: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch, exact: Callable | None = None
) -> None:
    """Checks dtypes and shapes against the plain formula, and that errors to fp64 are no larger."""
    calls = counted(monkeypatch)
    mine = results(function, leaves)
    assert len(calls) >= 2
    take_from(monkeypatch, NEVER)
    calls.clear()
    whole = results(function, leaves)
    assert not calls
    truth = results(exact or function, [leaf.detach().double().requires_grad_() for leaf in leaves], mine[0].dtype)
    for a, b, true in zip(mine, whole, truth, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        errors = [float((tensor.double() - true).norm() / true.norm()) for tensor in (a, b)]
        assert errors[0] <= errors[1] * 1.05 + 1e-6, errors


NORM_TYPES = [(kind, kind) for kind in (torch.float32, *HALF)] + [(kind, torch.float32) for kind in HALF]


@pytest.mark.parametrize("dtype, weight_dtype", NORM_TYPES)
@pytest.mark.parametrize("shape", [(2, 5, 16), (3, 7, 6, 24), (70, 64), (3, 3000)], ids=str)
def test_norm(shape, dtype, weight_dtype, monkeypatch):
    norm = Norm(shape[-1])
    torch.nn.init.normal_(norm.weight)
    norm = norm.to(DEVICE, weight_dtype)

    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt() * weight

    weight = norm.weight.detach().requires_grad_()
    check(function, [leaf(*shape, dtype=dtype), weight], monkeypatch, exact)


def test_norm_of_views_that_lie_apart(monkeypatch):
    norm = Norm(16).to(DEVICE)
    x = random(5, 3, 40)
    for view in (x[..., 8:24], x[..., :16].transpose(0, 1)):
        view = view.detach().requires_grad_()
        calls = counted(monkeypatch)
        output = norm(view)
        grad = random(*output.shape[::-1]).permute(2, 1, 0)  # of another layout
        found = [output, *torch.autograd.grad(output, (view, norm.weight), grad)]
        assert calls == ["rms_norm", "rms_norm_gradients"]
        leaves = [tensor.detach().double().requires_grad_() for tensor in (view, norm.weight)]
        output = functional.rms_norm(leaves[0], (16,), leaves[1], norm.variance_epsilon)
        for mine, true in zip(found, [output, *torch.autograd.grad(output, leaves, grad.double())], strict=True):
            torch.testing.assert_close(mine, true.float())


def test_norm_of_which_a_part_is_frozen():
    norm, x, grad = Norm(24).to(DEVICE), leaf(7, 24), random(7, 24, seed=1)
    both = torch.autograd.grad(norm(x), (x, norm.weight), grad)
    (alone,) = torch.autograd.grad(norm(x.detach()), norm.weight, grad)
    assert torch.equal(alone, both[1])
    norm.requires_grad_(False)
    assert torch.equal(torch.autograd.grad(norm(x), x, grad)[0], both[0])


@pytest.mark.parametrize("dtype", HALF)
def test_statistics_are_fp32(dtype):
    x = (random(4, 256) * 3000).to(dtype)  # squares overflow fp16
    truth = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    output = Norm(256).to(DEVICE, dtype)(x)
    torch.testing.assert_close(output.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("shape", [(2, 5, 16), (3, 1001)], ids=str)
def test_gate(shape, dtype, monkeypatch):
    leaves = [leaf(*shape, dtype=dtype), leaf(*shape, dtype=dtype, seed=1)]
    check(lambda gate, up: gated(gate, up, SILU), leaves, monkeypatch, lambda gate, up: gate * gate.sigmoid() * up)


def test_gate_of_one_product_for_both(monkeypatch):
    check(lambda both: gated(*both.chunk(2, -1), SILU), [leaf(3, 7, 40)], monkeypatch)


def test_gate_of_large_numbers():
    gate = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4], device=DEVICE, requires_grad=True)
    output = gated(gate, torch.ones_like(gate), SILU)
    torch.testing.assert_close(output, functional.silu(gate))
    (grad,) = torch.autograd.grad(output.sum(), gate)
    torch.testing.assert_close(grad, torch.autograd.grad(functional.silu(gate).sum(), gate)[0])


def test_gradients_of_what_is_asked_for_alone():
    gate, up, grad = leaf(3, 16), leaf(3, 16, seed=1), random(3, 16, seed=2)
    both = torch.autograd.grad(gated(gate, up, SILU), (gate, up), grad)
    assert torch.equal(torch.autograd.grad(gated(gate, up.detach(), SILU), gate, grad)[0], both[0])
    assert torch.equal(torch.autograd.grad(gated(gate.detach(), up, SILU), up, grad)[0], both[1])


def reader_of(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    reader = torch.nn.Linear(16, 8, bias="bias" in kind).to(DEVICE)
    if kind == "lora":
        holder = torch.nn.ModuleDict({"down": reader})
        config = LoraConfig(target_modules=["down"], r=2, init_lora_weights=False)
        return inject_adapter_in_model(config, holder)["down"].to(DEVICE)
    if kind == "of int8":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(reader, quantization.Int8WeightOnlyConfig(version=2))
        reader.requires_grad_(False)
    if kind == "frozen":
        reader.requires_grad_(False)
    if kind == "written into":
        reader.register_forward_pre_hook(lambda module, inputs: (inputs[0].mul_(2),))
    return reader


READERS = ["plain", "with a bias", "frozen", "lora", "written into", "of int8"]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", READERS)
def test_a_reader_of_the_gate_has_the_same_gradients(kind, autocast, monkeypatch):
    reader = reader_of(kind)
    leaves = [leaf(2, 5, 16), leaf(2, 5, 16, seed=1)]
    weights = [weight for weight in reader.parameters() if weight.requires_grad]
    found, calls = [], counted(monkeypatch, "gated_silu")
    for read in (lambda gate, up: reader(gated(gate, up, SILU)), lambda gate, up: gated_for(reader, gate, up, SILU)):
        calls.clear()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            gate, up = (2 * tensor if not autocast else tensor.bfloat16() for tensor in leaves)
            output = read(gate, up)
        output.float().square().sum().backward()
        found.append([output.detach(), *(tensor.grad.clone() for tensor in (*leaves, *weights))])
        for tensor in (*leaves, *weights):
            tensor.grad = None
    assert all(map(torch.equal, *found))
    # recomputed in the backward pass, unless a reader does not need it, or has changed or cast it
    is_made_again = kind in ("plain", "with a bias") or (kind == "lora" and not autocast)
    assert len(calls) == 1 + is_made_again


@pytest.mark.parametrize("within", ["nothing", "another activation", "someone else's hooks", "checkpointing"])
def test_who_keeps_the_gate_for_its_reader(within, monkeypatch):
    if DEVICE == "cpu":  # the interpreter holds on to its tensors
        monkeypatch.setattr(triton_training, "gated_silu", lambda gate, up: functional.silu(gate) * up)
    reader, act = reader_of("plain"), ACT2FN["gelu" if within == "another activation" else "silu"]
    products = []
    reader.register_forward_pre_hook(
        lambda module, inputs: products.append(StorageWeakRef(inputs[0].untyped_storage()))
    )
    leaves = [leaf(2, 5, 16), leaf(2, 5, 16, seed=1), reader.weight]
    expected = reader(gated(*leaves[:2], act))
    expected = [expected, *torch.autograd.grad(expected.square().sum(), leaves)]
    products.clear()
    packed = []
    if within == "checkpointing":
        output = checkpoint(gated_for, reader, *leaves[:2], act, use_reentrant=False)
    elif within == "someone else's hooks":
        with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x.shape) or x, lambda x: x):
            output = gated_for(reader, *leaves[:2], act)
        assert (10, 16) in packed  # as the matrix that was multiplied
    else:
        output = gated_for(reader, *leaves[:2], act)
    assert products[0].expired() == (within in ("nothing", "checkpointing"))
    mine = [output, *torch.autograd.grad(output.square().sum(), leaves)]
    assert all(map(torch.equal, mine, expected))


def angles(rows: int, length: int, rotary_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    half = 6 * random(rows, length, rotary_dim // 2, seed=2)
    both = torch.cat((half, half), -1)
    return both.cos().to(dtype), both.sin().to(dtype)


def rotated_by(cos: torch.Tensor, sin: torch.Tensor, **kwargs) -> Callable:
    """Queries and keys laid out as projections leave them, (B, S, H, E) -> the rotated ones side by side."""

    def rotate(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return torch.cat(rotated(query.transpose(1, 2), key.transpose(1, 2), cos, sin, **kwargs), dim=1)

    return rotate


@DTYPES
@pytest.mark.parametrize("rows", [1, 3], ids=["positions of all rows", "positions by row"])
@pytest.mark.parametrize("head_dim, rotary_dim", [(8, 8), (8, 6), (80, 80), (20, 4)])
@pytest.mark.parametrize("angle_dtype", [None, torch.float32], ids=["own type", "angles in fp32"])
def test_rotation(dtype, rows, head_dim, rotary_dim, angle_dtype, monkeypatch):
    cos, sin = angles(rows, 7, rotary_dim, angle_dtype or dtype)
    leaves = [leaf(3, 7, 5, head_dim, dtype=dtype), leaf(3, 7, 2, head_dim, dtype=dtype, seed=3)]
    check(rotated_by(cos, sin), leaves, monkeypatch, rotated_by(cos.double(), sin.double()))


@pytest.mark.parametrize("rotary_dim", [8, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rotation_for_attention_alone_is_in_the_type_of_autocast(dtype, rotary_dim, monkeypatch):
    cos, sin = angles(1, 7, rotary_dim, torch.float32)
    leaves = [leaf(3, 7, 4, 8, dtype=dtype), leaf(3, 7, 2, 8, dtype=dtype, seed=3)]
    with torch.autocast(DEVICE, torch.bfloat16):
        mine = results(rotated_by(cos, sin, for_cache=False), leaves)
        cached = rotated_by(cos, sin)(*leaves)
        take_from(monkeypatch, NEVER)
        whole = results(rotated_by(cos, sin, for_cache=False), leaves, torch.bfloat16)
    assert mine[0].dtype == torch.bfloat16 and cached.dtype == whole[0].dtype == torch.float32
    assert [grad.dtype for grad in mine[1:]] == [dtype, dtype]
    for a, b in zip(mine, whole, strict=True):
        torch.testing.assert_close(
            a.float(), b.float(), rtol=2**-7, atol=2e-2
        )  # written out, the gradient is rounded thrice


def test_rotation_keeps_the_layout_of_the_projection_whatever_that_of_its_input():
    cos, sin = angles(2, 7, 8, torch.float32)
    projected = random(2, 7, 4, 8)
    expected = (
        projected.transpose(1, 2) * cos[:, None]
        + torch.cat((-projected[..., 4:], projected[..., :4]), -1).transpose(1, 2) * sin[:, None]
    )
    of_one_product = torch.cat((projected, random(2, 7, 3, 8)), 2)[:, :, :4].transpose(1, 2)
    apart = projected.transpose(1, 2).permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    for query in (projected.transpose(1, 2), projected.transpose(1, 2).contiguous(), of_one_product, apart):
        out, _ = rotated(query, query, cos, sin)
        assert out.transpose(1, 2).is_contiguous()
        torch.testing.assert_close(out, expected)


def test_rotation_takes_gradients_that_are_one_number():
    cos, sin = angles(1, 7, 8, torch.float32)
    leaves = [leaf(1, 7, 2, 8), leaf(1, 7, 1, 8)]
    grads = torch.autograd.grad(rotated_by(cos, sin)(*leaves).sum(), leaves)
    expected = cos + torch.cat((sin[..., 4:], -sin[..., :4]), -1)
    for grad in grads:
        torch.testing.assert_close(grad, expected[:, :, None].expand_as(grad))


class Reader(torch.nn.Module):
    """Two or three linear maps, each with its own input."""

    def __init__(self, count: int, width: int = 24):
        super().__init__()
        torch.manual_seed(0)
        self.maps = torch.nn.ModuleList(torch.nn.Linear(width, 4 * k, bias=False) for k in (2, 1, 1)[:count])

    def forward(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.cat([module(mine) for module, mine in zip(self.maps, inputs, strict=True)], -1)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_norm_for_linear_maps(count, dtype, weight_dtype, monkeypatch):
    """Bit-equal output to that without kernels; gradients are added up in fp32."""
    reader, norm = Reader(count).to(DEVICE), Norm(24)
    torch.nn.init.normal_(norm.weight)
    norm = norm.to(DEVICE, weight_dtype)
    calls, inputs = counted(monkeypatch), []

    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        inputs.append(normed_for(norm, x, count))
        return reader(inputs[-1])

    leaves = [leaf(2, 5, 24), norm.weight]
    with torch.autocast(DEVICE, dtype):
        mine = results(function, leaves)
        assert calls == ["rms_norm", "rms_norm_gradients"]
        take_from(monkeypatch, NEVER)
        whole = results(function, leaves)
    fused, written = inputs[0][0], inputs[1][0]
    assert fused.dtype == dtype and written.dtype == torch.float32
    torch.testing.assert_close(fused, written.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
    assert [tensor.dtype for tensor in mine] == [tensor.dtype for tensor in whole]
    for a, b in zip(mine[1:], whole[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=torch.finfo(dtype).eps, atol=1e-2)


def test_norm_for_linear_maps_of_which_a_part_is_used():
    reader, norm, x = Reader(3).to(DEVICE), Norm(24).to(DEVICE), leaf(2, 5, 24)
    with torch.autocast(DEVICE, torch.bfloat16):
        normed = normed_for(norm, x, 3)
        output = reader.maps[1](normed[1])
        (mine,) = torch.autograd.grad(output.sum(), x)
        (alone,) = torch.autograd.grad(reader.maps[1](norm(x)).sum(), x)
    assert normed[0].dtype == torch.bfloat16
    torch.testing.assert_close(mine, alone)


def test_norm_for_linear_maps_has_a_second_derivative(monkeypatch):
    reader, norm, x = Reader(2).to(DEVICE), Norm(24).to(DEVICE), leaf(2, 5, 24)
    found = []
    for least in (1, NEVER):
        take_from(monkeypatch, least)
        with torch.autocast(DEVICE, torch.bfloat16):
            output = reader(normed_for(norm, x, 2))
        (first,) = torch.autograd.grad(output.float().square().sum(), x, create_graph=True)
        found.append((first, *torch.autograd.grad(first.square().sum(), (x, norm.weight))))
    for mine, other in zip(*found, strict=True):
        assert (mine - other).norm() < 3e-2 * other.norm()


@pytest.mark.parametrize("of", ["norm", "gate", "gate for a reader", "rotation", "part of a rotation"])
def test_there_is_a_second_derivative(of, monkeypatch):
    norm, reader = Norm(8).to(DEVICE), torch.nn.Linear(8, 4, bias=False).to(DEVICE)
    function = {
        "norm": lambda a, b: norm(a) * norm(b),
        "gate": lambda a, b: gated(a, b, SILU),
        "gate for a reader": lambda a, b: gated_for(reader, a, b, SILU) / 32,
        "rotation": rotated_by(*angles(1, 7, 8, torch.float32)),
        "part of a rotation": rotated_by(*angles(1, 7, 4, torch.float32)),
    }[of]
    leaves = [leaf(3, 7, 2, 8), leaf(3, 7, 2, 8, seed=3)]
    found = []
    for least in (1, NEVER):
        take_from(monkeypatch, least)
        of_all = [*leaves, reader.weight] if of == "gate for a reader" else leaves
        first = torch.autograd.grad(function(*leaves).square().sum(), of_all, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), of_all)
        found.append([*first, *second])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_kernels_are_for_plain_tensors():
    x = torch.empty(64, device=DEVICE)
    assert has_kernels(x) and not has_kernels(x.to("meta")) and not has_kernels(x.double())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_takes_all_of_them(autocast, checkpointing, monkeypatch):
    torch.manual_seed(0)
    config = HfDecoderConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        qk_norm=True,
    )
    model = HfDecoderForCausalLM(config).to(DEVICE).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.randint(64, (2, 9), device=DEVICE)
    calls = counted(monkeypatch)

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in model.parameters())]

    mine = step()
    forwards = 2 if checkpointing else 1
    expected = {
        "rms_norm": 8 * forwards + 1,
        "rms_norm_gradients": 9,
        "gated_silu": 4,  # with checkpointing the layer is run again, without it the product is made again
        "gated_silu_gradients": 2,
        "rotated": 2 * (forwards + 1),
        "cross_entropy": 1,
    }
    assert {name: calls.count(name) for name in expected} == expected
    monkeypatch.setattr(training_kernels, "kernels_run_on", lambda device: False)
    calls.clear()
    for a, b in zip(mine, step(), strict=True):
        assert (a - b).norm() <= (3e-2 if autocast else 1e-4) * b.norm()
    assert not calls
