"""The frontier: what each way of grading loses, and what it costs, on a model's own texts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from twilight_engine.config import PRESETS, KVConfig, SparseConfig
from twilight_engine.eval.items import Passage
from twilight_engine.eval.simulation.grading import Grading
from twilight_engine.eval.simulation.passage import (
    Outcome,
    kl_divergence,
    prefill_passage,
    simulate,
)
from twilight_engine.eval.simulation.row_cache import cache_slots, lru_misses
from twilight_engine.models.decoder import DecoderModel

# Rows each layer keeps on the device, as a share of its rows, the same for every grading.
CACHE_SHARE = 1 / 16
ITEM_BYTES = 2  # bytes are counted for 16-bit rows, whatever dtype the simulation runs in
COLD_STEPS = 8  # of a passage; the row cache fills, and its traffic is not counted
WHOLE_MASSES = (0.8, 0.9, 0.95)  # the masses that the promise is checked at


@dataclass(frozen=True)
class FrontierPoint:
    """One grading on all passages; a mean over targets, or over graded (layer, KV head, step).

    Attributes:
        name: which grading.
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


def gradings(num_layers: int) -> dict[str, Grading]:
    """The sweep: the presets, each knob around the default, and what peers would do."""
    base = Grading.of(KVConfig(), SparseConfig(), num_layers)
    found = {
        name: Grading.of(KVConfig.preset(name), SparseConfig.preset(name), num_layers)
        for name in PRESETS
    }
    paper, lean = found["paper"], found["lean"]
    found["paper@0.85"] = paper.replace(attn_top_p=0.85)
    found["paper, K per channel"] = paper.replace(k_index="int4_channel", quest_share=None)
    found["dense-int4"] = base.replace(attn_top_k=1, index_top_p=1.0)
    found["dense-int4, K per token"] = found["dense-int4"].replace(k_index="int4_token")
    for p in (0.5, 0.6, 0.7, 0.9, 0.95):
        found[f"balanced@{p}"] = base.replace(attn_top_p=p)
    for p in (0.8, 0.85, 0.9, 0.98):
        found[f"lean@{p}"] = lean.replace(attn_top_p=p)
    for p in (0.9, 0.95, 0.98, 1.0):
        found[f"index {p}"] = base.replace(index_top_p=p)
    found["union"] = base.replace(group_rule="union")
    found["renormalise"] = base.replace(tail="renormalise")
    found["V int2"] = base.replace(v_index="int2")
    found["V int8"] = base.replace(v_index="int8")
    found["K per token"] = base.replace(k_index="int4_token")
    found["K int2"] = base.replace(k_index="int2_channel")
    found["K int8"] = base.replace(k_index="int8_token")
    found["V only, K int8"] = base.replace(k_index="int8_token", value_only=True)
    found["V only, K int8, lean"] = lean.replace(k_index="int8_token", value_only=True)
    found["no dense layer"] = base.replace(dense_layers=())
    found["dense layer 0"] = base.replace(dense_layers=(0,))
    for p in WHOLE_MASSES:
        for margin in (0.0, 2.0):
            found[f"margin {margin:g} @{p}"] = base.replace(attn_top_p=p, mass_margin=margin)
    return found


@torch.inference_mode()
def frontier(
    model: DecoderModel,
    passages: Sequence[Passage],
    sweep: dict[str, Grading],
    *,
    cache_share: float = CACHE_SHARE,
    progress: Callable[[str], None] = lambda name: None,
) -> list[FrontierPoint]:
    """Simulate every grading on every passage.

    Args:
        sweep: name -> grading.
        cache_share: of a graded layer's rows that its row cache holds.
        progress: called with the name of each grading and passage done.
    Raises: NotImplementedError for a model with sliding windows.
    """
    measured: dict[str, list[FrontierPoint]] = {name: [] for name in sweep}
    dense = Grading(dense_layers=tuple(range(model.config.num_layers)))
    for passage in passages:
        prefilled = prefill_passage(model, list(passage.context_ids), list(passage.target_ids))
        reference = simulate(model, prefilled, dense)
        for name, grading in sweep.items():
            outcome = simulate(model, prefilled, grading)
            point = _measure(
                name, model, grading, outcome, reference, prefilled.next_ids, cache_share
            )
            measured[name].append(point)
            progress(name)
    return mark_front([_mean(points) for points in measured.values()])


