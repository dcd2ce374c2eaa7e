"""hot_quotas on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from torch import Tensor

from twilight_engine.layout import NO_ROW, SLOTS_PER_CHUNK, HotRows

Array = np.ndarray[Any, Any]


def rebalance_quotas(hot: HotRows, active: Tensor) -> None:
    """Lend the chunks anew; arguments as in ops.hot_quotas."""
    hkv = hot.set_mean.shape[1]
    owners = hot.chunk_owner.numpy()
    targets = _targets(hot.set_mean.numpy(), active.bool().numpy(), owners.shape[0])
    moved, new_owners = _move(owners, targets)
    _evict(hot.slot_map.flatten(1).numpy(), hot.slot_key.numpy(), owners, moved, hkv)
    owners[moved] = new_owners


def release_sequence(hot: HotRows, seq_slot: int, page_ids: Tensor) -> None:
    """Take back a sequence's slots; arguments as in ops.hot_quotas."""
    hkv = hot.set_mean.shape[1]
    owners, keys = hot.chunk_owner.numpy(), hot.slot_key.numpy()
    mine = np.flatnonzero((owners != NO_ROW) & (owners // hkv == seq_slot))
    _evict(hot.slot_map.flatten(1).numpy(), keys, owners, mine, hkv)
    owners[mine] = NO_ROW
    pages = page_ids.numpy()
    pages = pages[pages != NO_ROW]
    slot_map = hot.slot_map.numpy()
    held = slot_map[:, pages]
    keys[held[held != NO_ROW] - hot.first_row] = NO_ROW
    slot_map[:, pages] = NO_ROW
    hot.set_mean[seq_slot] = 0


def _targets(set_mean: Array, active: Array, num_chunks: int) -> Array:
    means = np.rint(set_mean).astype(np.int64).ravel()
    alive = np.repeat(active, set_mean.shape[1])
    known = means[alive & (means > 0)]
    typical = max(1, int(known.sum()) // len(known)) if len(known) else 1
    weights = np.where(alive, np.where(means > 0, means, typical), 0)
    least = 1 if alive.sum() <= num_chunks else 0
    extra = num_chunks - least * int(alive.sum())
    ends = extra * np.cumsum(weights) // max(1, int(weights.sum()))
    return least * alive + np.diff(ends, prepend=0)


@njit(cache=True)
def _move(chunk_owner: Array, targets: Array) -> tuple[Array, Array]:
    """The chunks to empty, in order, and whom each goes to (NO_ROW: nobody)."""
    owned = np.zeros(targets.shape[0], np.int64)
    moved = np.empty(chunk_owner.shape[0], np.int64)
    num_moved = 0
    for chunk in range(chunk_owner.shape[0]):
        owner = chunk_owner[chunk]
        if owner != NO_ROW and owned[owner] < targets[owner]:
            owned[owner] += 1
        else:
            moved[num_moved] = chunk
            num_moved += 1
    new_owners = np.full(num_moved, NO_ROW, np.int32)
    given = 0
    for owner in range(targets.shape[0]):
        lacking = targets[owner] - owned[owner]
        new_owners[given : given + lacking] = owner
        given += lacking
    return moved[:num_moved], new_owners


@njit(cache=True)
def _evict(slot_map: Array, slot_key: Array, owners: Array, chunks: Array, hkv: int) -> None:
    for chunk in chunks:
        if owners[chunk] == NO_ROW:
            continue  # nobody's slots are empty
        h = owners[chunk] % hkv
        for slot in range(chunk * SLOTS_PER_CHUNK, (chunk + 1) * SLOTS_PER_CHUNK):
            if slot_key[slot] != NO_ROW:
                slot_map[h, slot_key[slot]] = NO_ROW
                slot_key[slot] = NO_ROW
