"""prune as a decode step calls it: capacities a multiple of four, long rows, the mean rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compare import compare
from tests.ops.step_meta import make_meta
from tests.ops.test_prune import (
    assert_consistent,
    assert_same,
    make_scores,
    row_lse,
    run_both,
    segment,
)
from twilight_engine.layout import GRADE_EXACT, GRADE_INDEX, Pruned, StepMeta, block_of, num_blocks

# Tokens of a row that rounding may carry over a threshold: those of one step of it, which in a
# dense row are several.
MOST_DIFFERENCES = 3
TOKENS_A_DIFFERENCE = 10_000  # of a row that may have more
THRESHOLD_STEPS = 1e-3  # of a threshold; tokens lie less than this apart


def padded_scores(meta: StepMeta, num_q_heads: int, *, spread: float) -> tuple[Tensor, Tensor]:
    capacity = -(-meta.max_len // 64) * 64
    scores = torch.randn(meta.num_queries, num_q_heads, capacity) * spread
    scores = scores.to(meta.positions.device)
    return scores, row_lse(scores, meta)


def drop_blocks(scores: Tensor, meta: StepMeta, num_kv_heads: int, *, block: int) -> Tensor:
    """Candidates, a third of the blocks; drops the list tokens of the others from the scores."""
    blocks = num_blocks(meta.max_len, block, meta.page_size)
    candidates = torch.rand(meta.num_queries, num_kv_heads, blocks) < 1 / 3
    candidates = candidates.to(torch.uint8).to(scores.device)
    t = torch.arange(meta.max_len, device=scores.device)
    edges = meta.window_starts[meta.query_seq]
    listed = (t >= meta.num_sink) & (t < edges[:, None])
    dropped = (candidates[..., block_of(t, block, meta.page_size)] == 0) & listed[:, None]
    by_head = scores[..., : meta.max_len].unflatten(1, (num_kv_heads, -1))
    by_head.masked_fill_(dropped[:, :, None], -torch.inf)
    return candidates


def assert_at_threshold(w: Tensor, grades: Tensor, differs: Tensor) -> None:
    """Those that differ weigh what the least token of a grade does; all [visible], list tokens."""
    exact = grades == GRADE_EXACT
    chosen = exact | (grades == GRADE_INDEX)
    levels = [w[of_grade].min() for of_grade in (exact, chosen) if of_grade.any()]
    for level in levels:
        differs = differs & ((w - level).abs() > THRESHOLD_STEPS * level)
    assert not differs.any()


def assert_close(got: Pruned, want: Pruned, meta: StepMeta, scores: Tensor, lse: Tensor) -> None:
    """The same but for a few tokens whose weight lies at a threshold, up to rounding."""
    assert_consistent(got, meta)
    compare(got.mass, want.mass)
    num_kv_heads = want.grades.shape[1]
    for n in range(meta.num_queries):
        begin, end = int(meta.ctx_starts[n]), int(meta.positions[n]) + 1
        edge = min(end, int(meta.window_starts[meta.query_seq[n]]))
        listed = slice(max(begin, meta.num_sink), edge)
        w = (scores[n, :, listed] - lse[n, :, None]).exp()
        w = w.unflatten(0, (num_kv_heads, -1)).mean(1)
        grades = want.grades[n, :, listed]
        differs = got.grades[n, :, listed] != grades
        most = max(MOST_DIFFERENCES, (end - begin) // TOKENS_A_DIFFERENCE)
        assert (differs.sum(-1) <= most).all()
        for h in range(num_kv_heads):
            assert_at_threshold(w[h], grades[h], differs[h])


@pytest.mark.parametrize("group", [1, 3, 4, 6, 8, 13])
@pytest.mark.parametrize("page_size", [16, 61, 64])
@pytest.mark.parametrize("margin", [None, 1.5])
def test_matches_reference(
    device: torch.device, group: int, page_size: int, margin: float | None
) -> None:
    meta = make_meta(device, [900, 1, 130, 301], page_size=page_size)
    scores, lse = padded_scores(meta, 2 * group, spread=2.0)
    options: dict[str, Any] = {"p": 0.7, "index_p": 0.95, "num_kv_heads": 2}
    if margin is not None:
        errors = torch.rand(4, 2 * group, meta.page_table.shape[1]).to(device) * 0.4
        options.update(errors=errors, margin=margin)
    got, want = run_both(scores, lse, meta, **options)
    assert_same(got, want, meta)
    assert_consistent(got, meta)


@pytest.mark.parametrize("sliding", [None, 333])
@pytest.mark.parametrize("group_rule", ["mean", "union"])
def test_query_rows_and_windows(device: torch.device, group_rule: str, sliding: int | None) -> None:
    meta = make_meta(device, [700, 90], q_lens=[5, 3], page_size=16, sliding=sliding)
    scores, lse = padded_scores(meta, 4, spread=2.0)
    got, want = run_both(
        scores, lse, meta, index_p=0.95, num_kv_heads=2, group_rule=group_rule, fetch_block=16
    )
    assert_same(got, want, meta)
    got, want = run_both(scores, lse, meta, index_p=0.95, num_kv_heads=2)
    assert_same(got, want, meta)


def test_what_the_top_reaches_by_itself(device: torch.device) -> None:
    """Targets that close before any histogram, after the resident mass is known, or early."""
    meta = make_meta(device, [640], page_size=64)
    scores, lse = padded_scores(meta, 2, spread=1.0)
    scores[:, :, 77], scores[:, :, 3] = 12.0, 11.0
    lse = row_lse(scores, meta)
    for p, index_p in ((0.0, 0.0), (0.0, 0.9), (0.01, 0.02), (0.3, 0.6), (0.95, 1.0), (1.0, 1.0)):
        got, want = run_both(scores, lse, meta, p=p, index_p=index_p, num_kv_heads=1)
        assert_same(got, want, meta)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch", "length"),
    [(1, 131_072), (1, 32_768), (2, 100_003), (3, 60_000), (5, 40_000), (9, 20_011)],
)
@pytest.mark.parametrize("group", [4, 7, 8])
def test_rows_over_clusters(batch: int, length: int, group: int) -> None:
    meta = make_meta(torch.device("cuda"), [length - 1000 * b for b in range(batch)], page_size=64)
    scores, lse = padded_scores(meta, 8 * group, spread=2.5)
    errors = torch.rand(batch, 8 * group, meta.page_table.shape[1], device="cuda") * 0.3
    options: dict[str, Any] = {"index_p": 0.98, "num_kv_heads": 8, "errors": errors, "margin": 1.0}
    got, want = run_both(scores, lse, meta, **options)
    assert_close(got, want, meta, scores, lse)
    again, _ = run_both(scores, lse, meta, **options)
    assert_same(got, again, meta)
    assert torch.equal(got.mass, again.mass)


@pytest.mark.parametrize("group", [1, 2, 4, 7, 8])
@pytest.mark.parametrize(("page_size", "block"), [(16, 16), (64, 16), (64, 1)])
@pytest.mark.parametrize("margin", [None, 1.5])
def test_dropped_tokens(
    device: torch.device, group: int, page_size: int, block: int, margin: float | None
) -> None:
    """What is not reached takes all candidates, those of weight 0 by underflow too."""
    meta = make_meta(device, [900, 1, 130, 301], page_size=page_size)
    scores, _ = padded_scores(meta, 2 * group, spread=2.0)
    candidates = drop_blocks(scores, meta, 2, block=block)
    lse = row_lse(scores, meta)
    options: dict[str, Any] = {"candidates": candidates, "block": block, "dropped": True}
    if margin is not None:
        errors = torch.rand(4, 2 * group, meta.page_table.shape[1]).to(device) * 0.4
        options.update(errors=errors, margin=margin)
    for p, beside, underflow in (
        (0.7, 0.0, 0.0),
        (1.0, 0.0, 0.0),
        (0.9, 1.0, 0.0),
        (0.9, 1.0, 9e3),
    ):
        scores[:, :, 20:60] -= underflow
        got, want = run_both(
            scores, lse + beside, meta, p=p, index_p=0.95, num_kv_heads=2, **options
        )
        assert_same(got, want, meta)
        assert_consistent(got, meta)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch", "length", "num_kv_heads"), [(1, 30_011, 32), (1, 131_072, 8), (3, 60_000, 8)]
)
@pytest.mark.parametrize("group", [1, 4, 6])
def test_dropped_tokens_over_clusters(
    batch: int, length: int, num_kv_heads: int, group: int
) -> None:
    meta = make_meta(torch.device("cuda"), [length - 1000 * b for b in range(batch)], page_size=64)
    scores, _ = padded_scores(meta, num_kv_heads * group, spread=2.5)
    candidates = drop_blocks(scores, meta, num_kv_heads, block=16)
    lse = row_lse(scores, meta)
    got, want = run_both(
        scores, lse, meta, index_p=0.98, num_kv_heads=num_kv_heads, candidates=candidates,
        block=16, dropped=True,
    )  # fmt: skip
    assert_close(got, want, meta, scores, lse)


@pytest.mark.gpu
@pytest.mark.parametrize("levels", [1, 2, 40])
@pytest.mark.parametrize("k", [None, 777])
def test_equal_weights_over_clusters(levels: int, k: int | None) -> None:
    meta = make_meta(torch.device("cuda"), [50_001], page_size=64)
    scores, _ = padded_scores(meta, 4, spread=1.0)
    scores = (torch.rand_like(scores[:, :1]) * levels).floor().expand_as(scores).contiguous()
    got, want = run_both(scores, row_lse(scores, meta), meta, index_p=0.9, k=k, num_kv_heads=1)
    assert_same(got, want, meta)


@pytest.mark.gpu
@pytest.mark.parametrize("group_rule", ["mean", "union"])
def test_weights_that_do_not_fit_on_the_chip(group_rule: str) -> None:
    meta = make_meta(torch.device("cuda"), [1_000_000], page_size=64)
    scores, lse = padded_scores(meta, 2, spread=3.0)
    got, want = run_both(
        scores, lse, meta, index_p=0.95, num_kv_heads=1, group_rule=group_rule, fetch_block=64
    )
    assert_consistent(got, meta)
    compare(got.mass, want.mass)
    got, want = run_both(scores, lse, meta, index_p=0.95, num_kv_heads=1)
    assert_consistent(got, meta)
    compare(got.mass, want.mass)


def test_weights_that_agree_in_their_leading_bits_are_ties(device: torch.device) -> None:
    """Two bins of 2^-13, a bin apart: any weight of the upper one brings the others along."""
    meta = make_meta(device, [300], page_size=16)
    step = 2.0**-13
    within = torch.linspace(0.2, 0.8, meta.max_len)[torch.randperm(meta.max_len)]
    above = torch.arange(meta.max_len) % 2 == 0
    weights = torch.where(above, 1 + (102 + within) * step, 1 + (100 + within) * step) / 512
    scores, lse = weights.log()[None, None].to(device), torch.zeros(1, 1, device=device)
    t, edge = torch.arange(300), int(meta.window_starts[0])
    listed = (t >= meta.num_sink) & (t < edge)
    resident = float(weights[:300][~listed].sum())
    for p, chosen in ((resident + 0.01, listed & above[:300]), (resident + 0.45, listed)):
        got, want = run_both(scores, lse, meta, p=p, num_kv_heads=1)
        assert_same(got, want, meta)
        assert torch.equal(segment(got.exact, 0, 0), t[chosen])


@pytest.mark.gpu
@pytest.mark.parametrize("group_rule", ["mean", "union"])
def test_long_rows_over_several_blocks(group_rule: str) -> None:
    """Long enough that a row is split over the blocks of a cluster; the result is repeatable."""
    meta = make_meta(torch.device("cuda"), [70_001, 33], page_size=64)
    scores, lse = make_scores(meta, 8, spread=3.0)
    options = {"index_p": 0.98, "num_kv_heads": 2, "group_rule": group_rule}
    got, _ = run_both(scores, lse, meta, **options)
    again, _ = run_both(scores, lse, meta, **options)
    assert_same(got, again, meta)
    assert_consistent(got, meta)
    if group_rule == "mean":
        assert (got.mass >= 0.8 * (1 - 1e-5)).all()
    by_k, want = run_both(scores, lse, meta, k=5000, num_kv_heads=2)
    assert torch.equal(by_k.exact.counts, want.exact.counts)
