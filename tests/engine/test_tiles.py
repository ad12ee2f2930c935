"""Attention in tiles equals attention with the whole mask, is used where it is faster, and compiles."""

import copy

import pytest
import torch
from tiny_models import WINDOWS, random_ids, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_decoder.engine import precision
from hf_decoder.engine.attention import tiles
from hf_decoder.engine.attention.tiles import (
    MIN_TILED_TOKENS_IN_FP32,
    MIN_TILED_TOKENS_IN_INFERENCE,
    plan_tiles,
    tiled_attention_forward,
)
from hf_decoder.engine.training import loss as engine_loss
from hf_decoder.model.modeling_hf_decoder import eager_attention_forward

FEW_TOKENS_TOO = pytest.mark.usefixtures("tiles_of_few_tokens")


class Groups(nn.Module):
    def __init__(self, groups: int):
        super().__init__()
        self.num_key_value_groups = groups
        self.eval()


def documents(kind: str, length: int) -> torch.Tensor:
    """Positions (2, S) of rows that hold one, a few, or very many documents."""
    columns = torch.arange(length)
    if kind == "one":
        return columns.expand(2, -1).contiguous()
    if kind == "few":
        return torch.stack([columns % 50, torch.cat([columns[: length - 9], columns[:9]])])
    if kind == "aligned":  # borders that fall on the tiles' own
        return torch.stack([columns % 64, columns % 128])
    if kind == "single-tokens":
        return torch.stack([columns % 2, torch.zeros_like(columns)])
    return torch.stack([columns + 1000, columns * 3])  # later positions, and gaps, which separate documents too


@pytest.mark.parametrize("window", [None, 2, 7, 64, 100, 1000])
@pytest.mark.parametrize("kind", ["one", "few", "aligned", "single-tokens", "offset-and-gaps"])
@pytest.mark.parametrize("length", [64, 65, 128, 200, 257, 400])
def test_tiles_equal_attention_with_the_whole_mask(length: int, kind: str, window: int | None):
    """Value and gradient, against a mask of length squared that is written out here."""
    generator = torch.Generator().manual_seed(length)
    query, key, value = (torch.randn(2, heads, length, 8, generator=generator).requires_grad_() for heads in (6, 2, 2))
    weight = torch.randn(2, length, 6, 8, generator=generator)
    positions = documents(kind, length)
    group = torch.cat([torch.zeros(2, 1, dtype=torch.long), (positions.diff(dim=1) != 1).long().cumsum(1)], 1)
    row, column = torch.arange(length)[:, None], torch.arange(length)[None]
    seen = (group[:, :, None] == group[:, None, :]) & (column <= row)
    if window is not None:
        seen = seen & (row - column < window)
    mask = torch.zeros(2, 1, length, length).masked_fill(~seen[:, None], float("-inf"))
    module = Groups(3)
    expected, _ = eager_attention_forward(module, query, key, value, mask, 0.3)
    wanted = torch.autograd.grad((expected * weight).sum(), (query, key, value))
    plan = plan_tiles(positions, torch.float32, window)
    found, _ = tiled_attention_forward(module, query, key, value, plan, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad((found * weight).sum(), (query, key, value)), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)


class FlashKernel(TorchDispatchMode):
    """Notices whether torch's flash kernel is called."""

    is_called = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.is_called |= func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return func(*args, **(kwargs or {}))


