"""Packed, padded and windowed rows without an S x S mask, against the stock kernel with one.

The kernel is on CUDA alone. There it is what these tests run, in bf16; elsewhere a slow one of the same meaning takes
its place, in fp32.
"""

import itertools
from typing import Any

import pytest
import torch
from tiny_models import ATTENTION_KINDS, WINDOWS, random_ids, tiny_model
from torch import nn

from hf_decoder.engine.attention import varlen
from hf_decoder.engine.attention.varlen import Documents, varlen_attention_forward, varlen_masks

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
HEAD_DIM = 16  # of multiples of 8
KINDS = {**ATTENTION_KINDS, "many-heads": {"num_key_value_heads": 4}}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
PACKINGS = [[[20, 1, 9, 15]], [[7, 30, 8], [45]], [[45], [1, 43, 1]]]  # (B, S) rows of documents
LEFT, RIGHT, BOTH = [[(3, 7)], [(0, 2)]], [[(0, 11)], [(0, 33)]], [[(2, 9)], [(5, 1)], [(0, 0)]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Documents]:
    """Records the calls of the kernel, or of its stand-in where there is no CUDA."""
    seen: list[Documents] = []
    kernel = varlen.attend_documents if CUDA else attend_slowly

    def attend(query, key, value, documents, scaling):
        seen.append(documents)
        return kernel(query, key, value, documents, scaling)

    monkeypatch.setattr(varlen, "attend_documents", attend)
    if not CUDA:
        monkeypatch.setattr(varlen, "kernel_takes", lambda inputs_embeds, head_dim: True)
    return seen


def attend_slowly(query, key, value, documents: Documents, scaling: float) -> torch.Tensor:
    """The kernel's definition, document by document (n, H, E)."""
    outputs = []
    for start, stop in itertools.pairwise(documents.bounds.tolist()):
        assert 0 < stop - start <= documents.longest
        q, k, v = (x[start:stop].transpose(0, 1) for x in (query, key, value))
        distance = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        seen = (distance >= 0) & (distance < (documents.window or stop))
        output = nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scaling, enable_gqa=True)
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


def model_on_device(**config: Any) -> Any:
    return tiny_model(attn_implementation="sdpa", head_dim=HEAD_DIM, **config).to(DEVICE, DTYPE)


def positions_of(packing: list[list[int]]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in packing]).to(DEVICE)


def mask_of(rows: list[tuple[int, int]], length: int = 45) -> torch.Tensor:
    """A mask with so many tokens of padding on the left and right of each row."""
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for row, (left, right) in zip(mask, rows, strict=True):
        row[left : length - right] = 1
    return mask.to(DEVICE)


