"""resolve_rows against its reference, bit by bit, over several steps of one cache."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.hot_cases import (
    assert_same_state,
    check_invariants,
    int32,
    make_hot,
    make_meta,
    random_lists,
    random_page_table,
    to_device,
)
from twilight_engine.layout import (
    COUNTER_DIRECT_ROWS,
    COUNTER_HIT_ROWS,
    COUNTER_MISSED_ROWS,
    MAX_AGE,
    MAX_CHUNKS,
    NO_ROW,
    NUM_COUNTERS,
    FetchLists,
    HotRows,
    RowLists,
    StepMeta,
)
from twilight_engine.ops.resolve_rows import resolve_rows
from twilight_engine.reference import resolve_rows as reference


def assert_same_lists(
    lists: RowLists, found: tuple[torch.Tensor, FetchLists], want: tuple[torch.Tensor, FetchLists]
) -> None:
    (locations, fetch), (want_locations, want_fetch) = found, want
    listed = torch.arange(lists.tokens.shape[2]) < lists.counts[..., None]
    assert torch.equal(locations.cpu()[listed], want_locations[listed])
    assert torch.equal(fetch.counts.cpu(), want_fetch.counts)
    assert torch.equal(fetch.direct.cpu(), want_fetch.direct)
    capacity = min(fetch.src.shape[2], want_fetch.src.shape[2])
    fetched = torch.arange(capacity) < want_fetch.counts[..., None]
    for name in ("src", "dst"):
        a, e = getattr(fetch, name).cpu(), getattr(want_fetch, name)
        assert torch.equal(a[..., :capacity][fetched], e[..., :capacity][fetched]), name


def check_step(
    lists: RowLists,
    hot: HotRows,
    want_hot: HotRows,
    meta: StepMeta,
    *,
    shared_pages: bool,
    counters: torch.Tensor | None = None,
    want_counters: torch.Tensor | None = None,
) -> None:
    """One step of both, hot on the device under test and the rest on the CPU."""
    device = hot.slot_key.device
    want = reference.resolve_rows(lists, want_hot, meta, counters=want_counters)
    arguments = to_device(lists, device), hot, to_device(meta, device)
    found = resolve_rows(*arguments, counters=counters, shared_pages=shared_pages)
    assert_same_lists(lists, found, want)
    assert_same_state(hot, want_hot)
    check_invariants(hot)
    want_hot.step.add_(1)
    hot.step.add_(1)


@pytest.mark.parametrize("shared_pages", [True, False])
@pytest.mark.parametrize("hkv", [1, 2, 8])
@pytest.mark.parametrize("page_size", [16, 61, 64])
@pytest.mark.parametrize(
    ("q_lens", "num_chunks", "most"),
    [
        ([1], 3, 40),
        ([1], 40, 300),  # everything fits
        ([1], 70, 600),  # more chunks than a warp counts at once
        ([1, 1, 1], 9, 60),  # more wanted than fits
        ([3, 1, 2], 12, 50),  # several query rows a sequence
        ([1] * 17, 20, 12),
        ([3], 12, 90),  # later query rows of one sequence use what earlier ones installed
        ([0, 2], 9, 60),  # a sequence without a query row
    ],
)
def test_steps_match_reference(
    device: torch.device,
    hkv: int,
    page_size: int,
    q_lens: list[int],
    num_chunks: int,
    most: int,
    shared_pages: bool,
) -> None:
    num_seqs, pages_each = len(q_lens), -(-640 // page_size)
    num_pages = num_seqs * pages_each + 3
    meta = make_meta(random_page_table(num_seqs, pages_each, num_pages), page_size, q_lens=q_lens)
    want_hot = make_hot(
        num_chunks=num_chunks, num_pages=num_pages, hkv=hkv, page_size=page_size, num_seqs=num_seqs
    )
    hot = to_device(want_hot, device)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=device)
    want_counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64)
    for _ in range(5):
        check_step(
            random_lists(sum(q_lens), hkv, 640, most),
            hot,
            want_hot,
            meta,
            shared_pages=shared_pages,
            counters=counters,
            want_counters=want_counters,
        )
        assert torch.equal(counters.cpu(), want_counters)
    assert want_counters[COUNTER_MISSED_ROWS] > 0


@pytest.mark.parametrize("shared_pages", [True, False])
@pytest.mark.parametrize(
    ("q_lens", "num_chunks", "most"),
    [
        ([1], 900, 3500),  # several entries a thread, more misses than are noted at once
        ([1], 300, 14000),  # lists of several tiles
        ([1], 900, 14000),
        ([2], 900, 14000),
        ([2, 1], 700, 6000),
        ([1] * 9, 2500, 900),
    ],
)
def test_long_lists_match_reference(
    device: torch.device, q_lens: list[int], num_chunks: int, most: int, shared_pages: bool
) -> None:
    num_seqs, hkv, size, length = len(q_lens), 8 if len(q_lens) > 2 else 2, 16, 16000
    num_pages = num_seqs * length // size + 3
    table = random_page_table(num_seqs, length // size, num_pages)
    meta = make_meta(table, size, q_lens=q_lens)
    want_hot = make_hot(
        num_chunks=num_chunks, num_pages=num_pages, hkv=hkv, page_size=size, num_seqs=num_seqs
    )
    hot = to_device(want_hot, device)
    for _ in range(3):
        lists = random_lists(sum(q_lens), hkv, length, most)
        check_step(lists, hot, want_hot, meta, shared_pages=shared_pages)


@pytest.mark.parametrize("shared_pages", [True, False])
def test_lists_at_a_tiles_end_match_reference(device: torch.device, shared_pages: bool) -> None:
    """Lists about as long as a tile; hits and victims among slots whose order is not kept."""
    size, length, num_seqs = 16, 24000, 2  # the second wants nothing
    num_pages, q_lens = num_seqs * length // size, [1] * num_seqs
    meta = make_meta(random_page_table(num_seqs, length // size, num_pages), size, q_lens=q_lens)
    want_hot = make_hot(
        num_chunks=700, num_pages=num_pages, hkv=1, page_size=size, num_seqs=num_seqs
    )
    want_hot.chunk_owner.fill_(0)
    hot = to_device(want_hot, device)
    for count in (20000, 8191, 8192, 8193, 1025, 4097, 16384):
        tokens = torch.randperm(length)[:count].sort().values.int()
        lists = RowLists(tokens.expand(num_seqs, 1, -1).contiguous(), int32([[count], [0]]))
        check_step(lists, hot, want_hot, meta, shared_pages=shared_pages)


def single(device: torch.device, tokens: list[int], length: int = 640) -> tuple[RowLists, StepMeta]:
    lists = RowLists(int32([[tokens]]), int32([[len(tokens)]]))
    meta = make_meta(torch.arange(length // 16).view(1, -1).int(), 16, q_lens=[1])
    return to_device(lists, device), to_device(meta, device)


def test_oldest_rows_give_way_and_hits_stay(device: torch.device) -> None:
    hot = make_hot(num_chunks=2, num_pages=40, hkv=1, page_size=16, num_seqs=1)
    hot.chunk_owner.copy_(int32([0, NO_ROW]))
    hot = to_device(hot, device)
    old, new = list(range(0, 16)), list(range(100, 116))
    resolve_rows(single(device, old)[0], hot, single(device, old)[1])
    hot.step.add_(1)
    resolve_rows(*swap(single(device, new), hot))
    hot.step.add_(1)
    wanted = [*old[:4], *range(200, 204)]  # touch four old rows, ask for four that are not there
    locations, fetch = resolve_rows(*swap(single(device, wanted), hot))
    assert (locations >= 0).all() and fetch.counts.item() == 4
    where = hot.slot_map.flatten().cpu()
    assert (where[:4] >= 0).all(), "hits of this step were evicted"
    assert (where[4:16] >= 0).sum() == 8, "four of the least recent rows give way"
    assert (where[100:116] >= 0).all(), "rows used later than the victims were evicted"


def swap(case: tuple[RowLists, StepMeta], hot: object) -> tuple:  # type: ignore[type-arg]
    return case[0], hot, case[1]


@pytest.mark.parametrize("ages", [(MAX_AGE + 5, MAX_AGE), (3, 2), (MAX_AGE, MAX_AGE - 1)])
def test_ages_above_the_limit_are_equal(device: torch.device, ages: tuple[int, int]) -> None:
    hot = make_hot(num_chunks=1, num_pages=40, hkv=1, page_size=16, num_seqs=1)
    hot.chunk_owner.fill_(0)
    hot = to_device(hot, device)
    lists, meta = single(device, list(range(32)))
    resolve_rows(lists, hot, meta)
    hot.step.fill_(MAX_AGE + 50)
    hot.slot_stamp.fill_(MAX_AGE + 50 - ages[1])
    hot.slot_stamp[31] = MAX_AGE + 50 - ages[0]
    lists, meta = single(device, [500])
    _, fetch = resolve_rows(lists, hot, meta)
    victim = 0 if ages[1] == MAX_AGE else 31
    assert fetch.dst[0, 0, 0].item() == hot.first_row + victim


@pytest.mark.parametrize("slots", ["none", "zero", "unlent", "padding"])
def test_without_slots_every_row_is_direct(device: torch.device, slots: str) -> None:
    hot = make_hot(
        num_chunks=0 if slots == "zero" else 2, num_pages=40, hkv=1, page_size=16, num_seqs=1
    )
    hot.chunk_owner.fill_(NO_ROW if slots == "unlent" else 0)
    lists, meta = single(device, [3, 17, 90])
    if slots == "padding":
        meta.seq_slots.fill_(NO_ROW)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=device)
    fetch = FetchLists.empty(1, 1, 5, device)
    fetch.counts.fill_(9)  # must be overwritten
    fetch.direct.fill_(9)
    locations, fetch = resolve_rows(
        lists,
        None if slots == "none" else to_device(hot, device),
        meta,
        fetch=fetch,
        counters=counters,
    )
    assert (locations == NO_ROW).all() and fetch.counts.item() == 0 and fetch.direct.item() == 3
    assert counters[COUNTER_DIRECT_ROWS] == 3 and counters.sum() == 3


def test_a_full_fetch_list_leaves_rows_to_the_host(device: torch.device) -> None:
    hot = make_hot(num_chunks=2, num_pages=40, hkv=1, page_size=16, num_seqs=1)
    hot.chunk_owner.fill_(0)
    lists, meta = single(device, [3, 17, 90, 91])
    fetch = FetchLists.empty(1, 1, 3, device)
    locations, fetch = resolve_rows(lists, to_device(hot, device), meta, fetch=fetch)
    assert fetch.counts.item() == 3 and fetch.src.flatten().tolist() == [3, 17, 90]
    assert locations.flatten().tolist() == [7, 8, 9, NO_ROW]


def test_sequences_that_share_pages_share_rows(device: torch.device) -> None:
    """Two sequences over the same pages: no row is held twice, each location is right."""
    hot = make_hot(num_chunks=30, num_pages=40, hkv=2, page_size=16, num_seqs=3)
    hot = to_device(hot, device)
    pages = torch.arange(40).view(1, -1).expand(3, -1).contiguous().int()
    meta = to_device(make_meta(pages, 16, q_lens=[1, 2, 1]), device)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=device)
    listed = 0
    for _ in range(6):
        lists = random_lists(4, 2, 640, 300)
        listed += int(lists.counts.sum())
        locations, fetch = resolve_rows(to_device(lists, device), hot, meta, counters=counters)
        check_invariants(hot)
        keys, first_row = hot.slot_key.cpu(), hot.first_row
        for n in range(4):
            for h in range(2):
                count = int(lists.counts[n, h])
                where = locations[n, h, :count].cpu()
                held = where >= 0
                tokens = lists.tokens[n, h, :count]
                assert torch.equal(keys[(where[held] - first_row).long()], tokens[held])
        valid = torch.arange(fetch.src.shape[2]) < fetch.counts.cpu()[..., None]
        src, dst = fetch.src.cpu()[valid], fetch.dst.cpu()[valid]
        src, dst = src[dst >= 0], dst[dst >= 0]
        assert dst.unique().numel() == dst.numel()
        assert torch.equal(keys[(dst - first_row).long()], src)
        hot.step.add_(1)
    rows = counters[[COUNTER_HIT_ROWS, COUNTER_MISSED_ROWS, COUNTER_DIRECT_ROWS]]
    assert int(rows.sum()) == listed


def test_set_mean_runs(device: torch.device) -> None:
    hot = to_device(make_hot(num_chunks=2, num_pages=40, hkv=1, page_size=16, num_seqs=1), device)
    resolve_rows(*swap(single(device, list(range(20))), hot))
    assert hot.set_mean.item() == 20  # the first set counts fully
    hot.step.add_(1)
    resolve_rows(*swap(single(device, list(range(10))), hot))
    assert hot.set_mean.item() == pytest.approx(19)


def test_bad_arguments_are_named(device: torch.device) -> None:
    hot = make_hot(num_chunks=2, num_pages=40, hkv=1, page_size=16, num_seqs=1)
    hot = to_device(hot, device)
    lists, meta = single(device, [1, 2])
    with pytest.raises(ValueError, match=r"locations has shape \[1, 1, 3\]; it must be \[1, 1, 2"):
        resolve_rows(lists, hot, meta, locations=torch.zeros(1, 1, 3).int().to(device))
    with pytest.raises(ValueError, match=r"exact\.counts has dtype torch.int64"):
        resolve_rows(RowLists(lists.tokens, lists.counts.long()), hot, meta)
    with pytest.raises(ValueError, match=r"hot\.slot_map has page size 16; .*\(32\)"):
        resolve_rows(lists, hot, dataclasses.replace(meta, page_size=32))
    too_many = dataclasses.replace(hot, chunk_owner=torch.zeros(MAX_CHUNKS + 1).int())
    with pytest.raises(ValueError, match="at most 65536"):
        resolve_rows(lists, too_many, meta)
