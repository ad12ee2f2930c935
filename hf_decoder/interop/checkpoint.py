"""Reads and writes checkpoints one tensor at a time, so that memory holds no more than one.

The format is safetensors: 8 bytes with the length of a JSON header, the header with type, shape and place of every
tensor, and the bytes of the tensors.
"""

from __future__ import annotations

import glob
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open

from hf_decoder.safety.terminal import first_line

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
GENERATION_NAME = "generation_config.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Old checkpoints hold rotary frequencies, which follow from the config.
IGNORED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
# Files of a checkpoint besides config and weights.
SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
    GENERATION_NAME,
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
# The largest JSON files of tokenizers have about 30 MB.
MOST_JSON_BYTES = 256 << 20
MOST_LEVELS = 64
MAY_BE_INFINITE = ("time_step_limit",)  # Mamba and its kin have no upper limit
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)


def read_config_values(folder: Path) -> dict[str, Any]:
    """The content of config.json, with a `model_type`.

    Raises:
        ValueError: if the folder has no config.json, or one that is damaged or names no model type.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"folder {folder} holds no model: it has no config.json")
    values = read_json(path)
    if not isinstance(values.get("model_type"), str) or not values["model_type"]:
        raise ValueError(f"{path} names no model_type")
    return values


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file of a checkpoint, with the limits of `parse_json`.

    Raises:
        ValueError: if the file is too large or damaged.
    """
    size = path.stat().st_size
    if size > MOST_JSON_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; at most {MOST_JSON_BYTES:,} are read")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return parse_json(text, str(path))


def parse_json(text: Any, where: str) -> dict[str, Any]:
    """Parses a stranger's JSON, which must be an object.

    Raises:
        ValueError: naming `where`, for a repeated key, a number that is not finite, deep nesting or invalid JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {twice!r} occurs twice")
        return found

    try:
        values = json.loads(text, object_pairs_hook=unique)
        _check_values([values])
    except RecursionError:
        raise ValueError(f"{where} is damaged: it is nested too deeply") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where} is damaged: it holds a {type(values).__name__}, not an object")
    return values


def _check_values(values: Any, key: str = "", depth: int = 0) -> None:
    """Raises ValueError for values more than `MOST_LEVELS` deep, and for numbers that are not finite."""
    if depth > MOST_LEVELS:
        raise ValueError("it is nested too deeply")
    for name, value in values.items() if isinstance(values, dict) else ((key, value) for value in values):
        if isinstance(value, dict | list):
            _check_values(value, name, depth + 1)
        elif isinstance(value, float) and not math.isfinite(value) and name not in MAY_BE_INFINITE:
            raise ValueError(f"{name}={value} is not a finite number")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is still on disk: its shape, its type, and a function that reads it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PackedTensor(LazyTensor):
    """A matrix of a GGUF file: the name of its type there, and its rows (M, bytes) as they are."""

    format_name: str
    load_blocks: Callable[[], torch.Tensor]


Tensors = dict[str, LazyTensor]


def local_folder(name: str) -> Path | None:
    """The folder that `name` leads to; None where `name` can only be one of the Hub.

    Raises:
        ValueError: if `name` is a file, or a path that leads nowhere.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{name} is a file; give the folder that holds config.json and the weights")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and folder.parent.is_dir()):
        raise ValueError(f"folder {name} does not exist")
    return None


def not_on_hub(name: str, error: Exception) -> ValueError:
    """The error for a `name` that is no folder, and that the Hub answers with `error`."""
    return ValueError(f"{name} is neither a folder here nor a model that the Hub gives us: {first_line(error)}")


def download(name: str, revision: str | None, **patterns: Any) -> Path:
    """Downloads the files of a Hub name into the cache; returns their folder. `patterns` choose the files.

    Raises:
        ValueError: if the Hub does not give them.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, **patterns))
    except (OSError, HFValidationError) as error:  # the client's own errors are OSErrors, too
        raise not_on_hub(name, error) from None


def locate(name: str, revision: str | None = None) -> Path:
    """The folder that `name` is, or that the files of this Hub name are downloaded into.

    Raises:
        ValueError: if it is neither.
    """
    patterns = ["config.json", "*.safetensors", INDEX_NAME, "README.md", *SIDE_FILES]
    # The root alone: some repositories hold the same weights in folders, in other formats.
    elsewhere = ["*/*.safetensors", "*/*.json"]
    return local_folder(name) or download(name, revision, allow_patterns=patterns, ignore_patterns=elsewhere)


def read_weight_map(index_file: Path) -> dict[str, str]:
    """Reads the index of a checkpoint in several files: tensor name -> file.

    Raises:
        ValueError: if it is damaged, or names a file outside its folder.
    """
    try:
        weight_map = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index_file} is damaged: {error}") from None
    for file in files:
        if not isinstance(file, str) or not file or re.search(r"[/\\\0]", file) or file in (".", ".."):
            raise ValueError(f"{index_file} names the shard {file!r}, which is not a file of its own folder")
    return weight_map


def read_tensors(folder: Path) -> Tensors:
    """All tensors of a folder's safetensors files by name, still on disk.

    Raises:
        ValueError: if there are none, a file is damaged, the index and the files disagree, or the index names a file
            that is absent or outside the folder.
    """
    index_file, single = folder / INDEX_NAME, folder / WEIGHTS_NAME
    if not index_file.is_file():
        if not single.is_file():
            raise ValueError(f"folder {folder} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}")
        return _read_file(single)
    weight_map = read_weight_map(index_file)
    tensors: Tensors = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise ValueError(f"shard {file} that {index_file} names is absent; copy or download it again")
        for name, tensor in _read_file(folder / file).items():
            if weight_map.get(name) != file:
                place = weight_map.get(name)
                raise ValueError(
                    f"shard {file} holds {name!r}, which {index_file} "
                    + (f"places in {place}" if place else "does not list")
                )
            tensors[name] = tensor
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise ValueError(f"shard {weight_map[absent[0]]} lacks {absent[0]!r}, which {index_file} places there")
    return tensors


def _read_file(path: Path) -> Tensors:
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dictionary)
                part = file.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise ValueError(
                        f"{name!r} in {path} is of type {part.get_dtype()}; supported are {', '.join(DTYPES)}"
                    )
                tensors[name] = LazyTensor(tuple(part.get_shape()), DTYPES[part.get_dtype()], _reader(path, name))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); copy or download it again") from None
    return tensors


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Reads the shapes of a safetensors file by name from its header, whatever the types.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); copy or download it again") from None


def _reader(path: Path, name: str) -> Callable[[], torch.Tensor]:
    def load() -> torch.Tensor:
        # Opened anew for each tensor: pages that were read stay in memory while the file is open.
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    return load


def split_rows(tensor: LazyTensor, sizes: list[int]) -> list[LazyTensor]:
    """Splits `tensor` into blocks of `sizes` rows."""

    def rows(start: int, stop: int) -> Callable[[], torch.Tensor]:
        return lambda: tensor.load()[start:stop]

    parts, start = [], 0
    for size in sizes:
        parts.append(LazyTensor((size, *tensor.shape[1:]), tensor.dtype, rows(start, start + size)))
        start += size
    return parts


def stack_rows(parts: list[LazyTensor]) -> LazyTensor:
    """Stacks the rows of all parts into one tensor."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return LazyTensor(shape, parts[0].dtype, lambda: torch.cat([part.load() for part in parts]))


