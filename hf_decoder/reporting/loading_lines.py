"""Builds lines of Python that load and use a model, classifier or adapter, for cards and the end of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_decoder.data.label_names import read_label_names
from hf_decoder.reporting.markup import quoted

Prompt = str | Sequence[Mapping[str, Any]]  # text, or the messages of a chat

CLASSIFIERS = ("classification", "reward")  # tasks whose model writes no text
DEFAULT_PROMPT = "Once upon a time"


def neutral(prompt: Prompt | None) -> Prompt:
    """A neutral prompt of the same kind as `prompt`. A card shows no row of anyone's data."""
    return DEFAULT_PROMPT if prompt is None or isinstance(prompt, str) else [{"role": "user", "content": "Hello!"}]


def load_lines(folder: str, prompt: Prompt = DEFAULT_PROMPT, *, trust: bool = True) -> str:
    """Three lines of Python that load the model of `folder`, and continue `prompt` or answer its messages.

    `trust` says that the class is not part of transformers.
    """
    code = ", trust_remote_code=True" if trust else ""
    answer = "" if isinstance(prompt, str) else '[-1]["content"]'
    return "\n".join(
        [
            "from transformers import pipeline",
            f'generate = pipeline("text-generation", model={quoted(folder)}{code})',
            f'print(generate({_literal(prompt)}, max_new_tokens=64)[0]["generated_text"]{answer})',
        ]
    )


def classifier_load_lines(folder: str, text: str, *, scores: bool = False) -> str:
    """Three lines of Python that load the classifier of `folder` and classify `text`.

    `scores`: it is a reward model, whose number stays as it is.
    """
    as_it_is = ', function_to_apply="none"' if scores else ""
    return "\n".join(
        [
            "from transformers import pipeline",
            f'classify = pipeline("text-classification", model={quoted(folder)}, trust_remote_code=True)',
            f"print(classify({_literal(text)}{as_it_is}))",
        ]
    )


def _literal(prompt: Prompt) -> str:
    return json.dumps(prompt, ensure_ascii=False)


def adapter_load_lines(
    folder: str, task: str, id2label: Mapping[int, str] | None = None, prompt: Prompt = DEFAULT_PROMPT
) -> str:
    """Lines of Python that load and use an adapter, its base, and the tokenizer beside it.

    `id2label` names the classes of a classifier, which the base does not know.
    """
    head = "SequenceClassification" if task in CLASSIFIERS else "CausalLM"
    name = quoted(folder)
    labels = []
    if id2label is not None:
        pairs = [(index, json.dumps(label, ensure_ascii=False)) for index, label in id2label.items()]
        labels = [
            f"id2label = {{{', '.join(f'{index}: {label}' for index, label in pairs)}}}",
            f"label2id = {{{', '.join(f'{label}: {index}' for index, label in pairs)}}}",
        ]
    names = ", id2label=id2label, label2id=label2id" if labels else ""
    if isinstance(prompt, str):
        inputs = f'tokenizer({_literal(prompt)}, return_tensors="pt")'
    else:
        inputs = f'tokenizer.apply_chat_template({_literal(prompt)}, add_generation_prompt=True, return_tensors="pt", return_dict=True)'  # noqa: E501
    if task == "reward":
        use = f"print(float(model(**{inputs}).logits))"
    elif task == "classification":
        use = f"print(model.config.id2label[int(model(**{inputs}).logits.argmax())])"
    else:
        use = f"print(tokenizer.decode(model.generate(**{inputs}, max_new_tokens=64)[0]))"
    return "\n".join(
        [
            f"from peft import AutoPeftModelFor{head}",
            "from transformers import AutoTokenizer",
            *labels,
            f"model = AutoPeftModelFor{head}.from_pretrained({name}, trust_remote_code=True{names})",
            f"tokenizer = AutoTokenizer.from_pretrained({name})",
            use,
        ]
    )


def finetuned_load_lines(folder: str, task: str, prompt: Prompt, *, adapter: Path | None) -> str:
    """Lines of Python that load and use a fine-tuned model in `folder`. `adapter` is the folder of an adapter."""
    if adapter is not None:
        return adapter_load_lines(folder, task, read_label_names(adapter), prompt)
    if task in CLASSIFIERS:
        return classifier_load_lines(folder, str(prompt), scores=task == "reward")
    return load_lines(folder, prompt)
