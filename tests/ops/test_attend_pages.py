"""attend_pages against its reference and against torch's attention."""

from __future__ import annotations

import pytest
import torch

from tests.compare import compare
from tests.ops.attend_cases import (
    SHAPES,
    Case,
    make_host_kv,
    make_meta,
    make_queries,
    name,
    row_dtypes,
)
from twilight_engine.layout import COUNTER_STREAMED_BYTES, NUM_COUNTERS
from twilight_engine.ops.attend_pages import attend_pages
from twilight_engine.ops.merge_states import merge_states
from twilight_engine.reference.attend_pages import attend_pages as reference


@pytest.mark.parametrize("on_host", [False, True], ids=["device", "host"])
@pytest.mark.parametrize("case", SHAPES, ids=name)
def test_equals_reference(case: Case, on_host: bool, device: torch.device) -> None:
    meta = make_meta(case, device)
    for dtype in row_dtypes(device):
        host = make_host_kv(case, dtype, device)
        pages = host if on_host else host.to(device)
        q = make_queries(case, meta, dtype)
        state = attend_pages(q, pages, meta.page_table, meta, softmax_scale=0.2)
        out, lse = merge_states([state], torch.float32)
        want_out, want_lse = reference(q, host, meta.page_table, meta, softmax_scale=0.2)
        assert out.dtype == lse.dtype == torch.float32
        compare(out, want_out)
        compare(lse, want_lse)


def test_equals_sdpa_over_a_long_context(device: torch.device) -> None:
    case = Case(seq_lens=(5000,), group=4, head_dim=128, page_size=64)
    meta = make_meta(case, device)
    pages = make_host_kv(case, torch.float32, device).to(device)
    q = make_queries(case, meta, torch.float32)
    state = attend_pages(q, pages, meta.page_table, meta, softmax_scale=0.3)
    out, _ = merge_states([state], torch.float32)
    rows = pages[:, meta.page_table[0, :79].long()].reshape(2, -1, 256)[:, :5000]
    k, v = rows[..., :128].repeat_interleave(4, 0), rows[..., 128:].repeat_interleave(4, 0)
    want = torch.nn.functional.scaled_dot_product_attention(
        q[0, :, None].double(), k.double(), v.double(), scale=0.3
    )
    compare(out[0], want[:, 0].float())


def test_counts_streamed_bytes(device: torch.device) -> None:
    case = Case(seq_lens=(150, 40), q_lens=(4, 3), group=3)
    meta = make_meta(case, device)
    pages = make_host_kv(case, torch.float32, device)
    q = make_queries(case, meta, torch.float32)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=device)
    attend_pages(q, pages, meta.page_table, meta, softmax_scale=1.0, counters=counters)
    seen = (meta.positions + 1 - meta.ctx_starts).sum().item()
    want = torch.zeros(NUM_COUNTERS, dtype=torch.int64)
    want[COUNTER_STREAMED_BYTES] = seen * case.num_kv_heads * 2 * 64 * 4
    assert torch.equal(counters.cpu(), want)


def test_a_large_score_does_not_overflow(device: torch.device) -> None:
    case = Case(seq_lens=(100,), group=2)
    meta = make_meta(case, device)
    pages = make_host_kv(case, torch.float32, device).to(device)
    q = make_queries(case, meta, torch.float32) * 100
    state = attend_pages(q, pages, meta.page_table, meta, softmax_scale=5.0)
    out, lse = merge_states([state], torch.float32)
    want = reference(q, pages, meta.page_table, meta, softmax_scale=5.0)
    compare(lse, want[1])
    assert torch.isfinite(out).all()


def test_bad_arguments_are_named(device: torch.device) -> None:
    case = Case()
    meta = make_meta(case, device)
    pages = make_host_kv(case, torch.float32, device).to(device)
    q = make_queries(case, meta, torch.float32)

    def call(q: torch.Tensor = q, pages: torch.Tensor = pages) -> None:
        attend_pages(q, pages, meta.page_table, meta, softmax_scale=1.0)

    with pytest.raises(ValueError, match=r"pages has dtype torch\.float16"):
        call(pages=pages.half())
    with pytest.raises(ValueError, match=r"pages has 2 KV heads; they must divide 7"):
        call(q=q[:, :7].contiguous())
    with pytest.raises(ValueError, match=r"q has shape \[2, 8, 64\]"):
        call(q=q.repeat(2, 1, 1))
    with pytest.raises(NotImplementedError, match="head_dim is 32"):
        call(q=q[..., :32].contiguous(), pages=pages[..., :64].contiguous())
    with pytest.raises(NotImplementedError, match=r"q has dtype torch\.float64"):
        call(q=q.double(), pages=pages.double())
