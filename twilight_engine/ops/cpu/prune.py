"""prune on a CPU: torch for the exponentials, NumPy's vectorised sort for the thresholds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twilight_engine.layout import (
    GRADE_DROPPED,
    GRADE_EXACT,
    GRADE_INDEX,
    GRADE_TAIL,
    Pruned,
    RowLists,
    StepMeta,
    block_of,
)

Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]


def _threshold_set(w: Floats, resident_mass: float, candidate: Mask, p: float) -> Mask:
    if p >= 1:
        return candidate
    needed = p - resident_mass
    if needed <= 0:
        return np.zeros_like(candidate)
    ordered = np.sort(w[candidate])[::-1]
    reached = int(np.searchsorted(np.cumsum(ordered, dtype=np.float64), needed))
    return candidate & (w >= ordered[reached]) if reached < len(ordered) else candidate


def _largest_set(w: Floats, count: int, candidate: Mask) -> Mask:
    places = np.flatnonzero(candidate)
    if count >= len(places):
        return candidate
    chosen = np.zeros_like(candidate)
    if count > 0:
        values = w[places]
        least = np.partition(values, len(values) - count)[len(values) - count]
        chosen[places[values > least]] = True
        ties = places[values == least]
        chosen[ties[: count - np.count_nonzero(chosen)]] = True
    return chosen


def _write(lists: RowLists, n: int, h: int, chosen: Mask, first: int) -> None:
    tokens = np.flatnonzero(chosen)
    lists.tokens[n, h].numpy()[: len(tokens)] = tokens + first
    lists.counts[n, h] = len(tokens)


def _prune_head(
    weights: Floats, edges: tuple[int, int], candidate: Mask, p: float, index_p: float, k: int
) -> tuple[Mask, Mask]:
    """Exact and index sets of one KV head: weights [rules, visible], list tokens edges[0]..[1]."""
    lo, hi = edges
    exact, index = np.zeros_like(candidate), np.zeros_like(candidate)
    for w in weights:
        resident_mass = float(w[:lo].sum(dtype=np.float64) + w[hi:].sum(dtype=np.float64))
        if k > 0:
            exact |= _largest_set(w[lo:hi], k - (len(w) - (hi - lo)), candidate)
        else:
            exact |= _threshold_set(w[lo:hi], resident_mass, candidate, p)
        if index_p > 0:
            index |= _threshold_set(w[lo:hi], resident_mass, candidate, index_p)
    return exact, index


def prune(
    scores: Tensor,
    lse: Tensor,
    meta: StepMeta,
    *,
    top_p: Tensor,
    index_top_p: Tensor | None,
    top_k: Tensor | None,
    group_rule: str,
    num_kv_heads: int,
    fetch_block: int,
    candidates: Tensor | None,
    block: int,
    out: Pruned,
) -> None:
    """Writes `out`; see ops.prune."""
    group = scores.shape[1] // num_kv_heads
    for n in range(meta.num_queries):
        b = int(meta.query_seq[n])
        start, stop = int(meta.ctx_starts[n]), int(meta.positions[n]) + 1
        out.exact.counts[n], out.index.counts[n], out.mass[n] = 0, 0, 0
        if start >= stop:
            continue
        first = min(max(start, meta.num_sink), stop)
        last = max(first, min(stop, int(meta.window_starts[b])))
        weights = torch.exp(scores[n, :, start:stop] - lse[n, :, None])
        by_head = weights.view(num_kv_heads, group, -1)
        mean = by_head.mean(1, keepdim=True).numpy()
        rules = mean if group_rule == "mean" else by_head.numpy()
        tokens = torch.arange(first, last)
        blocks = block_of(tokens, block, meta.page_size)
        pages: NDArray[Any] = (tokens // meta.page_size).numpy()
        for h in range(num_kv_heads):
            if candidates is None:
                candidate = np.ones(last - first, dtype=np.bool_)
            else:
                candidate = (candidates[n, h, blocks] != 0).numpy()
            exact, index = _prune_head(
                rules[h],
                (first - start, last - start),
                candidate,
                float(top_p[b]),
                0.0 if index_top_p is None else float(index_top_p[b]),
                0 if top_k is None else int(top_k[b]),
            )
            if fetch_block > 1:
                exact = np.isin(pages, pages[exact])
            index &= ~exact
            grades = out.grades[n, h].numpy()
            grades[start:stop] = GRADE_EXACT
            dropped = ~candidate & np.isneginf(scores[n, h * group, first:last].numpy())
            rest = np.where(dropped, GRADE_DROPPED, GRADE_TAIL)
            grades[first:last] = np.where(exact, GRADE_EXACT, np.where(index, GRADE_INDEX, rest))
            out.mass[n, h] = float(mean[h, 0][grades[start:stop] == GRADE_EXACT].sum())
            _write(out.exact, n, h, exact, first)
            if out.index.tokens.shape[2]:
                _write(out.index, n, h, index, first)
