"""Changes the server of `transformers serve`: it honours each parameter, or refuses it with a clear error.

transformers' handlers stay. Each request gets a copy of its handler, which checks the body first, and whose generation
knows the context, stop strings, seed, penalties and log-probabilities of the request. Importing this module needs the
packages of the extra `serve`.
"""

from __future__ import annotations

import asyncio
import copy
import json
import math
import re
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cli.serving import chat_completion, completion, model_manager, response, server, utils
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import DirectStreamer, ReasoningText, ToolCall, _StreamError

from hf_decoder.evaluation.batch_generation import cut_stop, end_ids
from hf_decoder.serving.batching import BatchingManager, Job, Written
from hf_decoder.serving.requests import AnyRequest, ChatRequest, CompletionRequest, parse, refusal

BUILD_SERVER = server.build_server  # transformers' own


# --------------------------------------------------------------------------------------------- one generation


class OpenAIPenalties(LogitsProcessor):
    """OpenAI's penalties on tokens written so far: logit - count x frequency - (count > 0) x presence.

    transformers' repetition_penalty multiplies instead, and counts the prompt's tokens, too.
    """

    def __init__(self, prompt: int, presence: float, frequency: float):
        self.prompt, self.presence, self.frequency = prompt, presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        written = input_ids[:, self.prompt :]
        counts = torch.zeros_like(scores).scatter_add_(1, written, torch.ones_like(written, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)


class Generation:
    """transformers' generation manager for one request. The handlers call it in place of the shared one."""

    def __init__(self, manager: Any, asked: AnyRequest | None, body: dict[str, Any]):
        self._manager, self._asked, self._body = manager, asked, body
        self.choice = 0  # of `n`
        self.finish: str | None = None  # "stop" or "length", once known
        self.text = ""
        self.logprobs: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def _prepare(self, model: Any, processor: Any, inputs: Any, config: GenerationConfig) -> dict[str, Any]:
        """Checks the prompt against the context, and completes the settings.

        Raises:
            HTTPException: 400, if prompt and answer do not fit into the context.
        """
        length = inputs["input_ids"].shape[-1]
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        wanted = config.max_new_tokens
        if length + (wanted or 1) > limit:
            raise refusal(
                f"this model's context is {limit} tokens; the prompt has {length}"
                + (f", and the answer may have {wanted}" if wanted else ""),
                param="messages" if "messages" in self._body else "prompt",
                code="context_length_exceeded",
            )
        if length == 0:
            raise refusal("prompt: empty; give at least one character", param="prompt")
        if wanted is None:
            config.max_new_tokens = int(min(1024, limit - length))
        ends = end_ids(model, processor, chat="prompt" not in self._body)
        if "eos_token_id" not in json.loads(self._body.get("generation_config") or "{}"):
            config.eos_token_id = ends or None
        if config.pad_token_id is None:
            pad = processor.pad_token_id
            config.pad_token_id = ends[0] if pad is None and ends else pad
        inputs = dict(inputs)
        asked = self._asked
        if asked is not None:
            outside = [token for token in asked.logit_bias or () if not 0 <= token < model.config.vocab_size]
            if outside:
                raise refusal(f"logit_bias: {outside[0]} is not a token of this model", param="logit_bias")
            if asked.presence_penalty or asked.frequency_penalty:
                penalties = OpenAIPenalties(length, asked.presence_penalty or 0.0, asked.frequency_penalty or 0.0)
                inputs["logits_processor"] = LogitsProcessorList([penalties])
        return inputs

    @property
    def stops(self) -> list[str]:
        return self._asked.stops if self._asked is not None else []

    def _job(self, model: Any, processor: Any, inputs: Any, config: GenerationConfig, **given: Any) -> Job:
        inputs, seed = self._prepare(model, processor, inputs, config), self._body.get("seed")
        return Job(model, processor, inputs, config, seed=None if seed is None else seed + self.choice, **given)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: GenerationConfig, request_id: str
    ) -> tuple[str, int, torch.Tensor]:
        count = None if self._asked is None else self._asked.log_count
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Written] = loop.create_future()

        def settle(what: Written | Exception) -> None:
            if future.cancelled():  # the client has left
                return
            if isinstance(what, Exception):
                future.set_exception(what)
            else:
                future.set_result(what)

        def done(what: Written | Exception) -> None:
            loop.call_soon_threadsafe(settle, what)

        job = self._job(model, processor, inputs, gen_config, done=done, needs_logits=count is not None)
        self._manager.write(job)
        ids, ended, logits = await future
        whole = processor.decode(ids, skip_special_tokens=True)
        self.text = text = cut_stop(whole, self.stops)
        self.finish = "stop" if ended or len(text) < len(whole) else "length"
        if count is not None and logits is not None:
            self.logprobs = _logprobs(processor, ids, logits, text, count, isinstance(self._asked, ChatRequest))
        return text, job.length, ids

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], Any]:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Any] = asyncio.Queue()
        tokenizer = getattr(processor, "tokenizer", processor)._tokenizer
        streamer = DirectStreamer(tokenizer, loop, queue, response_parser=response_parser)

        def done(what: Written | Exception) -> None:
            if isinstance(what, Exception):
                quoted = json.dumps(str(what))  # transformers puts the quotes around it
                loop.call_soon_threadsafe(queue.put_nowait, _StreamError(quoted[1:-1]))
                return
            if what.ended:
                self.finish = "stop"
            streamer.end()

        self._manager.write(self._job(model, processor, inputs, gen_config, done=done, streamer=streamer))
        cut: asyncio.Queue[Any] = asyncio.Queue()
        self._pump = asyncio.create_task(self._cut_stream(queue, cut))  # a task that nobody holds may be collected
        return cut, streamer

    async def _cut_stream(self, queue: asyncio.Queue[Any], cut: asyncio.Queue[Any]) -> None:
        """Passes a stream on up to a stop string. Text that may start one waits."""
        held, done = "", False
        while True:
            item = await queue.get()
            if isinstance(item, str) and not isinstance(item, ReasoningText):
                if done:
                    continue
                held += item
                text = cut_stop(held, self.stops)
                done = len(text) < len(held)
                wait = 0 if done else _start_of_stop(text, self.stops)
                text, held = text[: len(text) - wait], text[len(text) - wait :]
                if text:
                    cut.put_nowait(text)
                if done:
                    self.finish = "stop"
                continue
            if held and not done and (item is None or isinstance(item, ToolCall)):
                cut.put_nowait(held)
                held = ""
            cut.put_nowait(item)
            if item is None or isinstance(item, _StreamError):
                return


