"""The frontier's points: what a way of grading loses, and what it costs, on simulated steps."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from twilight_engine.eval.records import Record
from twilight_engine.eval.simulation.attention import LayerTrace
from twilight_engine.eval.simulation.grading import Grading
from twilight_engine.eval.simulation.passage import Outcome, kl_divergence, log_loss
from twilight_engine.eval.simulation.row_cache import cache_slots, lru_misses
from twilight_engine.models.decoder import DecoderModel

# Rows a graded layer's row cache holds, as a share of its rows, the same for every grading.
CACHE_SHARE = 1 / 16
ITEM_BYTES = 2  # bytes are counted for 16-bit rows, whatever dtype the simulation runs in
COLD_STEPS = 8  # of a passage; the row cache fills, and its traffic is not counted
# Where no layer is graded: dense attention, from the device.
ALL_EXACT = {
    "index_rows": 0.0,
    "mass": 1.0,
    "mass_kept_share": 1.0,
    "mass_p1": 1.0,
    "weakest_head": 1.0,
    "output_error": 0.0,
}
WORST = ("mass_p1", "weakest_head")  # of several passages the least counts


@dataclass(frozen=True)
class FrontierPoint:
    """One grading and cache size on all passages; a mean over targets, or over graded
    (layer, KV head, step).

    Attributes:
        name: which grading.
        cache_share: of a graded layer's rows that its row cache holds.
        kl: KL(dense || graded) of the next token, nats. ppl, ppl_dense: perplexity of the targets.
        top1: share of targets whose most probable token is dense attention's.
        exact_rows: exact rows a graded layer and KV head beyond the resident ones.
        exact_share: the same as a share of the context.
        index_rows: rows of the index grade.
        link_bytes: from the host a step of one sequence, past the cold steps, behind a row cache.
        device_share: device bytes (index, dense layers, row cache) of the KV's bytes.
        device_reads: device bytes that attention reads a step.
        mass: realised group-mean mass of the exact grade by the true softmax.
        mass_kept_share: share of (layer, KV head, step) with mass >= attn_top_p - 0.01.
        mass_p1, weakest_head: its first percentile; the least mass of a single query head.
        output_error: relative L2 error of the attention output.
        on_front: no other point is as good in KL, link bytes and device bytes, and better in one.
    """

    name: str
    cache_share: float
    kl: float
    ppl: float
    ppl_dense: float
    top1: float
    exact_rows: float
    exact_share: float
    index_rows: float
    link_bytes: float
    device_share: float
    device_reads: float
    mass: float
    mass_kept_share: float
    mass_p1: float
    weakest_head: float
    output_error: float
    on_front: bool = False

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def measure(
    model: DecoderModel,
    grading: Grading,
    outcome: Outcome,
    dense: Outcome,
    targets: torch.Tensor,
    length: int,
    cache_shares: Sequence[float],
) -> Record:
    """A passage's part of FrontierPoint: nll and nll_dense in place of perplexities, and what
    hangs on the row cache as a list by cache share, all from the same traces.

    Args:
        outcome, dense: of the same passage; targets: [T], its tokens; length: of the passage,
            the last target left out.
    """
    traces = list(outcome.traces.values())
    figures = _grades(traces, grading) if traces else {**ALL_EXACT, "exact_rows": float(length)}
    rows, index_rows = figures["exact_rows"], figures["index_rows"]
    return {
        "kl": kl_divergence(dense.log_probs, outcome.log_probs).mean().item(),
        "nll": log_loss(outcome.log_probs, targets),
        "nll_dense": log_loss(dense.log_probs, targets),
        "top1": (outcome.log_probs.argmax(-1) == dense.log_probs.argmax(-1)).float().mean().item(),
        **figures,
        "exact_share": rows / length,
        "device_reads": _device_reads(model, grading, len(traces), length, rows, index_rows),
        "caches": _caches(model, grading, outcome, cache_shares),
    }


def _grades(traces: Sequence[LayerTrace], grading: Grading) -> dict[str, float]:
    """Rows by grade, and the mass that the exact ones hold, over the graded layers."""
    mass = torch.stack([trace.mass for trace in traces])
    return {
        "exact_rows": torch.stack([t.wanted.sum(-1) for t in traces]).float().mean().item(),
        "index_rows": torch.stack([t.index_rows for t in traces]).float().mean().item(),
        "mass": mass.mean().item(),
        "mass_kept_share": (mass >= grading.attn_top_p - 0.01).float().mean().item(),
        "mass_p1": mass.flatten().kthvalue(1 + mass.numel() // 100).values.item(),
        "weakest_head": min(trace.head_mass.min().item() for trace in traces),
        "output_error": torch.stack([trace.output_error for trace in traces]).mean().item(),
    }


def _device_reads(
    model: DecoderModel, grading: Grading, graded: int, length: int, rows: float, index_rows: float
) -> float:
    config = model.config
    row_bytes = 2 * config.head_dim * ITEM_BYTES
    index_bytes = grading.index_bytes_a_token(config.head_dim)
    without_v = grading.replace(v_index="none").index_bytes_a_token(config.head_dim)
    head = length * without_v + index_rows * (index_bytes - without_v) + rows * row_bytes
    dense = (config.num_layers - graded) * length * row_bytes
    return config.num_kv_heads * (graded * head + dense)


def _caches(
    model: DecoderModel, grading: Grading, outcome: Outcome, cache_shares: Sequence[float]
) -> list[dict[str, float]]:
    """Link bytes and device share of each cache share."""
    config = model.config
    row_bytes = 2 * config.head_dim * ITEM_BYTES
    missed = torch.zeros(len(cache_shares), dtype=torch.float64)
    for trace in outcome.traces.values():
        slots = torch.stack([cache_slots(trace.wanted, share) for share in cache_shares])
        misses = lru_misses(trace.wanted, slots)[..., COLD_STEPS:]
        missed += misses.sum(1).double().mean(-1).cpu()
    graded = len(outcome.traces)
    index_bytes = grading.index_bytes_a_token(config.head_dim)
    found = []
    for share, rows in zip(cache_shares, missed.tolist(), strict=True):
        on_device = graded * (index_bytes + share * row_bytes)
        on_device += (config.num_layers - graded) * row_bytes
        found.append(
            {
                "cache_share": share,
                "link_bytes": rows * grading.fetched_bytes_a_row(row_bytes),
                "device_share": on_device / (config.num_layers * row_bytes),
            }
        )
    return found


def points(name: str, records: Sequence[Record]) -> list[FrontierPoint]:
    """A grading's point for each cache share: means over passages, minima of minima.

    Args:
        records: of `measure`, one a passage, of the same cache shares.
    """
    found: list[FrontierPoint] = []
    for caches in zip(*(record["caches"] for record in records), strict=True):
        flat = [{**record, **cache} for record, cache in zip(records, caches, strict=True)]
        values: dict[str, Any] = {
            field.name: (min if field.name in WORST else statistics.fmean)(
                [record[field.name] for record in flat]
            )
            for field in dataclasses.fields(FrontierPoint)
            if field.name in flat[0]
        }
        values["ppl"] = math.exp(statistics.fmean(record["nll"] for record in flat))
        values["ppl_dense"] = math.exp(statistics.fmean(record["nll_dense"] for record in flat))
        found.append(FrontierPoint(name=name, **values))
    return found


def mark_front(points: Iterable[FrontierPoint]) -> list[FrontierPoint]:
    """Mark the points that no other dominates in KL, link bytes and device bytes."""
    points = list(points)

    def cost(point: FrontierPoint) -> tuple[float, float, float]:
        return point.kl, point.link_bytes, point.device_share

    def dominated(point: FrontierPoint) -> bool:
        mine = cost(point)
        return any(
            all(a <= b for a, b in zip(cost(other), mine, strict=True)) and cost(other) != mine
            for other in points
        )

    return [dataclasses.replace(point, on_front=not dominated(point)) for point in points]