def check(tensors: Tensors, expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises ValueError, naming the first tensor whose name or shape differs from the `expected`."""
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ValueError(
            f"{where} lacks {missing[0]!r}, which its config.json asks for" + _and_more(len(missing), "absent")
        )
    surplus = [name for name in tensors if name not in expected]
    if surplus:
        raise ValueError(
            f"{where} holds {surplus[0]!r}, which its config.json has no place for"
            + _and_more(len(surplus), "surplus")
        )
    for name, shape in expected.items():
        if tensors[name].shape != tuple(shape):
            raise ValueError(
                f"{name!r} in {where} is of shape {list(tensors[name].shape)}; its config.json asks for {list(shape)}"
            )


def _and_more(count: int, state: str) -> str:
    return f" ({count} tensors are {state})" if count > 1 else ""


def parse_size(text: str) -> int:
    """Parses sizes such as `5GB`, `500MB` or `2GiB` into bytes.

    Raises:
        ValueError: if `text` is not of that form.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise ValueError(f"max_shard_size {text!r} is not a size; write it as 5GB, 500MB or 2GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** ("", "K", "M", "G", "T").index(match[2].upper()))


def check_disk(destination: Path, num_bytes: int) -> None:
    """Raises ValueError unless the disk of `destination` has room for `num_bytes`."""
    folder = destination.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ValueError(
            f"{destination} needs {num_bytes / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free; make room or "
            "choose another disk"
        )


def check_absent(destination: Path) -> None:
    """Raises ValueError if `destination` exists."""
    if destination.exists() or destination.is_symlink():
        raise ValueError(f"{destination} exists; delete it or choose another name")


@contextmanager
def written_aside(destination: Path, num_bytes: int) -> Iterator[Path]:
    """Yields a path to write to, and renames it to `destination` at the end. If the block fails, the path is deleted.

    What a killed process left for the same destination is deleted first.

    Raises:
        ValueError: if `destination` exists, or its disk has no room for `num_bytes`.
    """
    check_absent(destination)
    for path in destination.absolute().parent.glob(f".{glob.escape(destination.name)}.*.partial"):
        writer = path.name.split(".")[-2]
        if writer.isdigit() and (int(writer) == os.getpid() or not psutil.pid_exists(int(writer))):
            _delete(path)
    check_disk(destination, num_bytes)
    destination.absolute().parent.mkdir(parents=True, exist_ok=True)
    aside = destination.absolute().with_name(f".{destination.name}.{os.getpid()}.partial")
    try:
        yield aside
        aside.rename(destination)
    finally:
        _delete(aside)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_tensors(folder: Path, tensors: Tensors, max_shard_size: int, progress: Callable[[int], None]) -> None:
    """Writes `tensors` as one safetensors file, or as shards of at most `max_shard_size` bytes with an index."""
    shards: list[Tensors] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.num_bytes > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.num_bytes
    if len(shards) == 1:
        _write_file(folder / WEIGHTS_NAME, tensors, progress)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, shard, progress)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors.values())}}
    text = json.dumps(index | {"weight_map": weight_map}, indent=2, sort_keys=True)
    (folder / INDEX_NAME).write_text(text + "\n", encoding="utf-8")


def _write_file(path: Path, tensors: Tensors, progress: Callable[[int], None]) -> None:
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))  # keeps all aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.num_bytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the bytes of the tensors start at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            tensor.load().contiguous().reshape(-1).view(torch.uint8).numpy().tofile(file)
            progress(tensor.num_bytes)


def side_files(folder: Path) -> list[Path]:
    """The `SIDE_FILES` in `folder`, as paths relative to it."""
    found = {path for pattern in SIDE_FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder) for path in found)


def copy_side_files(source: Path, destination: Path) -> None:
    """Copies the `side_files`."""
    for path in side_files(source):
        (destination / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, destination / path)
