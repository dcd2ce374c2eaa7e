"""Who owns which hot rows: steps, quotas by head, and the end of a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import SLOTS_PER_CHUNK, HotRows
from twilight_engine.ops.cpu import hot_quotas as cpu
from twilight_engine.ops.launch import check_dtype, check_shape, current_stream, kernels, ptr
from twilight_engine.ops.resolve_rows import check_hot_rows

MAX_OWNERS = 2048  # (sequence slot, KV head) pairs: two ints each in a block's shared memory


def advance(hot: HotRows) -> None:
    """Begin a decode step: slots used before it may be evicted again.

    `step` is shared by all layers, so call it once a step, with any layer's hot rows.
    """
    hot.step.add_(1)


def rebalance_quotas(hot: HotRows, active: Tensor) -> None:
    """Lend chunks to the heads of active sequences in proportion to their running set means.

    target = 1 + (C - A) * weight / sum(weights), rounded so that the targets of the A active heads
    add up to all C chunks; weight is set_mean rounded to a whole number, for a head without history
    the mean of those that have one. With fewer chunks than heads the 1 falls away. An owner keeps
    its first chunks up to its target; the others, those of inactive sequences and the free ones are
    lent in chunk order to the owners that lack some. A chunk that moves is emptied: its rows are
    fetched again if they are wanted. Call it between steps; no kernel may be reading the slots.

    Args:
        active: [num_seq_slots] uint8 or bool, on the slots' device.
    Raises: ValueError for shapes or dtypes other than these.
    """
    _check(hot)
    check_shape("active", active, (hot.set_mean.shape[0],))
    check_dtype("active", active, torch.uint8, torch.bool)
    if not hot.slot_key.is_cuda:
        cpu.rebalance_quotas(hot, active)
        return
    kernels().rebalance_quotas(
        slot_map=ptr(hot.slot_map),
        slot_key=ptr(hot.slot_key),
        chunk_owner=ptr(hot.chunk_owner),
        set_mean=ptr(hot.set_mean),
        active=ptr(active),
        num_chunks=hot.chunk_owner.shape[0],
        num_owners=hot.set_mean.numel(),
        num_kv_heads=hot.set_mean.shape[1],
        keys_per_head=hot.slot_map[0].numel(),
        stream=current_stream(hot.slot_key),
    )


def release_sequence(hot: HotRows, seq_slot: int, page_ids: Tensor) -> None:
    """Take back a sequence's slots at its end, and forget where its freed pages' rows were.

    Empties and unlends every chunk of the sequence slot, clears slot_map for page_ids (and the
    slots of others that hold their rows) and sets set_mean to 0.

    Args:
        seq_slot: the sequence's slot, as in StepMeta.seq_slots.
        page_ids: [M] int32, the pages that go back to the pool; NO_ROW is skipped.
    Raises: ValueError for a slot out of range, shapes or dtypes other than these.
    """
    _check(hot)
    num_slots = hot.set_mean.shape[0]
    if not 0 <= seq_slot < num_slots:
        raise ValueError(f"seq_slot is {seq_slot}; it must lie in [0, {num_slots})")
    check_shape("page_ids", page_ids, (None,))
    check_dtype("page_ids", page_ids, torch.int32)
    if not hot.slot_key.is_cuda:
        cpu.release_sequence(hot, seq_slot, page_ids)
        return
    kernels().release_sequence(
        slot_map=ptr(hot.slot_map),
        slot_key=ptr(hot.slot_key),
        chunk_owner=ptr(hot.chunk_owner),
        set_mean=ptr(hot.set_mean),
        page_ids=ptr(page_ids),
        num_pages=page_ids.shape[0],
        seq_slot=seq_slot,
        num_chunks=hot.chunk_owner.shape[0],
        num_kv_heads=hot.set_mean.shape[1],
        page_size=hot.slot_map.shape[2],
        keys_per_head=hot.slot_map[0].numel(),
        first_row=hot.first_row,
        stream=current_stream(hot.slot_key),
    )


def _check(hot: HotRows) -> None:
    check_hot_rows(hot, hot.slot_map.shape[0])
    owners = hot.set_mean.numel()
    if owners > MAX_OWNERS:
        raise ValueError(
            f"hot.set_mean has {owners} (sequence slot, head) pairs; at most {MAX_OWNERS} share "
            f"the slots of a layer (in chunks of {SLOTS_PER_CHUNK})"
        )
