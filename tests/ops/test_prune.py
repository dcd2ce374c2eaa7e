from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.compare import compare
from tests.ops.step_meta import make_meta
from twilight_engine.layout import (
    GRADE_DROPPED,
    GRADE_EXACT,
    GRADE_INDEX,
    GRADE_TAIL,
    TIE_BITS,
    Pruned,
    RowLists,
    StepMeta,
    block_of,
    num_blocks,
)
from twilight_engine.ops.prune import prune
from twilight_engine.reference.prune import prune as reference

EPSILON = 1e-6  # of a mass: what minimality is promised up to


def make_scores(meta: StepMeta, num_q_heads: int, *, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    n, device = meta.num_queries, meta.positions.device
    scores = torch.randn(n, num_q_heads, meta.max_len).to(device) * spread
    return scores, row_lse(scores, meta)


def row_lse(scores: Tensor, meta: StepMeta) -> Tensor:
    t = torch.arange(scores.shape[2], device=scores.device)
    seen = (t >= meta.ctx_starts[:, None]) & (t <= meta.positions[:, None])
    return scores.masked_fill(~seen[:, None], -torch.inf).logsumexp(-1)


def per_seq(meta: StepMeta, value: float | int | None) -> Tensor | None:
    if value is None:
        return None
    dtype = torch.int32 if isinstance(value, int) else torch.float32
    return torch.full_like(meta.seq_lens, value, dtype=dtype)


def run_both(
    scores: Tensor, lse: Tensor, meta: StepMeta, *, p: float = 0.8, index_p: float | None = None,
    k: int | None = None, **options: Any,
) -> tuple[Pruned, Pruned]:  # fmt: skip
    tops = {
        "top_p": per_seq(meta, float(p)),
        "index_top_p": per_seq(meta, index_p),
        "top_k": per_seq(meta, k),
    }
    return prune(scores, lse, meta, **tops, **options), reference(
        scores, lse, meta, **tops, **options
    )


def segment(lists: RowLists, n: int, h: int) -> Tensor:
    return lists.tokens[n, h, : int(lists.counts[n, h])].long().cpu()


def assert_same(got: Pruned, want: Pruned, meta: StepMeta) -> None:
    for n in range(meta.num_queries):
        seen = slice(int(meta.ctx_starts[n]), int(meta.positions[n]) + 1)
        assert torch.equal(got.grades[n, :, seen], want.grades[n, :, seen])
        for h in range(want.mass.shape[1]):
            assert torch.equal(segment(got.exact, n, h), segment(want.exact, n, h))
    assert torch.equal(got.index_counts, want.index_counts)
    compare(got.mass, want.mass)


def assert_consistent(got: Pruned, meta: StepMeta) -> None:
    """Grades, list and counts tell the same story; residents are exact and not listed."""
    for n in range(meta.num_queries):
        t = torch.arange(int(meta.ctx_starts[n]), int(meta.positions[n]) + 1)
        edge = int(meta.window_starts[meta.query_seq[n]])
        resident = (t < meta.num_sink) | (t >= edge)
        for h in range(got.mass.shape[1]):
            grades = got.grades[n, h].cpu()[t]
            assert (grades[resident] == GRADE_EXACT).all()
            assert torch.equal(segment(got.exact, n, h), t[(grades == GRADE_EXACT) & ~resident])
            assert got.index_counts[n, h] == (grades == GRADE_INDEX).sum()


def assert_threshold_set(w: Tensor, chosen: Tensor, resident: Tensor, p: float) -> None:
    """chosen, of all list tokens, is {w >= tau}, reaches p, and no smaller one does.

    By the bits above TIE_BITS: those that agree in them are chosen together.
    """
    leading = w.view(torch.int32) >> TIE_BITS
    w = w.double()
    rest = ~chosen & ~resident
    mass = w[chosen | resident].sum()
    if rest.any():
        assert mass >= p * (1 - EPSILON)
    if chosen.any():
        least = leading[chosen].min()
        if rest.any():
            assert least > leading[rest].max()  # a threshold set that keeps all ties
        if p < 1:
            ties = chosen & (leading == least)
            assert mass - w[ties].sum() <= p * (1 + EPSILON)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 300),
    p=st.floats(0.0078125, 1.0, width=32),
    index_p=st.none() | st.floats(0.0078125, 1.0, width=32),
    levels=st.sampled_from([1, 3, 1000]),
    spread=st.sampled_from([0.0, 1.0, 8.0, 60.0]),
    num_sink=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
