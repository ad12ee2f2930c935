"""Converts conversations from the forms of public data sets to the messages that chat templates take.

A turn is a mapping of `role` and `content` (OpenAI, TRL) or of `from` and `value` (ShareGPT, LLaMA-Factory, axolotl).
It may have `tool_calls`, and a `weight` of 0 where nothing of an assistant's turn is to be learned. A conversation may
stand as JSON text in its column.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

Turn = dict[str, Any]

# names of ShareGPT and its followers -> roles of chat templates
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
}
# Under these names a turn says whether it is learned: OpenAI and Mistral, axolotl.
WEIGHTS = ("weight", "train", "training")


class Unusable(str):
    """Stands in a row for a value that cannot be used, and says why."""


def read_turns(value: Any) -> Any:
    """The messages that `value` stands for; what is no conversation comes back as it is.

    One turn alone is a conversation, too. Keys without a value are left out: tables fill them in.
    """
    if isinstance(value, str) and value.lstrip().startswith("[") and ("role" in value or "from" in value):
        parsed = parse(value)
        # An answer may be JSON itself; only what has the roles of a chat is one.
        is_chat = isinstance(parsed, list) and parsed and all(map(_is_turn, parsed))
        value = (
            parsed
            if is_chat and all(_role_of(turn) in (*ROLES, *ROLES.values(), "system") for turn in parsed)
            else value
        )
    if _is_turn(value):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        return value
    return [_read_turn(turn) for turn in value]


def parse(text: str) -> Any:
    """What JSON, or the same written by Python, stands for; None for any other text."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return None


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and bool({"role", "from"} & value.keys())


def _role_of(turn: Mapping[str, Any]) -> Any:
    return turn["role"] if turn.get("role") is not None else turn.get("from")


def _read_turn(turn: Mapping[str, Any]) -> Turn:
    found = {key: value for key, value in turn.items() if value not in (None, [], {})}
    role = _role_of(found)
    found = {key: value for key, value in found.items() if key not in ("role", "from")}
    known = {key: found.pop(key) for key in ("content", "value") if key in found}
    content = join_parts(known.get("content", known.get("value")))
    calls = found.pop("function_call", None)
    if role == "function_call":
        calls, content = parse(content) if isinstance(content, str) else content, None
        calls = [None] if calls is None else calls  # no call, and said to be none by `turns_fault`
    if calls is not None:
        found["tool_calls"] = calls if isinstance(calls, list) else [calls]
    if isinstance(calls := found.get("tool_calls"), list):
        found["tool_calls"] = [_read_call(call) for call in calls]
    read = {} if role is None else {"role": ROLES.get(role, role) if isinstance(role, str) else role}
    # Only a turn that calls a tool may say nothing else.
    if content is not None or "tool_calls" in found or {"content", "value"} & turn.keys():
        read["content"] = content
    return {**read, **found}


def join_parts(content: Any) -> Any:
    """Parts of a content as one text, where all of them are text; any other content as it is."""
    if not isinstance(content, list) or not content:
        return content
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    return "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else content


def _read_call(call: Any) -> Any:
    """A call as templates take it: a function's name, and its arguments as a mapping."""
    if not isinstance(call, Mapping):
        return call
    inner = call.get("function")
    function = inner if isinstance(inner, Mapping) else call
    arguments = function.get("arguments")
    if isinstance(arguments, str) and isinstance(read := parse(arguments), Mapping):
        arguments = read
    wrapped = {key: value for key, value in call.items() if function is not call and value is not None}
    return {"type": "function", **wrapped, "function": {**function, "arguments": arguments}}


def read_tools(value: Any) -> Any:
    """Tool schemas as templates take them, or None where there are none; text that is no JSON is `Unusable`."""
    if isinstance(value, str) and value.strip() and (value := parse(text := value)) is None:
        return Unusable(f"its tools are no JSON: {text[:40]!r}")
    tools = [value] if isinstance(value, Mapping) else value or []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        return Unusable("its tools are no list of descriptions")
    return [tool if "name" not in tool else {"type": "function", "function": tool} for tool in tools] or None


def turns_fault(role: str, turns: Sequence[Any]) -> str | None:
    """Why a conversation in the column of this role cannot be rendered or learned from, or None."""
    if not all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in turns):
        return f"{role} has a turn without role or content"
    for turn in turns:
        content, calls = turn["content"], turn.get("tool_calls")
        if isinstance(content, list) and content:
            kinds = {str(part.get("type", "part")) if isinstance(part, Mapping) else "part" for part in content}
            return f"{role} has a turn whose content is not text ({', '.join(sorted(kinds - {'text'}) or ['part'])})"
        if not isinstance(content, str | list | None):
            return f"{role} has a turn whose content is not text"
        if calls is not None and not all(_is_call(call) for call in calls):
            return f"{role} has a tool call without name or arguments"
        if any(key in turn and turn[key] not in (0, 1) for key in WEIGHTS):
            return f"{role} has a turn whose weight is neither 0 nor 1"
    return None


