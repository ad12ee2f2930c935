"""Defines the parameters of a request, and the values that the server honours."""

from __future__ import annotations

import json
from typing import Any, Literal, TypeVar

from fastapi import HTTPException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers import GenerationConfig

MOST_CHOICES, MOST_STOPS, MOST_SEED = 128, 16, 2**63 - 1
# Fields of a message that the chat template gets.
MESSAGE_FIELDS = {"role", "content", "tool_calls", "tool_call_id"}


def refusal(message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> HTTPException:
    """An error in the form of OpenAI's clients."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    detail = {"message": message, "type": kind, "param": param, "code": code}
    return HTTPException(status, detail=detail)


class StreamOptions(BaseModel):
    """Options of a stream. Its last piece holds the usage, whatever `include_usage` says."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool | None = None


class AnyRequest(BaseModel):
    """The parameters of both kinds of completion. A Literal lists values that change nothing."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-MOST_SEED, le=MOST_SEED)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[int, float] | None = None
    user: str | None = None  # changes no answer
    generation_config: str | None = None

    @model_validator(mode="after")
    def check(self) -> AnyRequest:
        stops = self.stops
        if not all(stops) or len(stops) > MOST_STOPS:
            raise ValueError(f"stop: give at most {MOST_STOPS} strings, none of them empty")
        if self.stream:
            for name, is_asked in (("n", (self.n or 1) > 1), ("logprobs", self.log_count is not None)):
                if is_asked:
                    raise ValueError(f"{name}: not in a stream; ask with stream=false")
        elif self.stream_options is not None:
            raise ValueError("stream_options: only with stream=true")
        if self.generation_config is not None:
            _check_generation_config(self.generation_config)
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def log_count(self) -> int | None:
        """The number of likeliest tokens to list beside the chosen one; None for no log-probabilities."""
        return None


class ChatRequest(AnyRequest):
    """The parameters of a chat completion."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    modalities: list[Literal["text"]] | None = None
    metadata: dict[str, str] | None = None  # changes no answer
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def check_chat(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens: differs from max_completion_tokens; give one of them")
        for number, message in enumerate(self.messages):
            _check_message(f"messages[{number}]", message)
        return self

    @property
    def log_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(AnyRequest):
    """The parameters of a text completion."""

    prompt: str = ""
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def check_completion(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of: this server returns all that it writes; give only n")
        return self

    @property
    def log_count(self) -> int | None:
        return self.logprobs


def _check_message(where: str, message: dict[str, Any]) -> None:
    given = {name for name, value in message.items() if value not in (None, [], {})}
    unknown = given - MESSAGE_FIELDS - ({"name"} if message.get("role") == "tool" else set())
    if unknown:
        raise ValueError(f"{where}.{min(unknown)}: the model would not see it")
    if not isinstance(message.get("role"), str):
        raise ValueError(f"{where}.role: missing")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise ValueError(f"{where}.content: this model reads only text parts")
    elif not (isinstance(content, str) or (content is None and message.get("tool_calls"))):
        raise ValueError(f"{where}.content: neither text nor a list of text parts")


def _check_generation_config(text: str) -> None:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"generation_config: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError("generation_config: not a JSON object")
    unknown = values.keys() - GenerationConfig().to_dict().keys()
    if unknown:
        raise ValueError(f"generation_config: {min(unknown)!r} is not a setting of generate()")


Asked = TypeVar("Asked", bound=AnyRequest)


def parse(kind: type[Asked], body: dict[str, Any]) -> Asked:
    """Parses the request in `body`.

    Raises:
        HTTPException: 400, naming the first parameter that is unknown, malformed, or not honoured here.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        name = str(first["loc"][0]) if first["loc"] else message.partition(":")[0]
        if first["type"] == "extra_forbidden":
            message = "unknown to this server"
        elif first["type"] == "literal_error":
            message = f"this server takes only {first['ctx']['expected']} (or leave it out)"
        if first["loc"]:
            message = f"{'.'.join(map(str, first['loc']))}: {message}"
        raise refusal(message, param=name, code="unsupported_parameter") from None
