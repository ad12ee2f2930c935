"""Generates token by token until it is stopped, and tells the probability of each token afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Queue
from threading import Event, Lock, Thread
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from hf_decoder.evaluation.batch_generation import end_ids, generate_settings
from hf_decoder.interop.adapters import load_adapter

LIKELIEST = 3  # tokens that are named beside the one that was written


@dataclass
class LoadedModel:
    """A model in memory, and the folder of the adapter that is on it now."""

    model: Any
    adapter: str | None = None
    lock: Lock = field(default_factory=Lock)

    @contextmanager
    def with_adapter(self, adapter: str | None) -> Iterator[Any]:
        """The model with this adapter on it, or with none, for one caller at a time.

        Raises:
            ValueError: if the adapter does not fit.
        """
        with self.lock:
            if adapter != self.adapter:
                if self.adapter is not None:  # an adapter of prompts changes no module, and cannot be unloaded
                    model = self.model
                    self.model = model.unload() if hasattr(model, "unload") else model.get_base_model()
                    self.adapter = None
                if adapter is not None:
                    self.model = load_adapter(self.model, adapter).eval()
                    self.adapter = adapter
            yield self.model


@dataclass(frozen=True)
class Piece:
    """A token's text, its probability, and the likeliest texts in its place. A character in parts is one piece."""

    text: str
    probability: float
    likeliest: list[tuple[str, float]]


@dataclass(frozen=True)
class Choice:
    """What one can talk to: a model, or a model with an adapter. `note` says that it never learned to chat."""

    name: str
    loaded: LoadedModel
    tokenizer: Any
    adapter: str | None = None
    note: str | None = None

    def stream(
        self, ids: Sequence[int], given: Mapping[str, Any], stopped: Event, *, seed: int | None, chat: bool
    ) -> Iterator[list[int]]:
        """Yields the new tokens so far, each time that there are more.

        The model runs in a thread, which ends when this iterator is closed or `stopped` is set.

        Args:
            ids: the prompt.
            given: settings of `generate` that differ from the model's generation_config.
            seed: of the draws.
            chat: the end of a turn ends the answer, too.

        Raises:
            ValueError: if `generate` does not take the settings, or the adapter does not fit.
        """
        streamer, closed = _TokenQueue(), Event()

        def must_stop(ids: torch.Tensor, scores: Any) -> torch.Tensor:
            return torch.full(ids.shape[:1], stopped.is_set() or closed.is_set(), device=ids.device)

        def generate() -> None:
            try:
                with self.loaded.with_adapter(self.adapter) as model, torch.inference_mode():
                    settings = generate_settings(model, self.tokenizer, len(ids), given)
                    settings["eos_token_id"] = end_ids(model, self.tokenizer, chat=chat) or None
                    settings |= {"streamer": streamer, "stopping_criteria": [must_stop]}
                    if seed is not None:
                        torch.manual_seed(seed)
                    prompt = torch.tensor([list(ids)], device=model.device)
                    model.generate(inputs=prompt, attention_mask=torch.ones_like(prompt), **settings)
                streamer.queue.put(None)
            except Exception as error:  # is raised where the tokens are waited for
                streamer.queue.put(error)

        thread = Thread(target=generate, daemon=True)
        thread.start()
        tokens: list[int] = []
        try:
            while (item := streamer.queue.get()) is not None:
                if isinstance(item, Exception):
                    raise ValueError(" ".join(str(item).split()) or type(item).__name__) from item
                tokens.append(item)
                if streamer.queue.empty():  # a slow reader misses some, and no token
                    yield list(tokens)
            yield list(tokens)
        finally:
            closed.set()
            thread.join()

    def text(self, tokens: Sequence[int]) -> str:
        """The text of new tokens, without a character at its end that is not whole yet."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")

    @torch.inference_mode()
    def pieces(self, ids: Sequence[int], tokens: Sequence[int]) -> list[Piece]:
        """The text of `tokens` after the prompt `ids`, with the model's own probabilities: before temperature."""
        with self.loaded.with_adapter(self.adapter) as model:
            whole = torch.tensor([[*ids, *tokens]], device=model.device)
            logits = model(whole, logits_to_keep=len(tokens) + 1, use_cache=False).logits[0, :-1]
        found: list[Piece] = []
        shown, product = 0, 1.0
        for place, token in enumerate(tokens):
            row = logits[place].float().softmax(-1)
            product *= float(row[token])
            text = self.text(tokens[: place + 1])
            if len(text) <= shown and place + 1 < len(tokens):
                continue  # a part of a character
            top = row.topk(min(LIKELIEST, len(row)))
            texts = [self.tokenizer.decode([one]) for one in top.indices]
            found.append(Piece(text[shown:], product, list(zip(texts, top.values.tolist(), strict=True))))
            shown, product = len(text), 1.0
        return found


class _TokenQueue(BaseStreamer):
    """Takes new tokens from `generate`, and leaves the prompt out."""

    def __init__(self) -> None:
        self.queue: Queue[int | Exception | None] = Queue()
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self._is_prompt:
            self.queue.put(int(value))
        self._is_prompt = False

    def end(self) -> None:
        """Whoever calls `generate` says when all is done."""
