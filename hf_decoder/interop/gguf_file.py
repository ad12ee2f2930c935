"""Parses a GGUF file into fields and tensors, and checks every count against the bytes of the file.

The format: a magic number, a version and two counts; fields (key, type, value); names, sizes, types and places of the
tensors; their bytes. The reader of the package `gguf` trusts the counts, and makes an object for every element of an
array.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Type of a field: number in the file -> numpy type.
SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
STRING, ARRAY = 8, 9
MOST_DIMENSIONS = 4
# The fewest bytes of a string, of a field and of a tensor's entry.
LEAST_STRING, LEAST_FIELD, LEAST_TENSOR = 8, 13, 32
# Elements of an array become Python objects of about 50 bytes each. No tokenizer has more.
MOST_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file: its type in `gguf`, its sizes, innermost first, and its rows, still on disk."""

    tensor_type: Any
    shape: tuple[int, ...]
    data: np.ndarray


def read_file(path: Path, gguf: Any) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Reads fields by key and tensors by name. `gguf` is the package, which knows the tensor types.

    Raises:
        ValueError: if the file is damaged, cut short, or asks for more than its bytes can hold.
    """
    try:
        return _Reader(np.memmap(path, mode="r")).read(gguf)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a GGUF file, or is cut short ({error})") from None


class _Reader:
    def __init__(self, data: np.ndarray):
        self._data = data
        self._place = 0

    def read(self, gguf: Any) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        if self._take(4).tobytes() != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._scalar("<u4")
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}; supported are {' and '.join(map(str, VERSIONS))}")
        tensor_count, field_count = self._scalar("<u8"), self._scalar("<u8")
        self._check_count(field_count, LEAST_FIELD, "fields")
        fields: dict[str, Any] = {}
        for _ in range(field_count):
            key = self._string()
            if key in fields:
                raise ValueError(f"the field {key!r} occurs twice")
            fields[key] = self._value(key, self._scalar("<u4"))
        self._check_count(tensor_count, LEAST_TENSOR, "tensors")
        entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensor_count):
            name, entry = self._entry()
            if name in entries:
                raise ValueError(f"the tensor {name!r} occurs twice")
            entries[name] = entry
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = math.ceil(self._place / alignment) * alignment
        tensors = {name: self._tensor(gguf, name, start, *entry) for name, entry in entries.items()}
        if sum(tensor.data.nbytes for tensor in tensors.values()) > len(self._data):
            raise ValueError(
                f"its tensors lie over one another: together they are more than {len(self._data):,} bytes"
            )
        return fields, tensors

    def _take(self, count: int) -> np.ndarray:
        """The next `count` bytes."""
        if count > len(self._data) - self._place:
            raise ValueError(f"it ends at byte {len(self._data):,}, but announces {count:,} bytes at {self._place:,}")
        self._place += count
        return self._data[self._place - count : self._place]

    def _check_count(self, count: int, least_bytes: int, of: str) -> None:
        if count * least_bytes > len(self._data) - self._place:
            raise ValueError(f"{count:,} {of} do not fit into its {len(self._data):,} bytes")

    def _scalar(self, kind: str) -> Any:
        return self._take(np.dtype(kind).itemsize).view(kind)[0].item()

    def _string(self) -> str:
        return self._take(self._scalar("<u8")).tobytes().decode("utf-8")

    def _value(self, key: str, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind in SCALARS:
            return self._scalar(SCALARS[kind])
        if kind != ARRAY:
            raise ValueError(f"the field {key!r} is of the unknown type {kind}")
        kind, count = self._scalar("<u4"), self._scalar("<u8")
        if count > MOST_ELEMENTS:
            raise ValueError(f"the field {key!r} has {count:,} elements; at most {MOST_ELEMENTS:,} are read")
        if kind == STRING:
            self._check_count(count, LEAST_STRING, f"elements of {key!r}")
            return [self._string() for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError(
                f"the field {key!r} is an array of type {kind}; supported are arrays of numbers and of strings"
            )
        return self._take(count * np.dtype(SCALARS[kind]).itemsize).view(SCALARS[kind]).tolist()

    def _entry(self) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        """A tensor's name, with its sizes, the number of its type, and its offset."""
        name, dimensions = self._string(), self._scalar("<u4")
        if not 0 < dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"the tensor {name!r} has {dimensions:,} dimensions")
        shape = tuple(self._scalar("<u8") for _ in range(dimensions))
        return name, (shape, self._scalar("<u4"), self._scalar("<u8"))

    def _tensor(
        self, gguf: Any, name: str, start: int, shape: tuple[int, ...], kind: int, offset: int
    ) -> StoredTensor:
        tensor_type = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
        if 0 in shape or shape[0] % block:
            raise ValueError(f"the tensor {name!r} is of {list(shape)}, in blocks of {block}")
        row = shape[0] // block * block_bytes
        self._place = start + offset
        data = self._take(math.prod(shape[1:]) * row)
        if tensor_type.name in ("F32", "F16"):
            data = data.view("<f4" if tensor_type.name == "F32" else "<f2")
            row = shape[0]
        return StoredTensor(tensor_type, shape, data.reshape((*reversed(shape[1:]), row)))
