"""resolve_rows on the CPU: one thread walks what the kernel's blocks own."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from torch import Tensor

from twilight_engine.layout import (
    COUNTER_DIRECT_ROWS,
    COUNTER_HIT_ROWS,
    COUNTER_MISSED_ROWS,
    MAX_AGE,
    NO_ROW,
    SLOTS_PER_CHUNK,
    FetchLists,
    HotRows,
    RowLists,
    StepMeta,
)

Array = np.ndarray[Any, Any]


def resolve_rows(
    exact: RowLists,
    hot: HotRows | None,
    meta: StepMeta,
    locations: Tensor,
    fetch: FetchLists,
    counters: Tensor | None,
) -> None:
    """Fill locations and fetch, and update hot; arguments as in ops.resolve_rows, all given."""
    hkv = exact.tokens.shape[1]
    tally = np.zeros((hkv, 3), dtype=np.int64)
    if hot is None:
        locations.fill_(NO_ROW)
        fetch.counts.zero_()
        fetch.direct.zero_()
        fetch.direct.index_add_(0, meta.query_seq, exact.counts)
        tally[0, 2] = int(exact.counts.sum())
    else:
        _resolve(
            exact.tokens.numpy(),
            exact.counts.numpy(),
            meta.page_table.numpy(),
            meta.seq_slots.numpy(),
            meta.cu_seqlens_q.numpy(),
            hot.slot_map.flatten(1).numpy(),
            hot.slot_key.numpy(),
            hot.slot_stamp.numpy(),
            hot.chunk_owner.numpy(),
            hot.set_mean.numpy(),
            int(hot.step[0]),
            hot.first_row,
            meta.page_size,
            locations.numpy(),
            fetch.src.numpy(),
            fetch.dst.numpy(),
            fetch.counts.numpy(),
            fetch.direct.numpy(),
            tally,
        )
    if counters is not None:
        hits, missed, direct = tally.sum(0).tolist()
        counters[COUNTER_HIT_ROWS] += hits
        counters[COUNTER_MISSED_ROWS] += missed
        counters[COUNTER_DIRECT_ROWS] += direct


@njit(cache=True)
def _eviction_order(key: int, stamp: int, step: int) -> int:
    """0 for a free slot, then rising with recency; MAX_AGE + 1: in use by this step."""
    if key == NO_ROW:
        return 0
    return MAX_AGE + 1 - min(max(step - stamp, 0), MAX_AGE)


@njit(cache=True)
def _take_victims(
    chunk_owner: Array, slot_key: Array, slot_stamp: Array, owner: int, step: int, wanted: int
) -> Array:
    """The `wanted` oldest slots of an owner, or all it may give up, by rising slot."""
    histogram = np.zeros(MAX_AGE + 2, np.int64)
    for chunk in range(chunk_owner.shape[0]):
        if chunk_owner[chunk] == owner:
            for slot in range(chunk * SLOTS_PER_CHUNK, (chunk + 1) * SLOTS_PER_CHUNK):
                histogram[_eviction_order(slot_key[slot], slot_stamp[slot], step)] += 1
    threshold, below = 0, 0
    while threshold <= MAX_AGE and below + histogram[threshold] < wanted:
        below += histogram[threshold]
        threshold += 1
    ties = wanted - below if threshold <= MAX_AGE else 0
    victims = np.empty(below + ties, np.int32)
    found = 0
    for chunk in range(chunk_owner.shape[0]):
        if chunk_owner[chunk] == owner:
            for slot in range(chunk * SLOTS_PER_CHUNK, (chunk + 1) * SLOTS_PER_CHUNK):
                order = _eviction_order(slot_key[slot], slot_stamp[slot], step)
                if order < threshold or (order == threshold and ties > 0):
                    ties -= order == threshold
                    victims[found] = slot
                    found += 1
    return victims[:found]


@njit(cache=True)
def _resolve(
    tokens: Array,
    counts: Array,
    page_table: Array,
    seq_slots: Array,
    cu_seqlens_q: Array,
    slot_map: Array,
    slot_key: Array,
    slot_stamp: Array,
    chunk_owner: Array,
    set_mean: Array,
    step: int,
    first_row: int,
    page_size: int,
    locations: Array,
    src: Array,
    dst: Array,
    fetch_counts: Array,
    fetch_direct: Array,
    tally: Array,
) -> None:
    hkv = tokens.shape[1]
    for h in range(hkv):
        for b in range(seq_slots.shape[0]):  # all hits first: no sequence may evict another's
            for n in range(cu_seqlens_q[b], cu_seqlens_q[b + 1]):
                for i in range(counts[n, h]):
                    t = tokens[n, h, i]
                    row = slot_map[h, page_table[b, t // page_size] * page_size + t % page_size]
                    if row >= 0:
                        slot_stamp[row - first_row] = step
        for b in range(seq_slots.shape[0]):
            fetched, direct, longest = 0, 0, 0
            for n in range(cu_seqlens_q[b], cu_seqlens_q[b + 1]):
                missing, num_missing = np.empty(counts[n, h], np.int32), 0
                longest = max(longest, counts[n, h])
                for i in range(counts[n, h]):
                    t = tokens[n, h, i]
                    key = page_table[b, t // page_size] * page_size + t % page_size
                    locations[n, h, i] = slot_map[h, key]
                    if locations[n, h, i] < 0:
                        missing[num_missing] = i
                        num_missing += 1
                tally[h, 0] += counts[n, h] - num_missing
                wanted = min(num_missing, src.shape[2] - fetched)
                if wanted > 0 and seq_slots[b] >= 0:
                    owner = seq_slots[b] * hkv + h
                    victims = _take_victims(chunk_owner, slot_key, slot_stamp, owner, step, wanted)
                else:
                    victims = np.empty(0, np.int32)
                for j in range(victims.shape[0]):
                    t = tokens[n, h, missing[j]]
                    key = page_table[b, t // page_size] * page_size + t % page_size
                    slot = victims[j]
                    if slot_key[slot] != NO_ROW:
                        slot_map[h, slot_key[slot]] = NO_ROW
                    slot_map[h, key] = first_row + slot
                    slot_key[slot] = key
                    slot_stamp[slot] = step
                    locations[n, h, missing[j]] = first_row + slot
                    src[b, h, fetched] = key
                    dst[b, h, fetched] = first_row + slot
                    fetched += 1
                tally[h, 1] += victims.shape[0]
                direct += num_missing - victims.shape[0]
            fetch_counts[b, h] = fetched
            fetch_direct[b, h] = direct
            tally[h, 2] += direct
            if seq_slots[b] >= 0 and cu_seqlens_q[b + 1] > cu_seqlens_q[b]:
                old = set_mean[seq_slots[b], h]
                decayed = np.float32(0.9) * old + np.float32(0.1) * np.float32(longest)
                set_mean[seq_slots[b], h] = decayed if old > 0 else np.float32(longest)
