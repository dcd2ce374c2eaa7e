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
    means = wanted.sum(-1).double().mean(1)
    return split_by_head(means, share * wanted.shape[0] * wanted.shape[2])


def miss_curve(wanted: Tensor, *, cold_steps: int) -> Tensor:
    """Rows fetched a step, past the cold ones, by each head with any number of slots.

    A least-recently-used cache of k slots holds the k newest rows of the unlimited one, so a row's
    place among those when it is wanted again says how many slots would have kept it.

    Args:
        wanted: [H, T, L] bool, the rows of each head and step; T > cold_steps.
    Returns: [H, L + 1] float64, [h, k]: mean misses of head h with k slots, as `lru_misses` has it.
    """
    heads, steps, length = wanted.shape
    never = length  # the place of a row that was not wanted before: no slots would have kept it
    last_use = torch.full((heads, length), -1, dtype=torch.int32, device=wanted.device)
    places = torch.arange(length, device=wanted.device).expand(heads, length)
    counts = torch.zeros(heads, length + 1, dtype=torch.int64, device=wanted.device)
    for t in range(steps):
        now = wanted[:, t]
        if t >= cold_steps:
            order = last_use.argsort(dim=-1, descending=True, stable=True)
            place = torch.empty_like(order).scatter_(-1, order, places)
            place = torch.where(last_use < 0, never, place)
            counts.scatter_add_(-1, place, now.long())
        last_use = torch.where(now, t, last_use)
    return counts.flip(-1).cumsum(-1).flip(-1).double() / (steps - cold_steps)


def split_by_head(means: Tensor, slots: float) -> Tensor:
    """[H] slots of each head of a layer with `slots`, in proportion to the mean sets [H]."""
    return (means / means.sum().clamp(min=1e-9) * slots).long()
