"""prune on a CPU: torch for the exponentials, numba for the thresholds."""

from __future__ import annotations

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twilight_engine.layout import (
    GRADE_DROPPED,
    GRADE_EXACT,
    GRADE_INDEX,
    GRADE_TAIL,
    MOST_MASS,
    TIE_BITS,
    Pruned,
    RowLists,
    StepMeta,
    block_of,
)

Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]
BIN_SHIFT = 18  # 32 bins an octave, so that few values are left to sort
NUM_BINS = 1 << (31 - BIN_SHIFT)
NOT_CANDIDATE = -1.0  # a weight below every threshold


@numba.njit(cache=True)
def _threshold(w: Floats, needed: float) -> float:
    """The largest tau with sum of {w >= tau} >= needed; 0 if there is none. Negative w: not there.

    A histogram over the leading bits, whose order is w's, finds the bin; only that bin is sorted.
    """
    bits = w.view(np.int32)
    mass = np.zeros(NUM_BINS, np.float64)
    for i in range(w.shape[0]):
        if bits[i] >= 0:
            mass[bits[i] >> BIN_SHIFT] += w[i]
    above, found = 0.0, NUM_BINS - 1
    while found >= 0 and above + mass[found] < needed:
        above += mass[found]
        found -= 1
    inside = np.sort(w[(bits >> BIN_SHIFT) == found])
    for i in range(inside.shape[0] - 1, -1, -1):
        above += inside[i]
        if above >= needed:
            return float(inside[i])
    return float(inside[0]) if inside.shape[0] else 0.0


def _threshold_set(w: Floats, resident_mass: float, p: float) -> Mask:
    if p >= 1:
        return w >= 0
    needed = p - resident_mass
    if needed <= 0:
        return np.zeros(len(w), np.bool_)
    bits = np.float32(_threshold(w, needed)).view(np.int32) >> TIE_BITS
    chosen: Mask = w.view(np.int32) >> TIE_BITS >= bits
    return chosen


def _largest_set(w: Floats, count: int) -> Mask:
    places = np.flatnonzero(w >= 0)
    if count >= len(places):
        return w >= 0
    chosen = np.zeros(len(w), np.bool_)
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
    weights: Floats,
    edges: tuple[int, int],
    left_out: Mask | None,
    masses: list[float],
    index_p: float,
    k: int,
) -> tuple[Mask, Mask]:
    """Exact and index sets of one KV head.

    weights is [rules, visible], masses has what each rule's exact set must reach, and the list
    tokens are edges[0] .. edges[1].
    """
    lo, hi = edges
    exact, index = np.zeros(hi - lo, np.bool_), np.zeros(hi - lo, np.bool_)
    for visible, p in zip(weights, masses, strict=True):
        resident_mass = float(
            visible[:lo].sum(dtype=np.float64) + visible[hi:].sum(dtype=np.float64)
        )
        w = visible[lo:hi]
        if left_out is not None:
            w = np.where(left_out, np.float32(NOT_CANDIDATE), w)
        if k > 0:
            exact |= _largest_set(w, k - (len(visible) - (hi - lo)))
        else:
            exact |= _threshold_set(w, resident_mass, p)
        if index_p > 0:
            index |= _threshold_set(w, resident_mass, index_p)
    return exact, index


def _masses(
    p: float, weights: Tensor, errors: Tensor | None, group_rule: str, margin: float
) -> list[list[float]]:
    """[Hkv][rules] the mass aimed at: p and its margin; weights and errors [Hkv, G, listed]."""
    heads, group, _ = weights.shape
    rules = 1 if group_rule == "mean" else group
    if errors is None or p >= 1:
        return [[p] * rules] * heads
    error = weights * errors
    if group_rule == "mean":
        error = error.mean(1, keepdim=True)
    variance = margin**2 * error.double().square().sum(-1)
    raised = (p + (p * (1 - p) * variance).sqrt()).clamp(max=MOST_MASS).clamp(min=p)
    out: list[list[float]] = raised.tolist()
    return out


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
    errors: Tensor | None,
    margin: float,
    out: Pruned,
) -> None:
    """Writes `out`; see ops.prune."""
    group = scores.shape[1] // num_kv_heads
    for n in range(meta.num_queries):
        b = int(meta.query_seq[n])
        start, stop = int(meta.ctx_starts[n]), int(meta.positions[n]) + 1
        out.exact.counts[n], out.index_counts[n], out.mass[n] = 0, 0, 0
        if start >= stop:
            continue
        first = min(max(start, meta.num_sink), stop)
        last = max(first, min(stop, int(meta.window_starts[b])))
        weights = torch.exp(scores[n, :, start:stop] - lse[n, :, None])
        by_head = weights.view(num_kv_heads, group, -1)
        mean = by_head.mean(1, keepdim=True).numpy()
        rules = mean if group_rule == "mean" else by_head.numpy()
        tokens = torch.arange(first, last)
        listed_errors = None
        if errors is not None:
            listed_errors = errors[n].view(num_kv_heads, group, -1)[..., tokens // meta.page_size]
        masses = _masses(
            float(top_p[b]),
            by_head[..., first - start : last - start],
            listed_errors,
            group_rule,
            margin,
        )
        for h in range(num_kv_heads):
            left_out: Mask | None = None
            if candidates is not None:
                kept = candidates[n, h, block_of(tokens, block, meta.page_size)]
                left_out = (kept == 0).numpy()
            exact, index = _prune_head(
                rules[h],
                (first - start, last - start),
                left_out,
                masses[h],
                0.0 if index_top_p is None else float(index_top_p[b]),
                0 if top_k is None else int(top_k[b]),
            )
            if fetch_block > 1:
                pages = (tokens // meta.page_size).numpy()
                exact = np.isin(pages, pages[exact])
            index &= ~exact
            grades = out.grades[n, h, start:stop].numpy()
            grades[:] = GRADE_EXACT
            listed = grades[first - start : last - start]
            listed[:] = GRADE_TAIL
            if left_out is not None:
                dropped = np.isneginf(scores[n, h * group, first:last].numpy())
                listed[left_out & dropped] = GRADE_DROPPED
            listed[index] = GRADE_INDEX
            listed[exact] = GRADE_EXACT
            out.mass[n, h] = float(mean[h, 0][grades == GRADE_EXACT].sum())
            _write(out.exact, n, h, exact, first)
            out.index_counts[n, h] = int(index.sum())
