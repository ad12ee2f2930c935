"""Fits a conversation into a model's context, and says of a model that it was never taught to hold one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_decoder.evaluation.batch_generation import check_ids, encode_prompt
from hf_decoder.training.run_report import is_pretrained_only

Turn = dict[str, str]  # role, content


def untaught_note(tokenizer: Any, folder: str | Path, adapter: str | None = None) -> str | None:
    """What a reader should know of a model that never learned to chat; None for one that did, or may have."""
    if tokenizer.chat_template is None:
        return "It was never taught to chat (no chat template): it continues each text, and remembers none."
    if adapter is None and is_pretrained_only(Path(folder)):
        return "It was never taught to chat: it has a chat template, but was only pretrained."
    return None


def fit_conversation(
    model: Any, tokenizer: Any, system: str | None, turns: Sequence[Turn], said: str
) -> tuple[list[int], list[Turn]]:
    """Token ids of the conversation up to the answer, and the `turns` that are part of it.

    The oldest exchanges are dropped if there is no room for an answer. Without a chat template the ids are those of
    `said` alone.

    Raises:
        ValueError: if what was said is empty, or alone too long for the model.
    """
    kept = list(turns)
    if tokenizer.chat_template is None:
        ids = encode_prompt(tokenizer, said)
        check_ids(model, ids)
        return ids, kept
    limit = getattr(model.config, "max_position_embeddings", None)
    first = [] if system is None else [{"role": "system", "content": system}]
    while True:
        ids = encode_prompt(tokenizer, [*first, *kept, {"role": "user", "content": said}])
        # An answer gets at least a quarter of the context.
        if limit is None or not kept or len(ids) <= limit - limit // 4:
            break
        del kept[:2]
    check_ids(model, ids)
    return ids, kept
