"""Chooses by name the files that go to the Hub: those that make up a model or an adapter, and no others."""

from __future__ import annotations

import os
import re
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from hf_decoder.data.label_names import LABELS_FILE
from hf_decoder.interop.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter
from hf_decoder.interop.checkpoint import GENERATION_NAME, INDEX_NAME

CARD = "README.md"
# `*` stands for any part of a name, never for a folder.
COMMON = (
    CARD,
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "NOTICE.md", "USE_POLICY.md"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "*.tiktoken"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    # what this package's commands write about a model
    *("*_results.json", "eval_results.png", "loss_curve.png", "samples.md", "samples_in_training.md"),
    *("tokenizer_report.json", LABELS_FILE),
)
MODEL = (
    *COMMON,
    *("config.json", GENERATION_NAME, "quantize_config.json"),
    *("processor_config.json", "preprocessor_config.json"),
    *("model*.safetensors", INDEX_NAME, "*.gguf", "*.onnx", "*.onnx.data", "*.onnx_data"),
    "*_hf_decoder.py",  # which the doctor compares with the package's own
)
ADAPTER = (*COMMON, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
# What a card may show or refer to, in folders too.
SHOWN_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".md")
# What an earlier push may have left and a loader would look at: weights in another number of files, older code.
STALE = ("model*.safetensors", INDEX_NAME, "*_hf_decoder.py", "adapter_model*.safetensors")


def files_to_push(folder: str | Path) -> list[Path]:
    """The files of a model's or an adapter's folder that belong on the Hub.

    Raises:
        ValueError: if the folder does not exist, holds no config or no weights in safetensors, or a link in it leads
            out of it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder {folder} does not exist")
    patterns = ADAPTER if is_adapter(folder) else MODEL
    shown, found = _shown(folder), _walk(folder)
    names = [name for name in found if matches(name, patterns) or name in shown]
    _check_links(folder, [name for name in found if "/" not in name or name in names])
    config = ADAPTER_CONFIG if is_adapter(folder) else "config.json"
    if config not in names:
        raise ValueError(f"{folder} holds neither config.json nor {ADAPTER_CONFIG}: give the folder of a saved model")
    if not any(name.endswith(".safetensors") for name in names):
        raise ValueError(
            f"{folder} holds no weights in safetensors, the one form that runs no code where it is loaded; save the "
            "model again with save_pretrained"
        )
    return [folder / name for name in names]


def left_out(folder: Path, sent: list[Path]) -> list[str]:
    """Everything in a folder that is not among `sent`; of an inner folder, its name and the number of files."""
    found: dict[str, int] = {}
    for name in _walk(folder):
        if folder / name not in sent:
            first, slash, _ = name.partition("/")
            found[first + slash] = found.get(first + slash, 0) + 1
    said = {name: f" ({count} file{'s' if count > 1 else ''})" for name, count in found.items() if name.endswith("/")}
    return [name + said.get(name, "") for name in found]


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a posix path is of one of the patterns, folder by folder and letter by letter."""
    parts = name.split("/")
    for pattern in patterns:
        wanted = pattern.split("/")
        if len(wanted) == len(parts) and all(map(fnmatchcase, parts, wanted)):
            return True
    return False


def _walk(folder: Path) -> list[str]:
    """Every file below a folder by posix path; of a link to a folder, and of an empty one, only its name."""
    found = []
    for place, folders, names in os.walk(folder):
        here = Path(place).relative_to(folder)
        links = [name for name in folders if (folder / here / name).is_symlink()]
        found += [(here / name).as_posix() for name in (*names, *links)]
    return sorted(found)


def _check_links(folder: Path, names: list[str]) -> None:
    """Refuses a link out of the folder: what lies behind it is another place's business.

    Raises:
        ValueError: naming it.
    """
    root = folder.resolve()
    for name in names:
        path = folder / name
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise ValueError(
                f"nothing was pushed: {path} is a link out of the folder; put the file itself there, or take the link "
                "away"
            )


def _shown(folder: Path) -> set[str]:
    """The pictures and pages of the folder that its card refers to."""
    from hf_decoder.doctor.files import local_links

    try:
        text = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return set()
    links = {*local_links(text), *re.findall(r"<img[^>]+src=[\"']([^\"']+)", text)}
    return {
        link
        for link in (str(PurePosixPath(link)) for link in links)
        if link.lower().endswith(SHOWN_SUFFIXES) and not any(part.startswith(".") for part in link.split("/"))
    }
