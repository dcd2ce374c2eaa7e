"""Parse and check the header of a GGUF file: metadata and where its tensors lie.

The gguf package's own reader takes seconds for a vocabulary and trusts every count it finds; this
one bounds each by the bytes that are left. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from twilight_engine.loaders.errors import CheckpointError

MAX_STRING_BYTES = 16 << 20
MAX_DIMS = 4
STRING, ARRAY, BOOL = 8, 9, 7
NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1"}
NUMBERS |= {10: "<u8", 11: "<i8", 12: "<f8"}
SUPPORTED_TYPES = tuple(
    GGMLQuantizationType[name]
    for name in "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K".split()
)


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor's place in the file; shape in torch's order (GGUF's reversed)."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    num_bytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata by key (arrays of numbers as numpy arrays, of strings as lists), and tensors."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


class Cursor:
    """Reads little-endian values off a file and never past its end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.left = size

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise CheckpointError(f"truncated: {count} bytes wanted, {self.left} left")
        self.left -= count
        data = self.file.read(count)
        if len(data) != count:
            raise CheckpointError("truncated while it was read")
        return data

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def count(self, what: str, min_bytes: int) -> int:
        """A u64 count of things that take at least min_bytes each."""
        count = self.u64()
        if count * min_bytes > self.left:
            raise CheckpointError(f"it claims {count} {what}, more than its {self.left} bytes hold")
        return count

    def string(self) -> str:
        length = self.u64()
        if length > MAX_STRING_BYTES:
            raise CheckpointError(f"a string of {length} bytes; at most {MAX_STRING_BYTES}")
        return self.take(length).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        """A metadata value; arrays hold numbers or strings."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            item = self.u32()
            if item == STRING:
                return [self.string() for _ in range(self.count("strings", 8))]
            dtype = self.number_type(item)
            data = self.take(self.count("numbers", dtype.itemsize) * dtype.itemsize)
            return np.frombuffer(data, dtype)
        value = np.frombuffer(self.take(self.number_type(kind).itemsize), NUMBERS[kind])[0].item()
        return bool(value) if kind == BOOL else value

    def number_type(self, kind: int) -> np.dtype[Any]:
        if kind not in NUMBERS:
            raise CheckpointError(f"unknown metadata type {kind}")
        return np.dtype(NUMBERS[kind])


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read and check the header of a GGUF file; nothing of its tensors' data.

    Raises: CheckpointError for broken or hostile headers; NotImplementedError for versions and
    quantisations that are not supported.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return checked_header(Cursor(file, size), size)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except NotImplementedError as error:
        raise NotImplementedError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def checked_header(cursor: Cursor, size: int) -> GGUFHeader:
    if size < 24 or cursor.take(4) != b"GGUF":
        raise CheckpointError("not a GGUF file")
    version = cursor.u32()
    if version not in (2, 3):
        raise NotImplementedError(f"GGUF version {version}; supported: 2 and 3, little-endian")
    num_tensors = cursor.count("tensors", 24)
    num_keys = cursor.count("metadata keys", 13)
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string()
        if key in metadata:
            raise CheckpointError(f"the key {key!r} appears twice")
        metadata[key] = cursor.value(cursor.u32())
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment % 8:
        raise CheckpointError(f"general.alignment is {alignment!r}; it must be a multiple of 8")
    found: dict[str, GGUFTensor] = {}
    for _ in range(num_tensors):
        name = cursor.string()
        if name in found:
            raise CheckpointError(f"the tensor {name!r} appears twice")
        found[name] = read_tensor_info(cursor, name)
    data_start = -(-(size - cursor.left) // alignment) * alignment
    tensors = {
        name: GGUFTensor(t.shape, t.kind, data_start + t.start, t.num_bytes)
        for name, t in found.items()
    }
    check_places(tensors, alignment, data_start, size)
    return GGUFHeader(metadata, tensors)


def read_tensor_info(cursor: Cursor, name: str) -> GGUFTensor:
    num_dims = cursor.u32()
    if not 1 <= num_dims <= MAX_DIMS:
        raise CheckpointError(f"tensor {name!r} has {num_dims} dimensions; 1 to {MAX_DIMS} allowed")
    dims = [cursor.u64() for _ in range(num_dims)]
    kind_number = cursor.u32()
    supported = {int(kind): kind for kind in SUPPORTED_TYPES}
    if kind_number not in supported:
        names = ", ".join(kind.name for kind in SUPPORTED_TYPES)
        raise NotImplementedError(f"tensor {name!r} has type {kind_number}; supported: {names}")
    kind = supported[kind_number]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if dims[0] % block:
        raise CheckpointError(f"tensor {name!r}: rows of {dims[0]} are no multiple of {block}")
    num_bytes = math.prod(dims) // block * block_bytes
    return GGUFTensor(tuple(reversed(dims)), kind, cursor.u64(), num_bytes)


def check_places(tensors: dict[str, GGUFTensor], alignment: int, start: int, size: int) -> None:
    """Hold each tensor's place against the file's end, the alignment and its neighbours."""
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if (tensor.start - start) % alignment:
            raise CheckpointError(f"tensor {name!r} is not aligned to {alignment} bytes")
        if tensor.start < end:
            raise CheckpointError(f"tensor {name!r} overlaps another")
        end = tensor.start + tensor.num_bytes
        if end > size:
            raise CheckpointError(
                f"tensor {name!r} ends at byte {end}; the file has {size} (truncated?)"
            )
