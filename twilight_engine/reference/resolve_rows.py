"""Reference of resolve_rows: sorted victims, one list entry at a time."""

from __future__ import annotations

import torch
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

SET_MEAN_DECAY = 0.9


def resolve_rows(
    exact: RowLists,
    hot: HotRows | None,
    meta: StepMeta,
    *,
    locations: Tensor | None = None,
    fetch: FetchLists | None = None,
    counters: Tensor | None = None,
) -> tuple[Tensor, FetchLists]:
    n, hkv, capacity = exact.tokens.shape
    if locations is None:
        locations = torch.full_like(exact.tokens, NO_ROW)
    if fetch is None:
        fetch = FetchLists.empty(meta.num_seqs, hkv, max(1, n * capacity), exact.tokens.device)
    hits = missed = direct = 0
    keys = {
        (row, h): _keys(exact, meta, row, h) for row in range(n) for h in range(hkv)
    }  # page * S + offset of every list entry
    if hot is not None:
        for (_, h), listed in keys.items():  # whatever is wanted and there is in use by this step
            for key in listed:
                slot = int(hot.slot_map.flatten(1)[h, key]) - hot.first_row
                if slot >= 0:
                    hot.slot_stamp[slot] = hot.step[0]
    for b in range(meta.num_seqs):
        rows = range(int(meta.cu_seqlens_q[b]), int(meta.cu_seqlens_q[b + 1]))
        for h in range(hkv):
            fetched = unplaced = 0
            for row in rows:
                listed = keys[row, h]
                if hot is not None:
                    where = hot.slot_map.flatten(1)[h]
                    missing = [key for key in listed if where[key] == NO_ROW]
                    room = fetch.src.shape[2] - fetched
                    victims = _victims(hot, int(meta.seq_slots[b]) * hkv + h, room)
                    for key, slot in zip(missing, _in_order(victims, len(missing)), strict=False):
                        _install(hot, h, key, slot)
                        fetch.src[b, h, fetched] = key
                        fetch.dst[b, h, fetched] = hot.first_row + slot
                        fetched += 1
                        missed += 1
                    hits += len(listed) - len(missing)
                    unplaced += sum(int(where[key]) == NO_ROW for key in missing)
                    for i, key in enumerate(listed):
                        locations[row, h, i] = where[key]
                else:
                    locations[row, h, : len(listed)] = NO_ROW
                    unplaced += len(listed)
            fetch.counts[b, h], fetch.direct[b, h] = fetched, unplaced
            direct += unplaced
            if hot is not None and len(rows) and meta.seq_slots[b] >= 0:
                _update_mean(hot, int(meta.seq_slots[b]), h, max(len(keys[r, h]) for r in rows))
    if counters is not None:
        counters[COUNTER_HIT_ROWS] += hits
        counters[COUNTER_MISSED_ROWS] += missed
        counters[COUNTER_DIRECT_ROWS] += direct
    return locations, fetch


def _keys(exact: RowLists, meta: StepMeta, row: int, h: int) -> list[int]:
    tokens = exact.tokens[row, h, : int(exact.counts[row, h])].tolist()
    table = meta.page_table[int(meta.query_seq[row])]
    size = meta.page_size
    return [int(table[t // size]) * size + t % size for t in tokens]


def _victims(hot: HotRows, owner: int, most: int) -> list[int]:
    """Slots that may be taken, at most so many: free ones, then the oldest; ties by slot."""
    ranked = []
    for chunk in (hot.chunk_owner == owner).nonzero().flatten().tolist() if owner >= 0 else []:
        for slot in range(chunk * SLOTS_PER_CHUNK, (chunk + 1) * SLOTS_PER_CHUNK):
            age = int(hot.step[0]) - int(hot.slot_stamp[slot])
            if hot.slot_key[slot] == NO_ROW:
                ranked.append((-MAX_AGE - 1, slot))
            elif age > 0:
                ranked.append((-min(age, MAX_AGE), slot))
    return [slot for _, slot in sorted(ranked)[:most]]


def _in_order(victims: list[int], wanted: int) -> list[int]:
    """The first victims, so many as are wanted, by slot: writes go to rising addresses."""
    return sorted(victims[:wanted])


def _install(hot: HotRows, h: int, key: int, slot: int) -> None:
    where = hot.slot_map.flatten(1)[h]
    if hot.slot_key[slot] != NO_ROW:
        where[hot.slot_key[slot]] = NO_ROW
    where[key] = hot.first_row + slot
    hot.slot_key[slot] = key
    hot.slot_stamp[slot] = hot.step[0]


def _update_mean(hot: HotRows, slot: int, h: int, count: int) -> None:
    old = float(hot.set_mean[slot, h])
    hot.set_mean[slot, h] = (
        SET_MEAN_DECAY * old + (1 - SET_MEAN_DECAY) * count if old > 0 else count
    )