def _measure(
    name: str,
    model: DecoderModel,
    grading: Grading,
    outcome: Outcome,
    dense: Outcome,
    targets: torch.Tensor,
    cache_share: float,
) -> FrontierPoint:
    traces = list(outcome.traces.values())
    mass = torch.stack([trace.mass for trace in traces])
    rows = torch.stack([trace.wanted.sum(-1) for trace in traces]).float()
    index_rows = torch.stack([trace.index_rows for trace in traces]).float().mean().item()
    length = traces[0].wanted.shape[-1]
    config = model.config
    row_bytes = 2 * config.head_dim * ITEM_BYTES
    pairs = len(traces) * config.num_kv_heads
    index_bytes = grading.index_bytes_a_token(config.head_dim)
    dense_layers = config.num_layers - len(traces)
    on_device = len(traces) * (index_bytes + cache_share * row_bytes) + dense_layers * row_bytes
    keys = index_bytes - _value_bytes(grading, config.head_dim)
    reads = pairs * (length * keys + index_rows * _value_bytes(grading, config.head_dim))
    reads += pairs * rows.mean().item() * row_bytes
    reads += dense_layers * config.num_kv_heads * length * row_bytes
    return FrontierPoint(
        name=name,
        kl=kl_divergence(dense.log_probs, outcome.log_probs).mean().item(),
        ppl=_log_loss(outcome, targets),
        ppl_dense=_log_loss(dense, targets),
        top1=(outcome.log_probs.argmax(-1) == dense.log_probs.argmax(-1)).float().mean().item(),
        exact_rows=rows.mean().item(),
        exact_share=rows.mean().item() / length,
        index_rows=index_rows,
        link_bytes=_missed_rows(outcome, cache_share) * grading.fetched_bytes_a_row(row_bytes),
        device_share=on_device / (config.num_layers * row_bytes),
        device_reads=reads,
        mass=mass.mean().item(),
        mass_kept_share=(mass >= grading.attn_top_p - 0.01).float().mean().item(),
        mass_p1=mass.flatten().kthvalue(1 + mass.numel() // 100).values.item(),
        weakest_head=min(trace.head_mass.min().item() for trace in traces),
        output_error=torch.stack([trace.output_error for trace in traces]).mean().item(),
    )


def _value_bytes(grading: Grading, head_dim: int) -> float:
    """Index bytes of a token that only its V takes."""
    without = grading.replace(v_index="none")
    return grading.index_bytes_a_token(head_dim) - without.index_bytes_a_token(head_dim)


def _log_loss(outcome: Outcome, targets: torch.Tensor) -> float:
    """Mean negative log-probability of the targets; `_mean` makes it a perplexity."""
    return -outcome.log_probs.gather(-1, targets[:, None]).mean().item()


def _missed_rows(outcome: Outcome, cache_share: float) -> float:
    """Rows fetched a step by all graded layers and heads, past the cold steps."""
    total = 0.0
    for trace in outcome.traces.values():
        misses = lru_misses(trace.wanted, cache_slots(trace.wanted, cache_share))
        total += misses[:, COLD_STEPS:].sum(0).double().mean().item()
    return total


def _mean(points: Sequence[FrontierPoint]) -> FrontierPoint:
    """Over passages: means, minima of minima, and log losses turned into perplexities."""
    worst = ("mass_p1", "weakest_head")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(FrontierPoint):
        column = [getattr(point, field.name) for point in points]
        if field.name in ("name", "on_front"):
            values[field.name] = column[0]
        else:
            values[field.name] = min(column) if field.name in worst else sum(column) / len(column)
    for name in ("ppl", "ppl_dense"):
        values[name] = math.exp(values[name])
    return FrontierPoint(**values)


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
