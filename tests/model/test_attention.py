"""Padding, packing, batching and windows give what one plain document alone gives, for every attention."""

import copy
import itertools
from typing import Any

import pytest
import torch
from tiny_models import ATTENTION_KINDS as KINDS
from tiny_models import WINDOWS, random_ids, tiny_config, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations import flex_attention

from hf_decoder.engine import precision
from hf_decoder.engine.attention import tiles
from hf_decoder.engine.attention.tiles import (
    MIN_TILED_TOKENS,
    MIN_TILED_TOKENS_IN_FP32,
    MIN_TILED_TOKENS_IN_INFERENCE,
    plan_tiles,
    tiled_attention_forward,
)
from hf_decoder.model.modeling_hf_decoder import (
    HfDecoderRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

FEW_TOKENS_TOO = pytest.mark.usefixtures("tiles_of_few_tokens")
TOLERANCE = {"rtol": 0.0, "atol": 2e-5}
# on either side of the length from which sdpa turns to tiles, and past the end of a tile
LENGTHS = (7, MIN_TILED_TOKENS + 5, 137)
# flex_attention is slow on a CPU, and differs from the others only in its masks
FLEX = ("flex_attention", "windows", 7)
CASES = pytest.mark.parametrize(
    ("attention", "kind", "length"), [*itertools.product(("eager", "sdpa"), KINDS, LENGTHS), FLEX]
)


@pytest.fixture
def tiles_of_few_tokens(monkeypatch: pytest.MonkeyPatch):
    """Without gradients and in fp32, too, tiles are for rows of `MIN_TILED_TOKENS`."""
    monkeypatch.setattr(tiles, "MIN_TILED_TOKENS_IN_INFERENCE", 0)
    monkeypatch.setattr(tiles, "MIN_TILED_TOKENS_IN_FP32", 0)


def reference(ids: torch.Tensor, config: Any, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    """Hidden states of one document (S,), written down from the definition in fp64, one token at a time."""
    weights = {name: tensor.double() for name, tensor in parameters.items()}
    head_dim, groups = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    exponents = torch.arange(0, head_dim, 2).double() / head_dim
    frequencies = config.rope_parameters["rope_theta"] ** -exponents

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[name + ".weight"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[name + ".weight"].T + weights.get(name + ".bias", 0)

    def rotate(x: torch.Tensor, position: int) -> torch.Tensor:
        """Every pair (x_i, x_{i + E/2}) is a complex number that is turned by its angle."""
        turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(frequencies), position * frequencies)
        return torch.cat((turned.real, turned.imag), -1)

    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}."
        h = norm(x, name + "input_layernorm")
        q, k, v = (
            linear(h, f"{name}self_attn.{kind}_proj").view(len(ids), -1, head_dim).clone() for kind in ("q", "k", "v")
        )
        if config.qk_norm:
            q, k = norm(q, name + "self_attn.q_norm"), norm(k, name + "self_attn.k_norm")
        if config.no_rope_layers is None or config.no_rope_layers[layer]:
            q, k = (torch.stack([rotate(row, p) for p, row in enumerate(tensor)]) for tensor in (q, k))
        rows = []
        for p in range(len(ids)):
            sliding = config.layer_types[layer] == "sliding_attention"
            first = max(0, p - config.sliding_window + 1) if sliding else 0
            heads = []
            for head in range(config.num_attention_heads):
                keys, values = k[first : p + 1, head // groups], v[first : p + 1, head // groups]
                heads.append((keys @ q[p, head] / head_dim**0.5).softmax(-1) @ values)
            rows.append(torch.cat(heads))
        x = x + linear(torch.stack(rows), name + "self_attn.o_proj")
        h = norm(x, name + "post_attention_layernorm")
        gate = linear(h, name + "mlp.gate_proj")
        x = x + linear(gate * gate.sigmoid() * linear(h, name + "mlp.up_proj"), name + "mlp.down_proj")
    return norm(x, "model.norm") @ weights["lm_head.weight"].T


@torch.no_grad()
@FEW_TOKENS_TOO
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [7, MIN_TILED_TOKENS + 5])
def test_equals_the_definition_written_out(kind: str, length: int):
    model = tiny_model(**KINDS[kind])
    ids = random_ids(1, length)
    expected = reference(ids[0], model.config, model.state_dict())
    for attention in ("eager", "sdpa", *(["flex_attention"] if (kind, length) == FLEX[1:] else [])):
        model.set_attn_implementation(attention)
        torch.testing.assert_close(model(ids).logits[0].double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_as_transformers_compiles_it(flex_attention_without_compiler, monkeypatch):
    monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", flex_attention_without_compiler)
    model = tiny_model(attn_implementation="flex_attention", **KINDS["windows"])
    ids = random_ids(1, 7)
    expected = reference(ids[0], model.config, model.state_dict())
    torch.testing.assert_close(model(ids).logits[0].double(), expected, rtol=1e-5, atol=2e-5)


@torch.no_grad()
@FEW_TOKENS_TOO
@CASES
def test_padded_equals_unpadded_and_batched_equals_single(kind: str, attention: str, length: int):
    model = tiny_model(attn_implementation=attention, **KINDS[kind])
    rows = [random_ids(1, n, seed=n) for n in (length, length // 2 + 1, 3, 1)]
    for side in ("left", "right"):
        ids = torch.zeros(len(rows), length + 2, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            place = slice(-row.shape[1], None) if side == "left" else slice(row.shape[1])
            ids[index, place], mask[index, place] = row[0], 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        assert logits.isfinite().all()
        for index, row in enumerate(rows):
            torch.testing.assert_close(logits[index][mask[index].bool()], model(row).logits[0], **TOLERANCE)
            # RoPE depends on distances alone, so the positions may also be left to the model
        shifted = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(shifted[mask.bool()], logits[mask.bool()], rtol=0, atol=1e-4)


@torch.no_grad()
@FEW_TOKENS_TOO
@CASES
@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_equals_separate_documents(kind: str, attention: str, length: int, use_cache: bool):
    model = tiny_model(attn_implementation=attention, **KINDS[kind])
    packings = [[length, 1, 9, length // 2 + 3], [3, length + 4, 6, length // 2]]
    rows = [[random_ids(1, n, seed=n + 31 * r) for n in packing] for r, packing in enumerate(packings)]
    ids = torch.cat([torch.cat(row, 1) for row in rows])
    positions = torch.stack([torch.cat([torch.arange(n) for n in packing]) for packing in packings])
    logits = model(ids, position_ids=positions, use_cache=use_cache).logits
    for index, row in enumerate(rows):
        separate = torch.cat([model(document).logits for document in row], 1)[0]
        torch.testing.assert_close(logits[index], separate, **TOLERANCE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["plain", "windows"])
@pytest.mark.parametrize("length", LENGTHS)
def test_packed_gradients_equal_those_of_separate_documents(kind: str, attention: str, length: int):
    model = tiny_model(attn_implementation=attention, **KINDS[kind]).train()
    lengths = [length, 4, length // 2 + 3]
    documents = [random_ids(1, n, seed=n) for n in lengths]
    items = sum(lengths) - len(lengths)
    for document in documents:
        model(document, labels=document, num_items_in_batch=items).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    labels = torch.cat(documents, 1).clone()
    labels[0, [0, lengths[0], lengths[0] + lengths[1]]] = -100  # nothing predicts a document's first token
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    model(torch.cat(documents, 1), position_ids=positions, labels=labels, num_items_in_batch=items).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=2e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    ("attention", "kind", "length"), [*itertools.product(("eager", "sdpa"), ("plain", "windows"), (9, 80)), FLEX]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fully_padded_rows_are_finite(kind: str, attention: str, dtype: torch.dtype, length: int):
    model = tiny_model(attn_implementation=attention, **KINDS[kind]).to(dtype)
    ids = random_ids(3, length)
    mask = torch.ones_like(ids)
    mask[0] = 0
    mask[1, :5] = 0
    outputs = model(ids, attention_mask=mask)
    assert outputs.logits.isfinite().all()
    # and the other rows do not notice it
    alone = model(ids[1:], attention_mask=mask[1:]).logits
    torch.testing.assert_close(outputs.logits[1:][mask[1:].bool()], alone[mask[1:].bool()], rtol=2e-2, atol=2e-2)
    assert model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False).shape == (3, length + 3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fully_padded_rows_train(attention: str, dtype: torch.dtype):
    model = tiny_model(attn_implementation=attention, **WINDOWS).to(dtype).train()
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0] = 0
    labels = ids.masked_fill(mask == 0, -100)
    loss = model(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("kind", ["plain", "windows"])
def test_left_padded_generation_equals_single(kind: str, attention: str):
    model = tiny_model(attn_implementation=attention, eos_token_id=None, **KINDS[kind])
    rows = [random_ids(1, n, seed=n) for n in (9, 4, 1)]
    ids = torch.zeros(3, 9, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, -row.shape[1] :], mask[index, -row.shape[1] :] = row[0], 1
    batched = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    for index, row in enumerate(rows):
        single = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=8, do_sample=False)
        assert torch.equal(batched[index, 9:], single[0, row.shape[1] :])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_prepared_mask_is_used_as_it_is(attention: str):
    model = tiny_model(attn_implementation=attention)
    ids = random_ids(2, 70)
    seen = torch.ones(70, 70, dtype=torch.bool).tril()
    seen[40:, 5:20] = False
    bias = torch.zeros(2, 1, 70, 70).masked_fill(~seen, torch.finfo(torch.float32).min)
    found = model(ids, attention_mask=bias).logits
    torch.testing.assert_close(found[:, :40], model(ids).logits[:, :40], **TOLERANCE)
    assert (found[:, 40:] - model(ids).logits[:, 40:]).abs().max() > 1e-2
    by_kind = model(ids, attention_mask={"full_attention": bias}).logits
    torch.testing.assert_close(by_kind, found)


# -- the tiles


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
    return torch.stack([columns + 1000, columns * 3])  # later positions, and gaps, which part documents as well


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


def count_tiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    original = tiles._TiledAttention.apply
    monkeypatch.setattr(tiles._TiledAttention, "apply", lambda *args: calls.append(1) or original(*args))
    return calls


def test_tiles_are_used_for_long_rows_and_not_where_they_cannot(monkeypatch: pytest.MonkeyPatch):
    calls = count_tiled(monkeypatch)
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
    calls = count_tiled(monkeypatch)
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
    calls, factors = count_tiled(monkeypatch), []
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
    calls = count_tiled(monkeypatch)
    torch.manual_seed(0)
    length = 150
    inputs = [torch.randn(2, length, n, 16).transpose(1, 2).to(dtype).requires_grad_() for n in (*heads, heads[1])]
    weight = torch.randn(2, length, heads[0], 16)
    plan = plan_tiles(torch.arange(length)[None], dtype)
    results = []
    for in_tiles in (False, True):
        if in_tiles:
            monkeypatch.setattr(tiles, "MIN_STOCK_TOKENS_IN_FP32", 151)
        found, _ = tiled_attention_forward(Groups(heads[0] // heads[1]), *inputs, plan, 0.3)
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
    tiled, stock = count_tiled(monkeypatch), []
    kernel = tiles._StockCausalAttention.apply
    monkeypatch.setattr(tiles._StockCausalAttention, "apply", lambda *args: stock.append(1) or kernel(*args))
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


# -- the parts, each against its definition


class SoftmaxTypes(TorchDispatchMode):
    """Records the type in which every softmax works."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._softmax.default:
            self.seen.add(result.dtype)
        return result


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_is_fp32_in_eager_attention(dtype: torch.dtype):
    model = tiny_model().to(dtype)
    with SoftmaxTypes() as types:
        output = model(random_ids(1, 9), output_attentions=True)
    assert types.seen == {torch.float32}
    assert output.attentions[0].dtype == output.logits.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [100, 300])
def test_tiles_sum_their_weights_in_fp32(dtype: torch.dtype, length: int):
    """Equal scores: summed in half precision, 300 weights of 1/300 would be off by far more than one rounding."""
    query, key = torch.zeros(1, 2, length, 8, dtype=dtype), torch.ones(1, 1, length, 8, dtype=dtype)
    value = torch.ones(1, 1, length, 8, dtype=dtype)
    plan = plan_tiles(torch.arange(length)[None], dtype)
    found, _ = tiled_attention_forward(Groups(2), query, key, value, plan, 1.0)
    # every weight may be rounded once, and the roundings of equal weights add up to one unit at most
    torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=torch.finfo(dtype).eps)


def rotary_model(tmp_path: Any, how: str) -> Any:
    config = {"max_position_embeddings": 32768, "head_dim": 16}
    if how == "to":
        return tiny_model(**config).to(torch.bfloat16)
    if how == "half-and-back":
        return tiny_model(**config).half().float()
    if how == "bfloat16":
        return tiny_model(**config).bfloat16()
    if how == "default-dtype":
        torch.set_default_dtype(torch.bfloat16)
        try:
            return tiny_model(**config)
        finally:
            torch.set_default_dtype(torch.float32)
    if how == "meta":
        with torch.device("meta"):
            model = type(tiny_model())(tiny_config(**config))
        model = model.to(torch.bfloat16).to_empty(device="cpu")
        model.init_weights()
        model.model._init_weights(model.model.rotary_emb)
        return model
    model = tiny_model(**config)
    model.save_pretrained(tmp_path)
    return type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize("how", ["to", "half-and-back", "bfloat16", "default-dtype", "meta", "from_pretrained"])
def test_angles_are_fp32_whatever_the_models_type(how: str, tmp_path):
    """At position 30000 a frequency rounded to bf16 turns by a random angle."""
    model = rotary_model(tmp_path, how)
    rotary = model.model.rotary_emb
    assert rotary.inv_freq.dtype == rotary.original_inv_freq.dtype == torch.float32
    positions = torch.tensor([[0, 1, 4097, 30000]])
    exact = positions[0].double()[:, None] * 10000.0 ** (-torch.arange(0, 16, 2).double() / 16)
    cos, sin = rotary(torch.zeros(1, 4, 32), positions)
    assert cos.dtype == torch.float32
    # fp32 holds 30000 rad to about 1e-3
    torch.testing.assert_close(cos[0].double(), torch.cat([exact.cos()] * 2, -1), rtol=0, atol=4e-3)
    torch.testing.assert_close(sin[0].double(), torch.cat([exact.sin()] * 2, -1), rtol=0, atol=4e-3)
    assert rotary(torch.zeros(1, 4, 32, dtype=torch.bfloat16), positions)[0].dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(rotary(torch.zeros(1, 4, 32), positions)[0], cos)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [4.0] * 6},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_angles_survive_a_change_of_type(rope: dict):
    """Also where the frequencies change with the length: back and forth over the original length."""
    config = tiny_config(rope_parameters=rope | {"original_max_position_embeddings": 16}, max_position_embeddings=32)
    plain, changed = HfDecoderRotaryEmbedding(config), HfDecoderRotaryEmbedding(config).bfloat16()
    for length in (8, 50, 8, 40):
        positions, x = torch.arange(length)[None], torch.zeros(1, 1)
        for mine, theirs in zip(changed(x, positions), plain(x, positions), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_partial_rotation_leaves_the_rest_alone():
    query = torch.randn(1, 2, 5, 12)
    angle = torch.randn(1, 5, 3)
    cos, sin = (torch.cat((f(angle), f(angle)), -1) for f in (torch.cos, torch.sin))
    turned = apply_rotary_pos_emb(query, cos, sin)
    torch.testing.assert_close(turned[..., 6:], query[..., 6:])
    pairs = torch.complex(query[..., :3], query[..., 3:6]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    torch.testing.assert_close(turned[..., :6], torch.cat((pairs.real, pairs.imag), -1))
