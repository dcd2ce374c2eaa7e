"""prune's margin: the mass aimed at, raised by the estimate's standard errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ops.step_meta import make_meta
from tests.ops.test_prune import assert_consistent, assert_same, make_scores, per_seq, run_both
from twilight_engine.ops.prune import prune


@pytest.mark.parametrize("group_rule", ["mean", "union"])
@pytest.mark.parametrize("p", [0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("spread", [0.05, 0.4, 30.0])
def test_margin_matches_reference_and_only_adds(
    device: torch.device, group_rule: str, p: float, spread: float
) -> None:
    meta = make_meta(device, [900, 33, 301], page_size=16)
    scores, lse = make_scores(meta, 6)
    errors = torch.rand(3, 6, meta.page_table.shape[1]).to(device) * spread
    options: dict[str, Any] = {"p": p, "index_p": 0.98, "num_kv_heads": 2, "group_rule": group_rule}
    got, want = run_both(scores, lse, meta, errors=errors, margin=1.5, **options)
    assert_same(got, want, meta)
    assert_consistent(got, meta)
    plain, _ = run_both(scores, lse, meta, **options)
    assert (got.exact.counts >= plain.exact.counts).all()
    if spread > 0.1 and p < 1:
        assert (got.exact.counts[0] > plain.exact.counts[0]).all()
    without, _ = run_both(scores, lse, meta, errors=errors, margin=0.0, **options)
    assert_same(without, plain, meta)


def test_margin_arguments(device: torch.device) -> None:
    meta = make_meta(device, [100])
    scores, lse = make_scores(meta, 4)
    p = per_seq(meta, 0.5)
    with pytest.raises(ValueError, match="errors holds 2 pages; it needs 7"):
        few = torch.zeros(1, 4, 2, device=device)
        prune(scores, lse, meta, top_p=p, num_kv_heads=2, errors=few, margin=1.0)
    with pytest.raises(ValueError, match="margin is -1"):
        pages = torch.zeros(1, 4, 7, device=device)
        prune(scores, lse, meta, top_p=p, num_kv_heads=2, errors=pages, margin=-1.0)
