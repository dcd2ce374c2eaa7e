"""What a method's steps cost: one definition of each figure, for every method and task."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twilight_engine.config import SparseConfig
from twilight_engine.eval.memory import device_bytes_kept
from twilight_engine.kv.cache import KVCache
from twilight_engine.kv.index import index_page_bytes
from twilight_engine.runtime.metrics import step_bytes
from twilight_engine.telemetry import Steps

LINK_BYTES = ("fetched_bytes", "direct_bytes", "streamed_bytes")
GRADES = ("exact", "index", "tail", "resident")


@dataclass(frozen=True)
class Cost:
    """Means over the decode steps of one sequence.

    Attributes:
        steps: decode steps.
        exact_rows, index_rows, tail_rows, resident_rows: rows a KV head by grade, over the layers
            that are not dense; where all are dense, every row of the context is exact.
        link_bytes: KV bytes from the host a step, over all layers.
        device_bytes: KV memory on the device for a sequence of the run's longest length: index,
            windows, hot rows and dense layers.
        device_read_bytes: KV bytes a step reads on the device, over all layers; None where a
            selector's own reads are not counted.
        mass: estimated attention mass of the exact rows, resident ones included, as a share of
            what the selector left to choose from.
    """

    steps: int
    exact_rows: float
    index_rows: float
    tail_rows: float
    resident_rows: float
    link_bytes: float
    device_bytes: int
    device_read_bytes: float | None
    mass: float


def cost_of(steps: Steps, cache: KVCache, sparse: SparseConfig, used: int) -> Cost:
    """The cost of a sequence's first `used` steps; later ones only kept its place in the batch."""
    steps = first_steps(steps, used)
    layers = cache.sparse_layers
    rows = {grade: _mean(getattr(steps, grade)[:, layers]) for grade in GRADES}
    if not layers:
        rows["exact"] = _mean(steps.context)
    moved = step_bytes(steps)
    return Cost(
        steps=used,
        exact_rows=rows["exact"],
        index_rows=rows["index"],
        tail_rows=rows["tail"],
        resident_rows=rows["resident"],
        link_bytes=_mean(np.sum([moved[name] for name in LINK_BYTES], axis=0)),
        device_bytes=device_bytes_kept(cache.plan, cache.max_num_seqs),
        device_read_bytes=device_reads(steps, cache, sparse),
        mass=_mean(steps.mass[:, layers], empty=1.0),
    )


def first_steps(steps: Steps, count: int) -> Steps:
    """The first `count` of a sequence's steps."""
    fields = dataclasses.fields(steps)
    return Steps(**{field.name: getattr(steps, field.name)[:count] for field in fields})


def device_reads(steps: Steps, cache: KVCache, sparse: SparseConfig) -> float | None:
    """Mean KV bytes a step reads on the device: every row and every part of the index once.

    A dense layer reads all rows; a graded one the INT4 K of every listed token, the INT4 V of its
    index rows, the mean V of the listed pages, and its exact and resident rows.
    """
    config, dim = cache.config, cache.model.head_dim
    mean = 2 * dim  # float16, one a page and head
    without_v = index_page_bytes(1, config.page_size, dim, config.k_index, "none")
    with_v = index_page_bytes(1, config.page_size, dim, config.k_index, "int4")
    k_bytes = (without_v - mean) / config.page_size
    v_bytes = (with_v - without_v) / config.page_size
    total = 0.0
    for layer in range(cache.model.num_layers):
        exact, index, tail, resident = (
            float(getattr(steps, grade)[:, layer].sum()) for grade in GRADES
        )
        total += (exact + resident) * cache.row_bytes
        here = sparse.layer(layer)
        if layer in cache.plan.dense_layers or here.policy == "dense" or here.keeps_every_row:
            continue
        if here.selector != "all":
            return None
        means = mean / config.page_size if here.tail == "mean" else 0.0
        total += (exact + index + tail) * (k_bytes + means) + index * v_bytes
    return total / max(len(steps.context), 1)


def _mean(values: NDArray[Any], empty: float = 0.0) -> float:
    return float(values.mean()) if values.size else empty
