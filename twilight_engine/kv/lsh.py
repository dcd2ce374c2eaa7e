"""The hash functions of the selector `lsh`: their size, and how they are drawn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SEED = 20241021  # any; the same functions in every cache, so that a copy has the same signatures


def num_tables(lsh: tuple[int, int] | None) -> int:
    """Signatures of a K row under KVConfig.lsh."""
    return 0 if lsh is None else lsh[1]


def hash_bytes(lsh: tuple[int, int] | None, head_dim: int, sparse_layers: int, centres: int) -> int:
    """Device bytes of the projections and of every layer's centres; 0 without signatures."""
    if lsh is None or sparse_layers == 0:
        return 0
    return 4 * head_dim * (math.prod(lsh) + sparse_layers * centres)


def make_projections(lsh: tuple[int, int], head_dim: int, device: torch.device) -> Tensor:
    """[D, L * bits] float32 Gaussian directions, from a fixed seed: alike on every device."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(head_dim, math.prod(lsh), generator=generator).to(device)
