"""Writes the Modelfile with which Ollama runs a GGUF file: chat template, stop tokens and settings of the draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from hf_decoder.safety.limits import bound_templates

# ChatML as a template of Go: what the Jinja template of this package's tokenizers renders for messages of text.
CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
# Setting of generate(): Ollama's name for it, and the value that generate() takes where none is given. Ollama would
# take another: 0.8, 0.9, 40 and 1.1.
PARAMETERS: dict[str, tuple[str, float]] = {
    "temperature": ("temperature", 1.0),
    "top_p": ("top_p", 1.0),
    "top_k": ("top_k", 50),
    "min_p": ("min_p", 0.0),
    "repetition_penalty": ("repeat_penalty", 1.0),
}
END_OF_TURN = "<|im_end|>"


def modelfile(gguf_name: str, folder: Path, context_length: int) -> str:
    """The text of the Modelfile for `gguf_name`, which was made from the model and tokenizer in `folder`.

    A chat template that is not ChatML has no counterpart in it; a comment says so.

    Raises:
        ValueError: if a setting in generation_config.json is not a number.
    """
    bound_templates()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = GenerationConfig()
    if (folder / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(folder)
    lines = [f"FROM ./{gguf_name}"]
    is_chatml = bool(tokenizer.chat_template) and _renders_chatml(tokenizer)
    if is_chatml:
        lines.append(f'TEMPLATE """{CHATML}"""')
    elif tokenizer.chat_template:
        lines.append("# The chat template is not ChatML; Ollama looks for a known one in the GGUF file.")
    for text in _stops(tokenizer, config, is_chatml):
        if '"' in text or not text.isprintable():
            lines.append(f"# A Modelfile cannot hold the stop token {text!a}.")
        else:
            lines.append(f'PARAMETER stop "{text}"')
    for name, (ollama_name, default) in PARAMETERS.items():
        value = getattr(config, name)
        value = default if value is None else value
        if name == "temperature" and not config.do_sample:
            value = 0.0  # generate() then takes the likeliest token; Ollama draws unless the temperature is 0
        if not isinstance(value, int | float):  # of a stranger, whose text would be read as instructions
            raise ValueError(f"{name} in generation_config.json of {folder} is {value!r}, not a number")
        lines.append(f"PARAMETER {ollama_name} {value}")
    lines.append("PARAMETER repeat_last_n -1")  # generate() penalizes what occurs anywhere in the text
    return "\n".join([*lines, f"PARAMETER num_ctx {context_length}", ""])


def _renders_chatml(tokenizer: Any) -> bool:
    """Whether the chat template gives ChatML, with a system message and without one."""
    turns = [{"role": role, "content": f"said by {role}"} for role in ("system", "user", "assistant", "user")]
    for chat in (turns, turns[1:]):
        expected = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in chat)
        try:
            rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except Exception:  # a template raises what it likes
            return False
        if rendered != f"{expected}<|im_start|>assistant\n":
            return False
    return True


def _stops(tokenizer: Any, config: GenerationConfig, is_chatml: bool) -> list[str]:
    """The texts of the tokens that end an answer."""
    ends = config.eos_token_id
    ids = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    texts = [tokenizer.convert_ids_to_tokens(one) for one in ids if one is not None]
    return list(dict.fromkeys(filter(None, [*texts, END_OF_TURN if is_chatml else None])))
