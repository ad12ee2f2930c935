"""Tells whose code lies in a checkpoint's folder: no one's, this package's, another version's, or a stranger's.

The files are read and compared. None of them is run or imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

import hf_decoder
from hf_decoder.interop.adapters import ADAPTER_CONFIG, is_adapter
from hf_decoder.interop.families import OURS
from hf_decoder.registration import CLASSES

RUNNABLE_SUFFIXES = {
    *(".py", ".pyw", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".exe"),
    *(".sh", ".bat", ".cmd", ".ps1", ".ipynb", ".js", ".jar"),
}
# Files that transformers or PEFT reads settings from: config.json, tokenizer_config.json, config.5.0.0.json, ...
CONFIG_FILE = re.compile(r"config[^/]*\.json|[^/]*config\.json", re.IGNORECASE)
# How every version of this package names the files that it saves beside a checkpoint.
OWN_NAME = re.compile(r"\w+_hf_decoder\.py")
# The libraries whose classes an adapter may have been put on.
PARENT_LIBRARIES = ("transformers", "transformers_modules", "hf_decoder")


class Origin(Enum):
    """Whose code it is. Only `OWN`, where every file equals the installed one, may run without the user's trust."""

    NONE = "none"
    OWN = "own, of this version"
    OLDER = "own by its names, of another version or changed"
    FOREIGN = "foreign"


@dataclass(frozen=True)
class Code:
    """The code of a folder. `elsewhere` names code or a model of another place that the JSON files ask for, if any."""

    origin: Origin
    files: tuple[str, ...]
    detail: str = ""
    elsewhere: str | None = None


def own_code() -> dict[str, bytes]:
    """Name -> content of the files that this version saves beside a checkpoint."""
    folder = Path(hf_decoder.__file__).parent / "model"
    return {path.name: path.read_bytes() for path in folder.glob("*.py") if path.name != "__init__.py"}


def code_of(folder: Path, files: Sequence[str]) -> Code:
    """Compares the code of a checkpoint with the package's. `files` are the posix paths of all its files.

    A named file that is not on disk counts as a stranger's. So does a link to a folder: loading follows it, and its
    content is not among `files`.
    """
    runnable = tuple(file for file in files if _may_run(folder, file))
    configs = {file: values_of(folder / file) for file in files if CONFIG_FILE.fullmatch(file)}
    references = [found for file, values in configs.items() for found in _references(file, values)]
    elsewhere = _elsewhere(folder, files, configs, references)
    if elsewhere is not None:
        return Code(Origin.FOREIGN, runnable, elsewhere, elsewhere)
    if not runnable:
        return Code(Origin.NONE, ())
    strange = [file for file in runnable if not OWN_NAME.fullmatch(file) or not (folder / file).is_file()]
    strange += [f"{reference} in {file}" for file, _, reference in references if not _is_own(file, reference)]
    if configs.get("config.json", {}).get("model_type") != OURS:
        return Code(Origin.FOREIGN, runnable, f"code of its own: {', '.join(runnable)}")
    if strange:
        return Code(Origin.FOREIGN, runnable, f"no checkpoint of this model has: {', '.join(strange)}")
    own = own_code()
    changed = [file for file in runnable if file in own and (folder / file).read_bytes() != own[file]]
    other = [file for file in runnable if file not in own]
    absent = sorted(own.keys() - set(runnable))
    of_this_version = {f"{name.removesuffix('.py')}.{public}" for name in own for public in CLASSES}
    unknown = [reference for _, _, reference in references if reference not in of_this_version]
    if changed or other or absent or unknown:
        parts = {"differs": changed, "not of this version": other, "absent": absent, "in auto_map": unknown}
        listed = "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)
        detail = (
            f"{len(runnable)} files with names of hf_decoder, of another version or changed since; compared with the "
            f"installed package, {listed}"
        )
        return Code(Origin.OLDER, runnable, detail)
    return Code(Origin.OWN, runnable)


def values_of(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where it is absent or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _may_run(folder: Path, file: str) -> bool:
    return PurePosixPath(file).suffix.lower() in RUNNABLE_SUFFIXES or (folder / file).is_dir()


def _is_own(file: str, reference: str) -> bool:
    """Whether a config of any version of ours may name this class."""
    module, _, name = reference.partition(".")
    return file == "config.json" and bool(OWN_NAME.fullmatch(f"{module}.py")) and name.isidentifier()


def _fields(values: Any) -> Iterator[tuple[str, Any]]:
    """Yields every key with its value, at any depth."""
    if isinstance(values, dict):
        yield from values.items()
    for value in values.values() if isinstance(values, dict) else values if isinstance(values, list) else ():
        yield from _fields(value)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    elif value:
        yield value


def _references(file: str, values: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yields (file, field, `module.Class`) for every class that a config takes from the folder."""
    for field, value in _fields(values):
        if field == "auto_map":
            for reference in _leaves(value):
                yield file, field, str(reference)
        elif field == "custom_pipelines" and isinstance(value, dict):
            for task in value.values():
                if isinstance(task, dict) and task.get("impl"):
                    yield file, field, str(task["impl"])


def _elsewhere(
    folder: Path, files: Sequence[str], configs: dict[str, Any], references: Sequence[tuple[str, str, str]]
) -> str | None:
    """Says what the configs ask to run or load that is no file of this folder, or returns None."""
    for file, field, reference in references:
        if "--" in reference:
            return f"{file} takes {field} from another repository: {reference}"
        if f"{reference.partition('.')[0]}.py" not in files:
            return f"{file} names {reference} in {field}, and that file is absent"
    for file, values in configs.items():
        for field, value in _fields(values):
            if field.removesuffix("_internal").endswith("_implementation"):
                kernel = next((leaf for leaf in _leaves(value) if "/" in str(leaf)), None)
                if kernel is not None:
                    return f"{file} asks for a kernel from the Hub: {field}={kernel!r}"
            if field == "custom_generate" and value:
                return f"{file} asks for code of its own in generate(): custom_generate={value!r}"
            if field in ("configuration_files", "fast_tokenizer_files") and value:
                return f"{file} has other files read instead: {field}={value!r}"
            if field in ("trust_remote_code", "megatron_config", "tokenizer_kwargs") and value:
                return f"{file} asks for code of another place: {field}={value!r}"
            if field == "auto_mapping" and isinstance(value, dict):
                library = str(value.get("parent_library"))
                if library.partition(".")[0] not in PARENT_LIBRARIES:
                    return f"{file} has {library!r} imported: {field}"
    if ADAPTER_CONFIG in files and not is_adapter(folder):
        return f"{ADAPTER_CONFIG} lies beside a whole model, and has an adapter or another base loaded with it"
    return None
