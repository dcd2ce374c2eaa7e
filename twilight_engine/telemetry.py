"""Counters of decode steps: rows by grade, cache hits, bytes and link time, one definition each.

Kernels and copies count on the device; the host reads a block of steps at a time, never within one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twilight_engine.layout import NUM_COUNTERS

# Columns of a step's counts, by layer, sequence and KV head.
EXACT, INDEX, MISSED, DIRECT = range(4)
NUM_COUNTS = 4

Array = NDArray[np.int64]


@dataclass(frozen=True)
class Steps:
    """Decode steps of a run as arrays; T steps, L layers, H KV heads, one sequence.

    Attributes:
        context: [T] tokens visible in the step, its own included.
        exact: [T, L, H] exact rows beyond the resident ones (0 in dense layers).
        index: [T, L, H] rows with INT4 K and V.
        tail: [T, L, H] rows of the lowest grade: page means, or dropped under `renormalise`.
        resident: [T, L, H] sinks and window rows (all rows in dense layers).
        missed: [T, L, H] exact rows fetched into a hot slot in this step.
        direct: [T, L, H] exact rows that found no slot and were read from the host by attention.
        mass: [T, L, H] estimated mass of the exact grade, resident rows included; 1 if dense.
        counters: [T, L, NUM_COUNTERS] bytes and rows counted in the step by what moved them, for
            the whole batch (layout.COUNTER_*).
        link_seconds: [T] time the fetches and streams kept the link busy, whole batch.
        batch: [T] sequences in the step.
        batch_context: [T] sum of the contexts of the step's sequences.
    """

    context: Array
    exact: Array
    index: Array
    tail: Array
    resident: Array
    missed: Array
    direct: Array
    mass: NDArray[np.float32]
    counters: Array
    link_seconds: NDArray[np.float64]
    batch: Array
    batch_context: Array

    @property
    def hit_rate(self) -> float:
        """Share of the exact rows beyond the resident ones that were in a hot slot already."""
        wanted = int(self.exact.sum())
        if wanted == 0:
            return 1.0
        return 1.0 - (int(self.missed.sum()) + int(self.direct.sum())) / wanted


@dataclass(frozen=True)
class LayerCounts:
    """Where a layer's kernels write what they count in a step, [B, H] each, B the most sequences.

    The columns of Steps, exact to direct as int32 and mass as float32; zero, and mass one, where
    nothing is written.
    """

    exact: Tensor
    index: Tensor
    missed: Tensor
    direct: Tensor
    mass: Tensor


@dataclass(frozen=True)
class Visit:
    """One sequence in one step: who, how many tokens it sees, and where its window starts."""

    sequence_id: int
    context: int
    window_start: int


@dataclass
class _Block:
    """Steps that were copied to the host; B is the widest step's."""

    ids: Array  # [T, B] sequence ids, -1 beyond a step's sequences
    context: Array  # [T, B], 0 beyond
    window_start: Array  # [T, B]
    counts: Array  # [T, L, B, H, NUM_COUNTS]
    mass: NDArray[np.float32]  # [T, L, B, H]
    counters: Array  # [T, L, NUM_COUNTERS]
    link_seconds: NDArray[np.float64]  # [T]


