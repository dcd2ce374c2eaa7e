"""What crosses the link for a sequence of exact sets, with a least-recently-used row cache."""

from __future__ import annotations

import torch
from torch import Tensor


def lru_misses(wanted: Tensor, slots: Tensor) -> Tensor:
    """Rows that each step fetches.

    A cache of n slots holds the n rows used last, of those used together the lower ones, so one
    pass serves all sizes.

    Args:
        wanted: [H, T, L] bool, the rows of each head and step.
        slots: [..., H] int64, rows each head may keep, of as many caches as there are.
    Returns: [..., H, T] int64.
    """
    heads, steps, length = wanted.shape
    last_use = torch.full((heads, length), -1, dtype=torch.int32, device=wanted.device)
    numbers = torch.arange(length, device=wanted.device).expand(heads, length)
    rank = numbers  # of each row, by last use
    misses = torch.zeros(*slots.shape, steps, dtype=torch.int64, device=wanted.device)
    for t in range(steps):
        now = wanted[:, t]
        cached = (last_use >= 0) & (rank < slots[..., None])
        misses[..., t] = (now & ~cached).sum(-1)
        last_use = torch.where(now, t, last_use)
        order = last_use.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(numbers).scatter(-1, order, numbers)
    return misses


def cache_slots(wanted: Tensor, share: float) -> Tensor:
    """[H] slots of a cache of `share` of a layer's rows, in proportion to the mean sets."""
    heads, _, length = wanted.shape
    means = wanted.sum(-1).double().mean(1)
    quota = means / means.sum().clamp(min=1e-9)
    return (quota * share * heads * length).long()
