"""What bench_gather_rows.py fetches: rows of a large arena, spaced, random or as recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from decode_attention.machine import granules_of
from decode_attention.timing import spread, time_work
from decode_attention.traces import ScaledTrace, load_trace, nearest_rule
from harness import L2_FLUSH_BYTES
from torch import Tensor

from twilight_engine.kv.host import HostArena
from twilight_engine.layout import FetchLists
from twilight_engine.ops.gather_rows import gather_rows

LAYERS, HKV, PAGE_SIZE, HEAD_DIM = 32, 8, 64, 128
FULL_ROW_BYTES = 4 * HEAD_DIM  # K and V in bfloat16
SEQUENCE_BYTES = 64 << 20  # a head's rows of one sequence
BULK_BYTES = 64 << 20  # a repeat moves up to so much: far above launch costs
BESIDE_BATCH, BESIDE_ROWS = 8, 211  # what a decode step misses: 6.9 MB in all
TRACE_SHARE, TRACE_STEP, KEPT_STEPS = 0.007, 32, 16
REPEATS = 10
DEVICE = torch.device("cuda")


@dataclass(frozen=True)
class Lists:
    """Rows to fetch of some layers, segments [B, Hkv] each."""

    src: Tensor  # [layers, B, Hkv, C] int32
    counts: Tensor  # [layers, B, Hkv] int32

    @classmethod
    def full(cls, src: Tensor) -> Lists:
        counts = torch.full(src.shape[:-1], src.shape[-1], dtype=torch.int32, device=DEVICE)
        return cls(src.int().contiguous(), counts)

    def fetch(self, layer: int) -> FetchLists:
        """Targets follow each other."""
        src, counts = self.src[layer], self.counts[layer]
        dst = torch.arange(src.numel(), dtype=torch.int32, device=DEVICE).view(src.shape)
        return FetchLists(src, dst, counts, torch.zeros_like(counts))


class Arena:
    """Host rows of 32 layers as rows of either size, device rows to copy to, and the link."""

    def __init__(self, arena_gb: int) -> None:
        page_bytes = LAYERS * HKV * PAGE_SIZE * FULL_ROW_BYTES
        self.name = f"{arena_gb}GB"
        self.host = HostArena(
            num_layers=LAYERS,
            num_kv_heads=HKV,
            num_pages=(arena_gb << 30) // page_bytes,
            page_size=PAGE_SIZE,
            head_dim=HEAD_DIM,
            dtype=torch.bfloat16,
            device=DEVICE,
        )
        self.host.ensure_pages(self.host.num_pages)
        self.rows = torch.empty(BULK_BYTES // 2, dtype=torch.bfloat16, device=DEVICE)
        self._flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)
        self.link_gbps = self._dma_gbps()

    def layer(self, layer: int, row_bytes: int) -> Tensor:
        """[Hkv, P, S', row_bytes / 2]: smaller rows are parts of the arena's."""
        rows = self.host.layer(layer)
        return rows.view(HKV, rows.shape[1], -1, row_bytes // 2)

    def rows_each(self, row_bytes: int) -> int:
        """Rows of a (layer, head)."""
        return self.host.num_pages * PAGE_SIZE * FULL_ROW_BYTES // row_bytes

    def gather(
        self,
        layer: int,
        fetch: FetchLists,
        row_bytes: int,
        num_blocks: int,
        times: Tensor | None = None,
    ) -> None:
        gather_rows(
            self.layer(layer, row_bytes),
            fetch,
            self.rows.view(-1, row_bytes // 2),
            times=times,
            num_blocks=num_blocks,
        )

    def granules(self, src: Tensor, counts: Tensor) -> int:
        """Granules of address translation in one layer's lists [B, Hkv, C] of whole rows."""
        stride = self.host.strip_pages * PAGE_SIZE * FULL_ROW_BYTES
        return granules_of(src, counts, FULL_ROW_BYTES, stride)

    def flush_l2(self) -> None:
        self._flush.add_(1)

    def _dma_gbps(self) -> float:
        """cudaMemcpyAsync from pinned memory."""
        pinned = torch.zeros(BULK_BYTES, dtype=torch.uint8, pin_memory=True)
        target = self.rows.view(torch.uint8)
        copy = partial(target.copy_, pinned, non_blocking=True)
        times = time_work(DEVICE, copy, repeats=REPEATS, before=self.flush_l2)
        return BULK_BYTES / spread(times)["us"] / 1e3


def spaced(arena: Arena, row_bytes: int, spacing: int, batch: int, repeat: int) -> Tensor:
    """[batch, Hkv, C] rows in address order, one every `spacing` bytes, elsewhere each repeat."""
    step, rows_each = max(1, spacing // row_bytes), arena.rows_each(row_bytes)
    count = min(BULK_BYTES // row_bytes // (batch * HKV), rows_each // (batch * step))
    starts = max(1, rows_each // batch - count * step)
    first = (repeat * 2654435761) % starts + rows_each // batch * torch.arange(batch)
    src = first[:, None, None] + step * torch.arange(count)
    return src.expand(batch, HKV, -1).to(DEVICE)


def scattered(arena: Arena, row_bytes: int, _repeat: int) -> Tensor:
    """[1, Hkv, C] rows anywhere in a head, in no order."""
    count = BULK_BYTES // row_bytes // HKV
    return torch.randint(0, arena.rows_each(row_bytes), (1, HKV, count), device=DEVICE)


def regions(arena: Arena) -> tuple[int, int]:
    """Tokens of a sequence, and how many such sequences lie in the arena."""
    rows = arena.rows_each(FULL_ROW_BYTES)
    tokens = min(SEQUENCE_BYTES // FULL_ROW_BYTES, rows)
    return tokens, rows // tokens


def random_passes(arena: Arena, count: int) -> list[Lists]:
    """A step's random rows, of another sequence in each pass."""
    tokens, many = regions(arena)
    passes = []
    for i in range(REPEATS):
        rows = torch.randint(0, tokens, (LAYERS, 1, HKV, count), device=DEVICE)
        passes.append(Lists.full(rows.sort(dim=-1).values + i % many * tokens))
    return passes


def beside_rows(arena: Arena, *, dense: bool) -> Tensor:
    """[8, Hkv, 211] rows of 8 sequences that share the arena, ascending: neighbours, or random."""
    tokens = arena.rows_each(FULL_ROW_BYTES) // BESIDE_BATCH
    each = (BESIDE_BATCH, HKV)
    if dense:
        starts = torch.randint(0, tokens - BESIDE_ROWS + 1, (*each, 1), device=DEVICE)
        rows = starts + torch.arange(BESIDE_ROWS, device=DEVICE)
    else:
        rows = torch.randint(0, tokens, (*each, BESIDE_ROWS), device=DEVICE).sort(dim=-1).values
    return rows + tokens * torch.arange(BESIDE_BATCH, device=DEVICE)[:, None, None]


def trace_passes(arena: Arena, path: Path, *, misses: bool) -> list[Lists]:
    """Successive steps of a recorded decode, of another sequence in each pass."""
    tokens, many = regions(arena)
    trace = ScaledTrace(
        load_trace(path, nearest_rule(TRACE_SHARE)),
        num_layers=LAYERS,
        first=PAGE_SIZE,
        last=tokens - 4 * PAGE_SIZE,
        share=TRACE_SHARE,
        tokens=tokens,
    )
    steps = range(TRACE_STEP - KEPT_STEPS, TRACE_STEP + REPEATS)
    sets = [[[trace.rows(n, 0, h, t) for h in range(HKV)] for n in range(LAYERS)] for t in steps]
    passes = []
    for i in range(REPEATS):
        now = i + KEPT_STEPS
        rows = sets[now]
        if misses:
            rows = [
                [
                    np.setdiff1d(rows[n][h], np.concatenate([s[n][h] for s in sets[i:now]]))
                    for h in range(HKV)
                ]
                for n in range(LAYERS)
            ]
        passes.append((rows, i % many * tokens))
    capacity = max(len(r) for rows, _ in passes for layer in rows for r in layer)
    return [_padded(rows, first, capacity) for rows, first in passes]


def _padded(rows: Sequence[Sequence[np.ndarray]], first: int, capacity: int) -> Lists:
    """Lists [layers, 1, Hkv, C] of rows of the sequence that begins at row `first`."""
    src = torch.zeros(LAYERS, 1, HKV, capacity, dtype=torch.int32)
    counts = torch.zeros(LAYERS, 1, HKV, dtype=torch.int32)
    for n, layer in enumerate(rows):
        for h, r in enumerate(layer):
            src[n, 0, h, : len(r)] = torch.from_numpy(r) + first
            counts[n, 0, h] = len(r)
    return Lists(src.to(DEVICE), counts.to(DEVICE))
