"""A real openai client has a served folder call a tool."""

import json

import pytest
import torch
from small_folder import write_folder
from test_server import serving

from hf_decoder import HfDecoderForCausalLM

pytestmark = pytest.mark.peers

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
CALL = {"name": "add", "arguments": {"a": 2, "b": 3}}
MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model that has learned one call by heart; nothing else makes it write one."""
    found = write_folder(tmp_path_factory.mktemp("tools") / "model", tokenizer, max_position_embeddings=1024)
    model = HfDecoderForCausalLM.from_pretrained(found)
    answer = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]}
    inputs = tokenizer.apply_chat_template(
        [*MESSAGES, answer],
        tools=[TOOL],
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    ids = inputs["input_ids"]
    labels = ids.masked_fill(torch.as_tensor(inputs["assistant_masks"]) == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = model.train()(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05
    model.save_pretrained(found)
    return found


def test_a_tool_is_called_with_arguments_in_json(folder, tmp_path):
    asked = {"model": str(folder), "messages": MESSAGES, "temperature": 0.0, "max_tokens": 200}
    with serving(folder, tmp_path / "log") as client:
        (choice,) = client.chat.completions.create(**asked, tools=[TOOL]).choices
        (call,) = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls" and not choice.message.content
        assert call.function.name == CALL["name"] and json.loads(call.function.arguments) == CALL["arguments"]
        result = {"role": "tool", "tool_call_id": call.id, "content": "5"}
        said = {"role": "assistant", "tool_calls": [call.model_dump()]}
        again = client.chat.completions.create(**asked | {"messages": [*MESSAGES, said, result]}, tools=[TOOL])
        assert again.choices[0].message is not None
