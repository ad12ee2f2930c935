"""A page to talk to a model of the Hub. Its weights and its code are those of one commit."""

from collections.abc import Callable, Iterator
from threading import Event, Thread
from typing import Any

import gradio as gr
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

MODEL, REVISION, TRUST_REMOTE_CODE = "user/name", "main", False  # `hf-decoder push --space` writes this line


def load(name: str = MODEL, revision: str | None = REVISION) -> Callable[[str, list], Iterator[str]]:
    """The function that answers a message after a conversation; yields the answer so far."""
    source = {"revision": revision, "trust_remote_code": TRUST_REMOTE_CODE}
    tokenizer: Any = AutoTokenizer.from_pretrained(name, **source)  # reads the config, and would ask about its code
    model: Any = AutoModelForCausalLM.from_pretrained(name, **source)

    def answer(message: str, history: list) -> Iterator[str]:
        turns = [{"role": turn["role"], "content": _text(turn["content"])} for turn in history]
        if tokenizer.chat_template:
            inputs = tokenizer.apply_chat_template(
                [*turns, {"role": "user", "content": message}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
        else:  # it never learned to chat, and goes on with the text
            inputs = tokenizer(message, return_tensors="pt")
        streamer: Any = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        room = getattr(model.config, "max_position_embeddings", 10**9) - inputs["input_ids"].shape[1]
        if room < 1:
            raise gr.Error("The conversation is longer than the model's context. Start a new one.")
        stopped = Event()

        def must_stop(ids: torch.Tensor, scores: Any) -> torch.Tensor:
            return torch.full(ids.shape[:1], stopped.is_set(), device=ids.device)

        def generate() -> None:
            try:
                model.generate(
                    **inputs, streamer=streamer, max_new_tokens=min(512, room), stopping_criteria=[must_stop]
                )
            finally:
                streamer.end()  # also after an error, which the log of the Space shows

        Thread(target=generate, daemon=True).start()
        text = ""
        try:
            for piece in streamer:
                text += piece
                yield text
        finally:  # the visitor stopped it, or left
            stopped.set()

    return answer


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def build(answer: Callable[[str, list], Iterator[str]]) -> gr.ChatInterface:
    return gr.ChatInterface(answer, title=MODEL, chatbot=gr.Chatbot(render_markdown=False), analytics_enabled=False)


if __name__ == "__main__":
    build(load()).launch()
