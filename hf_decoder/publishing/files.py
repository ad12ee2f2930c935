"""Chooses by name the files of a model or an adapter that go to the Hub."""

from __future__ import annotations

import os
import re
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from hf_decoder.data.label_names import LABELS_FILE
from hf_decoder.interop.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter
from hf_decoder.interop.checkpoint import GENERATION_NAME, INDEX_NAME

CARD = "README.md"
# `*` stands for any part of a name, but never for a folder.
COMMON = (
    CARD,
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "NOTICE.md", "USE_POLICY.md"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "*.tiktoken"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    # written by this package's commands
    *("*_results.json", "eval_results.png", "loss_curve.png", "samples.md", "samples_in_training.md"),
    *("tokenizer_report.json", LABELS_FILE),
)
MODEL = (
    *COMMON,
    *("config.json", GENERATION_NAME, "quantize_config.json"),
    *("processor_config.json", "preprocessor_config.json"),
    *("model*.safetensors", INDEX_NAME, "*.gguf", "*.onnx", "*.onnx.data", "*.onnx_data"),
    "*_hf_decoder.py",  # the doctor compares them with the package's own
)
ADAPTER = (*COMMON, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
# Files that a card may show or refer to, in inner folders too.
SHOWN_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".md")
# Files of an earlier push that a loader would read: weights in another number of files, older code.
STALE = ("model*.safetensors", INDEX_NAME, "*_hf_decoder.py", "adapter_model*.safetensors")


def files_to_push(folder: str | Path) -> list[Path]:
    """The files of a model's or an adapter's folder that belong on the Hub.

    Raises:
        ValueError: if the folder does not exist, holds no config or no weights in safetensors, or a link leads out of
            it.
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
    """Lists what is in a folder and not among `sent`: files by name, inner folders with the number of their files."""
    found: dict[str, int] = {}
    for name in _walk(folder):
        if folder / name not in sent:
            first, slash, _ = name.partition("/")
            found[first + slash] = found.get(first + slash, 0) + 1
    said = {name: f" ({count} file{'s' if count > 1 else ''})" for name, count in found.items() if name.endswith("/")}
    return [name + said.get(name, "") for name in found]


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a posix path matches one of the patterns, folder by folder and with case."""
    parts = name.split("/")
    for pattern in patterns:
        wanted = pattern.split("/")
        if len(wanted) == len(parts) and all(map(fnmatchcase, parts, wanted)):
            return True
    return False


def _walk(folder: Path) -> list[str]:
    """The posix paths of all files below a folder. A link to a folder counts as a file."""
    found = []
    for place, folders, names in os.walk(folder):
        here = Path(place).relative_to(folder)
        links = [name for name in folders if (folder / here / name).is_symlink()]
        found += [(here / name).as_posix() for name in (*names, *links)]
    return sorted(found)


def _check_links(folder: Path, names: list[str]) -> None:
    """Raises ValueError for a link that leads out of the folder."""
    root = folder.resolve()
    for name in names:
        path = folder / name
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise ValueError(
                f"nothing was pushed: {path} is a link out of the folder; put the file there, or delete the link"
            )


def _shown(folder: Path) -> set[str]:
    """The pictures and pages of the folder that its card refers to."""
    from hf_decoder.doctor.files import local_links

    try:
        text = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return set()
    links = {*local_links(text), *re.findall(r"<img[^<>]+src=[\"']([^\"']+)", text)}
    return {
        link
        for link in (str(PurePosixPath(link)) for link in links)
        if link.lower().endswith(SHOWN_SUFFIXES) and not any(part.startswith(".") for part in link.split("/"))
    }
