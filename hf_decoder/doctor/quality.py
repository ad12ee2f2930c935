"""Rows about quality: likelihood on text, dead weights, and the settings of generation and chat."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch.nn import functional

from hf_decoder.data.documents import load_standard_library
from hf_decoder.doctor.numerics import logits_of
from hf_decoder.doctor.report import Check, Finding, failed, passed, skipped, warned
from hf_decoder.doctor.subject import Subject
from hf_decoder.interop.checkpoint import read_tensors
from hf_decoder.safety.quiet import quiet
from hf_decoder.safety.terminal import first_line
from hf_decoder.training.run_report import is_pretrained_only

TEXT_CHARACTERS = 60_000  # read of the text that the model is measured on
TEXT_TOKENS, BLOCK = 8192, 256
LEAST_TOKENS = 64
OWN_CORPUS = "the standard library of Python"  # as pretrain's card names it
OUTLIER = 1e4  # times the median row's largest value
ALIKE = 0.9  # cosine of embeddings that never occurred in training: only the softmax moved them, all the same way
SAID = {"system": "Answer in verse.", "user": "What is the capital of France?", "assistant": "Paris."}
# Settings of generate() that hold token ids, alone, in lists or as keys.
ID_SETTINGS = (
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "sequence_bias"),
    *("forced_bos_token_id", "forced_eos_token_id", "decoder_start_token_id"),
)


def _card_figure(subject: Subject) -> tuple[float | None, str]:
    """The held-out loss in the card, or in the results beside it, and the name of its text."""
    try:
        results = ModelCard.load(subject.folder / "README.md").data.eval_results or []
    except Exception:  # the row about the card says what is wrong with it
        results = []
    for result in results:
        if result.metric_type == "loss" and isinstance(result.metric_value, int | float):
            return float(result.metric_value), str(result.dataset_name)
    value = subject.values_of("all_results.json").get("eval_loss")
    return (float(value), "its held-out text") if isinstance(value, int | float) else (None, "")


def _loss_and_chance(subject: Subject, text: str) -> tuple[float, float] | None:
    """Nats per token of a text's second half, by the model and by chance; None if the text is too short.

    Chance is a table of the token counts of the first half, each plus one, or blind guessing where that is better.
    """
    tokenizer = subject.tokenizer
    ids = torch.tensor(tokenizer(text[:TEXT_CHARACTERS], add_special_tokens=False)["input_ids"][: 2 * TEXT_TOKENS])
    if len(ids) < 2 * LEAST_TOKENS:
        return None
    size = subject.model.get_input_embeddings().num_embeddings
    if int(ids.max()) >= size:
        raise ValueError(f"the tokenizer gives the id {int(ids.max())}, the model embeds {size:,}")
    first, second = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    counts = torch.bincount(first, minlength=size).double() + 1
    table = -(counts / counts.sum()).log()
    start = [one for one in tokenizer("")["input_ids"] if one != tokenizer.eos_token_id]
    limit = getattr(subject.config.get_text_config(), "max_position_embeddings", None) or BLOCK
    width = max(2, min(BLOCK, limit - len(start)))
    nats = by_table = 0.0
    count = 0
    for block in second.split(width):
        if len(block) < 2:
            continue
        row = torch.cat((torch.tensor(start, dtype=torch.long), block))[None]
        logits = logits_of(subject, row)[0, len(start) : -1].float()
        nats += float(functional.cross_entropy(logits, block[1:], reduction="sum").double())
        by_table += float(table[block[1:]].sum())
        count += len(block) - 1
    return nats / count, min(by_table / count, math.log(size))


def check_likelihood(subject: Subject) -> Finding:
    """The model predicts text better than a table of token counts."""
    if subject.tokenizer is None:
        return skipped("no tokenizer")
    stated, source = _card_figure(subject)
    is_own = subject.text is None and source.startswith(OWN_CORPUS)
    if subject.text is not None:
        text, name = subject.text, "the text given"
    elif stated is None:
        return skipped("no text to measure on, and the card states no held-out loss: give --text_file")
    else:
        text = "\n\n".join(document["text"][:4000] for document in load_standard_library()["validation"])
        name = "the standard library's held-out files" if is_own else "the standard library of Python"
    measured = _loss_and_chance(subject, text)
    if measured is None:
        return skipped(f"{name} has fewer than {2 * LEAST_TOKENS} tokens, too few to measure on")
    loss, chance = measured
    blind = math.log(subject.model.get_input_embeddings().num_embeddings)
    seen = f"{loss:.2f} nats a token on {name}, where counting tokens gives {chance:.2f} and guessing {blind:.2f}"
    if subject.text is None and not is_own:
        if loss >= chance or (stated or 0.0) >= blind:
            return warned(f"{seen}; the card states {stated:.2f} on {source}", "measure it with --text_file")
        return passed(seen)
    if not loss < chance:
        return failed(seen)
    if stated is not None and loss > (stated + chance) / 2:
        return warned(
            f"{seen}: nearer to chance than to the {stated:.2f} that the card states on {source}",
            "measure on a text like the training's; if this one is, compare the weights with those of the card",
        )
    return passed(seen)


def check_values(subject: Subject) -> Finding:
    """No matrix is all zeros, and no row is far larger than the others."""
    if subject.is_quantized:
        return skipped("quantized weights hold no plain numbers")
    count = 0
    for name, tensor in read_tensors(subject.folder).items():
        values = tensor.load()
        if not values.is_floating_point() or values.ndim < 2 or not values.numel():
            continue
        count += 1
        rows = values.float().flatten(1).abs().amax(1)
        largest = float(rows.max())
        if largest == 0:
            return warned(f"{name} is all zeros", "it was never initialised or never trained: save the model again")
        typical = float(rows[rows > 0].median())
        if not largest <= OUTLIER * typical:
            return warned(
                f"row {int(rows.argmax())} of {name} holds {largest:.1e}, and half of the rows no more than "
                f"{typical:.1e}"
            )
    return passed(f"{count} matrices, none all zeros, no row {OUTLIER:.0e} times the others")


def check_stop_ids(subject: Subject) -> Finding:
    """Generation ends at a special token, and every id in its settings is in the vocabulary."""
    settings = subject.generation_config
    held = subject.config.get_text_config().vocab_size
    for setting in ID_SETTINGS:
        outside = [one for one in _ids_in(getattr(settings, setting, None)) if not 0 <= one < held]
        if outside:
            return warned(f"{setting} holds {outside[0]}, outside the vocabulary of {held:,}", f"correct {setting}")
    tokenizer = subject.tokenizer
    if tokenizer is None:
        return skipped("no tokenizer")
    special = _special_ids(tokenizer)
    ends = _ids_in(settings.eos_token_id)
    for one in ends:
        if one not in special and 0 <= one < len(tokenizer):
            return warned(f"generation ends at {one}, {tokenizer.decode([one])!r}, which is an ordinary token")
    return passed(
        f"{', '.join(map(repr, tokenizer.convert_ids_to_tokens(ends)))} end generation" if ends else "no end"
    )


def _ids_in(value: Any) -> list[int]:
    """The token ids in a setting, whether alone, in a list or as keys."""
    if isinstance(value, dict):
        return [one for key in value for one in _ids_in(key)]
    if isinstance(value, list | tuple):
        if len(value) == 2 and isinstance(value[1], float):  # an entry of sequence_bias in JSON: ids and a bias
            return _ids_in(value[0])
        return [one for part in value for one in _ids_in(part)]
    return [int(value)] if isinstance(value, int) else []


def _special_ids(tokenizer: Any) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(index for index, token in added if token.special)}


def _render(tokenizer: Any, *roles: str) -> str:
    messages = [{"role": role, "content": SAID[role]} for role in roles]
    with quiet():
        return str(tokenizer.apply_chat_template(messages, tokenize=False))


def check_chat_roles(subject: Subject) -> Finding:
    """Roles differ, the system turn is rendered, and an answer closes with a token that ends generation."""
    tokenizer = subject.tokenizer
    if tokenizer is None or not tokenizer.chat_template:
        return skipped("no chat template")
    seen = []
    roles: tuple[str, ...] = ("system", "user", "assistant")
    try:
        whole = _render(tokenizer, *roles)
        if SAID["system"] not in whole:
            return warned("the template leaves the system turn out")
    except Exception as error:  # a template raises what it likes
        roles = roles[1:]
        whole = _render(tokenizer, *roles)
        seen.append(f"no system turn ({first_line(error)})")
    parts = re.split("|".join(re.escape(SAID[role]) for role in roles), whole)
    heads = {_head(part, number > 0) for number, part in enumerate(parts[:-1])}
    if len(parts) == len(roles) + 1 and len(heads) < len(roles):
        return warned(f"two of the roles {', '.join(roles)} look the same: {whole!r}")
    if wrong := _wrong_mask(tokenizer, roles):
        return warned(wrong)
    tail = tokenizer(whole[whole.rindex(SAID["assistant"]) + len(SAID["assistant"]) :], add_special_tokens=False)
    ends = _ids_in(subject.generation_config.eos_token_id)
    closing = [one for one in tail["input_ids"] if one in ends]
    if not closing:
        said = f"an answer closes with {tokenizer.decode(tail['input_ids'])!r}, and no token of it ends generation"
        if not is_pretrained_only(subject.folder):
            return warned(said)
        seen.append(f"{said}; right for a base model")
    else:
        seen.append(f"{', '.join(roles)} differ; {tokenizer.decode(closing[:1])!r} closes an answer")
    return passed("; ".join(seen))


def _head(part: str, follows: bool) -> str:
    """The part of the text between two contents that opens a turn, without what closes the turn before."""
    lines = part.strip().splitlines()
    return lines[-1] if lines and follows else part.strip()


def _wrong_mask(tokenizer: Any, roles: tuple[str, ...]) -> str | None:
    """Says what is wrong with the tokens that `{% generation %}` marks for the loss; None if nothing is."""
    template = tokenizer.chat_template
    if not isinstance(template, str) or not re.search(r"{%-?\s*generation\b", template):
        return None
    messages = [{"role": role, "content": SAID[role]} for role in roles]
    with quiet():
        found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mask in zip(found["input_ids"], found["assistant_masks"], strict=True) if mask]
    text = tokenizer.decode(marked)
    if SAID["assistant"] not in text:
        return f"{{% generation %}} marks {text!r}, which is not the answer"
    if any(SAID[role] in text for role in roles if role != "assistant"):
        return f"{{% generation %}} marks more than answers: {text!r}"
    if text.rstrip().endswith(SAID["assistant"]):
        return "{% generation %} leaves out the token that closes an answer: the model would not learn to stop"
    return None


def check_chat_tokens(subject: Subject) -> Finding:
    """The special tokens of the chat template have distinct embeddings."""
    tokenizer = subject.tokenizer
    if tokenizer is None or not tokenizer.chat_template:
        return skipped("no chat template")
    chat = tokenizer(_render(tokenizer, "user", "assistant"), add_special_tokens=False)["input_ids"]
    ids = sorted({*chat} & _special_ids(tokenizer))
    names = ", ".join(tokenizer.convert_ids_to_tokens(ids))
    if len(ids) < 2:
        return passed("the template needs fewer than two special tokens")
    for where, module in (
        ("embeddings", subject.model.get_input_embeddings()),
        ("head", subject.model.get_output_embeddings()),
    ):
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim != 2 or max(ids) >= len(weight):
            continue
        rows = functional.normalize(weight.detach()[ids].float(), dim=-1)
        least = float((rows @ rows.T).min())
        if least > ALIKE:
            said = f"{names} are all alike in the {where} (cosine {least:.3f} and more): they were never trained"
            if is_pretrained_only(subject.folder):
                return passed(f"{said}, as in a base model; LoRA must train these rows, too")
            return warned(said)
    return passed(f"{names} differ")


CHECKS = (
    Check(
        "values",
        "no dead and no exploded weights",
        "a part of the model does nothing, or outweighs the rest",
        "training diverged or a file is damaged: go back to an earlier checkpoint",
        check_values,
        needs="",
    ),
    Check(
        "likelihood",
        "better than chance on text",
        "the weights do not belong to this model, in this order, with this vocabulary: it writes noise",
        "compare names and order of tensors, norms and the tokenizer's ids with the trained model, or measure on a "
        "text like the training's",
        check_likelihood,
        needs="logits",
    ),
    Check(
        "stop_ids",
        "generation ends at special tokens",
        "answers break off at an ordinary word, or generate() fails on a setting",
        "set eos_token_id in generation_config.json to the tokenizer's end of text, and for a chat to its end of turn",
        check_stop_ids,
        needs="tokenizer",
    ),
    Check(
        "chat_roles",
        "roles, system turn, end of an answer",
        "the model cannot tell who speaks, or generate() does not stop after an answer",
        "correct chat_template.jinja, or add what closes an answer to eos_token_id in generation_config.json",
        check_chat_roles,
        needs="tokenizer",
    ),
    Check(
        "chat_tokens",
        "chat tokens have rows of their own",
        "the model cannot tell the end of a turn from its start",
        "train the embeddings with the adapter (modules_to_save or trainable_token_indices): by LoRA alone the model "
        "does not learn to stop",
        check_chat_tokens,
    ),
)