def _start_of_stop(text: str, stops: list[str]) -> int:
    """The number of characters at the end of `text` that may start a stop string."""
    longest = max(map(len, stops), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return size
    return 0


def _logprobs(tokenizer: Any, ids: torch.Tensor, logits: torch.Tensor, text: str, top: int, chat: bool) -> Any:
    """The log-probabilities of the tokens of `text`, in the form of either endpoint.

    They are the model's, before temperature and penalties. A token that is part of a character appears by its name in
    the vocabulary.
    """

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([token])
        if "\ufffd" in text:
            return {"token": tokenizer.convert_ids_to_tokens(token), "logprob": logprob, "bytes": None}
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    table = logits.log_softmax(-1)
    entries, offsets, end = [], [], 0
    for step, token in enumerate(ids.tolist()):
        if end >= len(text):
            break
        offsets.append(end)
        end = len(tokenizer.decode(ids[: step + 1], skip_special_tokens=True))
        likeliest = table[step].topk(min(top, table.shape[-1])).indices.tolist()
        entries.append([entry(one, float(table[step, one])) for one in [token, *likeliest]])
    if chat:
        return {"content": [{**chosen, "top_logprobs": others} for chosen, *others in entries], "refusal": None}
    return {
        "tokens": [chosen["token"] for chosen, *_ in entries],
        "token_logprobs": [chosen["logprob"] for chosen, *_ in entries],
        "top_logprobs": [{one["token"]: one["logprob"] for one in others} for _, *others in entries] if top else None,
        "text_offset": offsets,
    }


# --------------------------------------------------------------------------------------------------- handlers


class Managers:
    """transformers' state of generations, which gives the request its `Generation`."""

    def __init__(self, state: Any, asked: AnyRequest | None, body: dict[str, Any]):
        self._state, self._asked, self._body = state, asked, body
        self.generation: Generation | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def get_manager(self, model_id: str, use_cb: bool = False) -> Generation:
        self.generation = Generation(self._state.get_manager(model_id, use_cb=use_cb), self._asked, self._body)
        return self.generation


class Honest:
    """Mixin of transformers' handlers: it honours every parameter, or refuses it."""

    request_kind: type[AnyRequest] | None = None
    generation_state: Any
    model_manager: Any
    _unused_fields: set[str]

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        asked = None if self.request_kind is None else parse(self.request_kind, body)
        if asked is None:
            for name in sorted(self._unused_fields & {key for key, value in body.items() if value is not None}):
                raise refusal(f"{name}: not supported by this server", param=name, code="unsupported_parameter")
        handlers: list[Any] = []
        for choice in range((asked.n if asked is not None else None) or 1):
            handler: Any = copy.copy(self)  # holds the state of one request
            handler.generation_state = Managers(self.generation_state, asked, body)
            handler.choice = choice
            handlers.append(handler)
        given = {"stream": False, **{key: value for key, value in body.items() if value is not None}}
        answered: Any = super(Honest, type(self)).handle_request  # type: ignore[misc]
        found = await asyncio.gather(*(answered(handler, {**given}, request_id) for handler in handlers))
        if not isinstance(found[0], JSONResponse) or asked is None:
            return found[0]
        read = (json.loads(bytes(answer.body)) for answer in found)
        answers = [(answer, of.generation_state.generation) for answer, of in zip(read, handlers, strict=True)]
        return JSONResponse(_merge(answers))

    def _resolve_model(self, body: dict[str, Any]) -> Any:
        try:
            found = super()._resolve_model(body)  # type: ignore[misc]
        except HTTPException as error:
            raise refusal(str(error.detail), param="model", code="model_not_found", status=404) from None
        except (OSError, ValueError, AttributeError) as error:
            said = f"model {body.get('model')!r} cannot be loaded: {' '.join(str(error).split())}"
            raise refusal(said, param="model", code="model_not_found", status=404) from None
        if "messages" in body:
            _check_template(found[2], body)
        return found

    def _build_generation_config(self, body: dict[str, Any], config: GenerationConfig, use_cb: bool = False) -> Any:
        ours = {"seed", "presence_penalty", "frequency_penalty", "logit_bias"}
        built = super()._build_generation_config(  # type: ignore[misc]
            {key: value for key, value in body.items() if key not in ours}, config, use_cb=use_cb
        )
        asked = [body.get(name) for name in ("max_completion_tokens", "max_tokens", "max_output_tokens")]
        if body.get("generation_config") is None or any(asked):
            built.max_new_tokens = next(filter(None, asked), None)
        if body.get("logit_bias"):
            built.sequence_bias = {(int(token),): float(bias) for token, bias in body["logit_bias"].items()}
        if body.get("temperature") == 0:
            built.do_sample = False
        elif body.get("temperature") is not None or body.get("top_p") is not None:
            built.do_sample = True
        if not built.do_sample:
            built.temperature = built.top_p = built.top_k = built.min_p = None
        self.generation_state.generation.choice = getattr(self, "choice", 0)
        return built

    def _build_chunk_sse(self, *args: Any, **kwargs: Any) -> str:
        generation = getattr(self.generation_state, "generation", None)
        if kwargs.get("finish_reason") == "length" and generation is not None and generation.finish == "stop":
            kwargs["finish_reason"] = "stop"
        return super()._build_chunk_sse(*args, **kwargs)  # type: ignore[misc]


def _merge(answers: list[tuple[dict[str, Any], Generation]]) -> dict[str, Any]:
    """Merges answers of one choice each into one answer."""
    whole = answers[0][0]
    choices = []
    for index, (answer, generation) in enumerate(answers):
        (choice,) = answer["choices"]
        choice["index"] = index
        if choice["finish_reason"] != "tool_calls" and generation.finish:
            choice["finish_reason"] = generation.finish
        message = choice.get("message") or {}
        if not message.get("tool_calls") and not message.get("reasoning_content"):
            message["content"] = generation.text  # transformers reads its own from ids, stop strings included
        elif message.get("content"):
            message["content"] = cut_stop(message["content"], generation.stops)
        if generation.logprobs is not None:
            choice["logprobs"] = generation.logprobs
        choices.append(choice)
    usage = whole["usage"]
    usage["completion_tokens"] = sum(answer["usage"]["completion_tokens"] for answer, _ in answers)
    usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    return {**whole, "choices": choices, "usage": usage}


def _check_template(processor: Any, body: dict[str, Any]) -> None:
    """Raises HTTPException for messages, tools or template arguments that the chat template would drop."""
    template = processor.chat_template
    if not template:
        raise refusal("messages: this model has no chat template; use /v1/completions", param="messages")
    text = template if isinstance(template, str) else json.dumps(template)
    for name in (["tools"] if body.get("tools") else []) + list(body.get("chat_template_kwargs") or {}):
        if not re.search(rf"\b{re.escape(name)}\b", text):
            param = name if name == "tools" else "chat_template_kwargs"
            raise refusal(f"{name}: the model's chat template does not use it", param=param)
    try:
        shown = processor.apply_chat_template(body["messages"], tools=body.get("tools"), tokenize=False)
    except Exception as error:  # a template may raise anything
        raise refusal(f"messages: the chat template refuses them: {error}", param="messages") from None
    for number, message in enumerate(body["messages"]):
        content = message.get("content")
        if isinstance(content, str) and content.strip() not in shown:
            raise refusal(f"messages[{number}]: the chat template drops it", param="messages")


class ChatHandler(Honest, ChatCompletionHandler):
    request_kind = ChatRequest


class TextHandler(Honest, CompletionHandler):
    request_kind = CompletionRequest


class ResponsesHandler(Honest, ResponseHandler):
    pass


def build_server(*args: Any, **kwargs: Any) -> FastAPI:
    """transformers' application with all errors in OpenAI's form."""
    app = BUILD_SERVER(*args, **kwargs)

    async def answer(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, StarletteHTTPException):
            is_ours = isinstance(error.detail, dict)
            found = error if is_ours else refusal(str(error.detail), status=error.status_code)
        elif isinstance(error, RequestValidationError):
            found = refusal("the body is not a JSON object")
        else:
            found = refusal(f"{type(error).__name__}: {' '.join(str(error).split())}", status=500)
        return JSONResponse({"error": found.detail}, status_code=found.status_code)

    for kind in (StarletteHTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, answer)
    return app


def install(manager: type[ModelManager]) -> None:
    """Replaces the classes of `transformers serve` by ours and by `manager`."""
    chat_completion.ChatCompletionHandler = ChatHandler  # type: ignore[misc]
    completion.CompletionHandler = TextHandler  # type: ignore[misc]
    response.ResponseHandler = ResponsesHandler  # type: ignore[misc]
    model_manager.ModelManager = manager  # type: ignore[misc]
    utils.GenerateManager = BatchingManager  # type: ignore[misc]
    server.build_server = build_server
