"""What a checkpoint's tensors are, told before any of them is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's shape and type by its file's header; `is_float` after dequantisation."""

    shape: tuple[int, ...]
    dtype: str
    is_float: bool


class TensorSource(Protocol):
    """A checked checkpoint: names and shapes at once, data one tensor at a time."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its Hugging Face name."""

    def read(self, name: str) -> Tensor:
        """One tensor in fresh CPU memory, in a floating type.

        Raises: CheckpointError if the file has changed or ended since it was checked.
        """
