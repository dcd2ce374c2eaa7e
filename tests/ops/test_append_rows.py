"""append_rows writes the same bytes to every tier as the reference does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.step_meta import make_meta
from tests.ops.test_index_pages import FORMATS, assert_same, indexes
from twilight_engine.config import KIndex, VIndex
from twilight_engine.layout import COUNTER_WRITTEN_BYTES, NUM_COUNTERS, StepMeta, Windows
from twilight_engine.ops.append_rows import append_rows
from twilight_engine.reference.append_rows import append_rows as append_rows_reference

SINK = 4


def dtypes(device: torch.device) -> list[torch.dtype]:
    gpu = [torch.float16, torch.bfloat16] if device.type == "cuda" else []
    return [torch.float32, *gpu]


class Tiers:
    """Host pages, windows, device pages and counters, filled with a sentinel."""

    def __init__(
        self, meta: StepMeta, heads: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        size, num_pages = meta.page_size, int(meta.page_table.max()) + 2
        slots = int(meta.seq_slots.max()) + 1
        shape = (heads, num_pages, size, 2 * dim)
        # One page more than is used, so that the stride over heads is larger than the view.
        self.host = torch.full(
            (heads, num_pages + 1, size, 2 * dim),
            -7.0,
            dtype=dtype,
            pin_memory=device.type == "cuda",
        )[:, :num_pages]
        self.pages = torch.full(shape, -7.0, dtype=dtype, device=device)
        rows = torch.full((slots * heads * (SINK + 3 * size) + 5, 2 * dim), -7.0, dtype=dtype)
        self.windows = Windows(rows.to(device), heads, SINK, 3 * size)
        self.counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=device)

    def tensors(self) -> list[Tensor]:
        return [t.cpu() for t in (self.host, self.pages, self.windows.rows, self.counters)]


def check(
    meta: StepMeta, k: Tensor, v: Tensor, *, with_windows: bool = True, with_pages: bool = True
) -> Tiers:
    heads, dim = k.shape[1:]
    tiers = [Tiers(meta, heads, dim, k.dtype, k.device) for _ in range(2)]
    for op, t in zip((append_rows, append_rows_reference), tiers, strict=True):
        windows = t.windows if with_windows else None
        pages = t.pages if with_pages else None
        op(k, v, windows, t.host, meta, counters=t.counters, pages=pages)
    if k.is_cuda:
        torch.cuda.synchronize()
    for actual, expected in zip(tiers[0].tensors(), tiers[1].tensors(), strict=True):
        assert torch.equal(actual, expected)
    return tiers[0]


@pytest.mark.parametrize("page_size", [16, 61, 64])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_decode_step(device: torch.device, batch: int, dim: int, page_size: int) -> None:
    lens = [1, 5, 2 * page_size, 7 * page_size + 3, page_size + 1][: min(batch, 5)]
    lens += [page_size * 3 + b for b in range(batch - len(lens))]
    meta = make_meta(device, lens, page_size=page_size, num_sink=SINK)
    for dtype in dtypes(device):
        k, v = torch.randn(2, batch, 3, dim, device=device).to(dtype)
        tiers = check(meta, k, v)
        written = tiers.counters[COUNTER_WRITTEN_BYTES].item()
        assert written == batch * 3 * 2 * dim * k.element_size()


@pytest.mark.parametrize("page_size", [16, 61])
@pytest.mark.parametrize("length", [1, 40, 300])
def test_prefill_chunk(device: torch.device, length: int, page_size: int) -> None:
    meta = make_meta(device, [length + 50], q_lens=[length], page_size=page_size, num_sink=SINK)
    for dtype in dtypes(device):
        k, v = torch.randn(2, length, 2, 64, device=device).to(dtype)
        check(meta, k, v)
        check(meta, k, v, with_windows=False)
        check(meta, k, v, with_pages=False)


def test_fused_projection_strides(device: torch.device) -> None:
    meta = make_meta(device, [9, 40, 33], page_size=16, num_sink=SINK)
    fused = torch.randn(3, 6 * 80 + 3, device=device)  # rows of an odd length: not 16-byte aligned
    k, v = (fused[:, i * 160 : (i + 1) * 160].unflatten(1, (2, 80)) for i in range(2))
    check(meta, k, v)
    transposed = torch.randn(2, 3, 80, device=device).transpose(0, 1)
    check(meta, transposed, transposed + 1)


def test_padding_rows_go_nowhere(device: torch.device) -> None:
    meta = make_meta(device, [20, 30, 40], page_size=16, num_sink=SINK)
    meta.positions[1] = -1
    meta.page_table[2].fill_(-1)
    k, v = torch.randn(2, 3, 2, 64, device=device)
    tiers = check(meta, k, v)
    assert tiers.counters[COUNTER_WRITTEN_BYTES].item() == 2 * 2 * 64 * 4


@pytest.mark.parametrize(("k_index", "v_index"), FORMATS)
@pytest.mark.parametrize("page_size", [16, 61])
def test_completed_pages_are_indexed(
    device: torch.device, page_size: int, k_index: KIndex, v_index: VIndex
) -> None:
    """Sequences that complete no page, one at the end, one in the middle, two, the first."""
    s = page_size
    lens, q_lens = [s + 3, 4 * s, 3 * s + 2, 5 * s + 1, s, 2 * s], [1, 1, 5, s + 2, 2, 1]
    meta = make_meta(device, lens, q_lens=q_lens, page_size=s)
    meta.page_table[5].fill_(-1)  # padding
    num_pages = int(meta.page_table.max()) + 1
    for dtype in dtypes(device):
        k, v = torch.randn(2, sum(q_lens), 2, 96, device=device).to(dtype)
        tiers = [Tiers(meta, 2, 96, dtype, device) for _ in range(2)]
        rows = torch.randn(tiers[0].windows.rows.shape, device=device).to(dtype)
        pair = indexes(device, num_pages, 2, s, 96, k_index, v_index)
        ops = (append_rows, append_rows_reference)
        for op, t, index in zip(ops, tiers, pair, strict=True):
            t.windows.rows.copy_(rows)
            op(k, v, t.windows, t.host, meta, index=index, counters=t.counters)
        if device.type == "cuda":
            torch.cuda.synchronize()
        assert_same(*pair)
        for actual, expected in zip(tiers[0].tensors(), tiers[1].tensors(), strict=True):
            assert torch.equal(actual, expected)
        table = meta.page_table.cpu()
        done = {(1, 3), (2, 2), (3, 3), (3, 4), (4, 0)}
        assert {int(table[b, p]) for b, p in done} == set(
            pair[0].v_mean.flatten(1).any(1).nonzero().flatten().tolist()
        )


def test_empty_step(device: torch.device) -> None:
    meta = make_meta(device, [20], q_lens=[0], page_size=16, num_sink=SINK)
    k, v = torch.randn(2, 0, 2, 64, device=device)
    check(meta, k, v)


def test_messages(device: torch.device) -> None:
    meta = make_meta(device, [20], page_size=16, num_sink=SINK)
    tiers = Tiers(meta, 2, 64, torch.float32, device)
    k, v = torch.randn(2, 1, 2, 64, device=device)
    with pytest.raises(ValueError, match=r"v has shape \[1, 1, 64\]; it must be \[1, 2, 64\]"):
        append_rows(k, v[:, :1], tiers.windows, tiers.host, meta)
    with pytest.raises(ValueError, match=r"host_kv has dtype torch.float16"):
        append_rows(k, v, tiers.windows, tiers.host.half(), meta)
    with pytest.raises(ValueError, match=r"host_kv has shape"):
        append_rows(k, v, tiers.windows, tiers.host[:, :, :5], meta)
    with pytest.raises(ValueError, match=r"windows.num_kv_heads is 1; k has 2 heads"):
        append_rows(k, v, Windows(tiers.windows.rows, 1, SINK, 48), tiers.host, meta)
    with pytest.raises(ValueError, match=r"host_kv\[0\] has strides .* must be contiguous"):
        append_rows(k, v, None, tiers.host.transpose(1, 2).contiguous().transpose(1, 2), meta)
    index, _ = indexes(device, 8, 2, 16, 64, "int4_channel", "int4")
    with pytest.raises(ValueError, match=r"windows is None; an index needs"):
        append_rows(k, v, None, tiers.host, meta, index=index)
    with pytest.raises(ValueError, match=r"window_rows must be a multiple"):
        odd = Windows(tiers.windows.rows, 2, SINK, 40)
        append_rows(k, v, odd, tiers.host, meta, index=index)
    if device.type == "cpu":
        half = Tiers(meta, 2, 64, torch.float16, device)
        with pytest.raises(NotImplementedError, match=r"supported on a CPU: torch.float32"):
            append_rows(k.half(), v.half(), half.windows, half.host, meta)
