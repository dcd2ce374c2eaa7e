"""Hash functions and signatures for the tests of the selector `lsh`."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.kv.lsh import make_projections
from twilight_engine.layout import LshHashes


def make_hashes(
    device: torch.device, lsh: tuple[int, int], *, slots: int = 3, heads: int = 2, dim: int = 64
) -> LshHashes:
    centres = torch.randn(slots, heads, dim, device=device)
    return LshHashes(lsh[0], make_projections(lsh, dim, device), centres)


def differing_bits(mine: Tensor, theirs: Tensor) -> int:
    """Bits in which two tensors of int16 signatures differ."""
    assert mine.shape == theirs.shape and mine.dtype == theirs.dtype == torch.int16
    differ = (mine.cpu().int() ^ theirs.cpu().int()) & 0xFFFF
    return sum(int((differ >> bit & 1).sum()) for bit in range(16))