def _is_call(call: Any) -> bool:
    return isinstance(call, Mapping) and isinstance(call["function"].get("name"), str)


def says_something(turn: Mapping[str, Any]) -> bool:
    """Whether a turn has text, or calls a tool."""
    content = turn["content"]
    return bool(turn.get("tool_calls")) or (isinstance(content, str) and bool(content.strip()))


def is_learned(turn: Mapping[str, Any]) -> bool:
    """Whether the loss is on this turn, if it is the assistant's."""
    return all(turn.get(key, 1) for key in WEIGHTS)


def without_weights(turns: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """The turns as a chat template takes them."""
    return [{key: value for key, value in turn.items() if key not in WEIGHTS} for turn in turns]


def start_in_common(one: Sequence[Turn], other: Sequence[Turn]) -> int:
    """How many turns two conversations begin with that are the same."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


class Rendering:
    """What a chat template makes of conversations, and what of them it leaves out.

    `unused` counts the keys of turns that it does not read, by conversations.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.unused: dict[str, int] = {}
        self._held: set[str] = set()  # roles whose content was seen to make a difference

    def fault(
        self, turns: Sequence[Turn], tools: Any, options: Mapping[str, Any], *, prompt: bool = False
    ) -> str | None:
        """Why the template does not render all that these turns say, or None; `prompt`: the assistant answers next."""

        def render(turns: Sequence[Turn], tools: Any) -> str:
            return self.tokenizer.apply_chat_template(
                turns, tools=tools, tokenize=False, add_generation_prompt=prompt, **options
            )

        def differs(turns: Sequence[Turn], tools: Any) -> bool:
            """Whether something else is rendered, or nothing at all."""
            try:
                return render(turns, tools) != text
            except Exception:  # as below
                return True

        turns = without_weights(turns)
        try:
            text = render(turns, tools)
        except Exception as error:  # templates are programs of strangers: jinja2's errors, and any of Python
            return f"the chat template refuses it: {' '.join(str(error).split())[:100] or type(error).__name__}"
        if tools and not differs(turns, None):
            return "the chat template does not hold tools"
        for role in {turn["role"] for turn in turns if turn["content"]} - self._held:
            more = [
                {**turn, "content": turn["content"] + " x"} if turn["role"] == role and turn["content"] else turn
                for turn in turns
            ]
            if not differs(more, tools):
                return f"the chat template does not hold turns of role {role!r}"
            self._held.add(role)
        for key in sorted({key for turn in turns for key in turn} - {"role", "content"}):
            less = [{name: value for name, value in turn.items() if name != key} for turn in turns]
            if differs(less, tools):
                continue
            if key == "tool_calls":
                return "the chat template does not hold tool calls"
            self.unused[key] = self.unused.get(key, 0) + 1
        return None

    def row_fault(self, row: Mapping[str, Any]) -> str | None:
        """Why the template does not render all of a row of `records`, or None."""
        tools, options = row.get("tools"), row.get("chat_template_kwargs") or {}
        prompt = row.get("prompt")
        if isinstance(prompt, list) and (fault := self.fault(prompt, tools, options, prompt=True)):
            return fault
        for role in ("messages", "completion", "chosen", "rejected"):
            if isinstance(row.get(role), list):
                if not all(map(is_learned, row[role])) and role != "messages":
                    return f"a turn of {role} has weight 0"
                if fault := self.fault([*(prompt or []), *row[role]], tools, options):
                    return fault
        return None


def weighted_rows(rows: Sequence[Mapping[str, Any]], tokenizer: Any, *, assistant_only: bool) -> Dataset:
    """Conversations as `input_ids` and `labels`, which are -100 in the assistant's turns of weight 0.

    `assistant_only` says that they are -100 outside the assistant's turns, too.

    Raises:
        ValueError: if the template does not tell which tokens are of which turn.
    """
    import trl
    from datasets import Dataset

    from hf_decoder.data.packing import IGNORE_INDEX

    template = trl.get_training_chat_template(tokenizer)  # None: its own tells the assistant's tokens
    encoded: list[dict[str, list[int]]] = []
    for row in rows:
        out = tokenizer.apply_chat_template(
            without_weights(row["messages"]),
            tools=row.get("tools"),
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **(row.get("chat_template_kwargs") or {}),
        )
        said = np.array(out["assistant_masks"]) == 1
        answer = np.cumsum(said & ~np.roll(said, 1))  # the number of the turn that each token is of, or comes after
        learned = np.array([True, *(is_learned(turn) for turn in row["messages"] if turn["role"] == "assistant")])
        if answer[-1] != len(learned) - 1:
            raise ValueError(
                "the chat template does not tell the tokens of one assistant's turn from another's, so turns of "
                "weight 0 cannot be left out of the loss; leave out their rows"
            )
        kept = np.where(said, learned[answer], not assistant_only)
        labels = np.where(kept, out["input_ids"], IGNORE_INDEX).tolist()
        encoded.append({"input_ids": out["input_ids"], "labels": labels})
    return Dataset.from_list(encoded)
