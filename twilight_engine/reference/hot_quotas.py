"""Reference of hot_quotas: chunks move one at a time."""

from __future__ import annotations

from torch import Tensor

from twilight_engine.layout import NO_ROW, SLOTS_PER_CHUNK, HotRows


def advance(hot: HotRows) -> None:
    hot.step[0] += 1


def rebalance_quotas(hot: HotRows, active: Tensor) -> None:
    num_owners = hot.set_mean.numel()
    targets = _targets(hot, active)
    owned = [0] * num_owners
    spare = []
    for chunk, owner in enumerate(hot.chunk_owner.tolist()):
        if owner != NO_ROW and owned[owner] < targets[owner]:
            owned[owner] += 1
        else:
            spare.append(chunk)
    for owner in range(num_owners):
        for _ in range(targets[owner] - owned[owner]):
            chunk = spare.pop(0)
            _evict_chunk(hot, chunk)
            hot.chunk_owner[chunk] = owner
    for chunk in spare:
        _evict_chunk(hot, chunk)
        hot.chunk_owner[chunk] = NO_ROW


def _targets(hot: HotRows, active: Tensor) -> list[int]:
    """Chunks each (sequence slot, head) shall own; whole numbers, so every backend agrees."""
    num_chunks, hkv = hot.chunk_owner.shape[0], hot.set_mean.shape[1]
    means = hot.set_mean.round().long().flatten().tolist()
    alive = active.bool().repeat_interleave(hkv).tolist()
    known = [m for m, a in zip(means, alive, strict=True) if a and m > 0]
    typical = max(1, sum(known) // len(known)) if known else 1
    weights = [(m or typical) if a else 0 for m, a in zip(means, alive, strict=True)]
    least = 1 if sum(alive) <= num_chunks else 0
    extra, total = num_chunks - least * sum(alive), max(1, sum(weights))
    targets, before = [], 0
    for weight, a in zip(weights, alive, strict=True):
        share = extra * (before + weight) // total - extra * before // total
        targets.append(least * a + share)
        before += weight
    return targets


def release_sequence(hot: HotRows, seq_slot: int, page_ids: Tensor) -> None:
    hkv = hot.set_mean.shape[1]
    for chunk, owner in enumerate(hot.chunk_owner.tolist()):
        if owner != NO_ROW and owner // hkv == seq_slot:
            _evict_chunk(hot, chunk)
            hot.chunk_owner[chunk] = NO_ROW
    for page in page_ids.tolist():
        if page != NO_ROW:
            for h in range(hkv):
                for row in hot.slot_map[h, page].tolist():
                    if row != NO_ROW:
                        hot.slot_key[row - hot.first_row] = NO_ROW
            hot.slot_map[:, page] = NO_ROW
    hot.set_mean[seq_slot] = 0


def _evict_chunk(hot: HotRows, chunk: int) -> None:
    """Empty a chunk's slots; the head they belong to follows from the owner."""
    where = hot.slot_map.flatten(1)[int(hot.chunk_owner[chunk]) % hot.set_mean.shape[1]]
    for slot in range(chunk * SLOTS_PER_CHUNK, (chunk + 1) * SLOTS_PER_CHUNK):
        if hot.slot_key[slot] != NO_ROW:
            where[hot.slot_key[slot]] = NO_ROW
            hot.slot_key[slot] = NO_ROW
