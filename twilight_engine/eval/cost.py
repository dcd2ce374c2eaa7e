"""What a method's steps cost: one definition of each figure, for every method and task."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from twilight_engine.attention.selectors import (
    AllSelector,
    DoubleSparsityOnlineSelector,
    DoubleSparsitySelector,
    LshSelector,
    QuestSelector,
    StreamingSelector,
    make_selector,
)
from twilight_engine.config import EVERY_CANDIDATE, SparseConfig
from twilight_engine.eval.memory import device_bytes_kept
from twilight_engine.kv.cache import KVCache
from twilight_engine.layout import IndexPages
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
            selector's candidates are pruned and not counted (see key_reads).
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
    """Mean KV bytes a step reads on the device.

    A dense layer reads all rows; a graded one what its selector and the estimate read of K's index
    (`key_reads`), the INT4 V of its index rows, the mean V of the listed pages, and its exact and
    resident rows. The scales that a margin reads again are left out.

    Returns: None where a layer's selector leaves open how much that is.
    """
    size, total = cache.config.page_size, 0.0
    for layer in range(cache.model.num_layers):
        exact, index, tail, resident = (
            float(getattr(steps, grade)[:, layer].sum()) for grade in GRADES
        )
        total += (exact + resident) * cache.row_bytes
        here = sparse.layer(layer)
        if layer in cache.plan.dense_layers or here.policy == "dense" or here.keeps_every_row:
            continue
        pages = cache.layers[layer].index
        assert pages is not None
        listed = exact + index + tail
        keys = key_reads(here, pages, listed, exact)
        if keys is None:
            return None
        total += keys
        if here.tail == "mean":
            total += listed * _bytes_a_token(pages.v_mean, size)
        if pages.v_codes is not None and pages.v_scale is not None:
            total += index * _bytes_a_token(pages.v_codes, size, pages.v_scale)
    return total / max(len(steps.context), 1)


def key_reads(config: SparseConfig, index: IndexPages, listed: float, exact: float) -> float | None:
    """Bytes of a layer's K index that select and estimate read; row counts are over all heads.

    By selector: `all` reads K's codes and scales; `double_sparsity` twice, for the labels and for
    the estimate, its online variant the ranges of the channels besides; `lsh` the signatures and
    all of K; `quest` the bounds, and it and `streaming` the K of their candidates. These are known
    where all are exact and the rest is dropped; where they are pruned, nothing counts them.

    Args:
        listed, exact: list tokens, and those of them that are exact.
    Returns: None for a selector of the user's, and where the candidates are not counted.
    """
    size = index.page_size
    keys = _bytes_a_token(index.k_codes, size, index.k_scale)
    # The channels' min and scale are the bounds of a page; an index per token has bounds apart.
    bounds = _bytes_a_token(index.k_scale if index.k_bounds is None else index.k_bounds, size)
    selector = make_selector(config)
    if isinstance(selector, AllSelector):
        return listed * keys
    if isinstance(selector, DoubleSparsitySelector):
        return listed * 2 * keys
    if isinstance(selector, DoubleSparsityOnlineSelector):
        ranges = bounds / 2 if index.k_bounds is None else bounds  # the scales alone
        return listed * (2 * keys + ranges)
    if isinstance(selector, LshSelector):
        assert index.lsh_codes is not None
        return listed * (keys + _bytes_a_token(index.lsh_codes, size))
    if config.attn_top_k != EVERY_CANDIDATE or config.tail == "mean" or config.fetch != "row":
        return None
    if isinstance(selector, QuestSelector):
        return listed * bounds + exact * keys
    return exact * keys if isinstance(selector, StreamingSelector) else None


def _bytes_a_token(pages: Tensor, size: int, *more: Tensor) -> float:
    """Bytes of one token and KV head in tensors [P, Hkv, ...] of whole pages."""
    parts = (pages, *more)
    return sum(part[0, 0].numel() * part.element_size() for part in parts) / size


def _mean(values: NDArray[Any], empty: float = 0.0) -> float:
    return float(values.mean()) if values.size else empty
