"""A gather while another stream reads device memory at its full rate: what each costs the other.

The reader sums rows of 4 KB: it writes a thousandth of what it reads, and its thread blocks are
many and short (64 KB each, so some 10 us). Blocks of the gather, on a stream of higher priority,
then need not wait for a place on the multiprocessors, and its times are those of its reads; were
`beside_us` far above `beside_copy_us`, they did wait. A reader whose blocks fill the
multiprocessors for all of its run, as a sum to one number does, or one of the same priority with
thousands of blocks waiting, lets a gather start only about when it ends.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence

import torch
from decode_attention.timing import spread, time_work
from gather_lists import DEVICE, FULL_ROW_BYTES, LAYERS, REPEATS, Arena, Lists
from harness import L2_FLUSH_BYTES
from torch import Tensor

READ_BYTES = 2 * L2_FLUSH_BYTES  # 512 MB: little of it is still in the L2 from the read before
SUMMED = 1 << 10  # float32 a sum
WARMUP = 2
GATHERS, READS = 40, 200  # side by side; reads take 190 us or more, gathers up to 600
HOLDING_FLUSHES = 32  # some 6 ms, in which to queue the gathers
LEAST_OVERLAPPED = 8
UNTOUCHED = (2**63 - 1, 0)  # start and end before a gather has written its own

Span = tuple[float, float]  # start and end, in microseconds


class Gathers:
    """Gathers one after the other, each of new lists and of another layer than those before it."""

    def __init__(
        self, arena: Arena, make: Callable[[], Tensor], count: int, num_blocks: int
    ) -> None:
        self.arena, self.num_blocks = arena, num_blocks
        self.fetches = [Lists.full(make()[None]).fetch(0) for _ in range(count)]
        self.clocks = torch.tensor([UNTOUCHED] * count, dtype=torch.int64, device=DEVICE)
        self._turns = itertools.count()

    def __call__(self) -> None:
        i = next(self._turns)
        self.arena.gather(
            i * 5 % LAYERS, self.fetches[i], FULL_ROW_BYTES, self.num_blocks, self.clocks[i]
        )

    def copy_us(self) -> list[float]:
        """Of each, from the first block's start to the last one's end, by the GPU's clock."""
        return [(end - start) / 1e3 for start, end in self.clocks.tolist()]


class Beside:
    """The arena, a buffer in device memory, and the streams on which both are read."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._buffer = torch.zeros(READ_BYTES // (4 * SUMMED), SUMMED, device=DEVICE)
        self._sums = torch.empty(len(self._buffer), device=DEVICE)
        self._gather_stream = torch.cuda.Stream(DEVICE, priority=-1)
        self._read_stream = torch.cuda.Stream(DEVICE)

    def measure(self, make: Callable[[], Tensor], num_blocks: int) -> dict[str, float]:
        """Lists [B, Hkv, C] of make(), new ones for each gather: times of both, alone and beside.

        Caches are cold in all of them: lists differ, and the L2 is overwritten before a gather that
        is alone, as the reader does while a gather is beside it.
        """
        alone = Gathers(self.arena, make, WARMUP + REPEATS, num_blocks)
        gather_us = time_work(
            DEVICE, alone, repeats=REPEATS, before=self.arena.flush_l2, warmup=WARMUP
        )
        read_us = time_work(DEVICE, self._read, repeats=REPEATS, warmup=WARMUP)
        beside = Gathers(self.arena, make, GATHERS, num_blocks)
        gathers, reads = self._side_by_side(beside)
        gathers_kept, reads_kept = overlapped(gathers, reads), overlapped(reads, gathers)
        copies = beside.copy_us()
        metrics = {
            **spread(gather_us),
            **_named("beside", spread(_lengths(gathers, gathers_kept))),
            "copy_us": statistics.median(alone.copy_us()[WARMUP:]),
            "beside_copy_us": statistics.median(copies[i] for i in gathers_kept),
            **_named("reader", spread(read_us)),
            **_named("reader_beside", spread(_lengths(reads, reads_kept))),
            "granules": statistics.mean(
                self.arena.granules(fetch.src, fetch.counts) for fetch in beside.fetches
            ),
            "rows": float(beside.fetches[0].src.numel()),
        }
        for reader in ("reader", "reader_beside"):
            metrics[f"{reader}_gbps"] = READ_BYTES / metrics[f"{reader}_us"] / 1e3
        return metrics

    def _read(self) -> None:
        torch.sum(self._buffer, dim=1, out=self._sums)

    def _side_by_side(self, gathers: Gathers) -> tuple[list[Span], list[Span]]:
        """Both loops, on their streams; they start when the last of some flushes has ended.

        The gathers are queued first: by the end of the flushes, or at least faster than they run.
        """
        torch.cuda.synchronize()
        zero = torch.cuda.Event(enable_timing=True)
        for _ in range(HOLDING_FLUSHES):
            self.arena.flush_l2()
        zero.record()
        gather_events = _queue(self._gather_stream, gathers, GATHERS)
        read_events = _queue(self._read_stream, self._read, READS)
        torch.cuda.synchronize()
        return _spans(zero, gather_events), _spans(zero, read_events)


def overlapped(spans: Sequence[Span], others: Sequence[Span]) -> list[int]:
    """Which spans lie between the end of the first of the others and the start of the last.

    Raises: RuntimeError where they are too few to be measured by.
    """
    first, last = others[0][1], others[-1][0]
    kept = [i for i, (start, end) in enumerate(spans) if first <= start and end <= last]
    if len(kept) < LEAST_OVERLAPPED:
        raise RuntimeError(
            f"{len(kept)} of {len(spans)} runs ({spans[0][0]:.0f} to {spans[-1][1]:.0f} us) had "
            f"the other stream's beside them ({first:.0f} to {last:.0f} us); "
            f"at least {LEAST_OVERLAPPED} are needed"
        )
    return kept


def _queue(
    stream: torch.cuda.Stream, work: Callable[[], object], count: int
) -> list[tuple[torch.cuda.Event, torch.cuda.Event]]:
    """Runs on the stream, after what the current one has to do, between events."""
    stream.wait_stream(torch.cuda.current_stream())
    events = []
    with torch.cuda.stream(stream):
        for _ in range(count):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            events.append((start, end))
    return events


def _spans(
    zero: torch.cuda.Event, events: list[tuple[torch.cuda.Event, torch.cuda.Event]]
) -> list[Span]:
    return [(zero.elapsed_time(start) * 1e3, zero.elapsed_time(end) * 1e3) for start, end in events]


def _lengths(spans: Sequence[Span], kept: Sequence[int]) -> list[float]:
    return [spans[i][1] - spans[i][0] for i in kept]


def _named(name: str, times: dict[str, float]) -> dict[str, float]:
    return {f"{name}_{key}": value for key, value in times.items()}
