"""Attention in tiles equals attention with the whole mask, is used where it is faster, and compiles."""

from importlib import import_module
from itertools import pairwise

import pytest
import torch
from tiny_models import WINDOWS, random_ids, tiny_model
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from hf_decoder.engine import precision, settings
from hf_decoder.engine.attention import choice, tiles
from hf_decoder.engine.attention.choice import attention_way
from hf_decoder.engine.attention.tiles import CausalInFp32, plan_tiles, tiled_attention_forward
from hf_decoder.engine.calibration import measured
from hf_decoder.engine.training import loss as engine_loss
from hf_decoder.model.modeling_hf_decoder import eager_attention_forward

IN_TILES = pytest.mark.usefixtures("in_tiles")


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
@pytest.mark.parametrize("length, rows", [(64, 64), (65, 64), (128, 64), (200, 128), (257, 64), (400, 128)])
def test_tiles_equal_attention_with_the_whole_mask(length: int, rows: int, kind: str, window: int | None):
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
    plan = plan_tiles(positions, torch.float32, window, rows)
    found, _ = tiled_attention_forward(module, query, key, value, plan, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad((found * weight).sum(), (query, key, value)), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("cuts", [[], [700], [130, 301, 1111, 1500, 2301], [3000]])
def test_half_precision_meets_few_numbers_of_keys(cuts: list[int], monkeypatch):
    """The CPU's library compiles a product for each of them."""
    monkeypatch.setattr(tiles, "LONG", 1024)
    ends = [0, *cuts, 4096]
    positions = torch.cat([torch.arange(stop - start) for start, stop in pairwise(ends)])[None]
    plan = plan_tiles(positions, torch.bfloat16, None, 64)
    short = [tile for tile in plan.tiles if tile.stop - tile.first_key <= 1024]
    assert len({tile.last_key - tile.first_key for tile in short}) <= 1024 // 64
    counts = {tile.last_key - tile.first_key for tile in plan.tiles if tile.first_key == 0}
    assert cuts or len(counts) == 16
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 4096, 8, generator=generator) for heads in (4, 2, 2))
    found, _ = tiled_attention_forward(Groups(2), query, key, value, plan, 0.3)
    for start, stop in pairwise(ends):
        of_document = (x[:, :, start:stop] for x in (query, key, value))
        expected = scaled_dot_product_attention(*of_document, is_causal=True, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(found[:, start:stop], expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


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


@IN_TILES
def test_tiles_are_used_for_whole_rows_and_not_where_they_cannot(monkeypatch: pytest.MonkeyPatch):
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
    ]
    for inputs, expected in cases:
        for grad in (True, False):
            calls.clear()
            with torch.set_grad_enabled(grad):
                model(**inputs)
            assert len(calls) == expected
    calls.clear()
    tiny_model(attn_implementation="sdpa", attention_dropout=0.1).train()(ids)
    tiny_model(attn_implementation="eager")(ids)
    assert not calls


def test_each_type_of_layer_goes_its_own_way(monkeypatch: pytest.MonkeyPatch):
    """What is measured of windows says nothing of whole rows; both give what the plain masks give."""
    calls, _ = count_layers(monkeypatch)
    monkeypatch.setattr(
        choice, "attention_way", lambda config, rows, *_, **__: "tiles of 64" if rows == "windowed" else "torch"
    )
    model = tiny_model(attn_implementation="sdpa", **WINDOWS)
    ids = random_ids(2, 80)
    found = model(ids).logits
    assert len(calls) == sum(kind == "sliding_attention" for kind in model.config.layer_types) == 1
    with settings.override(all=False):
        torch.testing.assert_close(found, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, window", [("whole", None), ("windowed", 9), ("packed", None), ("packed", 5)])
def test_a_machine_that_chooses_finds_that_all_ways_give_the_same(rows, window, dtype, trains, measuring, caplog):
    way = attention_way((6, 2, 12), rows, dtype, 50, window, trains)
    (times,) = (times for case, times in measured().items() if case.startswith("attention"))
    assert len(times) == (4 if rows == "whole" else 3) and None not in times.values() and not caplog.text
    assert way in times


def test_a_window_is_measured_as_the_part_of_the_row_that_it_is(monkeypatch: pytest.MonkeyPatch):
    """Half of a short row says nothing of a window that is a small part of a long one."""
    keys = []
    monkeypatch.setattr(choice, "choose", lambda name, key, *_: keys.append(key[2:4]))
    for length, window in (
        (2048, 1024),
        (1500, 1024),
        (8192, 1024),
        (32768, 1024),
        (32768, 16384),
        (100, 30),
        (40, 39),
    ):
        attention_way((8, 4, 64), "windowed", torch.float32, length, window, trains=False)
    assert keys == [(2048, 1024), (2048, 1024), (2048, 256), (2048, 64), (2048, 1024), (128, 32), (64, 32)]


@IN_TILES
@pytest.mark.parametrize("is_fast", [True, False])
def test_tiles_in_half_precision_are_multiplied_as_is_fast_here(is_fast: bool, monkeypatch: pytest.MonkeyPatch):
    (calls, _), factors = count_layers(monkeypatch), []
    monkeypatch.setitem(precision.FAST_HALF_PRECISION, torch.bfloat16, is_fast)
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b, **to: factors.append(a.dtype) or bmm(a, b, **to))
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
    torch.manual_seed(0)
    length = 150
    inputs = [torch.randn(2, length, n, 16).transpose(1, 2).to(dtype).requires_grad_() for n in (*heads, heads[1])]
    weight = torch.randn(2, length, heads[0], 16)
    results = []
    for mask in (CausalInFp32(), plan_tiles(torch.arange(length)[None], dtype)):
        found, _ = tiled_attention_forward(Groups(heads[0] // heads[1]), *inputs, mask, 0.3)
        assert found.dtype == dtype and found.is_contiguous()
        results.append((found, *torch.autograd.grad((found.float() * weight).sum(), inputs)))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == dtype
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


def test_a_pinned_way_is_that_of_the_rows_it_is_for(monkeypatch: pytest.MonkeyPatch):
    tiled, stock = count_layers(monkeypatch)
    ids, shape = random_ids(1, 300), {"attn_implementation": "sdpa", "max_position_embeddings": 512}

    def ways(model, **inputs) -> tuple[int, int]:
        """Layers in tiles and by the stock kernel."""
        tiled.clear()
        stock.clear()
        model(ids, **inputs)
        return len(tiled), len(stock)

    model = tiny_model(**shape)
    with settings.override(ways={"attention": "torch in fp32"}):
        assert ways(model) == (0, 2)
        assert ways(model, position_ids=torch.arange(300)[None] % 100) == (2, 0)
        assert ways(tiny_model(**shape, sliding_window=400)) == (0, 2)
        kinds = ["sliding_attention", "full_attention"]
        assert ways(tiny_model(**shape, sliding_window=20, layer_types=kinds)) == (1, 1)
    assert ways(model) == (0, 0)


@IN_TILES
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


@IN_TILES
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

    import_module("torch._inductor.select_algorithm")  # names its kernels, on disk too, by the functions that it finds
    monkeypatch.setattr(torch, "mm", recorded_mm)
    monkeypatch.setattr(torch, "bmm", lambda a, b, **to: taken.append(1) or bmm(a, b, **to))  # of tiles alone
    monkeypatch.setitem(precision.FAST_HALF_PRECISION, torch.bfloat16, True)  # whatever CPU this is

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
