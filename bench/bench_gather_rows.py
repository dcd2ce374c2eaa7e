"""Rows from a large host arena to hot slots: GB/s and microseconds, beside the DMA peak.

Cases, of N-byte rows in an arena of 32 layers and 8 KV heads: `rowsN/dense` copies rows that are
neighbours (`dense-b8`: of 8 sequences), `rowsN/everyK` rows in address order, one every K bytes,
`rowsN/random` rows in no order, all of one layer at a time. `rowsN/stepR` is what the layers of a
decode step ask for, as a CUDA graph of all 32 in turn: R random rows a head, in address order, of a
sequence of 131,072 tokens (64 MB a head at 512 bytes); `us` is for one layer. With --trace, the
same with the clustered lists of a recorded decode: `trace` those rows of a set that the 16 steps
before did not have, `trace-sets` whole sets. Translations are cold: a repeat reads regions of the
arena that were last read more than 1 GB of granules ago.
With --beside, `rows512/beside-dense` and `beside-random`: 211 rows of each of 8 sequences and 8
heads, alone (`us`) and while another stream reads device memory at its full rate (`beside_us`);
`reader_us` and `reader_beside_us` are that stream's time for 512 MB, `copy_us` is the gather's from
its first block's start to its last one's end, without the wait for a place on the GPU.
Needs a CUDA device and the arena's bytes of free host memory; 64 GB take about 10 seconds.

    python bench/bench_gather_rows.py --trace selection_trace.npz --json
    python bench/bench_gather_rows.py --arena-gb 1                     # a quick check
    python bench/bench_gather_rows.py --sweep                          # numbers of blocks
    python bench/bench_gather_rows.py --beside --json                  # beside reads of HBM

Targets: 95 % of the link's rate at 512-byte rows, one every 16 KB or less, 85 % at 256 bytes; 20,
50 and 115 us a layer for 64, 256 and 1,024 rows a head.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from decode_attention.timing import Replay, spread, time_work
from decode_attention.traces import require_file
from gather_beside import Beside
from gather_lists import (
    DEVICE,
    FULL_ROW_BYTES,
    LAYERS,
    REPEATS,
    Arena,
    Lists,
    beside_rows,
    random_passes,
    scattered,
    spaced,
    trace_passes,
)
from harness import RESULTS, record
from torch import Tensor

from twilight_engine.ops.gather_rows import NUM_BLOCKS

BENCH = "gather_rows"
DEFAULT_RECORDS = RESULTS / f"{BENCH}.jsonl"
ROW_BYTES = (512, 256)
SPACINGS = (1 << 10, 4 << 10, 16 << 10, 64 << 10)
STEP_TARGETS_US = {64: 20.0, 256: 50.0, 1024: 115.0}  # by rows a head
SHARE_TARGETS = {512: 0.95, 256: 0.85}  # of the link's rate, by row bytes
TARGET_SPACING = 16 << 10
TARGET_ARENA_GB = 64  # a smaller one has warm translations
SWEEP = (16, 32, 64, 128)  # thread blocks
BESIDE_BLOCKS = (8, 16, 64)


class Bench:
    """An arena, and where the records go."""

    def __init__(self, arena: Arena, records: Path | None) -> None:
        self.arena, self.records = arena, records
        self.missed: list[str] = []

    def bulk(
        self,
        case: str,
        make: Callable[[int], Tensor],
        row_bytes: int,
        *,
        num_blocks: int = NUM_BLOCKS,
        least_share: float = 0.0,
    ) -> None:
        """Rows of one layer at a time, src [B, Hkv, C] from make(repeat)."""
        arena = self.arena
        batches = [Lists.full(make(i)[None]).fetch(0) for i in range(REPEATS + 2)]
        turns = itertools.count()

        def work() -> None:
            i = next(turns)
            arena.gather(i * 5 % LAYERS, batches[i], row_bytes, num_blocks)

        times = spread(time_work(DEVICE, work, repeats=REPEATS, before=arena.flush_l2))
        moved = batches[0].src.numel() * row_bytes
        gbps = moved / times["us"] / 1e3
        self._keep(case, num_blocks, times, gbps, {"rows": moved // row_bytes})
        if gbps < least_share * arena.link_gbps:
            self.missed.append(case)

    def step(
        self,
        case: str,
        passes: list[Lists],
        *,
        num_blocks: int = NUM_BLOCKS,
        most_us: float = float("inf"),
    ) -> None:
        """All layers in turn, lists of 512-byte rows that change with each pass."""
        arena, first = self.arena, passes[0]
        current = Lists(first.src.clone(), first.counts.clone())
        fetches = [current.fetch(layer) for layer in range(LAYERS)]
        turns = itertools.cycle(passes)

        def work() -> None:
            for layer, fetch in enumerate(fetches):
                arena.gather(layer, fetch, FULL_ROW_BYTES, num_blocks)

        def before() -> None:
            arena.flush_l2()
            lists = next(turns)
            current.src.copy_(lists.src)
            current.counts.copy_(lists.counts)

        replay = Replay(DEVICE, work)
        measured = time_work(DEVICE, replay, repeats=REPEATS, before=before)
        times = spread([us / LAYERS for us in measured])
        rows = float(np.mean([float(p.counts.sum()) / LAYERS for p in passes]))
        granules = np.mean([arena.granules(first.src[i], first.counts[i]) for i in range(LAYERS)])
        more = {
            "rows": rows,
            "granules": float(granules),
            "granules_per_us": float(granules) / times["us"],
        }
        self._keep(case, num_blocks, times, rows * FULL_ROW_BYTES / times["us"] / 1e3, more)
        if times["us"] > most_us:
            self.missed.append(case)

    def beside(self, case: str, make: Callable[[], Tensor], reads: Beside, num_blocks: int) -> None:
        """512-byte rows of one layer at a time, alone and while device memory is read."""
        metrics = reads.measure(make, num_blocks)
        gbps = metrics["rows"] * FULL_ROW_BYTES / metrics["us"] / 1e3
        self._keep(case, num_blocks, metrics, gbps, {})

    def _keep(
        self,
        case: str,
        num_blocks: int,
        times: dict[str, float],
        gbps: float,
        more: dict[str, float],
    ) -> None:
        link = self.arena.link_gbps
        metrics = {**times, "gbps": gbps, "link_gbps": link, "share_of_link": gbps / link, **more}
        metrics["num_blocks"] = num_blocks
        case += f"/{self.arena.name}"
        if num_blocks != NUM_BLOCKS:
            case += f"/blocks{num_blocks}"
        if self.records is not None:
            record(BENCH, case, metrics, path=self.records)
        else:
            print(case, " ".join(f"{k}={v:.4g}" for k, v in metrics.items()), flush=True)


def run_bulk(bench: Bench, row_bytes: int) -> None:
    """One row size: neighbours, rows ever farther apart, and no order."""
    arena, rows, share = bench.arena, f"rows{row_bytes}", SHARE_TARGETS[row_bytes]
    for name, batch in (("dense", 1), ("dense-b8", 8)):
        make = partial(spaced, arena, row_bytes, row_bytes, batch)
        bench.bulk(f"{rows}/{name}", make, row_bytes, least_share=share)
    for spacing in SPACINGS:
        make = partial(spaced, arena, row_bytes, spacing, 1)
        least = share if spacing <= TARGET_SPACING else 0.0
        bench.bulk(f"{rows}/every{spacing >> 10}K", make, row_bytes, least_share=least)
    bench.bulk(f"{rows}/random", partial(scattered, arena, row_bytes), row_bytes)


def run_steps(bench: Bench, trace: Path | None) -> None:
    """A step's lists: random ones, and as recorded."""
    rows = f"rows{FULL_ROW_BYTES}"
    for count, most_us in STEP_TARGETS_US.items():
        bench.step(f"{rows}/step{count}", random_passes(bench.arena, count), most_us=most_us)
    if trace is not None:
        bench.step(f"{rows}/trace", trace_passes(bench.arena, trace, misses=True))
        bench.step(f"{rows}/trace-sets", trace_passes(bench.arena, trace, misses=False))


