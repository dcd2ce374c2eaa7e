from __future__ import annotations

import pytest
import torch

from tests.ops.step_meta import make_meta
from tests.ops.test_prune import segment
from twilight_engine.ops.prune import list_all


def test_list_all(device: torch.device) -> None:
    meta = make_meta(device, [300, 20, 90], q_lens=[2, 1, 3], page_size=16, sliding=100)
    lists = list_all(meta, 2, meta.max_len)
    for n in range(meta.num_queries):
        edge = int(meta.window_starts[meta.query_seq[n]])
        stop = min(int(meta.positions[n]) + 1, edge)
        want = torch.arange(max(int(meta.ctx_starts[n]), 4), max(stop, 4))
        for h in range(2):
            assert torch.equal(segment(lists, n, h), want[want < max(stop, 0)])
    with pytest.raises(ValueError, match="capacity is 8; it must be at least max_len, 303"):
        list_all(meta, 2, 8)
