"""Rows about the tokenizer, and about the special ids that three files must agree on."""

from __future__ import annotations

from typing import Any

from hf_decoder.doctor.report import Check, Finding, failed, passed, skipped, warned
from hf_decoder.doctor.subject import Subject, Unloadable
from hf_decoder.safety.quiet import quiet

SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "def main(argv):\n    return 0 if len(argv) == 1 else 2  # 3.14159\n",
    "Größe, naïve, 東京, привет, 🙂",
    "two  spaces,\ttab,\n\nempty line",
)
SPECIAL = ("bos", "eos", "pad")
CHAT = (
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Italy?"},
)


def _ids(value: Any) -> set[int]:
    values = value if isinstance(value, list | tuple) else [value]
    return {int(one) for one in values if one is not None}


def check_round_trip(subject: Subject) -> Finding:
    """Decoding the ids of a text gives the text back, and every id has an embedding."""
    try:
        tokenizer = subject.tokenizer
    except Unloadable as error:
        return failed(f"it cannot be loaded: {error}")
    if tokenizer is None:
        return failed("the folder holds no tokenizer", "save the tokenizer beside the model: save_pretrained(folder)")
    held = subject.config.get_text_config().vocab_size
    if len(tokenizer) > held:
        return failed(
            f"the tokenizer has {len(tokenizer):,} tokens, the model embeds {held:,}",
            "take the tokenizer that belongs to it, or call model.resize_token_embeddings(len(tokenizer))",
        )
    unknown = tokenizer.unk_token_id
    for text in SAMPLES:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if back == text:
            continue
        if unknown is not None and unknown in ids:
            return warned(f"{text!r} holds characters without a token", "this is fine if no such text is expected")
        return failed(f"{text!r} comes back as {back!r}")
    again = tokenizer(SAMPLES[0])["input_ids"]
    if not set(again) <= set(range(held)):
        return failed(f"it gives the id {max(again)}, the model embeds {held:,}")
    return passed(f"{len(SAMPLES)} texts come back unchanged; {len(tokenizer):,} tokens, {held:,} embeddings")


def check_pad(subject: Subject) -> Finding:
    """There is a padding token, and it is not the end of text."""
    tokenizer = subject.tokenizer
    if tokenizer is None:
        return skipped("no tokenizer")
    if tokenizer.pad_token_id is None:
        return warned("it has no padding token, which batches need", "tokenizer.pad_token = an unused special token")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        return failed(f"pad and eos are the same token, {tokenizer.eos_token!r}")
    ending = _ids(subject.generation_config.eos_token_id)
    if tokenizer.pad_token_id in ending:
        return warned(
            f"{tokenizer.pad_token!r} is the padding token, and also ends generation", "leave it out of eos_token_id"
        )
    return passed(f"pad {tokenizer.pad_token!r}, eos {tokenizer.eos_token!r}")


def check_special_ids(subject: Subject) -> Finding:
    """config, generation_config and tokenizer do not contradict each other about special tokens."""
    if subject.tokenizer is None:
        return skipped("no tokenizer")
    sources = {
        "config.json": subject.config.get_text_config(),
        "generation_config.json": subject.generation_config,
        "the tokenizer": subject.tokenizer,
    }
    held = subject.config.get_text_config().vocab_size
    for kind in SPECIAL:
        found = {where: _ids(getattr(source, f"{kind}_token_id", None)) for where, source in sources.items()}
        found = {where: ids for where, ids in found.items() if ids}
        for where, ids in found.items():
            if kind == "pad" and ids == {-1}:
                continue
            if not all(0 <= one < held for one in ids):
                return failed(f"{kind}_token_id {sorted(ids)} of {where} is outside the vocabulary of {held:,}")
        pairs = list(found.items())
        for i, (where, ids) in enumerate(pairs):
            for other, others in pairs[i + 1 :]:
                if not ids & others:
                    return failed(f"{kind}_token_id is {_show(ids)} in {where} and {_show(others)} in {other}")
        if kind == "eos" and "the tokenizer" in found and "generation_config.json" not in found:
            return failed(
                f"the tokenizer ends texts with {subject.tokenizer.eos_token!r}, but generate() does not know it"
            )
    eos = sorted(_ids(subject.generation_config.eos_token_id))
    return passed(f"generation ends at {_show(set(eos))}" if eos else "no end-of-text token anywhere")


def _show(ids: set[int]) -> str:
    return ", ".join(map(str, sorted(ids)))


def check_chat_template(subject: Subject) -> Finding:
    """The template renders a whole conversation in order, and a prompt for the next answer."""
    tokenizer = subject.tokenizer
    if tokenizer is None:
        return skipped("no tokenizer")
    if not tokenizer.chat_template:
        return skipped("no chat template: a base model")
    with quiet():
        whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
        prompt = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.apply_chat_template(CHAT, tokenize=True, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
    lost = [message["content"] for message in CHAT if message["content"] not in whole]
    if lost:
        return failed(f"it leaves a message out: {lost[0]!r}")
    order = [whole.index(message["content"]) for message in CHAT]
    if order != sorted(order):
        return failed("it changes the order of the messages")
    if ids != tokenizer(prompt, add_special_tokens=False)["input_ids"]:
        return failed("the ids of its text differ from the ids that it gives")
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in ids:
        return warned(
            "its own words hold characters that the tokenizer has no token for", "train the tokenizer on them"
        )
    if prompt == whole:
        return warned("add_generation_prompt=True adds nothing", "end the template with the start of an answer")
    return passed(f"{len(CHAT)} turns, {len(ids)} tokens, answer prompt {prompt[len(whole) :]!r}")


FIX_TEMPLATE = "correct chat_template.jinja (or chat_template in tokenizer_config.json)"

CHECKS = (
    Check(
        "tokenizer",
        "tokenizer round trip",
        "the model is trained on another text than yours, and answers with another",
        "use the tokenizer files of the model's training",
        check_round_trip,
        needs="tokenizer",
    ),
    Check(
        "pad",
        "pad is not eos",
        "fine-tuning masks the end of text together with the padding: the model never learns to stop",
        "tokenizer.add_special_tokens({'pad_token': ...}), then save tokenizer, config and generation config again",
        check_pad,
        needs="tokenizer",
    ),
    Check(
        "special_ids",
        "special ids agree in all files",
        "generation does not stop, or stops at an ordinary token",
        "set the ids in config.json and generation_config.json to those of the tokenizer",
        check_special_ids,
        needs="tokenizer",
    ),
    Check(
        "chat_template",
        "chat template renders",
        "chats fail, or reach the model incomplete",
        FIX_TEMPLATE,
        check_chat_template,
        needs="tokenizer",
    ),
)