def count_layers(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Records the calls of our attention in tiles, and those by torch's flash kernel."""
    in_tiles: list[int] = []
    stock: list[int] = []
    forward = tiles.tiled_attention_forward

    def recorded(*args, **kwargs):
        with FlashKernel() as kernel:
            result = forward(*args, **kwargs)
        (stock if kernel.is_called else in_tiles).append(1)
        return result

    monkeypatch.setattr(tiles, "tiled_attention_forward", recorded)
    return in_tiles, stock


def test_tiles_are_used_for_long_rows_and_not_where_they_cannot(monkeypatch: pytest.MonkeyPatch):
    calls, _ = count_layers(monkeypatch)
    ids = random_ids(2, 80)
    ones, holes = torch.ones_like(ids), torch.ones_like(ids)
    holes[0, :3] = 0
    model = tiny_model(attn_implementation="sdpa", **WINDOWS)
    cases: list[tuple[dict, int]] = [
        ({"input_ids": ids}, 2),
        ({"input_ids": ids, "attention_mask": ones}, 2),
        ({"input_ids": ids, "position_ids": torch.arange(80)[None] % 30}, 2),
        ({"input_ids": ids, "use_cache": False}, 2),
        ({"input_ids": ids, "attention_mask": holes}, 0),
        ({"input_ids": ids[:, :20]}, 0),
    ]
    for inputs, expected in cases:
        calls.clear()
        model(**inputs)
        assert len(calls) == expected
    with torch.no_grad():  # one document of few tokens is faster in the stock kernel, several need a mask there
        long = random_ids(2, MIN_TILED_TOKENS_IN_INFERENCE // 2)
        for (inputs, _), expected in zip(cases, [0, 0, 2, 0, 0, 0], strict=True):
            calls.clear()
            model(**inputs)
            assert len(calls) == expected
        calls.clear()
        model(long)
        assert len(calls) == 2
        calls.clear()
        model(long[:, :-1])
        assert not calls
    calls.clear()
    tiny_model(attn_implementation="sdpa", attention_dropout=0.1).train()(ids)
    tiny_model(attn_implementation="eager")(ids)
    assert not calls


def test_short_rows_of_one_document_in_fp32_are_for_the_stock_kernel(monkeypatch: pytest.MonkeyPatch):
    calls, _ = count_layers(monkeypatch)
    model = tiny_model(attn_implementation="sdpa", max_position_embeddings=512)
    windowed = tiny_model(attn_implementation="sdpa", max_position_embeddings=512, **WINDOWS)
    half, limit = copy.deepcopy(model).bfloat16(), MIN_TILED_TOKENS_IN_FP32
    for with_gradients in (True, False):
        for watched, autocast, length, expected in (
            (model, False, limit - 1, 0),
            (model, False, limit, 2),
            (model, True, limit - 1, 2),
            (half, False, limit - 1, 2),
            (windowed, False, limit - 1, 2),
        ):
            calls.clear()
            with torch.set_grad_enabled(with_gradients), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                watched(random_ids(2, length))
            assert len(calls) == expected
        calls.clear()
        with torch.set_grad_enabled(with_gradients):
            model(random_ids(2, limit - 1), position_ids=torch.arange(limit - 1)[None] % 30)
        assert len(calls) == 2


@FEW_TOKENS_TOO
@pytest.mark.parametrize("is_fast", [True, False])
def test_tiles_in_half_precision_are_multiplied_as_is_fast_here(is_fast: bool, monkeypatch: pytest.MonkeyPatch):
    (calls, _), factors = count_layers(monkeypatch), []
    monkeypatch.setitem(precision.FAST_HALF_PRECISION, torch.bfloat16, is_fast)
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: factors.append(a.dtype) or bmm(a, b))
    model = tiny_model(attn_implementation="sdpa", max_position_embeddings=256)
    half = tiny_model(attn_implementation="sdpa", max_position_embeddings=256).bfloat16()
    ids, documents, layers = random_ids(2, 160), torch.arange(160)[None] % 50, model.config.num_hidden_layers
    for watched, autocast in ((half, False), (model, True)):
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = watched(ids).logits
        logits.sum().backward()
        assert logits.dtype == torch.bfloat16
        assert len(calls) == layers
        for inputs in ({"position_ids": documents}, {}):
            calls.clear()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                watched(ids, **inputs)
            assert len(calls) == layers
    assert set(factors) == {torch.bfloat16 if is_fast else torch.float32}
    calls.clear()
    model(ids)
    assert len(calls) == layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_whole_documents_by_the_stock_kernel_are_those_in_tiles(heads, dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(precision.FAST_HALF_PRECISION, torch.bfloat16, False)
    monkeypatch.setattr(tiles, "MIN_STOCK_TOKENS_IN_FP32", 150)
    calls, _ = count_layers(monkeypatch)
    torch.manual_seed(0)
    length = 150
    inputs = [torch.randn(2, length, n, 16).transpose(1, 2).to(dtype).requires_grad_() for n in (*heads, heads[1])]
    weight = torch.randn(2, length, heads[0], 16)
    plan = plan_tiles(torch.arange(length)[None], dtype)
    results = []
    for in_tiles in (False, True):
        if in_tiles:
            monkeypatch.setattr(tiles, "MIN_STOCK_TOKENS_IN_FP32", 151)
        found, _ = tiles.tiled_attention_forward(Groups(heads[0] // heads[1]), *inputs, plan, 0.3)
        assert found.dtype == dtype and found.is_contiguous() and bool(calls) == in_tiles
        results.append((found, *torch.autograd.grad((found.float() * weight).sum(), inputs)))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == dtype
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("is_fast", [True, False])
def test_the_stock_kernel_takes_whole_documents_that_are_multiplied_in_fp32(is_fast, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(precision.FAST_HALF_PRECISION, torch.bfloat16, is_fast)
    monkeypatch.setattr(tiles, "MIN_STOCK_TOKENS_IN_FP32", 300)
    tiled, stock = count_layers(monkeypatch)
    ids = random_ids(1, 300)
    shape = {"attn_implementation": "sdpa", "max_position_embeddings": 512}

    def ways(model, **inputs) -> tuple[int, int]:
        """Layers in tiles and by the stock kernel, the same in training and in inference."""
        counts = []
        for grad in (False, True):
            tiled.clear()
            stock.clear()
            with torch.set_grad_enabled(grad):
                model(ids, **inputs)
            counts.append((len(tiled), len(stock)))
        assert counts[0] == counts[1]
        return counts[0]

    model = tiny_model(**shape)
    assert ways(model) == (0, 2)
    assert ways(model, position_ids=torch.arange(300)[None] % 100) == (2, 0)
    assert ways(tiny_model(**shape, sliding_window=400)) == (0, 2)
    assert ways(tiny_model(**shape, sliding_window=20, layer_types=["sliding_attention", "full_attention"])) == (1, 1)
    in_half = (2, 0) if is_fast else (0, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert ways(model) == in_half
    monkeypatch.setattr(tiles, "MIN_STOCK_TOKENS_IN_FP32", 301)
    assert ways(model) == (2, 0)
    monkeypatch.setattr(tiles, "MIN_STOCK_TOKENS_IN_FP32", 300)
    assert ways(model.bfloat16()) == in_half


def test_tiles_in_bf16_and_under_autocast_are_close_to_fp32(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(precision.FAST_HALF_PRECISION, torch.bfloat16, True)
    ids = random_ids(2, 150)
    model = tiny_model(attn_implementation="sdpa", max_position_embeddings=256, **WINDOWS).train()
    exact = model(ids, labels=ids).loss
    exact.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert abs(loss - exact) < 0.05
    errors = {n: (p.grad - wanted[n]).norm() / wanted[n].norm() for n, p in model.named_parameters()}
    model.zero_grad()
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model.set_attn_implementation("eager")
        model(ids, labels=ids).loss.backward()
    stock = {n: (p.grad - wanted[n]).norm() / wanted[n].norm() for n, p in model.named_parameters()}
    for name, error in errors.items():  # no worse than attention written out, up to noise
        assert error < 1.5 * stock[name] + 0.02, name
    half = model.to(torch.bfloat16)
    half.set_attn_implementation("sdpa")
    half.zero_grad()
    loss = half(ids, labels=ids).loss
    loss.backward()
    assert abs(loss - exact) < 0.1
    assert all(parameter.grad.isfinite().all() for parameter in half.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [100, 300])
def test_tiles_sum_their_weights_in_fp32(dtype: torch.dtype, length: int):
    """Equal scores: summed in half precision, 300 weights of 1/300 would be off by far more than one rounding."""
    query, key = torch.zeros(1, 2, length, 8, dtype=dtype), torch.ones(1, 1, length, 8, dtype=dtype)
    value = torch.ones(1, 1, length, 8, dtype=dtype)
    plan = plan_tiles(torch.arange(length)[None], dtype)
    found, _ = tiled_attention_forward(Groups(2), query, key, value, plan, 1.0)
    # each weight is rounded once; roundings of equal weights add up to one unit at most
    torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=torch.finfo(dtype).eps)


@pytest.mark.kernels
@pytest.mark.parametrize("variant", ["plain", "windows", "checkpointing", "autocast"])
def test_compiled_training_is_eager_training(variant: str, monkeypatch):
    """Value and gradients, with tiles and chunks as operators of one graph."""
    windows = {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]}
    shape = {"attn_implementation": "sdpa", "max_position_embeddings": 256, "z_loss_coef": 1e-3, "qk_norm": True}
    model = tiny_model(**shape, **(windows if variant == "windows" else {})).train()
    if variant == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    monkeypatch.setattr(engine_loss, "MIN_CHUNK_ROWS", 50)
    monkeypatch.setattr(engine_loss, "CHUNK_ELEMENTS", 1)
    ids = random_ids(2, 150)
    labels = ids.clone()
    labels[:, :30] = -100
    reached, taken, mm, bmm = [], [], torch.mm, torch.bmm

    def recorded_mm(a: torch.Tensor, b: torch.Tensor, **kwargs) -> torch.Tensor:
        if b.shape[1] == model.config.vocab_size:
            reached.append(len(a))
        return mm(a, b, **kwargs)

    monkeypatch.setattr(torch, "mm", recorded_mm)
    monkeypatch.setattr(torch, "bmm", lambda a, b: taken.append(1) or bmm(a, b))  # of tiles alone
    monkeypatch.setitem(precision.FAST_HALF_PRECISION, torch.bfloat16, True)  # whatever CPU this is
    monkeypatch.setattr(tiles, "MIN_TILED_TOKENS_IN_FP32", 0)  # of eager rows alone

    def loss_and_gradients(forward) -> tuple[torch.Tensor, list[torch.Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=variant == "autocast"):
            loss = forward(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        return loss.detach(), gradients

    expected, expected_gradients = loss_and_gradients(model)
    eager_calls = len(taken)
    loss, gradients = loss_and_gradients(torch.compile(model, fullgraph=True))
    compiled_calls = len(taken) - eager_calls
    if variant == "checkpointing" and torch.__version__.startswith("2.11."):  # which does not compute a layer again
        assert 0 < compiled_calls < eager_calls
    else:
        assert compiled_calls == eager_calls > 0
    assert sum(reached) == 2 * 2 * 120  # positions without a label do not reach the head
    tolerance = 5e-2 if variant == "autocast" else 1e-5  # bf16 rounds where the compiler does not
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert (gradient - other).norm() <= tolerance * other.norm()
