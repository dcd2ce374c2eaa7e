"""attend_index against its reference."""

from __future__ import annotations

import pytest
import torch

from tests.compare import compare
from tests.ops.attend_cases import SHAPES, Case, make_index, make_lists, make_meta, name
from twilight_engine.ops.attend_index import attend_index
from twilight_engine.reference.attend_index import attend_index as reference


@pytest.mark.parametrize(
    "share", [(1.0,), (0.02, 0.9, 0.0, 0.3), (0.0,)], ids=["every-row", "uneven", "empty"]
)
@pytest.mark.parametrize("case", SHAPES, ids=name)
def test_equals_reference(case: Case, share: tuple[float, ...], device: torch.device) -> None:
    meta = make_meta(case, device)
    index = make_index(case, device)
    lists = make_lists(case, meta, share)
    scores = (5 * torch.randn(meta.num_queries, case.num_q_heads, meta.max_len)).to(device)
    out, lse = attend_index(scores, index, lists, meta)
    want = reference(scores, index, lists, meta)
    compare(out, want[0])
    compare(lse, want[1])


def test_reads_listed_scores_only_and_takes_minus_infinity(device: torch.device) -> None:
    case = Case(seq_lens=(400,), head_dim=128, page_size=64)
    meta = make_meta(case, device)
    index = make_index(case, device)
    lists = make_lists(case, meta, (0.3,))
    scores = torch.full((1, case.num_q_heads, meta.max_len), torch.nan, device=device)
    for h in range(case.num_kv_heads):
        tokens = lists.tokens[0, h, : int(lists.counts[0, h])].long()
        scores[0, h * 4 : h * 4 + 4, tokens] = torch.randn(4, len(tokens)).to(device)
        scores[0, h * 4 : h * 4 + 4, tokens[::3]] = -torch.inf
    scores[0, 0] = -torch.inf  # a head with no mass at all
    out, lse = attend_index(scores, index, lists, meta)
    want = reference(scores, index, lists, meta)
    compare(out, want[0])
    compare(lse, want[1])
    assert torch.isneginf(lse[0, 0]) and not out[0, 0].any()


def test_an_index_without_v_is_refused(device: torch.device) -> None:
    case = Case()
    meta = make_meta(case, device)
    lists = make_lists(case, meta, (0.5,))
    with pytest.raises(ValueError, match="index has no INT4 V"):
        attend_index(
            torch.zeros(1, 8, 155, device=device),
            make_index(case, device, v_codes=False),
            lists,
            meta,
        )
