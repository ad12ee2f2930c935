"""The chat template against the text that Hermes' parsers read, what TRL asks of templates, and a way back."""

import json
import re
from pathlib import Path

import pytest

from hf_decoder.data.conversations import Rendering
from hf_decoder.data.tokenization import train_tokenizer

trl = pytest.importorskip("trl")
CALLS = [
    {"type": "function", "function": {"name": "warm", "arguments": {"in": "Rome é", "days": [1, 2]}}},
    {"type": "function", "function": {"name": "clock", "arguments": '{"zone": "CET"}'}},
]
TOOLS = [{"type": "function", "function": {"name": "warm", "parameters": {"type": "object", "properties": {}}}}]
CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "Rome?"},
    {"role": "assistant", "content": "Let me see.", "reasoning_content": "two tools", "tool_calls": CALLS},
    {"role": "tool", "content": "21"},
    {"role": "tool", "content": "noon"},
    {"role": "assistant", "content": "21 degrees at noon"},
]
SAID = """<think>
two tools
</think>

Let me see.
<tool_call>
{"name": "warm", "arguments": {"in": "Rome é", "days": [1, 2]}}
</tool_call>
<tool_call>
{"name": "clock", "arguments": {"zone": "CET"}}
</tool_call><|im_end|>"""
# what vLLM's parser of this name looks for
HERMES = re.compile(r"<tool_call>(.*?)</tool_call>|<tool_call>(.*)", re.DOTALL)


@pytest.fixture(scope="module")
def chatty():
    return train_tokenizer(["the end of the text"] * 4, vocab_size=280)


def render(tokenizer, turns, **options):
    return tokenizer.apply_chat_template(turns, tokenize=False, **options)


def test_turns_are_rendered_as_hermes_reads_them(chatty):
    head, _, rest = render(chatty, CHAT, tools=TOOLS).partition("<|im_end|>\n")
    assert head.startswith("<|im_start|>system\nbe kind\n\n")
    assert f"<tools>\n{json.dumps(TOOLS[0])}\n</tools>" in head and "<tool_call>\n{" in head
    results = "".join(
        f"<|im_start|>tool\n<tool_response>\n{text}\n</tool_response><|im_end|>\n" for text in ("21", "noon")
    )
    answer = "<|im_start|>assistant\n21 degrees at noon<|im_end|>\n"
    assert rest == f"<|im_start|>user\nRome?<|im_end|>\n<|im_start|>assistant\n{SAID}\n{results}{answer}"


def test_assistants_turns_are_those_of_another_template_of_this_form(chatty):
    """Qwen's, as TRL holds it: the same calls, reasoning and answer, and no system turn but the one that is given."""
    other = (Path(trl.__file__).parent / "chat_templates" / "qwen3_training.jinja").read_text()
    for turns in (CHAT, [*CHAT[:2], {**CHAT[2], "content": ""}]):
        ours, theirs = (
            [part.split("<|im_end|>")[0] for part in text.split("<|im_start|>assistant\n")[1:]]
            for text in (render(chatty, turns, tools=TOOLS), render(chatty, turns, tools=TOOLS, chat_template=other))
        )
        assert ours[0] == theirs[0]
        assert ours[1:] == [text.removeprefix("<think>\n\n</think>\n\n") for text in theirs[1:]]


def test_a_chat_without_tools_is_plain_chatml(chatty):
    turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in (CHAT[0], CHAT[1], CHAT[5])]
    expected = "".join(
        f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in (CHAT[0], CHAT[1], CHAT[5])
    )
    assert render(chatty, turns) == render(chatty, [CHAT[0], CHAT[1], CHAT[5]]) == expected
    assert render(chatty, CHAT[1:2], add_generation_prompt=True).endswith("Rome?<|im_end|>\n<|im_start|>assistant\n")


def test_an_answer_is_read_back(chatty):
    prompt = render(chatty, CHAT[:2], tools=TOOLS, add_generation_prompt=True)
    text = render(chatty, CHAT[:3], tools=TOOLS)
    assert text == f"{prompt}{SAID}\n"
    found = [json.loads(one or other) for one, other in HERMES.findall(SAID)]
    assert [call["name"] for call in found] == ["warm", "clock"]
    assert [call["arguments"] for call in found] == [CALLS[0]["function"]["arguments"], {"zone": "CET"}]
    parsed = chatty.parse_response(SAID, prefix=prompt)
    assert (parsed["reasoning_content"], parsed["content"]) == ("two tools", "Let me see.")
    assert [call["function"] for call in parsed["tool_calls"]] == found
    assert render(chatty, [*CHAT[:2], parsed], tools=TOOLS) == text
    assert chatty.parse_response("21<|im_end|>", prefix=prompt) == {"role": "assistant", "content": "21"}


def test_the_marks_are_on_what_the_model_writes(chatty):
    encoded = chatty.apply_chat_template(CHAT, tools=TOOLS, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    assert chatty.decode([token for token, marked in pairs if marked]) == f"{SAID}21 degrees at noon<|im_end|>"


def test_trl_takes_the_template_as_it_is(chatty):
    from trl.chat_template_utils import (
        get_training_chat_template,
        is_chat_template_prefix_preserving,
        is_chat_template_stop_token_trained,
        supports_tool_calling,
    )

    assert supports_tool_calling(chatty) and is_chat_template_prefix_preserving(chatty)
    assert is_chat_template_stop_token_trained(chatty) and get_training_chat_template(chatty) is None
    rendering = Rendering(chatty)
    assert rendering.fault(CHAT, TOOLS, {}) is None and not rendering.unused
    for end in range(2, len(CHAT) + 1):
        assert render(chatty, CHAT, tools=TOOLS).startswith(render(chatty, CHAT[:end], tools=TOOLS))