def labels_of(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Labels neither at padding nor after it, so that outputs at padding do not count in the loss."""
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 1:].masked_fill_(mask[:, :-1] == 0, -100)
    return labels


def loss_and_gradients(model: Any, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_equal_training(model: Any, monkeypatch: pytest.MonkeyPatch, calls: list[Documents], **inputs: Any) -> None:
    """Loss and gradients are those of the stock kernel with a mask, and on CUDA no further from those in fp64."""
    found = loss_and_gradients(model, **inputs)
    assert calls
    calls.clear()
    monkeypatch.setattr(varlen, "kernel_takes", lambda inputs_embeds, head_dim: False)
    stock = loss_and_gradients(model, **inputs)
    assert not calls
    if not CUDA:
        torch.testing.assert_close(found, stock, rtol=1e-4, atol=2e-6)
        return
    exact = loss_and_gradients(model.double(), **inputs)
    assert abs(found[0] - exact[0]) < 2 * abs(stock[0] - exact[0]) + 0.02
    for name, gradient in exact[1].items():
        errors = [(run[1][name].double() - gradient).norm() / gradient.norm() for run in (found, stock)]
        assert errors[0] < 1.5 * errors[1] + 0.02, (name, errors)


# -- where the documents are


def masks_of(batch: int, length: int, windows: dict[str, int | None], **inputs: Any) -> Any:
    inputs = {"attention_mask": None, "document_positions": None, "training": True} | inputs
    embeds = torch.zeros(batch, length, 8, device=DEVICE, dtype=DTYPE)
    return varlen_masks(embeds, windows=windows, head_dim=HEAD_DIM, **inputs)


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("start", [0, 7])
def test_documents_start_where_positions_start_anew(packing: list[list[int]], start: int):
    lengths = [n for row in packing for n in row]
    masks = masks_of(len(packing), 45, {"a": None, "b": 3}, document_positions=positions_of(packing) + start)
    for kind, window in (("a", None), ("b", 3)):
        documents = masks[kind]
        assert documents.bounds.tolist() == [0, *itertools.accumulate(lengths)]
        assert documents.bounds.dtype == torch.int32 and documents.bounds.device.type == DEVICE
        assert documents.longest == max(lengths) and type(documents.longest) is int
        assert documents.tokens is None and documents.window == window and documents.dtype == DTYPE


@pytest.mark.usefixtures("calls")
def test_random_positions_part_as_they_do_written_out():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        batch, length = (int(torch.randint(1, high, (), generator=generator)) for high in (4, 20))
        positions = (torch.rand(batch, length, generator=generator) < 0.7).long().cumsum(1)
        bounds = [
            row * length + column
            for row, column in itertools.product(range(batch), range(length))
            if column == 0 or positions[row, column] != positions[row, column - 1] + 1
        ]
        bounds.append(batch * length)
        documents = masks_of(batch, length, {"a": 1}, document_positions=positions.to(DEVICE))["a"]
        if length == 1:
            assert documents is None
            continue
        assert documents.bounds.tolist() == bounds
        assert documents.longest == max(stop - start for start, stop in itertools.pairwise(bounds))


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("rows", [LEFT, RIGHT, BOTH])
def test_padding_is_left_out(rows: list[list[tuple[int, int]]]):
    mask = mask_of([*itertools.chain(*rows), (45, 0)])  # and a row of nothing else
    documents = masks_of(len(mask), 45, {"a": None}, attention_mask=mask)["a"]
    lengths = [n for n in mask.sum(1).tolist() if n]
    assert documents.bounds.tolist() == [0, *itertools.accumulate(lengths)]
    assert documents.longest == max(lengths)
    assert documents.tokens.tolist() == mask.flatten().nonzero().flatten().tolist()


@pytest.mark.usefixtures("calls")
def test_one_document_a_row_is_for_the_stock_kernel():
    windows = {"full": None, "wide": 45, "narrow": 44}
    every: list[dict[str, Any]] = [
        {},
        {"training": False},
        {"document_positions": torch.arange(45, device=DEVICE)[None] + 3},
        {"document_positions": positions_of([[45], [45]])},
        {"attention_mask": torch.ones(2, 45, device=DEVICE)},
    ]
    for inputs in every:
        masks = masks_of(2, 45, windows, **inputs)
        assert masks["full"] is None and masks["wide"] is None
        assert masks["narrow"].bounds.tolist() == [0, 45, 90] and masks["narrow"].longest == 45
        assert masks["narrow"].tokens is None


@pytest.mark.usefixtures("calls")
def test_what_the_kernel_cannot_attend_to_is_left_to_masks():
    holes = mask_of([(0, 0), (3, 4)])
    holes[1, 9] = 0
    for mask, training in [(holes, True), (torch.zeros_like(holes), True), (mask_of([(0, 9), (3, 0)]), False)]:
        assert masks_of(2, 45, {"a": None}, attention_mask=mask, training=training) is None
    assert masks_of(2, 44, {"a": None}, attention_mask=mask_of([(0, 0), (3, 4)])) is None  # of earlier tokens, too


@pytest.mark.skipif(not CUDA, reason="asks the device")
def test_what_the_device_takes():
    def takes(dtype: torch.dtype, head_dim: int = HEAD_DIM) -> bool:
        return varlen.kernel_takes(torch.zeros(1, 1, 8, device=DEVICE, dtype=dtype), head_dim)

    assert takes(torch.bfloat16) and takes(torch.float16) and takes(torch.bfloat16, 256)
    assert not takes(torch.float32) and not takes(torch.bfloat16, 264) and not takes(torch.bfloat16, 12)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert takes(torch.float32)


@pytest.mark.skipif(CUDA, reason="the kernel is there")
def test_a_cpu_has_no_such_kernel():
    assert not varlen.kernel_takes(torch.zeros(1, 1, 8, dtype=torch.bfloat16), HEAD_DIM)


@pytest.mark.skipif(not CUDA, reason="asks the device")
def test_rows_without_positions_are_not_waited_for():
    """Padded and packed rows wait only once."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        for training in (True, False):
            assert masks_of(2, 45, {"a": None, "b": 3}, training=training)["b"] is not None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for inputs in ({"document_positions": positions_of(PACKINGS[1])}, {"attention_mask": mask_of([(0, 9), (3, 0)])}):
        with pytest.warns(UserWarning, match="synchroniz") as warned:
            torch.cuda.set_sync_debug_mode("warn")
            try:
                masks_of(2, 45, {"a": None, "b": 3}, **inputs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert len([warning for warning in warned if "synchroniz" in str(warning.message)]) == 1


# -- what a layer and a model make of it


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_is_that_of_a_mask_written_out(groups: int, window: int | None, padded: bool):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 45, HEAD_DIM, generator=generator).to(DEVICE, DTYPE).requires_grad_()
        for heads in (6, groups, groups)
    )
    weight = torch.randn(2, 45, 6, HEAD_DIM, generator=generator).to(DEVICE, DTYPE)
    if padded:
        mask = mask_of([(0, 9), (3, 0)])
        inputs, group = {"attention_mask": mask}, mask - 1
    else:
        positions = positions_of(PACKINGS[1])
        inputs, group = {"document_positions": positions}, (positions == 0).cumsum(1)
    distance = torch.arange(45, device=DEVICE)[:, None] - torch.arange(45, device=DEVICE)
    seen = (group[:, :, None] == group[:, None]) & (distance >= 0) & (distance < (window or 45))
    scores = (query.double() @ key.double().repeat_interleave(6 // groups, 1).mT) * 0.3
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    expected = (weights @ value.double().repeat_interleave(6 // groups, 1)).transpose(1, 2)
    if padded:
        expected = expected * mask[:, :, None, None]
    documents = masks_of(2, 45, {"a": window}, **inputs)["a"]
    found, _ = varlen_attention_forward(nn.Module(), query, key, value, documents, 0.3, dropout=0.0)
    rtol, atol = (3e-2, 3e-2) if CUDA else (1e-4, 1e-5)
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol)
    wanted = torch.autograd.grad((expected * weight).sum(), (query, key, value))
    for mine, theirs in zip(torch.autograd.grad((found * weight).sum(), (query, key, value)), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=5 * atol)


@EACH_KIND
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_packed_rows_train_as_with_a_mask(kind: str, packing, checkpointing, calls, monkeypatch):
    model = model_on_device(**KINDS[kind]).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
    ids = random_ids(len(packing), 45).to(DEVICE)
    assert_equal_training(model, monkeypatch, calls, input_ids=ids, labels=ids, position_ids=positions_of(packing))


@EACH_KIND
@pytest.mark.parametrize("rows", [LEFT, RIGHT, BOTH])
def test_padded_rows_train_as_with_a_mask(kind: str, rows, calls, monkeypatch):
    model = model_on_device(**KINDS[kind]).train()
    mask = mask_of([*itertools.chain(*rows)])
    ids = random_ids(*mask.shape).to(DEVICE)
    labels = labels_of(ids, mask)
    assert_equal_training(model, monkeypatch, calls, input_ids=ids, labels=labels, attention_mask=mask)


@pytest.mark.parametrize("kind", ["windows", "only-windows"])
def test_windowed_rows_train_as_with_a_mask(kind: str, calls, monkeypatch):
    ids = random_ids(3, 45).to(DEVICE)
    model = model_on_device(**KINDS[kind]).train()
    assert_equal_training(model, monkeypatch, calls, input_ids=ids, labels=ids)


def test_training_under_autocast(calls, monkeypatch):
    """The documents' dtype is the one in which the layers attend."""
    model = model_on_device(qk_norm=True, **WINDOWS).float().train()
    ids = random_ids(1, 45).to(DEVICE)
    inputs = {"input_ids": ids, "labels": ids, "position_ids": positions_of(PACKINGS[0])}
    exact = model(**inputs).loss
    calls.clear()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    assert [documents.dtype for documents in calls] == [torch.bfloat16] * 2
    assert abs(loss - exact) < 0.05
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
@EACH_KIND
@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_rows_equal_separate_documents(kind: str, use_cache: bool, calls):
    model = model_on_device(**KINDS[kind])
    documents = [random_ids(1, n, seed=n).to(DEVICE) for n in PACKINGS[0][0]]
    positions = positions_of(PACKINGS[0])
    logits = model(torch.cat(documents, 1), position_ids=positions, use_cache=use_cache).logits
    assert len(calls) == 2
    separate = torch.cat([model(document).logits for document in documents], 1)
    torch.testing.assert_close(logits, separate, rtol=0, atol=0.25 if CUDA else 2e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "windows", "only-windows"])
def test_generation_goes_on_from_documents_in_the_cache(kind: str, calls):
    """Windowed layers fill a cache by this kernel."""
    model = model_on_device(eos_token_id=None, **KINDS[kind])
    ids = random_ids(2, 20).to(DEVICE)
    cached = model(ids[:, :19], use_cache=True)
    assert bool(calls) == (kind != "plain")
    calls.clear()
    found = model(ids[:, 19:], past_key_values=cached.past_key_values).logits[:, -1]
    assert not calls
    torch.testing.assert_close(found, model(ids).logits[:, -1], rtol=0, atol=0.25 if CUDA else 2e-5)


@pytest.mark.kernels
def test_what_else_there_is_goes_on_as_before(calls):
    ids = random_ids(2, 45).to(DEVICE)
    positions, padding = positions_of(PACKINGS[1]), mask_of([(0, 9), (3, 0)])
    model = model_on_device(**WINDOWS).train()
    dropout = model_on_device(attention_dropout=0.1, **WINDOWS).train()
    eager = model_on_device(**WINDOWS).train()
    eager.set_attn_implementation("eager")
    cases: list[tuple[Any, dict[str, Any], int]] = [
        (model, {"position_ids": positions}, 2),
        (model, {"position_ids": positions, "attention_mask": torch.ones_like(ids)}, 2),
        (model, {"attention_mask": padding}, 2),
        (model, {}, 1),
        (dropout, {"position_ids": positions}, 0),
        (eager, {"position_ids": positions}, 0),
    ]
    for case, inputs, expected in cases:
        calls.clear()
        case(ids, **inputs)
        assert len(calls) == expected, inputs
    calls.clear()
    model.eval()(ids, attention_mask=padding)
    assert not calls
    dropout.eval()(ids, position_ids=positions)
    assert len(calls) == 2
    calls.clear()
    parameters = dict(model.named_parameters())
    inputs = {"input_ids": ids, "labels": ids, "position_ids": positions}
    torch.func.grad(lambda parameters: torch.func.functional_call(model, parameters, (), inputs).loss)(parameters)
    torch.compile(model, backend="eager")(ids, position_ids=positions)
    assert not calls


def test_nothing_of_padding_reaches_tokens(calls):
    model = model_on_device(**WINDOWS).train()
    mask = mask_of([(0, 9), (3, 0), (45, 0)])
    ids = random_ids(3, 45).to(DEVICE)
    labels = labels_of(ids, mask)
    found = loss_and_gradients(model, input_ids=ids, labels=labels, attention_mask=mask)
    assert len(calls) == 2
    others = ids.where(mask == 1, random_ids(3, 45, seed=1).to(DEVICE))
    again = loss_and_gradients(model, input_ids=others, labels=labels, attention_mask=mask)
    torch.testing.assert_close(found, again)
    assert all(gradient.isfinite().all() for gradient in found[1].values())
