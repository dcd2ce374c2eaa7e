"""attend_lower against its reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.compare import compare
from tests.ops.attend_cases import SHAPES, Case, listed, make_index, make_meta, name
from twilight_engine.layout import (
    GRADE_DROPPED,
    GRADE_EXACT,
    GRADE_INDEX,
    GRADE_TAIL,
    IndexPages,
    StepMeta,
)
from twilight_engine.ops.attend_lower import attend_lower
from twilight_engine.ops.merge_states import merge_states
from twilight_engine.reference.attend_lower import attend_lower as reference

MIXES = {
    "mixed": (0.3, 0.2, 0.4, 0.1),  # shares of GRADE_TAIL, _INDEX, _EXACT, _DROPPED
    "tail": (1.0, 0.0, 0.0, 0.0),
    "index": (0.0, 1.0, 0.0, 0.0),
    "few-index": (0.97, 0.03, 0.0, 0.0),
    "none": (0.0, 0.0, 0.5, 0.5),
}


def make_scores(case: Case, meta: StepMeta) -> Tensor:
    """Finite where tokens are listed, some -inf; nan where nothing may be read."""
    scores = torch.full((meta.num_queries, case.num_q_heads, meta.max_len), torch.nan)
    for n in range(meta.num_queries):
        tokens = listed(meta, n)
        scores[n][:, tokens] = 5 * torch.randn(case.num_q_heads, len(tokens))
        scores[n][:, tokens[::7]] = -torch.inf
    return scores.to(meta.positions.device)


def total_lse(scores: Tensor) -> Tensor:
    """Over all tokens, where some mass lies on resident ones too."""
    return (
        scores.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        .logsumexp(-1)
        .logaddexp(torch.ones((), device=scores.device))
    )


def make_grades(case: Case, meta: StepMeta, mix: tuple[float, ...]) -> Tensor:
    shape = (meta.num_queries, case.num_kv_heads, meta.max_len)
    count = shape[0] * shape[1] * shape[2]
    drawn = torch.multinomial(torch.tensor(mix), count, replacement=True)
    return drawn.view(shape).to(meta.positions.device, torch.uint8)


def check(
    scores: Tensor,
    grades: Tensor,
    index: IndexPages,
    meta: StepMeta,
    *,
    tail: bool = True,
    index_counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    lse = total_lse(scores)
    state = attend_lower(scores, lse, grades, index, meta, tail=tail, index_counts=index_counts)
    got = merge_states([state], torch.float32)
    want = reference(scores, lse, grades, index, meta, tail=tail)
    compare(got[0], want[0])
    compare(got[1], want[1])
    return got


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("case", SHAPES, ids=name)
def test_equals_reference(case: Case, mix: str, device: torch.device) -> None:
    meta = make_meta(case, device)
    scores = make_scores(case, meta)
    check(scores, make_grades(case, meta, MIXES[mix]), make_index(case, device), meta)


def test_without_an_int4_v_or_without_the_tail(device: torch.device) -> None:
    for case in SHAPES[:4]:
        meta = make_meta(case, device)
        scores, grades = make_scores(case, meta), make_grades(case, meta, MIXES["mixed"])
        index = make_index(case, device)
        check(scores, grades, index, meta, tail=False)
        grades[grades == GRADE_INDEX] = GRADE_EXACT
        check(scores, grades, make_index(case, device, v_codes=False), meta)


def test_a_long_context_and_clustered_index_tokens(device: torch.device) -> None:
    case = Case(seq_lens=(5003, 900), head_dim=128, page_size=64)
    meta = make_meta(case, device)
    scores, grades = make_scores(case, meta), make_grades(case, meta, MIXES["few-index"])
    grades[:, :, 640:1000] = GRADE_INDEX  # whole pages, four tiles each
    check(scores, grades, make_index(case, device), meta)


def test_pages_of_several_slices(device: torch.device) -> None:
    for case in (
        Case(seq_lens=(900, 333), head_dim=96, page_size=130, group=5),
        Case(seq_lens=(1500,), head_dim=128, page_size=200),
    ):
        meta = make_meta(case, device)
        scores, grades = make_scores(case, meta), make_grades(case, meta, MIXES["mixed"])
        check(scores, grades, make_index(case, device), meta)


def test_work_dealt_out_by_counts(device: torch.device) -> None:
    for case in (*SHAPES, Case(seq_lens=(5003, 900), head_dim=128, page_size=64)):
        meta = make_meta(case, device)
        scores, grades = make_scores(case, meta), make_grades(case, meta, MIXES["few-index"])
        grades[:, 0, grades.shape[2] // 4 :] = GRADE_INDEX  # one head far above the others
        counts = (grades == GRADE_INDEX).sum(-1).int()
        check(scores, grades, make_index(case, device), meta, index_counts=counts)


def test_more_query_rows_than_a_block_keeps_in_mind(device: torch.device) -> None:
    case = Case(seq_lens=(300, 90) * 5, q_lens=(2, 5) * 5, head_dim=128, page_size=64)
    meta = make_meta(case, device)
    scores, grades = make_scores(case, meta), make_grades(case, meta, MIXES["mixed"])
    counts = (grades == GRADE_INDEX).sum(-1).int()
    check(scores, grades, make_index(case, device), meta, index_counts=counts)


def test_aligned_scores(device: torch.device) -> None:
    case = Case(seq_lens=(1000,), head_dim=128, page_size=64)
    meta = make_meta(case, device)
    scores, grades = make_scores(case, meta), make_grades(case, meta, MIXES["mixed"])
    padded = torch.full((*scores.shape[:2], 1024), torch.nan, device=device)
    padded[:, :, : scores.shape[2]] = scores
    check(padded, grades, make_index(case, device), meta)


def test_a_head_without_mass_is_empty(device: torch.device) -> None:
    case = Case(seq_lens=(400,), head_dim=128, page_size=64)
    meta = make_meta(case, device)
    scores, grades = make_scores(case, meta), make_grades(case, meta, MIXES["mixed"])
    scores[0, 0] = -torch.inf
    lse = total_lse(scores)
    lse[0, 0] = -torch.inf
    state = attend_lower(scores, lse, grades, make_index(case, device), meta)
    out, got = merge_states([state], torch.float32)
    assert torch.isneginf(got[0, 0]) and not out[0, 0].any()
    assert torch.isfinite(got[0, 1:]).all() and torch.isfinite(out).all()


def test_the_result_does_not_depend_on_lse(device: torch.device) -> None:
    case = Case(seq_lens=(700,), group=3)
    meta = make_meta(case, device)
    scores, grades = make_scores(case, meta), make_grades(case, meta, MIXES["mixed"])
    index, lse = make_index(case, device), total_lse(scores)
    want = merge_states([attend_lower(scores, lse, grades, index, meta)], torch.float32)
    got = merge_states([attend_lower(scores, lse + 20, grades, index, meta)], torch.float32)
    compare(got[0], want[0])
    compare(got[1], want[1])


def test_one_page_gives_its_mean(device: torch.device) -> None:
    case = Case(seq_lens=(200,), page_size=64, group=2)
    meta = make_meta(case, device)
    index = make_index(case, device)
    grades = torch.full((1, 2, meta.max_len), GRADE_DROPPED, dtype=torch.uint8, device=device)
    grades[:, :, 70:90] = GRADE_TAIL
    out, _ = check(torch.randn(1, 4, meta.max_len).to(device), grades, index, meta)
    mean = index.v_mean[meta.page_table[0, 1].long()].float()  # [Hkv, D]
    compare(out[0], mean.repeat_interleave(2, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("mix", ["mixed", "index"])
def test_many_slices_a_warp(mix: str) -> None:
    device = torch.device("cuda")
    case = Case(seq_lens=(26000,), head_dim=64, page_size=4, num_kv_heads=8)
    meta = make_meta(case, device)
    scores, grades = make_scores(case, meta), make_grades(case, meta, MIXES[mix])
    check(scores, grades, make_index(case, device), meta)


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "group"), [(128, 4), (64, 8), (256, 8)])
def test_many_whole_slices_a_warp_and_full_rings(head_dim: int, group: int) -> None:
    device = torch.device("cuda")
    case = Case(seq_lens=(100_000,), head_dim=head_dim, page_size=64, num_kv_heads=8, group=group)
    meta = make_meta(case, device)
    scores, grades = make_scores(case, meta), make_grades(case, meta, MIXES["few-index"])
    grades[:, :, 20_000:40_000] = GRADE_INDEX
    grades[:, :, 50_000:90_000:2] = GRADE_INDEX
    counts = (grades == GRADE_INDEX).sum(-1).int()
    for index_counts in (None, counts):
        check(scores, grades, make_index(case, device), meta, index_counts=index_counts)


@pytest.mark.gpu
def test_a_page_without_tail_tokens_needs_no_mean() -> None:
    device = torch.device("cuda")
    case = Case(seq_lens=(700,), head_dim=128, page_size=64)
    meta = make_meta(case, device)
    scores, grades = make_scores(case, meta), make_grades(case, meta, MIXES["mixed"])
    index = make_index(case, device)
    grades[:, 0, 128:256][grades[:, 0, 128:256] == GRADE_TAIL] = GRADE_INDEX
    index.v_mean[meta.page_table[0, 2:4].long(), 0] = torch.nan
    check(scores, grades, index, meta)


@pytest.mark.gpu
def test_captured_repeats_bit_for_bit_beside_another_stream() -> None:
    device = torch.device("cuda")
    case = Case(seq_lens=(3000, 700), head_dim=128, page_size=64)
    meta = make_meta(case, device)
    scores, grades = make_scores(case, meta), make_grades(case, meta, MIXES["mixed"])
    index, lse = make_index(case, device), total_lse(scores)
    want = merge_states([attend_lower(scores, lse, grades, index, meta)], torch.float32)
    side = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            state = attend_lower(scores, lse, grades, index, meta)
        torch.cuda.current_stream().wait_stream(side)
        got = merge_states([state], torch.float32)
    for _ in range(3):
        graph.replay()
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_bad_arguments_are_named(device: torch.device) -> None:
    case = Case()
    meta = make_meta(case, device)
    index = make_index(case, device)
    scores = torch.zeros(1, 8, meta.max_len, device=device)
    lse, grades = scores[:, :, 0].contiguous(), scores[:, :2].byte()
    with pytest.raises(ValueError, match=r"grades has dtype torch\.float32"):
        attend_lower(scores, lse, scores[:, :2].contiguous(), index, meta)
    with pytest.raises(ValueError, match="scores has shape"):
        attend_lower(scores[0], lse, grades, index, meta)
    with pytest.raises(ValueError, match="lse has shape"):
        attend_lower(scores, lse[:, :2], grades, index, meta)
    with pytest.raises(ValueError, match="index_counts has shape"):
        attend_lower(scores, lse, grades, index, meta, index_counts=lse.int())
    with pytest.raises(ValueError, match="no V is left"):
        bare = make_index(case, device, v_codes=False)
        attend_lower(scores, lse, grades, bare, meta, tail=False)
