"""Converts conversations from the forms of public data sets to the messages that chat templates take.

A turn is a mapping with `role` and `content` (OpenAI, TRL) or with `from` and `value` (ShareGPT, LLaMA-Factory,
axolotl). It may have `tool_calls`. An assistant's turn of `weight` 0 is not learned. A conversation may be JSON text.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

Turn = dict[str, Any]

# roles of ShareGPT and similar formats -> roles of chat templates
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
}
# Keys that say whether a turn is learned: of OpenAI and Mistral, of axolotl, and of ms-swift.
WEIGHTS = ("weight", "train", "training", "loss")
HALF = re.compile("[\ud800-\udfff]")  # of a pair of surrogates


class Unusable(str):
    """Replaces a value that cannot be used; its text says why."""


def read_turns(value: Any) -> Any:
    """Reads the messages in `value`; returns it unchanged if it is no conversation.

    A single turn is a conversation too. Keys without a value are dropped, because tables add them.
    """
    if isinstance(value, str) and value.lstrip().startswith("[") and ("role" in value or "from" in value):
        parsed = parse(value)
        # An answer may be JSON itself; only a list of turns with the roles of a chat is a conversation.
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
    """Parses JSON or a Python literal; None for any other text."""
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
        calls = [None] if calls is None else calls  # `turns_fault` reports it
    if calls is not None:
        found["tool_calls"] = calls if isinstance(calls, list) else [calls]
    if isinstance(calls := found.get("tool_calls"), list):
        found["tool_calls"] = [_read_call(call) for call in calls]
    read = {} if role is None else {"role": ROLES.get(role, role) if isinstance(role, str) else role}
    # Only a turn that calls a tool may have no content.
    if content is not None or "tool_calls" in found or {"content", "value"} & turn.keys():
        read["content"] = content
    return {**read, **found}


def join_parts(content: Any) -> Any:
    """Joins the parts of a content if all of them are text; returns any other content unchanged."""
    if not isinstance(content, list) or not content:
        return content
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    return "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else content


def _read_call(call: Any) -> Any:
    """Converts a call to what templates take: a function's name, and its arguments as a mapping."""
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
    """Reads tool schemas as templates take them; None if there are none; text that is no JSON is `Unusable`."""
    if isinstance(value, str) and value.strip() and (value := parse(text := value)) is None:
        return Unusable(f"its tools are no JSON: {text[:40]!r}")
    tools = [value] if isinstance(value, Mapping) else value or []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        return Unusable("its tools are no list of descriptions")
    return [tool if "name" not in tool else {"type": "function", "function": tool} for tool in tools] or None


def turns_fault(role: str, turns: Sequence[Any]) -> str | None:
    """Why the conversation of this role cannot be rendered or learned from, or None."""
    if not all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in turns):
        return f"{role} has a turn without role or content"
    for turn in turns:
        content, calls = turn["content"], turn.get("tool_calls")
        if isinstance(content, list) and content:
            kinds = {str(part.get("type", "part")) if isinstance(part, Mapping) else "part" for part in content}
            return f"{role} has a turn whose content is not text ({', '.join(sorted(kinds - {'text'}) or ['part'])})"
        if not isinstance(content, str | list | None):
            return f"{role} has a turn whose content is not text"
        if isinstance(content, str) and (fault := text_fault(role, content)):
            return fault
        if calls is not None and not all(_is_call(call) for call in calls):
            return f"{role} has a tool call without name or arguments"
        if any(key in turn and turn[key] not in (0, 1) for key in WEIGHTS):
            return f"{role} has a turn whose weight is neither 0 nor 1"
    return None


def text_fault(role: str, text: str) -> str | None:
    """Why no tokenizer takes a text, or None. JSON can hold half of an emoji."""
    return f"{role} holds half a character" if HALF.search(text) else None


def _is_call(call: Any) -> bool:
    return isinstance(call, Mapping) and isinstance(call["function"].get("name"), str)


def says_something(turn: Mapping[str, Any]) -> bool:
    """Whether a turn has text or calls a tool."""
    content = turn["content"]
    return bool(turn.get("tool_calls")) or (isinstance(content, str) and bool(content.strip()))


def is_learned(turn: Mapping[str, Any]) -> bool:
    """Whether an assistant's turn counts in the loss."""
    return all(turn.get(key, 1) for key in WEIGHTS)


def without_weights(turns: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """The turns without the keys that only we read."""
    return [{key: value for key, value in turn.items() if key not in WEIGHTS} for turn in turns]


def first_answer(turns: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The first turn of a conversation in which the assistant says something or calls a tool, or None."""
    return next((turn for turn in turns if turn["role"] == "assistant" and says_something(turn)), None)


def without_last_answer(turns: Sequence[Turn]) -> list[Turn]:
    """The turns without those of the assistant at the end."""
    end = next((at for at in range(len(turns), 0, -1) if turns[at - 1]["role"] != "assistant"), 0)
    return list(turns[:end])


def start_in_common(one: Sequence[Turn], other: Sequence[Turn]) -> int:
    """How many turns at the start of two conversations are equal."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def system_apart(turns: list[Turn]) -> tuple[list[Turn], list[Turn]]:
    """The system's turns at the beginning, and the other turns."""
    at = next((at for at, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
    return turns[:at], turns[at:]


class Rendering:
    """Renders conversations with a chat template to find out what it leaves out.

    `unused`: key of turns that the template does not read -> number of conversations with it.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.unused: dict[str, int] = {}
        self._held: set[str] = set()  # roles whose content changed the result

    def fault(
        self, turns: Sequence[Turn], tools: Any, options: Mapping[str, Any], *, prompt: bool = False
    ) -> str | None:
        """Why the template does not render all of these turns, or None; `prompt`: the assistant answers next."""

        def render(turns: Sequence[Turn], tools: Any) -> str:
            return self.tokenizer.apply_chat_template(
                turns, tools=tools, tokenize=False, add_generation_prompt=prompt, **options
            )

        def differs(turns: Sequence[Turn], tools: Any) -> bool:
            """Whether these turns give another result, or an error."""
            try:
                return render(turns, tools) != text
            except Exception:  # as below
                return True

        turns = without_weights(turns)
        try:
            text = render(turns, tools)
        except Exception as error:  # a template is a stranger's program, so any error of jinja2 or Python
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
    """Encodes conversations as `input_ids` and `labels`, which are -100 in the assistant's turns of weight 0.

    With `assistant_only` they are -100 outside the assistant's turns too.

    Raises:
        ValueError: if the template does not tell which tokens belong to which turn.
    """
    import trl
    from datasets import Dataset

    from hf_decoder.data.packing import IGNORE_INDEX

    template = trl.get_training_chat_template(tokenizer)  # None: the tokenizer's own marks the assistant's tokens
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
        answer = np.cumsum(said & ~np.roll(said, 1))  # per token, the number of the last assistant's turn begun
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
