"""The loss, with and without logits, equals transformers' `ForCausalLMLoss` and plain cross-entropy."""

from typing import Any

import pytest
import torch
from tiny_models import SHAPE, random_ids, tiny_config, tiny_model
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_decoder import HfDecoderForCausalLM, HfDecoderForTokenClassification
from hf_decoder.engine.training import loss as engine_loss
from hf_decoder.model import loss_hf_decoder

VOCAB = SHAPE["vocab_size"]
SKIP = pytest.mark.parametrize("skip_logits", [True, False], ids=["without_logits", "with_logits"])


def ragged(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and labels of which about a third are ignored."""
    ids = random_ids(*shape, seed=seed)
    ignored = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.35
    return ids, ids.masked_fill(ignored, -100)


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def loss_and_gradients(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, dict]:
    model.zero_grad(set_to_none=True)
    loss = model(*args, **kwargs).loss
    loss.backward()
    return loss.detach(), gradients(model)


def stock(model: nn.Module, ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, dict]:
    """transformers' own loss function on the model's logits."""
    model.zero_grad(set_to_none=True)
    loss = ForCausalLMLoss(model(ids).logits, vocab_size=VOCAB, **kwargs)
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(found: tuple[torch.Tensor, dict], expected: tuple[torch.Tensor, dict], rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=atol)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (gradient is None) == (found[1][name] is None), name
        if gradient is not None:
            torch.testing.assert_close(
                found[1][name], gradient, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )


@SKIP
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("items", [None, 17, torch.tensor(17), torch.tensor(9.0)], ids=str)
def test_equals_transformers_loss(skip_logits: bool, tied: bool, items: Any, small_chunks):
    model = tiny_model(tie_word_embeddings=tied)
    ids, labels = ragged(3, 11)
    expected = stock(model, ids, labels=labels, num_items_in_batch=items)
    assert expected[0] > 0.1
    assert_same(
        loss_and_gradients(model, ids, labels=labels, num_items_in_batch=items, skip_logits=skip_logits), expected
    )


@SKIP
def test_labels_are_shifted_once_and_shift_labels_not_at_all(skip_logits: bool):
    model = tiny_model()
    ids, labels = ragged(2, 9)
    shifted = functional.pad(labels[:, 1:], (0, 1), value=-100)
    expected = stock(model, ids, labels=None, shift_labels=shifted)
    assert_same(loss_and_gradients(model, ids, labels=labels, skip_logits=skip_logits), expected)
    assert_same(loss_and_gradients(model, ids, shift_labels=shifted, skip_logits=skip_logits), expected)
    both = loss_and_gradients(model, ids, labels=labels, shift_labels=shifted, skip_logits=skip_logits)
    assert_same(both, expected)
    # written out, position by position
    log_probs = model(ids).logits.log_softmax(-1)
    picked = [
        -log_probs[row, column, labels[row, column + 1]]
        for row in range(2)
        for column in range(8)
        if labels[row, column + 1] != -100
    ]
    torch.testing.assert_close(expected[0], torch.stack(picked).mean())


@SKIP
def test_another_ignore_index(skip_logits: bool):
    model = tiny_model()
    ids, labels = ragged(2, 9)
    labels = labels.masked_fill(labels == -100, 5)
    expected = stock(model, ids, labels=labels, ignore_index=5)
    assert_same(loss_and_gradients(model, ids, labels=labels, ignore_index=5, skip_logits=skip_logits), expected)


def test_logits_are_left_out_in_training_and_on_demand():
    model = tiny_model()
    ids = random_ids(1, 6)
    for training, skip_logits, there in [
        (True, None, False),
        (False, None, True),
        (True, False, True),
        (False, True, False),
    ]:
        output = model.train(training)(ids, labels=ids, skip_logits=skip_logits)
        assert (output.logits is not None) == there
        assert len(output.to_tuple()) == 2 + there  # loss, logits, cache
    # without labels there is nothing to form but logits
    assert model.train()(ids).logits.shape == (1, 6, VOCAB)
    assert model(ids, skip_logits=True).logits is not None
    first = model(ids, labels=ids, return_dict=False)[0]
    torch.testing.assert_close(first, model(ids, labels=ids, skip_logits=False).loss)


@SKIP
@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_a_single_label_the_loss_is_zero_and_finite(skip_logits: bool, items: Any, dtype: torch.dtype):
    model = tiny_model(z_loss_coef=1e-3, final_logit_softcapping=5.0).to(dtype)
    ids = random_ids(2, 7)
    labels = torch.full_like(ids, -100)
    loss, grads = loss_and_gradients(model, ids, labels=labels, num_items_in_batch=items, skip_logits=skip_logits)
    assert loss.item() == 0.0
    for name, gradient in grads.items():
        assert gradient is not None and not gradient.any(), name
    assert (
        tiny_model()(ids[:, :1], labels=ids[:, :1], skip_logits=skip_logits).loss == 0.0
    )  # one token predicts nothing


@SKIP
@pytest.mark.parametrize("frozen", ["head", "body"])
def test_frozen_parts_get_no_gradient(skip_logits: bool, frozen: str, small_chunks):
    model = tiny_model(tie_word_embeddings=False)
    (model.lm_head if frozen == "head" else model.model).requires_grad_(False)
    ids, labels = ragged(2, 9)
    expected = stock(model, ids, labels=labels)
    found = loss_and_gradients(model, ids, labels=labels, skip_logits=skip_logits)
    assert_same(found, expected)
    assert (found[1]["lm_head.weight"] is None) == (frozen == "head")
    assert (found[1]["model.norm.weight"] is None) == (frozen == "body")


@torch.no_grad()
def test_no_gradient_work_under_no_grad():
    """Neither forms gradients nor allocates memory for them."""
    model = tiny_model().train()
    ids = random_ids(2, 9)
    with LargestTensor() as with_loss:
        loss = model(ids, labels=ids).loss
    with LargestTensor() as without:
        model(ids)
    assert not loss.requires_grad
    products = [sum(seen.counts[name] for name in seen.counts if ".mm." in name) for seen in (with_loss, without)]
    assert products[0] == products[1] > 0
    assert not any("scatter_add" in name for name in with_loss.counts)  # how a gradient takes the target's share away
    torch.testing.assert_close(loss, model(ids, labels=ids, skip_logits=False).loss)


class LargestTensor(TorchDispatchMode):
    """Records the largest storage that any operation returns, rows of products by width, and how often each ran."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.counts: dict[str, int] = {}
        self.rows: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.counts[str(func)] = self.counts.get(str(func), 0) + 1
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out):
            self.rows[result.shape[1]] = max(self.rows.get(result.shape[1], 0), len(result))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_full_logits_never_exist(dtype: torch.dtype, monkeypatch):
    monkeypatch.setattr(engine_loss, "CHUNK_ELEMENTS", 2**14)
    monkeypatch.setattr(engine_loss, "MIN_CHUNK_ROWS", 16)
    monkeypatch.setattr(loss_hf_decoder, "CHUNK_ROWS", 16)
    vocab, tokens = 1024, 512
    model = tiny_model(vocab_size=vocab).to(dtype).train()
    ids = random_ids(tokens // 16, 16, high=vocab)
    largest = {}
    for skip_logits in (True, False):
        with LargestTensor() as seen:
            model(ids, labels=ids, skip_logits=skip_logits).loss.backward()
        largest[skip_logits] = seen.numel
    assert largest[False] >= tokens * vocab  # the probe sees them where they are
    assert largest[True] <= tokens * vocab / 8


def test_ignored_positions_do_not_reach_the_head():
    model = tiny_model().train()
    ids = random_ids(2, 40)
    labels = ids.clone()
    labels[:, :33] = -100
    with LargestTensor() as seen:
        model(ids, labels=labels)
    # of the 40 positions of each row, 7 have a label
    assert seen.rows[VOCAB] == 2 * 7


@pytest.mark.parametrize("cap", [None, 4.0])
def test_autocast_and_stock_agree(cap: float | None, small_chunks):
    model = tiny_model(final_logit_softcapping=cap).train()
    ids, labels = ragged(3, 12)
    exact = loss_and_gradients(model, ids, labels=labels)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=labels).loss
    assert loss.dtype == torch.float32
    loss.backward()
    found = gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = model(ids, labels=labels, skip_logits=False).loss
    torch.testing.assert_close(loss, theirs, rtol=1e-3, atol=1e-3)
    assert abs(loss - exact[0]) < 0.05
    for name, gradient in exact[1].items():
        assert found[name].dtype == torch.float32
        assert (found[name] - gradient).norm() < 0.15 * gradient.norm() + 1e-4, name


