"""Rows from a large host arena to hot slots: GB/s by row size and spacing, beside the DMA peak.

Cases: `dma/...` is the floor, cudaMemcpyAsync of pinned memory; `rowsN/dense/...` copies N-byte
rows that are neighbours; `rowsN/everyK/...` rows in address order, one every K bytes;
`rowsN/random/...` the same number of rows in no order, `stepR` R scattered rows a head in each of
8 heads, as one layer of a decode step does. Every repeat reads rows that the one before did not.
Needs a CUDA device and the arena's bytes of free host memory.

    python bench/bench_gather_rows.py --arena-gb 16

Target: 512-byte rows in address order, one every 16 KB or less, at 45 GB/s or more (PCIe 5 x16).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from harness import record, time_us
from torch import Tensor

from twilight_engine.kv.host import HostArena
from twilight_engine.layout import FetchLists
from twilight_engine.ops.gather_rows import NUM_BLOCKS, gather_rows

BENCH = "gather_rows"
HKV, PAGE_SIZE = 8, 64
TARGET_BYTES = 64 << 20  # a repeat moves up to so much: far above launch costs, below a head
SPACINGS = (1 << 10, 2 << 10, 4 << 10, 8 << 10, 16 << 10, 64 << 10)
TARGET_GBPS, TARGET_ROW_BYTES, TARGET_SPACING = 45.0, 512, 16 << 10
STEP_ROWS = (64, 256, 1024)
SEQUENCE_TOKENS = 1 << 17  # a step's rows lie in one sequence: 64 MB a head at 512 bytes
REPEATS = 20


class Arena:
    """One layer whose host rows fill the arena, and device rows to copy to."""

    def __init__(self, arena_gb: int, head_dim: int) -> None:
        self.row_bytes = 4 * head_dim  # K and V in bfloat16
        num_pages = (arena_gb << 30) // (HKV * PAGE_SIZE * self.row_bytes)
        self.host = HostArena(
            num_layers=1,
            num_kv_heads=HKV,
            num_pages=num_pages,
            page_size=PAGE_SIZE,
            head_dim=head_dim,
            dtype=torch.bfloat16,
            device="cuda",
        )
        self.host.ensure_pages(num_pages)
        self.host_kv = self.host.layer(0)
        self.rows_each = num_pages * PAGE_SIZE  # a head
        self.rows = torch.empty(
            TARGET_BYTES // self.row_bytes, 2 * head_dim, dtype=torch.bfloat16, device="cuda"
        )

    def lists(self, src: Tensor) -> FetchLists:
        """Fetch lists of src [Hkv, C]; targets follow each other."""
        dst = torch.arange(src.numel(), dtype=torch.int32, device="cuda").view(1, *src.shape)
        counts = torch.full((1, HKV), src.shape[1], dtype=torch.int32, device="cuda")
        return FetchLists(
            src[None].int().cuda().contiguous(), dst, counts, torch.zeros_like(counts)
        )


def spaced(arena: Arena, spacing_bytes: int, repeat: int) -> Tensor:
    """[Hkv, C] rows in address order, one every spacing_bytes, elsewhere in each repeat."""
    step = max(1, spacing_bytes // arena.row_bytes)
    count = min(TARGET_BYTES // arena.row_bytes // HKV, arena.rows_each // step)
    starts = max(1, arena.rows_each - count * step)
    first = (repeat * 2654435761) % starts
    return (first + step * torch.arange(count)).expand(HKV, -1)


def scattered(arena: Arena, count: int, order: bool, _repeat: int) -> Tensor:
    """[Hkv, count] rows anywhere in a head; in address order, or in none."""
    rows = torch.randint(0, arena.rows_each, (HKV, count))
    return rows.sort(dim=1).values if order else rows


def in_sequences(arena: Arena, count: int, tokens: int, repeat: int) -> Tensor:
    """[Hkv, count] ordered rows of one sequence's region of `tokens` rows, another each repeat."""
    region = repeat % max(1, arena.rows_each // tokens)
    rows = torch.randint(0, min(tokens, arena.rows_each), (HKV, count)).sort(dim=1).values
    return region * tokens + rows


def measure(
    arena: Arena,
    case: str,
    make: Callable[[int], Tensor],
    dma_gbps: float,
    num_blocks: int = NUM_BLOCKS,
) -> float:
    """Time and record one case; returns its GB/s."""
    batches = [arena.lists(make(i)) for i in range(REPEATS + 5)]
    moved = batches[0].src.numel() * arena.row_bytes
    times = time_us(
        lambda i: gather_rows(arena.host_kv, batches[i], arena.rows, num_blocks=num_blocks),
        repeats=REPEATS,
    )
    gbps = moved / times["us"] / 1e3
    record(
        BENCH,
        case,
        {
            **times,
            "rows": batches[0].src.numel(),
            "gbps": gbps,
            "dma_gbps": dma_gbps,
            "share_of_dma": gbps / dma_gbps,
            "num_blocks": num_blocks,
        },
    )
    return gbps


def dma_peak(arena: Arena, case: str) -> float:
    """GB/s of cudaMemcpyAsync from pinned memory of a gather's size."""
    pinned = torch.empty(TARGET_BYTES, dtype=torch.uint8, pin_memory=True)
    target = arena.rows.view(torch.uint8).flatten()
    times = time_us(lambda _: target.copy_(pinned, non_blocking=True), repeats=REPEATS)
    gbps = TARGET_BYTES / times["us"] / 1e3
    record(BENCH, case, {**times, "gbps": gbps, "bytes": TARGET_BYTES})
    return gbps


def run_head_dim(arena_gb: int, head_dim: int) -> dict[int, float]:
    """All cases of one row size; returns GB/s by the spacing of rows in address order."""
    arena = Arena(arena_gb, head_dim)
    rows, size = f"rows{arena.row_bytes}", f"{arena_gb}GB"
    dma = dma_peak(arena, f"dma/{TARGET_BYTES >> 20}MB/{rows}")
    by_spacing = {}
    for spacing in (arena.row_bytes, *(s for s in SPACINGS if s > arena.row_bytes)):
        name = "dense" if spacing == arena.row_bytes else f"every{spacing >> 10}K"
        by_spacing[spacing] = measure(
            arena, f"{rows}/{name}/{size}", partial(spaced, arena, spacing), dma
        )
    count = TARGET_BYTES // arena.row_bytes // HKV
    for name, order in (("sorted", True), ("random", False)):
        make = partial(scattered, arena, count, order)
        measure(arena, f"{rows}/{name}/{size}", make, dma)
    for wanted in STEP_ROWS:
        make = partial(in_sequences, arena, wanted, SEQUENCE_TOKENS)
        measure(arena, f"{rows}/step{wanted}/{size}", make, dma)
    for blocks in (4, 8, 32):
        make = partial(spaced, arena, 4 << 10)
        measure(arena, f"{rows}/every4K/{size}/blocks{blocks}", make, dma, num_blocks=blocks)
    arena.host.close()
    return by_spacing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arena-gb", type=int, default=16, help="host memory to read from")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gather_rows: skipped, it measures a GPU's link to host memory")
        return 0
    torch.manual_seed(0)
    by_row_bytes = {4 * d: run_head_dim(arguments.arena_gb, d) for d in (128, 64)}
    held = {s: g for s, g in by_row_bytes[TARGET_ROW_BYTES].items() if s <= TARGET_SPACING}
    verdict = "ok" if min(held.values()) >= TARGET_GBPS else "MISSED"
    print(f"gather_rows: {verdict} slowest={min(held.values()):.1f}GB/s target={TARGET_GBPS}GB/s")
    return 0 if verdict == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())
