"""Read a Hugging Face directory of safetensors shards, checked before it is believed.

Every header is parsed and checked here, in pure Python, and tensors are read with plain reads into
their own memory: a file cut short while it is open gives an error instead of a bus fault.
Format: https://github.com/huggingface/safetensors (8-byte length, JSON header, data).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twilight_engine.loaders.errors import CheckpointError
from twilight_engine.loaders.json_file import parse_object, read_json
from twilight_engine.loaders.tensors import TensorInfo

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
ITEM_BYTES |= {"I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4}
ITEM_BYTES |= {"I64": 8, "U64": 8, "F64": 8, "C64": 8}
FLOATS = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Entry(TensorInfo):
    """A tensor of a shard and its bytes in the file."""

    start: int
    end: int


def parse_header(path: Path) -> dict[str, Entry]:
    """Read and check one shard's header; nothing of its data.

    Raises: CheckpointError unless every tensor has a known dtype, a sane shape and exactly the
    bytes they need, and the tensors cover the data without holes or overlaps.
    """
    try:
        return checked_header(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def checked_header(path: Path) -> dict[str, Entry]:
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if file_bytes < 8 or length > min(MAX_HEADER_BYTES, file_bytes - 8):
            raise CheckpointError(
                f"the header claims {length} bytes; the file has {file_bytes} (truncated, or not "
                "a safetensors file)"
            )
        text = file.read(length)
    if len(text) != length or not text.startswith(b"{"):
        raise CheckpointError("the header is not a JSON object (not a safetensors file?)")
    header = parse_object(text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(type(v) is not str for v in metadata.values()):
        raise CheckpointError("__metadata__ is not an object of strings")
    data_start = 8 + length
    entries = {name: parse_entry(name, value, data_start) for name, value in header.items()}
    place = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != place:
            what = "overlaps another" if entry.start < place else "leaves a hole before it"
            raise CheckpointError(f"tensor {name!r} {what} (offset {entry.start - data_start})")
        place = entry.end
    if place != file_bytes:
        raise CheckpointError(
            f"the tensors end at byte {place} and the file at {file_bytes} (truncated?)"
        )
    return entries


def parse_entry(name: str, value: Any, data_start: int) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"tensor {name!r} needs dtype, shape and data_offsets only")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"tensor {name!r} has an unknown dtype {dtype!r}")
    for numbers in (shape, offsets):
        whole = isinstance(numbers, list) and len(numbers) <= 16
        if not whole or any(type(n) is not int or not 0 <= n < 1 << 63 for n in numbers):
            raise CheckpointError(f"tensor {name!r} has a bad shape or offsets: {numbers!r:.200}")
    if len(offsets) != 2:
        raise CheckpointError(f"tensor {name!r} needs two data_offsets")
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != needed:
        raise CheckpointError(
            f"tensor {name!r}: {dtype} {shape} needs {needed} bytes; its offsets span "
            f"{offsets[1] - offsets[0]}"
        )
    start, end = (data_start + offset for offset in offsets)
    return Entry(tuple(shape), dtype, dtype in FLOATS, start, end)


def shard_path(directory: Path, name: Any) -> Path:
    """Resolve a shard's name, which must lie in the directory itself.

    A symlink may lead to another place only as Hugging Face's cache lays out its snapshots: to the
    `blobs` folder beside the `snapshots` folder that holds the directory.
    """
    if not isinstance(name, str) or not name.endswith(".safetensors"):
        raise CheckpointError(f"shard {name!r}: only .safetensors files are loaded, never pickles")
    if Path(name).name != name or "\\" in name or "\0" in name:
        raise CheckpointError(f"shard {name!r} does not lie in the model directory {directory}")
    path, root = (directory / name).resolve(), directory.resolve()
    in_cache = root.parent.name == "snapshots" and path.parent == root.parent.parent / "blobs"
    if path.parent != root and not in_cache:
        raise CheckpointError(f"shard {name!r} is a link that leaves the model directory: {path}")
    if not path.is_file():
        raise CheckpointError(f"shard {name!r} is missing from {directory}")
    return path


class SafetensorsDirectory:
    """The tensors of model.safetensors, or of the shards that its index names."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.shards: dict[str, Path] = {}  # by tensor
        self.tensors: Mapping[str, TensorInfo]
        entries: dict[str, Entry] = {}
        for path, expected in self.find_shards().items():
            header = parse_header(path)
            if expected is not None and set(header) != expected:
                odd = sorted(set(header) ^ expected)
                raise CheckpointError(f"{path} and the index disagree on {odd[:8]}")
            entries |= header
            self.shards |= dict.fromkeys(header, path)
        self.entries = self.tensors = entries

    def find_shards(self) -> dict[Path, set[str] | None]:
        """Shards, with the tensors the index expects in each (None: no index)."""
        index = self.directory / INDEX_NAME
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{index} has no weight_map")
            names: dict[Any, set[str]] = {}
            for tensor, shard in weight_map.items():
                if not isinstance(shard, str):
                    raise CheckpointError(f"{index}: {tensor!r} is in {shard!r}, not in a file")
                names.setdefault(shard, set()).add(tensor)
            return {shard_path(self.directory, s): expected for s, expected in names.items()}
        if (self.directory / SINGLE_NAME).exists():
            return {shard_path(self.directory, SINGLE_NAME): None}
        pickles = sorted(p.name for pattern in PICKLES for p in self.directory.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{self.directory} holds pickles ({', '.join(pickles[:4])}), which can run code "
                "when they are read; convert them to safetensors"
            )
        raise CheckpointError(f"{self.directory} holds neither {SINGLE_NAME} nor {INDEX_NAME}")

    def read(self, name: str) -> Tensor:
        """One tensor in fresh CPU memory (see TensorSource)."""
        entry, path = self.entries[name], self.shards[name]
        tensor = torch.empty(entry.shape, dtype=FLOATS[entry.dtype])
        if tensor.numel():
            with path.open("rb") as file:
                file.seek(entry.start)
                got = file.readinto(tensor.view(-1).view(torch.uint8).numpy().data)
            if got != entry.end - entry.start:
                raise CheckpointError(f"{path}: ended in the middle of tensor {name!r}")
        return tensor
