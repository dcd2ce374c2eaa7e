"""merge_states against its reference and against one softmax over everything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.compare import compare
from tests.ops.attend_cases import (
    SHAPES,
    Case,
    make_host_kv,
    make_index,
    make_lists,
    make_meta,
    make_queries,
    make_windows,
    name,
    row_dtypes,
)
from tests.ops.test_attend_lower import MIXES, make_grades, make_scores, total_lse
from twilight_engine.layout import NO_ROW, StepMeta
from twilight_engine.ops.attend_lower import attend_lower
from twilight_engine.ops.attend_pages import attend_pages
from twilight_engine.ops.attend_rows import attend_rows
from twilight_engine.ops.attend_workspace import AttendState
from twilight_engine.ops.merge_states import merge_states
from twilight_engine.reference.attend_pages import attend_pages as dense_reference
from twilight_engine.reference.merge_states import merge_states as reference


def make_states(
    case: Case, meta: StepMeta, dtype: torch.dtype, device: torch.device, share: float
) -> list[AttendState]:
    """States of the three ops."""
    host_kv = make_host_kv(case, dtype, device)
    q = make_queries(case, meta, dtype)
    lists = make_lists(case, meta, (share, 0.0))
    windows = make_windows(case, meta, host_kv, num_hot=1)
    locations = torch.full_like(lists.tokens, NO_ROW)
    scores = make_scores(case, meta)
    grades = make_grades(case, meta, MIXES["mixed"])
    index = make_index(case, device)
    return [
        attend_lower(scores, total_lse(scores), grades, index, meta),
        attend_rows(q, windows, host_kv, lists, locations, meta, softmax_scale=0.3),
        attend_pages(q, host_kv, meta.page_table, meta, softmax_scale=0.1),
    ]


@pytest.mark.parametrize("case", SHAPES, ids=name)
def test_equals_reference(case: Case, device: torch.device) -> None:
    meta = make_meta(case, device)
    for dtype in row_dtypes(device):
        states = make_states(case, meta, dtype, device, 0.5)
        alone = [merge_states([state], torch.float32) for state in states]
        for count in (1, 2, 3):
            out, lse = merge_states(states[:count], dtype)
            want = reference([o for o, _ in alone[:count]], [s for _, s in alone[:count]], dtype)
            assert out.dtype == dtype and lse.dtype == torch.float32
            compare(out, want[0])
            compare(lse, want[1])


def test_many_partials(device: torch.device) -> None:
    case = Case(seq_lens=(20000,), group=4, head_dim=128, page_size=64, num_kv_heads=1)
    meta = make_meta(case, device)
    dtype = row_dtypes(device)[-1]
    states = make_states(case, meta, dtype, device, 1.0)
    alone = [merge_states([state], torch.float32) for state in states]
    out, lse = merge_states(states, torch.float32)
    want = reference([o for o, _ in alone], [s for _, s in alone], torch.float32)
    compare(out, want[0])
    compare(lse, want[1])


def test_all_empty_gives_zero_and_minus_infinity(device: torch.device) -> None:
    case = Case(seq_lens=(150,), group=3)
    meta = make_meta(case, device)
    scores = make_scores(case, meta)
    grades = make_grades(case, meta, MIXES["none"])
    state = attend_lower(scores, total_lse(scores), grades, make_index(case, device), meta)
    out, lse = merge_states([state, state], torch.float32)
    assert not out.any() and torch.isneginf(lse).all()


def test_merging_halves_is_one_softmax(device: torch.device) -> None:
    case = Case(seq_lens=(500,), group=4, head_dim=64, page_size=64)
    meta = make_meta(case, device)
    pages = make_host_kv(case, torch.float32, device)
    q = make_queries(case, meta, torch.float32)

    def attend(first: int, last: int) -> AttendState:
        bounds = [torch.full_like(meta.positions, t) for t in (first, last)]
        part = StepMeta(**{**vars(meta), "ctx_starts": bounds[0], "positions": bounds[1]})
        return attend_pages(q, pages, meta.page_table, part, softmax_scale=0.2)

    states = [attend(0, 29), attend(30, 30), attend(31, 499)]
    out, lse = merge_states(states, torch.float32)
    want: tuple[Tensor, Tensor] = dense_reference(
        q, pages, meta.page_table, meta, softmax_scale=0.2
    )
    compare(out, want[0])
    compare(lse, want[1])


def test_bad_arguments_are_named(device: torch.device) -> None:
    meta = make_meta(Case(), device)
    state = make_states(Case(), meta, torch.float32, device, 0.5)[0]
    other = Case(head_dim=80)
    wide = make_states(other, make_meta(other, device), torch.float32, device, 0.5)[0]
    with pytest.raises(ValueError, match="there are 4 states; 1 to 3 are allowed"):
        merge_states([state] * 4, torch.float32)
    with pytest.raises(ValueError, match="there are 0 states"):
        merge_states([], torch.float32)
    with pytest.raises(ValueError, match=r"states\[1\] has shape \[1, 8, 80\]"):
        merge_states([state, wide], torch.float32)
