"""The hot-row slot cache of a layer: its tensors and what they take."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import MAX_CHUNKS, NO_ROW, SLOTS_PER_CHUNK, HotRows

_INT32_BYTES = 4


def slots_within(budget_bytes: int, row_bytes: int) -> int:
    """Most slots a layer gets for a budget that pays for rows and slot state: whole chunks."""
    chunk_bytes = SLOTS_PER_CHUNK * (row_bytes + 2 * _INT32_BYTES) + _INT32_BYTES
    return min(budget_bytes // chunk_bytes, MAX_CHUNKS) * SLOTS_PER_CHUNK


def hot_row_bytes(
    *,
    num_slots: int,
    row_bytes: int,
    num_pages: int,
    num_kv_heads: int,
    page_size: int,
    num_seq_slots: int,
) -> int:
    """Device bytes of one layer's hot rows: rows, slot state, the map over all pages, means."""
    rows = num_slots * (row_bytes + 2 * _INT32_BYTES) + num_slots // SLOTS_PER_CHUNK * _INT32_BYTES
    slot_map = num_kv_heads * num_pages * page_size * _INT32_BYTES
    return rows + slot_map + num_seq_slots * num_kv_heads * _INT32_BYTES


def allocate_hot_rows(
    *,
    num_slots: int,
    num_pages: int,
    num_kv_heads: int,
    page_size: int,
    num_seq_slots: int,
    first_row: int,
    step: Tensor,
    device: torch.device,
) -> HotRows:
    """One layer's empty slot cache; nobody owns a chunk until rebalance_quotas lends them.

    Args:
        num_slots: a multiple of SLOTS_PER_CHUNK, at most MAX_CHUNKS * SLOTS_PER_CHUNK; may be 0.
        first_row: the first slot's row in the layer's row pool; the rows themselves are the pool's.
        step: [1] int32 on the device, one for all layers.
    Raises: ValueError for a number of slots or a step tensor other than these.
    """
    num_chunks = num_slots // SLOTS_PER_CHUNK
    if num_slots < 0 or num_slots % SLOTS_PER_CHUNK or num_chunks > MAX_CHUNKS:
        raise ValueError(
            f"num_slots is {num_slots}; it must be a multiple of {SLOTS_PER_CHUNK} in "
            f"[0, {MAX_CHUNKS * SLOTS_PER_CHUNK}]"
        )
    if step.shape != (1,) or step.dtype != torch.int32:
        raise ValueError(f"step is {step.dtype} {list(step.shape)}; it must be int32 [1]")

    def no_rows(*shape: int) -> Tensor:
        return torch.full(shape, NO_ROW, dtype=torch.int32, device=device)

    return HotRows(
        slot_map=no_rows(num_kv_heads, num_pages, page_size),
        slot_key=no_rows(num_slots),
        slot_stamp=torch.zeros(num_slots, dtype=torch.int32, device=device),
        chunk_owner=no_rows(num_chunks),
        set_mean=torch.zeros(num_seq_slots, num_kv_heads, device=device),
        step=step,
        first_row=first_row,
    )
