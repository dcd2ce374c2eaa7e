"""Made-up runs for the tests of metrics and reports: steps whose counters add up."""

from __future__ import annotations

import numpy as np

from twilight_engine.attention.audit_record import Audits
from twilight_engine.layout import (
    COUNTER_DIRECT_BYTES,
    COUNTER_DIRECT_ROWS,
    COUNTER_FETCHED_BYTES,
    COUNTER_MISSED_ROWS,
    COUNTER_WRITTEN_BYTES,
    NUM_COUNTERS,
)
from twilight_engine.runtime.metrics import RequestMetrics, step_figures
from twilight_engine.runtime.outputs import CompletionOutput, RequestOutput
from twilight_engine.runtime.report import RunShape
from twilight_engine.telemetry import Steps

RESIDENT = 132  # 4 sinks and a window of 128


def made_up_shape(*, layers: int = 6, heads: int = 2, dense: tuple[int, ...] = (0, 1)) -> RunShape:
    return RunShape(
        model="made-up",
        device="cpu",
        dtype="float32",
        num_layers=layers,
        num_kv_heads=heads,
        page_size=64,
        row_bytes=512,
        dense_layers=dense,
    )


def made_up_steps(shape: RunShape, *, steps: int = 8, context: int = 4096, seed: int = 0) -> Steps:
    """Steps of one sequence alone in its batch; heads differ, and budgets drift."""
    rng = np.random.default_rng(seed)
    size = (steps, shape.num_layers, shape.num_kv_heads)
    contexts = context + 1 + np.arange(steps)
    listed = np.broadcast_to((contexts - RESIDENT)[:, None, None], size)
    scale = rng.lognormal(3.5, 0.9, size[1:])
    exact = np.minimum(rng.poisson(scale * rng.uniform(0.7, 1.3, (steps, 1, 1)), size), listed)
    index = np.minimum(4 * exact + 20, listed - exact)
    tail = listed - exact - index
    missed = rng.binomial(exact, 0.25)
    direct = rng.binomial(exact - missed, 0.02)
    resident = np.full(size, RESIDENT)
    dense = list(shape.dense_layers)
    for rows in (exact, index, tail, missed, direct):
        rows[:, dense] = 0
    resident[:, dense] = contexts[:, None, None]
    counters = np.zeros((steps, shape.num_layers, NUM_COUNTERS), dtype=np.int64)
    counters[..., COUNTER_MISSED_ROWS] = missed.sum(-1)
    counters[..., COUNTER_DIRECT_ROWS] = direct.sum(-1)
    counters[..., COUNTER_FETCHED_BYTES] = missed.sum(-1) * shape.row_bytes
    counters[..., COUNTER_DIRECT_BYTES] = direct.sum(-1) * shape.row_bytes
    counters[..., COUNTER_WRITTEN_BYTES] = shape.num_kv_heads * shape.row_bytes
    mass = np.full(size, 0.85, dtype=np.float32)
    mass[:, dense] = 1.0
    return Steps(
        context=contexts,
        exact=exact,
        index=index,
        tail=tail,
        resident=resident,
        missed=missed,
        direct=direct,
        mass=mass,
        counters=counters,
        link_seconds=missed.sum((1, 2)) * shape.row_bytes / 10e9,
        batch=np.ones(steps, dtype=np.int64),
        batch_context=contexts,
    )


def made_up_audits(shape: RunShape, steps: Steps, *, p: float = 0.8) -> Audits:
    """An audit of each step, every layer and head in turn; one triple in four misses p."""
    count = len(steps.context)
    realised = np.where(np.arange(count) % 4 == 3, p - 0.02, p + 0.03)
    return Audits(
        step=steps.context,
        layer=np.arange(count) % shape.num_layers,
        kv_head=np.arange(count) % shape.num_kv_heads,
        p=np.full(count, p),
        estimated_mass=np.full(count, p + 0.01),
        realised_mass=realised,
        weakest_head_mass=realised - 0.1,
        output_error=np.full(count, 0.02),
        worst_head_error=np.full(count, 0.05),
        bytes=steps.context * shape.row_bytes,
    )


def made_up_output(*sequences: Steps, audits: Audits | None = None) -> RequestOutput:
    """A finished request of these sequences."""
    metrics = RequestMetrics(
        arrival_time=0.0,
        started_time=0.5,
        first_token_time=2.5,
        finished_time=4.5,
        prefill_s=2.0,
        decode_s=2.0,
        num_prompt_tokens=int(sequences[0].context[0]) - 1 if len(sequences[0].context) else 10,
        num_generated_tokens=sum(len(s.context) + 1 for s in sequences),
        prefill_written_bytes=1 << 20,
        audits=audits,
        **step_figures(sequences),
    )
    outputs = [CompletionOutput(i, "text", [1]) for i in range(len(sequences))]
    return RequestOutput("0", "prompt", [1, 2], outputs, finished=True, metrics=metrics)
