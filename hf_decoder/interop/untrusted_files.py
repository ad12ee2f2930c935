"""Checks the small files of an untrusted folder before anything of it is loaded.

Libraries trust these files: they nest as deep, make as many beams and import what the files say.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from hf_decoder.interop.checkpoint import GENERATION_NAME, read_json, side_files

# Files of a Hub name that are checked besides config.json.
FETCHED = (GENERATION_NAME, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
LARGEST_INTEGER = 1 << 63
# Generation settings that multiply memory or time -> a value far above any use.
MOST = {
    "num_beams": 256,
    "num_beam_groups": 256,
    "num_return_sequences": 256,
    "num_assistant_tokens": 1024,
    "prompt_lookup_num_tokens": 1024,
    "max_matching_ngram_size": 1024,
    "no_repeat_ngram_size": 1 << 16,
    "encoder_no_repeat_ngram_size": 1 << 16,
    "max_length": 1 << 28,
    "max_new_tokens": 1 << 28,
    "min_length": 1 << 28,
    "min_new_tokens": 1 << 28,
}
# Settings that are numbers and multiply nothing; settings that are one token id or several.
NUMBERS = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "max_time"),
    *("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "diversity_penalty", "guidance_scale"),
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "begin_suppress_tokens")
MOST_ADDED_TOKENS = 1 << 18
MOST_GROWTH = 256  # factor by which a normalizer may lengthen a text


def check_model(name: str) -> None:
    """Runs `check_folder` on a folder, or on the small files of a Hub name, which it downloads."""
    from transformers.utils.hub import cached_files

    folder = Path(name).expanduser()
    if folder.is_dir():
        check_folder(folder)
        return
    optional = dict.fromkeys(("missing_entries", "gated_repo", "connection_errors"), False)
    options: dict[str, Any] = {f"_raise_exceptions_for_{what}": value for what, value in optional.items()}
    try:
        found = cached_files(name, ["config.json", *FETCHED], **options)
    except Exception:  # no such name or no connection: loading will say so
        return
    if found:
        check_folder(Path(found[0]).parent)


def check_folder(folder: Path) -> None:
    """Raises ValueError, naming the file, if one is damaged or asks for what no model needs."""
    files = [folder / "config.json", *(folder / path for path in side_files(folder) if path.suffix == ".json")]
    for path in files:
        if path.is_file():
            stat = path.stat()
            _check_file(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _check_file(path: Path, size: int, time: int) -> None:
    """Checks one file. A file that passed is read again only after it changed."""
    values = read_json(path)
    try:
        if path.name in ("config.json", GENERATION_NAME):
            check_numbers(path, values)
            _check_ids(path, values)
        if path.name == "config.json":
            _check_names(path, values)
        elif path.name == GENERATION_NAME:
            _check_generation(path)
        elif path.name == "tokenizer.json":
            _check_tokenizer(path, values)
        elif path.name == "tokenizer_config.json":
            _check_tokenizer_config(path, values)
    except (TypeError, AttributeError) as error:  # a list where there should be an object, and the like
        raise ValueError(f"{path} is damaged: {error}") from None


def check_numbers(path: Path, values: dict[str, Any]) -> None:
    """Raises ValueError for integers of a config too large to be a size, and for generation settings above `MOST`."""
    for name, number in _numbers(values):
        if abs(number) >= LARGEST_INTEGER:
            raise ValueError(f"{path} has {name}={_short(number)}, which is too large")
    for name in (*MOST, *NUMBERS):
        value = values.get(name)
        if value is not None and not isinstance(value, int | float):
            raise ValueError(f"{path} has {name}={str(value)[:80]!r}, which is not a number")
        if value is not None and value > (most := MOST.get(name, LARGEST_INTEGER)):
            raise ValueError(f"{path} has {name}={_short(value)}; at most {most:,} is allowed")


def _check_ids(path: Path, values: dict[str, Any]) -> None:
    for name in TOKEN_IDS:
        value = values.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(one) is int for one in ids):
            raise ValueError(f"{path} has {name}={str(value)[:80]!r}, which is not a token id")


def _numbers(values: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Yields every integer in `values`, at any depth, with its key."""
    for name, value in values.items() if isinstance(values, dict) else ((key, value) for value in values):
        if isinstance(value, dict | list):
            yield from _numbers(value, name)
        elif isinstance(value, int):
            yield name, value


def _check_names(path: Path, values: dict[str, Any]) -> None:
    names = values.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{path} has architectures={str(names)[:80]!r}, which is not a list of names")


def _short(value: float) -> str:
    if abs(value) < LARGEST_INTEGER:
        return str(value)
    return f"{float(value):.0e}" if abs(value) < 10**300 else "a number of more than 300 digits"


def _check_generation(path: Path) -> None:
    try:
        GenerationConfig.from_pretrained(path.parent)
    except Exception as error:  # its fields may raise anything
        raise ValueError(f"{path} cannot be used: {' '.join(str(error).split())}") from None


def _check_tokenizer(path: Path, values: dict[str, Any]) -> None:
    added = values.get("added_tokens") or []
    if len(added) > MOST_ADDED_TOKENS:
        raise ValueError(
            f"{path} adds {len(added):,} tokens to its vocabulary; at most {MOST_ADDED_TOKENS:,} are read"
        )
    growth = 1.0
    for step in _steps(values.get("normalizer")):
        pattern = step.get("pattern")
        text = pattern.get("String") if isinstance(pattern, dict) else None
        if isinstance(content := step.get("content"), str):
            growth *= max(1.0, len(content) / max(1, len(text) if isinstance(text, str) else 1))
    if growth > MOST_GROWTH:
        raise ValueError(f"{path} has a normalizer that makes a text {growth:,.0f} times as long")


def _steps(normalizer: Any) -> Iterator[dict[str, Any]]:
    """Yields the steps of a normalizer, also those inside sequences."""
    if isinstance(normalizer, dict):
        yield normalizer
        for inner in normalizer.get("normalizers") or []:
            yield from _steps(inner)


def _check_tokenizer_config(path: Path, values: dict[str, Any]) -> None:
    added = values.get("added_tokens_decoder") or {}
    if len(added) > MOST_ADDED_TOKENS:
        raise ValueError(f"{path} adds {len(added):,} tokens; at most {MOST_ADDED_TOKENS:,} are read")
    template = values.get("chat_template")
    named = template if isinstance(template, list) else [] if template is None else [{"template": template}]
    if not all(isinstance(one, dict) and isinstance(one.get("template"), str) for one in named):
        raise ValueError(f"{path} has a chat_template that is not text")