def test_threshold_set_properties(
    length: int, p: float, index_p: float | None, levels: int, spread: float, num_sink: int,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    meta = make_meta(torch.device("cpu"), [length], page_size=16, num_sink=num_sink)
    scores = torch.randint(0, levels, (1, 1, meta.max_len)).float() / levels * spread
    lse = row_lse(scores, meta)
    got, _ = run_both(scores, lse, meta, p=p, index_p=index_p, num_kv_heads=1)
    assert_consistent(got, meta)
    t, edge = torch.arange(length), int(meta.window_starts[0])
    resident = (t < num_sink) | (t >= edge)
    w = torch.exp(scores[0, 0, :length] - lse[0, 0])
    grades = got.grades[0, 0, :length]
    exact = (grades == GRADE_EXACT) & ~resident
    assert_threshold_set(w, exact, resident, p)
    if index_p is not None and index_p >= p:
        assert_threshold_set(w, exact | (grades == GRADE_INDEX), resident, index_p)
    if p >= 1:
        assert exact.sum() == (~resident).sum()


@pytest.mark.parametrize("group", [1, 3, 4, 6, 7, 8])
@pytest.mark.parametrize("page_size", [16, 61, 64])
@pytest.mark.parametrize("group_rule", ["mean", "union"])
def test_matches_reference(
    device: torch.device, group_rule: str, page_size: int, group: int
) -> None:
    meta = make_meta(device, [900, 33, 301], page_size=page_size)
    scores, lse = make_scores(meta, 2 * group)
    for fetch_block in (1, page_size):
        got, want = run_both(
            scores, lse, meta, p=0.6, index_p=0.9, num_kv_heads=2, group_rule=group_rule,
            fetch_block=fetch_block,
        )  # fmt: skip
        assert_same(got, want, meta)
        assert_consistent(got, meta)


@pytest.mark.parametrize("batch", [1, 3, 17])
@pytest.mark.parametrize("sliding", [None, 70])
def test_batches_and_sliding_windows(device: torch.device, batch: int, sliding: int | None) -> None:
    lengths = [1 + 53 * i % 600 for i in range(batch)]
    meta = make_meta(device, lengths, page_size=16, sliding=sliding)
    scores, lse = make_scores(meta, 4)
    got, want = run_both(scores, lse, meta, index_p=1.0, num_kv_heads=2)
    assert_same(got, want, meta)


def test_several_query_rows_a_sequence(device: torch.device) -> None:
    meta = make_meta(device, [300, 90], q_lens=[5, 3], page_size=16, num_recent=24)
    scores, lse = make_scores(meta, 4)
    got, want = run_both(scores, lse, meta, index_p=0.95, num_kv_heads=2, fetch_block=16)
    assert_same(got, want, meta)
    assert_consistent(got, meta)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("page_size", "block"), [(16, 16), (61, 16), (64, 64), (61, 1), (64, 1)])
@pytest.mark.parametrize("dropped", [False, True])
def test_candidates(
    device: torch.device, share: float, page_size: int, block: int, dropped: bool
) -> None:
    meta = make_meta(device, [700, 129], page_size=page_size)
    blocks = num_blocks(meta.max_len, block, page_size)
    candidates = (torch.rand(2, 2, blocks) < share).to(torch.uint8).to(device)
    scores, _ = make_scores(meta, 6)
    t = torch.arange(meta.max_len, device=device)
    left_out = candidates[:, :, block_of(t, block, page_size)] == 0  # [N, Hkv, L]
    inside = (t >= meta.num_sink) & (t < meta.window_starts[:, None])
    left_out &= inside[:, None]
    if dropped:
        scores.masked_fill_(left_out.repeat_interleave(3, dim=1), -torch.inf)
    got, want = run_both(
        scores, row_lse(scores, meta), meta, p=0.7, index_p=0.95, num_kv_heads=2,
        candidates=candidates, block=block, dropped=dropped,
    )  # fmt: skip
    assert_same(got, want, meta)
    assert_consistent(got, meta)
    visible = left_out & (t <= meta.positions[:, None])[:, None]
    grade = GRADE_DROPPED if dropped else GRADE_TAIL
    assert (got.grades[visible] == grade).all()


@pytest.mark.parametrize("group_rule", ["mean", "union"])
@pytest.mark.parametrize("k", [1, 21, 60, 10_000])
@pytest.mark.parametrize("levels", [2, 100_000])
def test_top_k_takes_the_count_and_the_first_ties(
    device: torch.device, group_rule: str, k: int, levels: int
) -> None:
    meta = make_meta(device, [400, 150], page_size=16)
    scores = torch.randint(0, levels, (2, 4, meta.max_len)).float().div(levels / 3).to(device)
    got, want = run_both(
        scores, row_lse(scores, meta), meta, k=k, index_p=0.9, num_kv_heads=2,
        group_rule=group_rule,
    )  # fmt: skip
    assert_same(got, want, meta)
    if group_rule == "mean":
        listed = (meta.window_starts.cpu() - meta.num_sink).clamp(min=0)
        wanted = (k - meta.seq_lens.cpu() + listed).clamp(min=0).minimum(listed)
        assert torch.equal(got.exact.counts.cpu(), wanted[:, None].expand(-1, 2).int())