@dataclass
class StepLog:
    """Per-step, per-layer, per-head counts of an engine; device buffers of `block_steps` steps.

    Reading synchronises once a block; a step only copies small tensors on its own stream. What a
    layer records goes to the same addresses in every step, so that a step can be a CUDA graph;
    end_step copies it to the step's place.

    Attributes:
        counters: [num_layers, NUM_COUNTERS] int64, cumulative, counted on the device.
        link_ns: [num_layers, 2] int64: start and end of this step's fetch by the device's clock,
            as gather_rows notes them.
    """

    num_layers: int
    max_num_seqs: int
    num_kv_heads: int
    dense_layers: tuple[int, ...]
    sliding_windows: tuple[int | None, ...]
    num_sink: int
    device: torch.device
    block_steps: int = 128
    counters: Tensor = field(init=False)
    link_ns: Tensor = field(init=False)
    _blocks: list[_Block] = field(init=False, default_factory=list)
    _pending: list[list[Visit]] = field(init=False, default_factory=list)
    _link: list[list[Callable[[], float]]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        rows = (self.max_num_seqs, self.num_kv_heads)
        steps = (self.block_steps, self.num_layers)
        self.counters = torch.zeros(
            self.num_layers, NUM_COUNTERS, dtype=torch.int64, device=self.device
        )
        no_fetch = torch.tensor([torch.iinfo(torch.int64).max, 0], device=self.device)
        self._no_fetch = no_fetch.expand(self.num_layers, 2).contiguous()
        self.link_ns = self._no_fetch.clone()
        self._link_ns = self._no_fetch.repeat(self.block_steps, 1, 1)
        self._counts = torch.zeros(*steps, NUM_COUNTS, *rows, dtype=torch.int32, device=self.device)
        self._mass = torch.ones(*steps, *rows, dtype=torch.float32, device=self.device)
        self._step_counts = torch.zeros_like(self._counts[0])
        self._step_mass = torch.ones_like(self._mass[0])
        # The counters before and after each step; what prefill counts in between is not a step's.
        self._totals = torch.zeros(
            2,
            self.block_steps,
            self.num_layers,
            NUM_COUNTERS,
            dtype=torch.int64,
            device=self.device,
        )

    def begin_step(self, sequences: list[Visit]) -> None:
        """Start a step over these sequences, in batch order."""
        if len(self._pending) == self.block_steps:
            self.flush()
        self._step_counts.zero_()
        self._step_mass.fill_(1.0)
        self.link_ns.copy_(self._no_fetch)
        self._totals[0, len(self._pending)].copy_(self.counters)
        self._pending.append(sequences)
        self._link.append([])

    def layer(self, layer: int) -> LayerCounts:
        """A layer's counts of the current step, for its kernels to write: no copy is needed."""
        exact, index, missed, direct = self._step_counts[layer]
        return LayerCounts(exact, index, missed, direct, self._step_mass[layer])

    def record_layer(self, layer: int, counts: dict[int, Tensor]) -> None:
        """Copy a layer's counts (column -> [B, H] int32) that were not written in place."""
        for column, values in counts.items():
            self._step_counts[layer, column, : values.shape[0]].copy_(values)

    def end_step(self) -> None:
        """Close the step: its counters are what was added since begin_step."""
        row = len(self._pending) - 1
        self._counts[row].copy_(self._step_counts)
        self._mass[row].copy_(self._step_mass)
        self._link_ns[row].copy_(self.link_ns)
        self._totals[1, row].copy_(self.counters)

    def time_link(self) -> LinkTimer:
        """A context manager around copies over the link that do not note link_ns themselves."""
        return LinkTimer(self.device, self._link[-1])

    def _tokens(self, context: Array, window_start: Array) -> tuple[Array, Array]:
        """Visible and resident tokens [T, L] of steps with these contexts and windows [T]."""
        windows = np.array([w or np.iinfo(np.int64).max for w in self.sliding_windows])
        start = np.maximum(0, context[:, None] - windows)
        visible = context[:, None] - start
        listed = np.maximum(0, window_start[:, None] - np.maximum(start, self.num_sink))
        listed[:, list(self.dense_layers)] = 0
        return visible, visible - listed

    def flush(self) -> None:
        """Copy what the device holds to the host; waits for the steps to finish."""
        steps = len(self._pending)
        if steps == 0:
            return
        totals = self._totals[:, :steps].cpu().numpy()
        visits = np.zeros((3, steps, max(map(len, self._pending))), dtype=np.int64)
        visits[0] = -1
        for t, step in enumerate(self._pending):
            for i, name in enumerate(("sequence_id", "context", "window_start")):
                visits[i, t, : len(step)] = [getattr(visit, name) for visit in step]
        self._blocks.append(
            _Block(
                ids=visits[0],
                context=visits[1],
                window_start=visits[2],
                counts=np.moveaxis(self._counts[:steps].cpu().numpy().astype(np.int64), 2, -1),
                mass=self._mass[:steps].cpu().numpy().copy(),
                counters=totals[1] - totals[0],
                link_seconds=self._link_seconds(),
            )
        )
        self._pending, self._link = [], []

    def _link_seconds(self) -> NDArray[np.float64]:
        """[T] of the pending steps: what the fetches noted, and what was timed from outside."""
        start, end = self._link_ns[: len(self._pending)].cpu().numpy().transpose(2, 0, 1)
        seconds = np.array([sum(read() for read in reads) for reads in self._link], np.float64)
        seconds += np.where(end > 0, end - start, 0).sum(1) / 1e9
        return seconds

    def clear(self) -> None:
        """Forget every step (the cumulative counters stay)."""
        self.flush()
        self._blocks = []

    def request(self, sequence_id: int) -> Steps:
        """All steps of one sequence."""
        self.flush()
        layers, heads = self.num_layers, self.num_kv_heads
        found: list[tuple[_Block, Array, Array]] = []
        for block in self._blocks:
            t, b = np.nonzero(block.ids == sequence_id)
            found.append((block, t, b))

        def joined(parts: list[Array], *shape: int) -> Array:
            return np.concatenate([np.zeros((0, *shape), dtype=np.int64), *parts])

        context = joined([block.context[t, b] for block, t, b in found])
        window_start = joined([block.window_start[t, b] for block, t, b in found])
        counts = joined([block.counts[t, :, b] for block, t, b in found], layers, heads, NUM_COUNTS)
        visible, resident = (
            np.repeat(tokens[..., None], heads, axis=2)
            for tokens in self._tokens(context, window_start)
        )
        exact, index = counts[..., EXACT], counts[..., INDEX]
        mass = [np.ones((0, layers, heads), dtype=np.float32)]
        return Steps(
            context=context,
            exact=exact,
            index=index,
            tail=np.maximum(visible - resident - exact - index, 0),
            resident=resident,
            missed=counts[..., MISSED],
            direct=counts[..., DIRECT],
            mass=np.concatenate(mass + [block.mass[t, :, b] for block, t, b in found]),
            counters=joined([block.counters[t] for block, t, _ in found], layers, NUM_COUNTERS),
            link_seconds=np.concatenate(
                [np.zeros(0)] + [block.link_seconds[t] for block, t, _ in found]
            ),
            batch=joined([(block.ids[t] >= 0).sum(1) for block, t, _ in found]),
            batch_context=joined([block.context[t].sum(1) for block, t, _ in found]),
        )


class LinkTimer:
    """Times what runs inside it: by events on the current stream of a GPU, else by the clock."""

    def __init__(self, device: torch.device, reads: list[Callable[[], float]]) -> None:
        self._cuda = device.type == "cuda"
        self._reads = reads

    def __enter__(self) -> None:
        if self._cuda:
            self._start = torch.cuda.Event(enable_timing=True)
            self._start.record()
        else:
            self._started = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        if self._cuda:
            start, end = self._start, torch.cuda.Event(enable_timing=True)
            end.record()

            def read() -> float:
                end.synchronize()
                return float(start.elapsed_time(end)) / 1e3

            self._reads.append(read)
        else:
            seconds = time.perf_counter() - self._started
            self._reads.append(lambda: seconds)
