"""attend_rows against its reference and against dense attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.compare import compare
from tests.ops.attend_cases import (
    SHAPES,
    Case,
    make_host_kv,
    make_lists,
    make_meta,
    make_queries,
    make_windows,
    name,
    row_dtypes,
)
from twilight_engine.layout import (
    COUNTER_DIRECT_BYTES,
    NO_ROW,
    NUM_COUNTERS,
    RowLists,
    StepMeta,
    Windows,
)
from twilight_engine.ops.attend_rows import attend_rows
from twilight_engine.ops.merge_states import merge_states
from twilight_engine.reference.attend_pages import attend_pages as dense_reference
from twilight_engine.reference.attend_rows import attend_rows as reference
from twilight_engine.reference.step_tokens import page_rows

EVERY, NONE = (1.0,), (0.0,)
UNEVEN = (0.02, 0.9, 0.0, 0.3)


def make_locations(
    case: Case, meta: StepMeta, exact: RowLists, windows: Windows, host_kv: Tensor, hit: float
) -> Tensor:
    """Put a share of the listed rows into the pool, in random places behind the windows."""
    first = len(case.seq_lens) * case.num_kv_heads * windows.rows_per_head
    free = first + torch.randperm(windows.rows.shape[0] - first)
    tokens, counts, table = exact.tokens.cpu(), exact.counts.cpu(), meta.page_table.cpu()
    locations = torch.full_like(tokens, 2**30)  # beyond a segment's count nothing may be read
    used = 0
    for n, b in enumerate(meta.query_seq.tolist()):
        for h in range(case.num_kv_heads):
            listed = tokens[n, h, : int(counts[n, h])]
            hits = torch.rand(len(listed)) < hit
            places = free[used : used + int(hits.sum())]
            used += len(places)
            keys = page_rows(table[b], listed[hits], case.page_size)
            rows = host_kv[h].reshape(-1, 2 * case.head_dim)[keys]
            windows.rows[places.to(windows.rows.device)] = rows.to(windows.rows.device)
            locations[n, h, : len(listed)] = NO_ROW
            locations[n, h, : len(listed)][hits] = places.int()
    return locations.to(exact.tokens.device)


def run(
    case: Case, dtype: torch.dtype, device: torch.device, share: tuple[float, ...], hit: float
) -> None:
    meta = make_meta(case, device)
    host_kv = make_host_kv(case, dtype, device)
    exact = make_lists(case, meta, share)
    windows = make_windows(case, meta, host_kv, num_hot=int(exact.counts.sum()) + 1)
    locations = make_locations(case, meta, exact, windows, host_kv, hit)
    q = make_queries(case, meta, dtype)
    counters, want_counters = torch.zeros(2, NUM_COUNTERS, dtype=torch.int64, device=device)
    args = (q, windows, host_kv, exact, locations, meta)
    state = attend_rows(*args, softmax_scale=0.2, counters=counters)
    out, lse = merge_states([state], torch.float32)
    want = reference(*args, softmax_scale=0.2, counters=want_counters)
    compare(out, want[0])
    compare(lse, want[1])
    if device.type == "cuda":  # each tile of 8 query heads reads the rows
        want_counters *= -(-case.group // 8)
    assert torch.equal(counters, want_counters)
    if share == EVERY:
        dense = dense_reference(q, host_kv, meta.page_table, meta, softmax_scale=0.2)
        compare(out, dense[0])
        compare(lse, dense[1])


@pytest.mark.parametrize(
    ("share", "hit"),
    [(EVERY, 0.7), (UNEVEN, 0.7), (NONE, 0.0), (UNEVEN, 0.0), (UNEVEN, 1.0)],
    ids=["every-row", "uneven", "empty", "all-direct", "all-hit"],
)
@pytest.mark.parametrize("case", SHAPES[:7], ids=name)
def test_equals_reference(
    case: Case, share: tuple[float, ...], hit: float, device: torch.device
) -> None:
    for dtype in row_dtypes(device):
        run(case, dtype, device, share, hit)


MANY_ROWS = Case(seq_lens=(60,) * 17, q_lens=(8,) * 17)  # more than a block keeps in mind


@pytest.mark.parametrize("case", [*SHAPES[7:], MANY_ROWS], ids=name)
def test_many_heads_and_sequences(case: Case, device: torch.device) -> None:
    for dtype in row_dtypes(device):
        run(case, dtype, device, UNEVEN, 0.5)


def test_long_uneven_lists(device: torch.device) -> None:
    case = Case(seq_lens=(3000, 700), num_kv_heads=2, head_dim=128, page_size=64)
    run(case, row_dtypes(device)[-1], device, (1.0, 0.01), 0.8)


@pytest.mark.gpu
@pytest.mark.parametrize("seq_lens", [(9000,), (4000,) * 3], ids=["two-stages", "three-stages"])
def test_more_tiles_a_warp_than_stages(seq_lens: tuple[int, ...]) -> None:
    case = Case(seq_lens=seq_lens, num_kv_heads=8, group=4, head_dim=128, page_size=64)
    run(case, torch.bfloat16, torch.device("cuda"), EVERY, 0.8)


@pytest.mark.gpu
def test_a_captured_graph_follows_the_device_counts() -> None:
    device = torch.device("cuda")
    case = Case(seq_lens=(1000, 300), head_dim=128, page_size=64)
    meta = make_meta(case, device)
    host_kv = make_host_kv(case, torch.bfloat16, device)
    exact = make_lists(case, meta, (0.0,))
    windows = make_windows(case, meta, host_kv, num_hot=5000)
    q = make_queries(case, meta, torch.bfloat16)
    locations = torch.full_like(exact.tokens, NO_ROW)
    args = (q, windows, host_kv, exact, locations, meta)
    merge_states([attend_rows(*args, softmax_scale=0.1)], torch.float32)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = merge_states([attend_rows(*args, softmax_scale=0.1)], torch.float32)
    for share in (UNEVEN, EVERY, NONE):
        lists = make_lists(case, meta, share)
        exact.tokens.copy_(lists.tokens)
        exact.counts.copy_(lists.counts)
        locations.copy_(make_locations(case, meta, exact, windows, host_kv, 0.5))
        graph.replay()
        want = reference(*args, softmax_scale=0.1)
        compare(out, want[0])
        compare(lse, want[1])


def test_direct_bytes_are_the_rows_without_a_slot(device: torch.device) -> None:
    case = Case(seq_lens=(200,), group=3)
    meta = make_meta(case, device)
    host_kv = make_host_kv(case, torch.float32, device)
    exact = make_lists(case, meta, (0.5,))
    windows = make_windows(case, meta, host_kv, num_hot=1000)
    locations = make_locations(case, meta, exact, windows, host_kv, 0.5)
    valid = torch.arange(locations.shape[2], device=device) < exact.counts[..., None]
    misses = int(((locations == NO_ROW) & valid).sum())
    assert misses > 10
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=device)
    q = make_queries(case, meta, torch.float32)
    for _ in range(2):
        attend_rows(
            q, windows, host_kv, exact, locations, meta, softmax_scale=1.0, counters=counters
        )
    want = torch.zeros(NUM_COUNTERS, dtype=torch.int64)
    want[COUNTER_DIRECT_BYTES] = 2 * misses * 2 * case.head_dim * 4
    assert torch.equal(counters.cpu(), want)


def test_bad_arguments_are_named(device: torch.device) -> None:
    case = Case()
    meta = make_meta(case, device)
    host_kv = make_host_kv(case, torch.float32, device)
    exact = make_lists(case, meta, NONE)
    windows = make_windows(case, meta, host_kv, num_hot=1)
    q = make_queries(case, meta, torch.float32)
    with pytest.raises(ValueError, match="locations has shape"):
        attend_rows(q, windows, host_kv, exact, exact.tokens[..., :3], meta, softmax_scale=1.0)
    with pytest.raises(ValueError, match=r"host_kv has dtype torch\.float16"):
        attend_rows(q, windows, host_kv.half(), exact, exact.tokens, meta, softmax_scale=1.0)
    other = Windows(windows.rows, 2, windows.num_sink + 1, windows.window_rows)
    with pytest.raises(ValueError, match=r"meta\.num_sink is 3; windows has 4"):
        attend_rows(q, other, host_kv, exact, exact.tokens, meta, softmax_scale=1.0)