def test_top_k_of_zero_falls_back_to_top_p(device: torch.device) -> None:
    meta = make_meta(device, [400, 390], page_size=16)
    scores, lse = make_scores(meta, 2)
    top_k = torch.tensor([0, 50], dtype=torch.int32, device=device)
    got = prune(scores, lse, meta, top_p=per_seq(meta, 0.5), top_k=top_k, num_kv_heads=2)
    by_p, _ = run_both(scores, lse, meta, p=0.5, num_kv_heads=2)
    by_k, _ = run_both(scores, lse, meta, k=50, num_kv_heads=2)
    assert torch.equal(got.exact.counts, torch.stack((by_p.exact.counts[0], by_k.exact.counts[1])))


@pytest.mark.parametrize("spread", [0.0, 200.0])
def test_flat_and_underflowing_weights(device: torch.device, spread: float) -> None:
    meta = make_meta(device, [500], page_size=16)
    scores, lse = make_scores(meta, 4, spread=spread)
    for p in (0.5, 0.999, 1.0):
        # a mean over heads would have weights of 0.25 on either side of it, up to rounding
        got, want = run_both(scores, lse, meta, p=p, index_p=1.0, num_kv_heads=4)
        assert_same(got, want, meta)


def test_first_token_need_not_be_the_largest(device: torch.device) -> None:
    """A bisection that starts from the first weight keeps everything here."""
    meta = make_meta(device, [500], page_size=16, num_sink=0)
    scores = torch.zeros(1, 1, meta.max_len, device=device)
    scores[..., 0], scores[..., 77] = -100.0, 20.0
    got, _ = run_both(scores, row_lse(scores, meta), meta, p=0.9, num_kv_heads=1)
    assert segment(got.exact, 0, 0).tolist() == [77]


@pytest.mark.parametrize("num_sink", [0, 40])
def test_empty_list_region(device: torch.device, num_sink: int) -> None:
    meta = make_meta(device, [1, 16, 40], page_size=16, num_sink=num_sink, num_recent=64)
    scores, lse = make_scores(meta, 2)
    got, want = run_both(scores, lse, meta, p=1.0, num_kv_heads=1)
    assert_same(got, want, meta)
    assert (got.exact.counts == 0).all()
    compare(got.mass, torch.ones_like(got.mass))


def test_row_that_sees_nothing(device: torch.device) -> None:
    meta = make_meta(device, [200, 100], page_size=16)
    meta.positions[1] = -1
    scores, lse = make_scores(meta, 2)
    got, _ = run_both(scores, lse, meta, index_p=1.0, num_kv_heads=2)
    assert (got.exact.counts[1] == 0).all() and (got.index_counts[1] == 0).all()
    assert (got.mass[1] == 0).all() and (got.exact.counts[0] > 0).all()


def test_bad_arguments(device: torch.device) -> None:
    meta = make_meta(device, [100])
    scores, lse = make_scores(meta, 4)
    p = per_seq(meta, 0.5)
    with pytest.raises(ValueError, match="group_rule is 'max'; allowed: 'mean', 'union'"):
        prune(scores, lse, meta, top_p=p, num_kv_heads=2, group_rule="max")
    with pytest.raises(ValueError, match="fetch_block is 7; allowed: 1, 16"):
        prune(scores, lse, meta, top_p=p, num_kv_heads=2, fetch_block=7)
    with pytest.raises(ValueError, match="scores has 4 heads; it must be a multiple of 3"):
        prune(scores, lse, meta, top_p=p, num_kv_heads=3)
    with pytest.raises(ValueError, match="scores holds 50 tokens; max_len is 103"):
        prune(scores[..., :50].contiguous(), lse, meta, top_p=p, num_kv_heads=2)
    with pytest.raises(ValueError, match="holds 3 blocks; 103 tokens in blocks of 16 need 7"):
        few = torch.ones(1, 2, 3, dtype=torch.uint8, device=device)
        prune(scores, lse, meta, top_p=p, num_kv_heads=2, candidates=few)
    with pytest.raises(ValueError, match=r"top_p has dtype torch\.float64"):
        prune(scores, lse, meta, top_p=p.double(), num_kv_heads=2)
