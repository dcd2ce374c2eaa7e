"""Pruning in plain torch: one sort a row, float64 sums."""

from __future__ import annotations

import torch
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


def with_margin(p: float, w_error: Tensor, margin: float) -> float:
    """p raised by `margin` standard errors of a set's mass, from those of the list tokens."""
    variance = margin**2 * float(w_error.double().square().sum())
    return max(p, min(MOST_MASS, p + (p * (1 - p) * variance) ** 0.5)) if p < 1 else p


def threshold_set(w: Tensor, resident: Tensor, candidate: Tensor, p: float) -> Tensor:
    """The smallest {w >= tau} over candidates that lifts the resident mass to p; ties kept.

    Weights that differ in their TIE_BITS low bits only are ties.
    """
    if p >= 1:
        return candidate
    needed = p - w[resident].double().sum()
    if needed <= 0:
        return torch.zeros_like(candidate)
    ordered = w[candidate].sort(descending=True).values
    reached = (ordered.double().cumsum(0) >= needed).nonzero()
    if not len(reached):
        return candidate
    tau = ordered[reached[0]].view(torch.int32) >> TIE_BITS
    return candidate & (w.view(torch.int32) >> TIE_BITS >= tau)


def largest_set(w: Tensor, resident: Tensor, candidate: Tensor, k: int) -> Tensor:
    """Exactly max(0, k - residents) candidates, the largest; of equal ones those in front."""
    order = torch.where(candidate, w, -1.0).sort(descending=True, stable=True).indices
    count = min(max(0, k - int(resident.sum())), int(candidate.sum()))
    chosen = torch.zeros_like(candidate)
    chosen[order[:count]] = True
    return chosen


def prune(
    scores: Tensor,
    lse: Tensor,
    meta: StepMeta,
    *,
    top_p: Tensor,
    index_top_p: Tensor | None = None,
    top_k: Tensor | None = None,
    group_rule: str = "mean",
    num_kv_heads: int,
    fetch_block: int = 1,
    candidates: Tensor | None = None,
    block: int | None = None,
    dropped: bool = False,
    errors: Tensor | None = None,
    margin: float = 0.0,
) -> Pruned:
    """See ops.prune; row by row. What is dropped shows in the scores."""
    n_rows, num_q_heads, capacity = scores.shape
    group, device = num_q_heads // num_kv_heads, scores.device
    exact = RowLists.empty(n_rows, num_kv_heads, capacity, device)
    index_counts = torch.zeros(n_rows, num_kv_heads, dtype=torch.int32, device=device)
    grades = torch.empty(n_rows, num_kv_heads, capacity, dtype=torch.uint8, device=device)
    mass = torch.zeros(n_rows, num_kv_heads, device=device)
    for n in range(n_rows):
        b = int(meta.query_seq[n])
        t = torch.arange(int(meta.ctx_starts[n]), int(meta.positions[n]) + 1, device=device)
        if len(t) == 0:
            continue
        resident = (t < meta.num_sink) | (t >= meta.window_starts[b])
        k = 0 if top_k is None else int(top_k[b])
        for h in range(num_kv_heads):
            s = scores[n, h * group : (h + 1) * group, t]
            weights = torch.exp(s - lse[n, h * group : (h + 1) * group, None])  # [G, visible]
            candidate = ~resident
            if candidates is not None:
                kept = candidates[n, h, block_of(t, block or meta.page_size, meta.page_size)]
                candidate = candidate & (kept != 0)
            is_exact, is_index = torch.zeros_like(resident), torch.zeros_like(resident)
            e = torch.zeros_like(weights)
            if errors is not None:
                e = weights * errors[n, h * group : (h + 1) * group][:, t // meta.page_size]
            if group_rule == "mean":
                weights, e = weights.mean(0, keepdim=True), e.mean(0, keepdim=True)
            for w, w_error in zip(weights, e, strict=True):
                p = with_margin(float(top_p[b]), w_error[~resident], margin)
                if k > 0:
                    is_exact |= largest_set(w, resident, candidate, k)
                else:
                    is_exact |= threshold_set(w, resident, candidate, p)
                if index_top_p is not None:
                    is_index |= threshold_set(w, resident, candidate, float(index_top_p[b]))
            if fetch_block > 1:
                pages = t // meta.page_size
                is_exact = torch.isin(pages, pages[is_exact]) & ~resident
            is_index &= ~is_exact
            grade = torch.full_like(t, GRADE_TAIL, dtype=torch.uint8)
            grade[~candidate & torch.isneginf(s[0])] = GRADE_DROPPED
            grade[is_index] = GRADE_INDEX
            grade[is_exact | resident] = GRADE_EXACT
            grades[n, h, t] = grade
            mass[n, h] = weights.mean(0)[is_exact | resident].sum()
            exact.tokens[n, h, : int(is_exact.sum())] = t[is_exact].int()
            exact.counts[n, h], index_counts[n, h] = is_exact.sum(), is_index.sum()
    return Pruned(exact, index_counts, grades, mass)