@pytest.mark.parametrize("reentrant", [True, False])
@SKIP
def test_gradient_checkpointing_changes_nothing(reentrant: bool, skip_logits: bool):
    model = tiny_model(attention_dropout=0.2).train()
    ids, labels = ragged(2, 9)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert model.is_gradient_checkpointing
            if reentrant:
                model.enable_input_require_grads()  # the older kind needs an input with a gradient
        torch.manual_seed(3)
        results.append(loss_and_gradients(model, ids, labels=labels, skip_logits=skip_logits, use_cache=False))
    assert_same(results[1], results[0], rtol=0, atol=1e-7)


def test_gradients_accumulate_over_calls(small_chunks):
    """Two backward passes add up, and the embedding's gradient of a tied model has both its parts."""
    model = tiny_model().train()
    pieces = [ragged(2, 9, seed=seed) for seed in (0, 5)]
    items = sum((labels[:, 1:] != -100).sum() for _, labels in pieces)
    together = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
    expected = stock(model, together[0], labels=together[1])
    model.zero_grad()
    total = 0
    for ids, labels in pieces:
        loss = model(ids, labels=labels, num_items_in_batch=items).loss
        loss.backward()
        total += loss.detach()
    assert_same((total, gradients(model)), expected)


@pytest.mark.parametrize("skip_logits", [None, False])
@pytest.mark.parametrize("tied", [True, False])
def test_torch_func_gives_the_same_gradients(skip_logits: bool | None, tied: bool):
    model = tiny_model(tie_word_embeddings=tied).train()
    ids, labels = ragged(2, 9)
    expected = loss_and_gradients(model, ids, labels=labels)[1]
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict) -> torch.Tensor:
        kwargs = {"labels": labels, "skip_logits": skip_logits, "use_cache": False}
        return torch.func.functional_call(model, parameters, (ids,), kwargs).loss

    found = torch.func.grad(loss)(parameters)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


