"""The step's shared tensors: which tokens each query row sees, by kind of layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from twilight_engine.kv.cache import KVCache, SequenceKV
from twilight_engine.layout import NO_ROW, StepMeta
from twilight_engine.ops.append_rows import append_rows


def window_start(length: int, num_recent: int, page_size: int) -> int:
    """First token of the window of a sequence of this length: a multiple of page_size."""
    return max(0, (length - num_recent) // page_size * page_size)


def bucket(length: int, page_size: int) -> int:
    """A max_len for steps of this length: whole pages, at most an eighth more than needed.

    Steps of one bucket are alike in all that the host decides, so one CUDA graph serves them.
    """
    pages = -(-length // page_size)
    step = 1 << max(0, pages.bit_length() - 4)
    return -(-pages // step) * step * page_size


def page_table(cache: KVCache, sequences: Sequence[SequenceKV]) -> Tensor:
    """[B, pages_per_sequence] int32 page ids on the device, NO_ROW beyond a sequence's pages."""
    table = torch.full((len(sequences), cache.plan.pages_per_sequence), NO_ROW, dtype=torch.int32)
    for b, sequence in enumerate(sequences):
        table[b, : len(sequence.pages)] = torch.tensor(sequence.pages, dtype=torch.int32)
    return table.to(cache.device)


def with_sliding_window(meta: StepMeta, window: int | None) -> StepMeta:
    """The same step for a layer that sees only the last `window` tokens."""
    if window is None:
        return meta
    return dataclasses.replace(meta, ctx_starts=(meta.positions + 1 - window).clamp_(min=0))


def append_step(cache: KVCache, layer: int, k: Tensor, v: Tensor, meta: StepMeta) -> None:
    """Append a decode step's rows, k and v [N, Hkv, D], to every tier of a layer."""
    tiers = cache.layers[layer]
    append_rows(
        k,
        v,
        tiers.windows,
        tiers.host,
        meta,
        index=tiers.index,
        counters=cache.log.counters[layer],
        pages=tiers.pages,
    )


def prefill_meta(cache: KVCache, table: Tensor, slot: int, start: int, length: int) -> StepMeta:
    """The step of a prefill chunk of one sequence: tokens [start, start + length)."""
    end = start + length
    device = cache.device

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    recent = window_start(end, cache.config.num_recent, cache.config.page_size)
    return StepMeta(
        page_table=table,
        seq_slots=ints(slot),
        seq_lens=ints(end),
        window_starts=ints(recent),
        cu_seqlens_q=ints(0, length),
        query_seq=torch.zeros(length, dtype=torch.int32, device=device),
        positions=torch.arange(start, end, dtype=torch.int32, device=device),
        ctx_starts=torch.zeros(length, dtype=torch.int32, device=device),
        page_size=cache.config.page_size,
        num_sink=cache.config.num_sink,
        max_len=end,
    )
