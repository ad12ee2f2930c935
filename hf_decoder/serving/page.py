"""Builds the page to talk to a model: chat and completion, one model or two side by side. Needs the extra `demo`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event
from typing import Any

import gradio as gr

from hf_decoder.evaluation.batch_generation import check_ids, encode_prompt
from hf_decoder.serving.conversation import Turn, fit_conversation
from hf_decoder.serving.live_generation import Choice, Piece
from hf_decoder.serving.local_page import NARROWEST, escaped

# Setting of generate(): label, smallest value, value where the model's generation_config has none.
SETTINGS: dict[str, tuple[str, float, float]] = {
    "max_new_tokens": ("Max new tokens", 1, 200),
    "temperature": ("Temperature", 0, 1.0),
    "top_p": ("Top p", 0, 1.0),
    "top_k": ("Top k", 0, 50),
    "min_p": ("Min p", 0, 0.0),
    "repetition_penalty": ("Repetition penalty", 0, 1.0),
    "seed": ("Seed (-1: none)", -1, -1),
}
HINT = "The darker a token, the less likely it was. Point at one, or tap it, to see its probability."
# What the page has above and below a chat takes 31rem: the chat scrolls, and the buttons stay in sight.
CHAT_HEIGHT = "max(16rem, calc(100vh - 31rem))"
GENERATES: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
AT_ONCE: dict[str, Any] = {"queue": False, "api_visibility": "private"}


class Page:
    """The page, with one or two columns; each shows one of `choices`. When a browser leaves, its answer stops."""

    def __init__(self, choices: Sequence[Choice], columns: int):
        self.choices = {choice.name: choice for choice in choices}
        self.columns = columns
        self._running: dict[str | None, Event] = {}

    def build(self) -> gr.Blocks:
        title = " and ".join(list(self.choices)[: self.columns])
        with gr.Blocks(title=title, analytics_enabled=False) as page:
            picks = self._columns(self._pick)
            with gr.Accordion("Settings", open=False):
                system = gr.Textbox(label="System prompt of a chat", placeholder="none", max_lines=8, elem_id="system")
                with gr.Row():
                    numbers = [self._number(*setting) for setting in SETTINGS.items()]
            with gr.Tab("Chat"):
                self._chat_tab([system, *numbers, *picks])
            with gr.Tab("Completion"):
                self._completion_tab([system, *numbers, *picks])
            page.unload(self.stop)
        return page

    def _number(self, name: str, setting: tuple[str, float, float]) -> gr.Number:
        label, least, start = setting
        config = next(iter(self.choices.values())).loaded.model.generation_config
        given = getattr(config, name, None)
        if name == "temperature" and not config.do_sample:
            given = 0.0  # takes the likeliest
        value, is_whole = start if given is None else given, isinstance(start, int)
        precision, step = (0, 1) if is_whole else (None, 0.05)
        return gr.Number(value, label=label, minimum=least, precision=precision, step=step, min_width=140)

    def _pick(self, column: int) -> gr.Dropdown:
        names = list(self.choices)
        pick = gr.Dropdown(names, value=names[column], label="Model", elem_id=f"model{column}")
        note = gr.HTML(self._note(names[column]))
        pick.change(self._note, pick, note, **AT_ONCE)
        return pick

    def _note(self, name: str) -> str:
        return _line(self.choices[name].note or "")

    def _columns(self, make: Callable[[int], Any]) -> list[Any]:
        made = []
        with gr.Row():
            for column in range(self.columns):
                with gr.Column(min_width=NARROWEST):
                    made.append(make(column))
        return made

    def _written(self, kind: str, column: int, value: str, asked: Sequence[Any], **how: Any) -> gr.HTML:
        """The part that shows what a model wrote; of two, each is under the name of its model."""
        if self.columns > 1:
            pick = asked[column - self.columns]
            name = gr.HTML(_line(pick.value))
            pick.change(_line, pick, name, **AT_ONCE)
        return gr.HTML(value, elem_id=f"{kind}{column}", **how)

    # ------------------------------------------------------------------------------------------------------ chat

    def _chat_tab(self, asked: list[Any]) -> None:
        how = {"autoscroll": True, "max_height": CHAT_HEIGHT}
        shown = self._columns(lambda column: self._written("chat", column, _talk([]), asked, **how))
        said = gr.Textbox(show_label=False, placeholder="Say something", elem_id="said", max_lines=8, autofocus=True)
        with gr.Row():
            send = gr.Button("Send", variant="primary", elem_id="send", min_width=60)
            stop = gr.Button("Stop", elem_id="stop", min_width=60)
            again = gr.Button("Retry", elem_id="retry", min_width=60)
            clear = gr.Button("Clear", elem_id="clear", min_width=60)
        status = gr.HTML()
        empty: list[list[Turn]] = [[] for _ in range(self.columns)]
        talks = gr.State(empty)
        outputs = [said, status, talks, *shown]
        gr.on([send.click, said.submit], self.chat, [said, talks, *asked], outputs, **GENERATES)
        again.click(self.retry, [talks, *asked], outputs, **GENERATES)
        stop.click(self.stop, **AT_ONCE)
        clear.click(self.stop, **AT_ONCE).then(lambda: ("", "", empty, *map(_talk, empty)), None, outputs, **GENERATES)

    def chat(
        self, request: gr.Request, said: str, talks: list[list[Turn]], system: str, *asked: Any
    ) -> Iterator[tuple[Any, ...]]:
        """Has each column answer in turn; yields the message box, the status, the talks and how they look."""
        if not said.strip():
            raise _problem("Say something first.")
        given, seed, chosen = self._asked(asked)
        before, status, stopped = talks, "", self._begin(request)
        talks = [[*talk, _turn("user", said), _turn("assistant", "")] for talk in before]
        for column, choice in enumerate(chosen):
            if stopped.is_set():
                break
            with _explained(), choice.loaded.with_adapter(choice.adapter) as model:
                ids, kept = fit_conversation(model, choice.tokenizer, system or None, before[column], said)
            if len(kept) < len(before[column]):
                status = f"The context is full: {choice.name} no longer reads its oldest messages."
            with _explained():
                for tokens in choice.stream(ids, given, stopped, seed=seed, chat=True):
                    talks[column][-1] = _turn("assistant", choice.text(tokens))
                    yield "", _line(status), talks, *map(_talk, talks)

    def retry(self, request: gr.Request, talks: list[list[Turn]], *asked: Any) -> Iterator[tuple[Any, ...]]:
        """Answers the last message anew."""
        if not talks[0]:
            raise _problem("There is nothing to retry yet.")
        yield from self.chat(request, talks[0][-2]["content"], [talk[:-2] for talk in talks], *asked)

    # ------------------------------------------------------------------------------------------------ completion

    def _completion_tab(self, asked: list[Any]) -> None:
        prompt = gr.Textbox(label="Text to continue", lines=4, max_lines=12, elem_id="prompt")
        with gr.Row():
            go = gr.Button("Continue", variant="primary", elem_id="continue", min_width=60)
            stop = gr.Button("Stop", elem_id="stop_completion", min_width=60)
        shown = self._columns(lambda column: self._written("completion", column, _tokens("", []), asked))
        hint = gr.HTML(_line(HINT))
        go.click(self.complete, [prompt, *asked], [hint, *shown], **GENERATES)
        stop.click(self.stop, **AT_ONCE)

    def complete(self, request: gr.Request, prompt: str, system: str, *asked: Any) -> Iterator[tuple[str, ...]]:
        """Has each column continue the prompt in turn; yields the hint, and what the columns show."""
        given, seed, chosen = self._asked(asked)
        shown = [_tokens(prompt, [])] * self.columns
        stopped = self._begin(request)
        for column, choice in enumerate(chosen):
            if stopped.is_set():
                break
            with _explained():
                ids = encode_prompt(choice.tokenizer, prompt)
                with choice.loaded.with_adapter(choice.adapter) as model:
                    check_ids(model, ids)
                tokens: list[int] = []
                for tokens in choice.stream(ids, given, stopped, seed=seed, chat=False):
                    shown[column] = _tokens(prompt, [Piece(choice.text(tokens), 1.0, [])])
                    yield _line(HINT), *shown
                shown[column] = _tokens(prompt, choice.pieces(ids, tokens))
                yield _line(HINT), *shown

    # ---------------------------------------------------------------------------------------------------- common

    def _asked(self, values: Sequence[Any]) -> tuple[dict[str, Any], int | None, list[Choice]]:
        """Settings of generate(), the seed and the choices, from the fields that both tabs share."""
        given: dict[str, Any] = {}
        for (name, (label, _, start)), value in zip(SETTINGS.items(), values, strict=False):
            if value is None:
                raise _problem(f"{label} is empty.")
            given[name] = type(start)(value)
        seed = given.pop("seed")
        return given, None if seed < 0 else seed, [self.choices[name] for name in values[len(SETTINGS) :]]

    def _begin(self, request: gr.Request) -> Event:
        self.stop(request)
        return self._running.setdefault(request.session_hash, Event())

    def stop(self, request: gr.Request) -> None:
        """Stops what is being written for this browser; also when it leaves."""
        if (running := self._running.pop(request.session_hash, None)) is not None:
            running.set()


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def _talk(turns: Sequence[Turn]) -> str:
    inner = "".join(f'<div class="turn {turn["role"]}">{escaped(turn["content"])}</div>' for turn in turns)
    return f'<div class="talk">{inner}</div>'


def _line(text: str) -> str:
    return f'<div class="note">{escaped(text)}</div>' if text else ""


def _tokens(prompt: str, pieces: Sequence[Piece]) -> str:
    """The prompt and what follows it; each piece has a colour and tells its probability where one points at it."""
    spans = []
    for piece in pieces:
        others = "  ".join(f"{text!r} {100 * share:.1f}%" for text, share in piece.likeliest)
        tip = f"{100 * piece.probability:.1f}%   likeliest: {others}" if others else ""
        tip = f' data-tip="{escaped(tip)}"' if tip else ""
        shade = 0.15 * min(4.0, -math.log10(max(piece.probability, 1e-9)))  # darkest at 1 in 10,000
        spans.append(f'<span{tip} style="background: rgba(230, 120, 30, {shade:.2f})">{escaped(piece.text)}</span>')
    inner = f'<span class="prompt">{escaped(prompt)}</span>{"".join(spans)}'
    return f'<div class="tokens"><div class="text">{inner}</div></div>'


def _problem(text: str) -> gr.Error:
    """Shows what is wrong; Gradio takes the text of an error for HTML."""
    return gr.Error(escaped(text), print_exception=False)


@contextmanager
def _explained() -> Iterator[None]:
    """Shows what is wrong with a prompt or a setting in the page."""
    try:
        yield
    except ValueError as error:
        raise _problem(str(error)) from None