def test_second_derivatives_are_right_or_refused():
    """A gradient penalty: silently wrong gradients would be the worst answer."""
    model = tiny_model(attn_implementation="eager").train()
    ids = random_ids(1, 6)
    weight = model.model.norm.weight
    loss = model(ids, labels=ids, skip_logits=False).loss
    (first,) = torch.autograd.grad(loss, weight, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), weight)
    assert second.abs().max() > 0
    with pytest.raises(RuntimeError, match="skip_logits=False"):
        torch.autograd.grad(model(ids, labels=ids).loss, weight, create_graph=True)


@SKIP
@pytest.mark.parametrize("wrong", [VOCAB, 10**6, -1, -5])
def test_ids_outside_the_vocabulary_are_a_value_error(skip_logits: bool, wrong: int):
    model = tiny_model()
    ids = random_ids(2, 6)
    bad = ids.clone()
    bad[1, 3] = wrong
    for inputs, labels, name in ((bad, None, "input_ids"), (ids, bad, "labels")):
        with pytest.raises(ValueError) as caught:
            model(inputs, labels=labels, skip_logits=skip_logits)
        message = str(caught.value)
        assert name in message and str(wrong) in message and str(VOCAB - 1) in message and "\n" not in message


@SKIP
def test_an_assigned_loss_function_is_used(skip_logits: bool):
    model = tiny_model().train()
    ids = random_ids(2, 6)
    calls = []

    def loss_function(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any) -> torch.Tensor:
        calls.append((tuple(logits.shape), vocab_size, kwargs.get("num_items_in_batch")))
        return logits.float().square().mean() * 0 + 42.0

    model.loss_function = loss_function
    assert model(ids, labels=ids, num_items_in_batch=3, skip_logits=skip_logits).loss == 42.0
    assert calls == [((2, 6, VOCAB), VOCAB, 3)]


def test_the_loss_function_can_be_called_as_the_stock_one():
    """Trainer's and users' own code: `model.loss_function(logits, labels, vocab_size)`."""
    model = tiny_model()
    ids, labels = ragged(2, 6)
    logits = model(ids).logits
    found = model.loss_function(logits=logits, labels=labels, vocab_size=VOCAB)
    torch.testing.assert_close(found, ForCausalLMLoss(logits, labels, VOCAB))


