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
# Settings of generate() and Ollama's names for them.
PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
END_OF_TURN = "<|im_end|>"


def modelfile(gguf_name: str, folder: Path, context_length: int) -> str:
    """The text of the Modelfile for `gguf_name`, which was made from the model and tokenizer in `folder`.

    A chat template that is not ChatML has no counterpart in it; a comment says so.
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
    lines += [f"PARAMETER stop {_quoted(text)}" for text in _stops(tokenizer, config, is_chatml)]
    # Without do_sample, transformers takes the likeliest token, and Ollama draws unless the temperature is 0.
    given = {name: getattr(config, name) for name in PARAMETERS}
    if not config.do_sample:
        given = {"temperature": 0.0, "repetition_penalty": config.repetition_penalty}
    lines += [f"PARAMETER {PARAMETERS[name]} {value}" for name, value in given.items() if value is not None]
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
    found = dict.fromkeys(filter(None, [*texts, END_OF_TURN if is_chatml else None]))
    return [text for text in found if '"""' not in text]


def _quoted(text: str) -> str:
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'
