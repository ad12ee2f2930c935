"""The heads for classification and question answering equal Llama's on the same weights."""

from typing import Any

import pytest
import torch
from tiny_models import SHAPE, random_ids, randomise, tiny_config
from transformers import (
    LlamaConfig,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

from hf_decoder import (
    HfDecoderForQuestionAnswering,
    HfDecoderForSequenceClassification,
    HfDecoderForTokenClassification,
)

HEADS = {
    "sequence": (HfDecoderForSequenceClassification, LlamaForSequenceClassification),
    "token": (HfDecoderForTokenClassification, LlamaForTokenClassification),
    "questions": (HfDecoderForQuestionAnswering, LlamaForQuestionAnswering),
}
ATTENTION = pytest.mark.parametrize("attention", ["eager", "sdpa"])


def pair(head: str, attention: str = "eager", **options: Any) -> tuple[Any, Any]:
    """Ours and Llama's, with the same weights."""
    ours_class, stock_class = HEADS[head]
    options = {"num_labels": 3, "pad_token_id": 0} | options
    stock_config = LlamaConfig(**SHAPE, rms_norm_eps=1e-6, **options)
    stock_config._attn_implementation = attention
    stock = stock_class(stock_config)
    randomise(stock)
    ours = ours_class(tiny_config(attn_implementation=attention, **options))
    # Llama's head for question answering calls its decoder otherwise
    state = {name.replace("transformer.", "model.", 1): tensor for name, tensor in stock.state_dict().items()}
    ours.load_state_dict(state)
    return ours.eval(), stock.eval()


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    rows = [random_ids(n, seed=n) for n in (9, 4, 1)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(-len(row), None) if side == "left" else slice(len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids, mask, rows


@torch.no_grad()
@ATTENTION
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("head", HEADS)
def test_logits_are_llamas(head: str, side: str, attention: str):
    ours, stock = pair(head, attention)
    ids, mask, _ = padded(side)
    found, expected = (model(ids, attention_mask=mask) for model in (ours, stock))
    names = ("start_logits", "end_logits") if head == "questions" else ("logits",)
    for name in names:
        one, other = found[name], expected[name]
        if head != "sequence":
            one, other = one[mask.bool()], other[mask.bool()]
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        assert one.std() > 0.1
    if head == "sequence":
        assert found.logits.shape == (3, 3)


@torch.no_grad()
@ATTENTION
# without a mask tokens attend to the padding on their left, as in every model
@pytest.mark.parametrize(("side", "with_mask"), [("left", True), ("right", True), ("right", False)])
def test_sequence_classification_reads_the_last_token_that_is_not_padding(side: str, attention: str, with_mask: bool):
    ours, _ = pair("sequence", attention)
    ids, mask, rows = padded(side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = ours(ids, attention_mask=mask if with_mask else None, position_ids=positions if with_mask else None).logits
    for index, row in enumerate(rows):
        # the score of every token of the unpadded row, of which the last counts
        scores = ours.score(ours.model(row[None]).last_hidden_state)[0]
        torch.testing.assert_close(found[index], scores[-1], rtol=0, atol=2e-5)
        if len(row) > 1:
            assert (found[index] - scores[-2]).abs().max() > 1e-2


def test_a_batch_without_a_padding_token_is_refused():
    ours, _ = pair("sequence", pad_token_id=None)
    assert ours(random_ids(1, 4)).logits.shape == (1, 3)
    with pytest.raises(ValueError, match="padding"):
        ours(random_ids(2, 4))


def test_minus_one_is_no_padding_token_as_older_configs_write_it():
    ours, _ = pair("sequence", pad_token_id=-1)
    assert ours.config.pad_token_id is None and ours.model.embed_tokens.padding_idx is None
    with pytest.raises(ValueError, match="padding"):
        ours(random_ids(2, 4))


PROBLEMS: dict[str, tuple[dict, torch.Tensor]] = {
    "single label": ({"num_labels": 3}, torch.tensor([2, 0, 1])),
    "multi label": ({"num_labels": 3}, torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]])),
    "regression": ({"num_labels": 1}, torch.tensor([0.5, -1.0, 2.0])),
    "regression of three": ({"num_labels": 3, "problem_type": "regression"}, torch.arange(9.0).view(3, 3)),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_losses_of_sequence_classification(problem: str):
    options, labels = PROBLEMS[problem]
    ours, stock = pair("sequence", **options)
    ids, mask, _ = padded("left")
    losses = []
    for model in (ours, stock):
        output = model(ids, attention_mask=mask, labels=labels)
        output.loss.backward()
        losses.append(output.loss.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.score.weight.grad, stock.score.weight.grad, rtol=1e-4, atol=1e-6)
    logits = ours(ids, attention_mask=mask).logits.detach()
    functional = torch.nn.functional
    expected = {
        "single label": lambda: functional.cross_entropy(logits, labels),
        "multi label": lambda: functional.binary_cross_entropy_with_logits(logits, labels),
        "regression": lambda: (logits[:, 0] - labels).square().mean(),
        "regression of three": lambda: (logits - labels).square().mean(),
    }[problem]()
    torch.testing.assert_close(losses[0], expected)


def test_loss_of_token_classification():
    ours, stock = pair("token")
    ids, mask, _ = padded("right")
    labels = (ids % 3).masked_fill(mask == 0, -100)
    found, expected = (model(ids, attention_mask=mask, labels=labels) for model in (ours, stock))
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    by_hand = torch.nn.functional.cross_entropy(found.logits[mask.bool()], labels[mask.bool()])
    torch.testing.assert_close(found.loss, by_hand)


def test_loss_of_question_answering():
    ours, stock = pair("questions")
    ids = random_ids(3, 9)
    start, end = torch.tensor([0, 3, 8]), torch.tensor([2, 3, 20])  # past the text: ignored
    found, expected = (model(ids, start_positions=start.clone(), end_positions=end.clone()) for model in (ours, stock))
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    functional = torch.nn.functional
    by_hand = functional.cross_entropy(found.start_logits, start) + functional.cross_entropy(
        found.end_logits[:2], end[:2]
    )
    torch.testing.assert_close(found.loss, by_hand / 2)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_saves_and_loads_and_keeps_the_decoder(head: str, tmp_path):
    ours, _ = pair(head)
    ours.save_pretrained(tmp_path)
    loaded, report = type(ours).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in ours.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    # a decoder trained with one head serves another
    other = HEADS["token" if head != "token" else "sequence"][0].from_pretrained(tmp_path)
    for name, tensor in ours.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], tensor)


def test_dropout_of_token_classification_acts_in_training_only():
    ours, _ = pair("token")
    ids = random_ids(1, 9)
    assert torch.equal(ours(ids).logits, ours(ids).logits)
    ours.train()
    assert not torch.equal(ours(ids).logits, ours(ids).logits)


@pytest.mark.parametrize("head", ["sequence", "token"])
def test_losses_of_parts_add_up_to_that_of_the_whole_batch_even_without_a_label_in_one(head):
    ours, _ = pair(head)
    ids = random_ids(6, 5)
    shape = (6,) if head == "sequence" else (6, 5)
    labels = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(0))
    labels[2:4] = -100
    whole = ours(ids, labels=labels).loss
    whole.backward()
    wanted = ours.score.weight.grad.clone()
    ours.zero_grad()
    count = (labels != -100).sum()
    parts = [ours(ids[rows], labels=labels[rows], num_items_in_batch=count).loss for rows in torch.arange(6).split(2)]
    assert parts[1] == 0
    sum(parts).backward()
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(ours.score.weight.grad, wanted)