@pytest.mark.parametrize("tied", [True, False])
def test_lora_on_the_head_trains(tied: bool):
    peft = pytest.importorskip("peft")
    model = tiny_model(tie_word_embeddings=tied)
    config = peft.LoraConfig(target_modules=["lm_head", "q_proj"], r=2, lora_alpha=8, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).train()
    ids, labels = ragged(2, 9)
    with_logits = loss_and_gradients(wrapped, ids, labels=labels, skip_logits=False)
    found = loss_and_gradients(wrapped, ids, labels=labels)
    assert_same(found, with_logits)
    # the adapter's own arithmetic: the head is W + alpha / r * B A
    head = wrapped.base_model.model.lm_head
    a, b = head.lora_A["default"].weight, head.lora_B["default"].weight
    hidden = wrapped.base_model.model.model(ids).last_hidden_state
    logits = hidden @ (head.base_layer.weight + 4.0 * b @ a).T
    torch.testing.assert_close(found[0], ForCausalLMLoss(logits, labels, VOCAB).detach())
    assert found[1]["base_model.model.lm_head.lora_A.default.weight"].any()
    assert found[1]["base_model.model.lm_head.base_layer.weight"] is None if not tied else True


def test_a_head_with_a_bias():
    model = tiny_model(tie_word_embeddings=False)
    model.lm_head = nn.Linear(SHAPE["hidden_size"], VOCAB)
    ids, labels = ragged(2, 9)
    assert_same(loss_and_gradients(model, ids, labels=labels, skip_logits=True), stock(model, ids, labels=labels))


def test_hooks_on_the_head_still_run():
    model = tiny_model().train()
    calls = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: calls.append(output.shape))
    ids = random_ids(1, 5)
    hooked = model(ids, labels=ids).loss
    handle.remove()
    torch.testing.assert_close(hooked, model(ids, labels=ids).loss)
    assert calls == [(1, 5, VOCAB)]


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_on_the_gradient_of_the_head_still_run(kind):
    model, calls = tiny_model().train(), []
    getattr(model.lm_head, kind)(lambda module, *gradients: calls.append(gradients[-1][0].shape))
    ids = random_ids(1, 5)
    model(ids, labels=ids).loss.backward()
    assert calls == [(1, 5, VOCAB)]


def test_training_with_either_path_takes_the_same_steps(small_chunks):
    losses = []
    for skip_logits in (True, False):
        torch.manual_seed(0)
        model = HfDecoderForCausalLM(tiny_config(attn_implementation="sdpa")).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses.append([])
        for step in range(12):
            ids = random_ids(4, 16, seed=step % 2)
            loss = model(ids, labels=ids, skip_logits=skip_logits).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0] - 0.2


@pytest.mark.kernels
def test_compiled_training_on_packed_documents_keeps_them_apart():
    model = tiny_model(attn_implementation="sdpa", max_position_embeddings=256).train()
    ids = random_ids(1, 128)
    inputs = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(128)[None] % 64, "use_cache": False}
    torch.testing.assert_close(torch.compile(model)(**inputs).loss, model(**inputs).loss)


@pytest.mark.parametrize("training", [True, False])
def test_labels_of_chosen_positions_must_be_shifted_already(training: bool):
    """Unshifted, each would be paired with the next chosen position, which is not the next token."""
    model, ids = tiny_model().train(training), random_ids(2, 9)
    kept = torch.tensor([0, 4, 7])
    with pytest.raises(ValueError, match="give shift_labels"):
        model(ids, labels=ids[:, kept], logits_to_keep=kept)
    found = model(ids, shift_labels=ids[:, kept + 1], logits_to_keep=kept).loss
    expected = functional.cross_entropy(
        model(ids, skip_logits=False).logits[:, kept].flatten(0, 1), ids[:, kept + 1].flatten()
    )
    torch.testing.assert_close(found, expected)


def test_the_dropout_of_token_classification_is_the_config_s():
    for fields, expected in (({}, 0.1), ({"classifier_dropout": 0.0}, 0.0), ({"hidden_dropout": 0.3}, 0.3)):
        assert HfDecoderForTokenClassification(tiny_config(**fields)).dropout.p == expected
