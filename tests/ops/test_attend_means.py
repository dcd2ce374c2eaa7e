"""attend_means against its reference."""

from __future__ import annotations

import pytest
import torch

from tests.compare import compare
from tests.ops.attend_cases import SHAPES, Case, listed, make_index, make_meta, name
from twilight_engine.layout import GRADE_DROPPED, GRADE_TAIL
from twilight_engine.ops.attend_means import attend_means
from twilight_engine.reference.attend_means import attend_means as reference


@pytest.mark.parametrize("grade", ["random", "tail", "dropped"])
@pytest.mark.parametrize("case", SHAPES, ids=name)
def test_equals_reference(case: Case, grade: str, device: torch.device) -> None:
    meta = make_meta(case, device)
    index = make_index(case, device, v_codes=False)
    shape = (meta.num_queries, case.num_kv_heads, meta.max_len)
    grades = torch.randint(0, 4, shape, dtype=torch.uint8)
    if grade != "random":
        grades.fill_(GRADE_TAIL if grade == "tail" else GRADE_DROPPED)
    grades = grades.to(device)
    scores = torch.full((shape[0], case.num_q_heads, shape[2]), torch.nan)
    for n in range(meta.num_queries):
        tokens = listed(meta, n)
        scores[n][:, tokens] = 5 * torch.randn(case.num_q_heads, len(tokens))
        scores[n][:, tokens[::7]] = -torch.inf
    scores = scores.to(device)
    out, lse = attend_means(scores, grades, index, meta)
    want = reference(scores, grades, index, meta)
    compare(out, want[0])
    compare(lse, want[1])


def test_one_page_gives_its_mean(device: torch.device) -> None:
    case = Case(seq_lens=(200,), page_size=64, group=2)
    meta = make_meta(case, device)
    index = make_index(case, device)
    grades = torch.full((1, 2, meta.max_len), GRADE_DROPPED, dtype=torch.uint8, device=device)
    grades[:, :, 70:90] = GRADE_TAIL
    scores = torch.randn(1, 4, meta.max_len).to(device)
    out, lse = attend_means(scores, grades, index, meta)
    mean = index.v_mean[meta.page_table[0, 1].long()].float()  # [Hkv, D]
    compare(out[0], mean.repeat_interleave(2, 0))
    compare(lse[0], scores[0, :, 70:90].logsumexp(-1))


def test_bad_arguments_are_named(device: torch.device) -> None:
    case = Case()
    meta = make_meta(case, device)
    index = make_index(case, device)
    scores = torch.zeros(1, 8, meta.max_len, device=device)
    with pytest.raises(ValueError, match=r"grades has dtype torch\.float32"):
        attend_means(scores, scores[:, :2].contiguous(), index, meta)
    with pytest.raises(ValueError, match="scores has shape"):
        attend_means(scores[0], scores[:, :2].byte(), index, meta)
