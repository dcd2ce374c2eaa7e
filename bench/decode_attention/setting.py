"""What a run of the bench is: sizes, device, trace, and where its records go."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from harness import record

from decode_attention.machine import Machine
from decode_attention.traces import RULES, ScaledTrace, Trace, load_trace, nearest_rule
from decode_attention.workload import Shape, Workload
from twilight_engine.config import KVConfig

if TYPE_CHECKING:
    from decode_attention.cases import Point

BENCH = "decode_attention"
SHARE = 0.007  # of the context: the traces' exact sets under `balanced`
MOST_TOKENS_OF_8_LAYERS = 256 << 10  # all requests; beyond, 4 layers: the host arena stays small


@dataclass(frozen=True)
class Sizes:
    """The shapes and lengths of the cases."""

    gqa: Shape
    mha: Shape
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    sweep: tuple[int, tuple[int, ...]]  # tokens, batches
    table7: tuple[int, ...]
    table7_rows: int  # surviving rows a head of the preset `paper`
    policies: tuple[int, ...]
    breakdown: tuple[tuple[int, int], ...]  # (tokens, batch)
    uneven: tuple[int, tuple[int, ...], tuple[int, ...]]  # tokens, mean exact rows a head, batches
    graph: int  # tokens of a step whose kernels have next to nothing to do


SIZES = {
    "llama-3.1-8b": Sizes(
        gqa=Shape(8),
        mha=Shape(1, 32, 32, 128),
        contexts=(8 << 10, 32 << 10, 128 << 10),
        batches=(1, 8),
        sweep=(32 << 10, (1, 2, 4, 8, 16)),
        table7=(10 << 10, 20 << 10, 30 << 10),
        table7_rows=256,
        policies=(8 << 10, 32 << 10, 128 << 10),
        breakdown=((32 << 10, 1), (128 << 10, 1), (128 << 10, 8)),
        uneven=(128 << 10, (512, 1024, 4096), (1, 8)),
        graph=512,
    ),
    "tiny": Sizes(
        gqa=Shape(2, 4, 2, 64),
        mha=Shape(1, 2, 2, 64),
        contexts=(512, 1024),
        batches=(1, 2),
        sweep=(512, (1, 2)),
        table7=(1024,),
        table7_rows=32,
        policies=(512, 1024),
        breakdown=((1024, 1),),
        uneven=(1024, (48,), (1, 2)),
        graph=512,
    ),
}


@dataclass(frozen=True)
class Setting:
    """Options of a run.

    Attributes:
        share: mean exact set as a share of the context; None: the trace's own counts.
        scatter: whether the sets are put at random places, as a worst case.
        steps: decode steps of a run; the first `warm` fill the hot rows and are not timed.
        repeats: of an op alone.
        records: JSON lines file to append to; None: none is written.
    """

    sizes: Sizes
    device: torch.device
    trace: Path
    share: float | None
    scatter: bool
    steps: int
    warm: int
    repeats: int
    records: Path | None
    machine: Machine
    traces: dict[str, Trace] = field(default_factory=dict)
    points: dict[tuple[int, int], Point] = field(default_factory=dict)  # what cases share

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def middle(self) -> int:
        """The step whose ops are timed alone."""
        return (self.warm + self.steps) // 2

    def gqa(self, tokens: int, batch: int) -> Shape:
        """The layer shape under test, with fewer layers in turn where the KV is large."""
        layers = self.sizes.gqa.num_layers
        fits = tokens * batch <= MOST_TOKENS_OF_8_LAYERS
        return replace(self.sizes.gqa, num_layers=layers if fits else layers // 2)

    @contextmanager
    def workload(
        self,
        shape: Shape,
        kv_config: KVConfig,
        tokens: int,
        batch: int,
        *,
        share: float | None,
        rule: str | None = None,
    ) -> Iterator[Workload]:
        """Filled sequences whose sets have this share of the context (None: trace's counts)."""
        name = rule or (nearest_rule(share) if share else next(iter(RULES)))
        if name not in self.traces:
            self.traces[name] = load_trace(self.trace, name)

        def make_trace(first: int, last: int) -> ScaledTrace:
            return ScaledTrace(
                self.traces[name],
                num_layers=shape.num_layers,
                first=first,
                last=last,
                share=share,
                tokens=tokens,
                scatter=self.scatter,
            )

        made = Workload(
            shape,
            kv_config,
            tokens=tokens,
            batch=batch,
            steps=self.steps,
            make_trace=make_trace,
            device=self.device,
            dtype=self.dtype,
        )
        try:
            yield made
        finally:
            made.close()
            del made
            gc.collect()  # steps and their graphs refer to each other
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def keep(self, case: str, metrics: dict[str, float], *, traced: bool = True) -> None:
        """Append a record, if records are kept.

        Args:
            traced: whether the case replays a trace; its name then tells other sets than the usual.
        """
        if traced and self.share is None:
            case += "/counts"
        elif traced and self.share != SHARE:
            case += f"/share{self.share:g}"
        if traced and self.scatter:
            case += "/random"
        if self.records is not None:
            record(BENCH, case, metrics, path=self.records)


def print_table(title: str, headers: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    """A table with right-aligned numbers."""
    cells = [headers, *(tuple(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    print(f"\n{title}")
    for row in cells:
        padded = [row[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(padded).rstrip())
    print(flush=True)
