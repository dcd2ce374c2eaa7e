"""Choose which tokens are read exactly, which from the index, which not at all."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import Pruned, RowLists, StepMeta, num_blocks
from twilight_engine.ops import launch
from twilight_engine.ops.cpu import prune as cpu

GROUP_RULES = ("mean", "union")


def allocate_pruned(
    num_rows: int, num_kv_heads: int, capacity: int, device: torch.device
) -> Pruned:
    """Outputs of prune."""
    return Pruned(
        exact=RowLists.empty(num_rows, num_kv_heads, capacity, device),
        index_counts=torch.zeros(num_rows, num_kv_heads, dtype=torch.int32, device=device),
        grades=torch.empty(num_rows, num_kv_heads, capacity, dtype=torch.uint8, device=device),
        mass=torch.empty(num_rows, num_kv_heads, device=device),
    )


def _check_rules(
    scores: Tensor, num_kv_heads: int, group_rule: str, fetch_block: int, meta: StepMeta
) -> None:
    if scores.shape[1] % num_kv_heads:
        raise ValueError(
            f"scores has {scores.shape[1]} heads; it must be a multiple of {num_kv_heads}"
        )
    if group_rule not in GROUP_RULES:
        allowed = ", ".join(map(repr, GROUP_RULES))
        raise ValueError(f"group_rule is {group_rule!r}; allowed: {allowed}")
    if fetch_block not in (1, meta.page_size):
        raise ValueError(f"fetch_block is {fetch_block}; allowed: 1, {meta.page_size} (a page)")


def _check_tensors(
    scores: Tensor,
    lse: Tensor,
    meta: StepMeta,
    top_p: Tensor,
    index_top_p: Tensor | None,
    top_k: Tensor | None,
) -> None:
    launch.check_dtype("scores", scores, torch.float32)
    launch.check_shape("lse", lse, tuple(scores.shape[:2]))
    launch.check_shape("meta.positions", meta.positions, (scores.shape[0],))
    per_seq = (("top_p", top_p, torch.float32), ("index_top_p", index_top_p, torch.float32))
    for name, tensor, dtype in (*per_seq, ("top_k", top_k, torch.int32)):
        if tensor is not None:
            launch.check_shape(name, tensor, (meta.num_seqs,))
            launch.check_dtype(name, tensor, dtype)


def _check_candidates(candidates: Tensor, meta: StepMeta, num_kv_heads: int, block: int) -> None:
    blocks = num_blocks(meta.max_len, block, meta.page_size)
    launch.check_shape("candidates", candidates, (meta.num_queries, num_kv_heads, None))
    launch.check_dtype("candidates", candidates, torch.uint8)
    if candidates.shape[2] != blocks:
        raise ValueError(
            f"candidates holds {candidates.shape[2]} blocks; {meta.max_len} tokens in blocks of "
            f"{block} need {blocks}"
        )


def _check_errors(errors: Tensor, scores: Tensor, meta: StepMeta, margin: float) -> None:
    launch.check_shape("errors", errors, (*scores.shape[:2], None))
    launch.check_dtype("errors", errors, torch.float32)
    pages = -(-meta.max_len // meta.page_size)
    if errors.shape[2] < pages:
        raise ValueError(f"errors holds {errors.shape[2]} pages; it needs {pages}")
    if margin < 0:
        raise ValueError(f"margin is {margin}; it must be >= 0")


def _check_capacity(scores: Tensor, out: Pruned, meta: StepMeta) -> None:
    sizes = {
        "scores": scores.shape[2],
        "out.exact": out.exact.tokens.shape[2],
        "out.grades": out.grades.shape[2],
    }
    for name, size in sizes.items():
        if size < meta.max_len:
            raise ValueError(f"{name} holds {size} tokens; max_len is {meta.max_len}")


def _launch(
    scores: Tensor,
    lse: Tensor,
    meta: StepMeta,
    *,
    top_p: Tensor,
    index_top_p: Tensor | None,
    top_k: Tensor | None,
    unite: bool,
    num_kv_heads: int,
    expand_pages: bool,
    candidates: Tensor | None,
    block: int,
    dropped: bool,
    errors: Tensor | None,
    margin: float,
    out: Pruned,
    weights: Tensor | None,
) -> None:
    num_rows, num_q_heads, capacity = scores.shape
    if weights is None:
        weights = torch.empty(num_rows, num_kv_heads, capacity, device=scores.device)
    launch.check_shape("weights", weights, (num_rows, num_kv_heads, capacity))
    launch.kernels().prune(
        scores=launch.ptr(scores),
        lse=launch.ptr(lse),
        top_p=launch.ptr(top_p),
        index_top_p=launch.ptr(index_top_p),
        top_k=launch.ptr(top_k),
        candidates=launch.ptr(candidates),
        errors=launch.ptr(errors),
        window_starts=launch.ptr(meta.window_starts),
        query_seq=launch.ptr(meta.query_seq),
        positions=launch.ptr(meta.positions),
        ctx_starts=launch.ptr(meta.ctx_starts),
        weights=launch.ptr(weights),
        exact_tokens=launch.ptr(out.exact.tokens),
        exact_counts=launch.ptr(out.exact.counts),
        index_counts=launch.ptr(out.index_counts),
        grades=launch.ptr(out.grades),
        mass=launch.ptr(out.mass),
        num_rows=num_rows,
        num_kv_heads=num_kv_heads,
        group=num_q_heads // num_kv_heads,
        page_size=meta.page_size,
        num_sink=meta.num_sink,
        max_len=meta.max_len,
        capacity=capacity,
        exact_capacity=out.exact.tokens.shape[2],
        grades_capacity=out.grades.shape[2],
        block=block,
        num_blocks=0 if candidates is None else candidates.shape[2],
        unite=unite,
        dropped=dropped and candidates is not None,
        expand_pages=expand_pages,
        num_pages=0 if errors is None else errors.shape[2],
        margin=margin,
        stream=launch.current_stream(scores),
    )


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
    out: Pruned | None = None,
    weights: Tensor | None = None,
) -> Pruned:
    """The threshold set {w >= tau} whose mass, with the resident tokens', reaches top_p.

    w[t] = exp(scores[t] - lse): the mean over the group's query heads (one set) under the rule
    "mean", each query head's own (a set each, united) under "union". tau is the largest that
    reaches top_p among the floats whose TIE_BITS low bits are zero, so weights that agree in the
    bits above, which lie within 2^-13 of each other, are ties; all ties are kept and no tolerance
    is involved. Where all candidates together do not reach top_p, all are taken. Resident tokens
    are exact and count first. top_p >= 1 takes every candidate by rule. top_k takes exactly
    max(0, top_k - residents) candidates by all bits, ties by position. The index grade has the
    tokens of the same rule with index_top_p that are not exact.

    The margin: K's codes make a score err by errors[n, h, page], so a weight by w * error, and the
    mass of a set of mass p by sqrt(p * (1 - p) * sum of those squares over the list tokens). top_p
    is raised by `margin` times that, to MOST_MASS at most.

    Args:
        scores, lse: [N, Hq, C] and [N, Hq] float32, as estimate_scores gives them.
        top_p, index_top_p: [B] float32, a mass of the whole context; None: no index grade.
        top_k: [B] int32, in place of top_p where >= 1.
        fetch_block: 1, or page_size: every list token of a page that holds an exact one is exact.
        candidates: [N, Hkv, NB] uint8 by block of `block` tokens (default: a page); None: all.
        dropped: promises that the scores of list tokens outside the candidates, and of no others,
            are -inf in every head, as estimate_scores leaves them with left_out "drop": then the
            kernel need not look at the candidates. It changes no result.
        errors: [N, Hq, P] float32, the standard error of the scores of each page of a sequence, as
            estimate_errors gives them; None: no margin.
        margin: standard errors that the exact mass aimed at is raised by; see below.
        out: from allocate_pruned, with a capacity >= meta.max_len.
        weights: [N, Hkv, C] float32 workspace (CUDA only): weights that do not fit on the chip.
    Returns: Pruned; the list ascending, without resident tokens. Tokens outside the candidates are
        GRADE_DROPPED where their score is -inf, else GRADE_TAIL.
    Raises: ValueError for shapes, dtypes, a group_rule or a fetch_block other than these.
    Source: Twilight (arXiv 2502.02770), Algorithm 1, with a radix select in place of its bisection.
    """
    block = block or meta.page_size
    _check_rules(scores, num_kv_heads, group_rule, fetch_block, meta)
    _check_tensors(scores, lse, meta, top_p, index_top_p, top_k)
    if candidates is not None:
        _check_candidates(candidates, meta, num_kv_heads, block)
    if errors is not None:
        _check_errors(errors, scores, meta, margin)
    if out is None:
        out = allocate_pruned(scores.shape[0], num_kv_heads, scores.shape[2], scores.device)
    _check_capacity(scores, out, meta)
    if scores.is_cuda:
        _launch(
            scores, lse, meta, top_p=top_p, index_top_p=index_top_p, top_k=top_k,
            unite=group_rule == "union", num_kv_heads=num_kv_heads, expand_pages=fetch_block > 1,
            candidates=candidates, block=block, dropped=dropped, errors=errors, margin=margin,
            out=out, weights=weights,
        )  # fmt: skip
        return out
    cpu.prune(
        scores, lse, meta, top_p=top_p, index_top_p=index_top_p, top_k=top_k,
        group_rule=group_rule, num_kv_heads=num_kv_heads, fetch_block=fetch_block,
        candidates=candidates, block=block, errors=errors, margin=margin, out=out,
    )  # fmt: skip
    return out


def list_all(
    meta: StepMeta, num_kv_heads: int, capacity: int, *, out: RowLists | None = None
) -> RowLists:
    """Every list token of every row: what attn_top_p >= 1 attends, with no score looked at.

    Args:
        capacity: of each list, >= meta.max_len.
    Returns: RowLists; entries beyond counts are arbitrary.
    """
    if capacity < meta.max_len:
        raise ValueError(f"capacity is {capacity}; it must be at least max_len, {meta.max_len}")
    device, n = meta.positions.device, meta.num_queries
    if out is None:
        out = RowLists.empty(n, num_kv_heads, capacity, device)
    first = meta.ctx_starts.clamp(min=meta.num_sink)
    last = torch.minimum(meta.positions + 1, meta.window_starts[meta.query_seq])
    steps = torch.arange(capacity, dtype=torch.int32, device=device)
    out.tokens.copy_((first[:, None] + steps)[:, None, :])
    out.counts.copy_((last - first).clamp(min=0)[:, None])
    return out