def run_sweep(bench: Bench, trace: Path | None) -> None:
    """Every number of blocks over a few cases, to choose the defaults by."""
    rows, arena = f"rows{FULL_ROW_BYTES}", bench.arena
    steps = {f"step{count}": random_passes(arena, count) for count in STEP_TARGETS_US}
    if trace is not None:
        steps["trace"] = trace_passes(arena, trace, misses=True)
    for num_blocks in SWEEP:
        for name, passes in steps.items():
            bench.step(f"{rows}/{name}", passes, num_blocks=num_blocks)
        for row_bytes in ROW_BYTES:
            make = partial(spaced, arena, row_bytes, row_bytes, 1)
            bench.bulk(f"rows{row_bytes}/dense", make, row_bytes, num_blocks=num_blocks)


def run_beside(bench: Bench) -> None:
    """A step's misses beside a reader of device memory, by numbers of blocks."""
    reads = Beside(bench.arena)
    for num_blocks in BESIDE_BLOCKS:
        for name, dense in (("dense", True), ("random", False)):
            make = partial(beside_rows, bench.arena, dense=dense)
            bench.beside(f"rows{FULL_ROW_BYTES}/beside-{name}", make, reads, num_blocks)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--arena-gb", type=int, default=64, help="host memory to read from (default: %(default)s)")
    add("--trace", type=Path, help="recorded selections, for lists that cluster as real ones do")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--sweep", action="store_true", help="numbers of blocks instead")
    instead.add_argument("--beside", action="store_true", help="beside reads of HBM instead")
    add(
        "--json",
        type=Path,
        nargs="?",
        const=DEFAULT_RECORDS,
        help="append records, to bench/results/ or to this file",
    )
    return parser.parse_args()


def main() -> int:
    args = parse()
    if not torch.cuda.is_available():
        print(f"{BENCH}: skipped, it measures a GPU's link to host memory")
        return 0
    if args.trace is not None:
        require_file(args.trace)
    torch.manual_seed(0)
    bench = Bench(Arena(args.arena_gb), args.json)
    if args.sweep:
        run_sweep(bench, args.trace)
    elif args.beside:
        run_beside(bench)
    else:
        for row_bytes in ROW_BYTES:
            run_bulk(bench, row_bytes)
        run_steps(bench, args.trace)
    bench.arena.host.close()
    if args.sweep or args.beside or args.arena_gb < TARGET_ARENA_GB:
        return 0
    verdict = f"targets missed: {', '.join(bench.missed)}" if bench.missed else "all targets met"
    print(f"{BENCH}: {verdict}; the link's rate is {bench.arena.link_gbps:.1f} GB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
