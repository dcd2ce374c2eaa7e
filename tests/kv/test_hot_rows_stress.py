"""Resolve and gather under eviction for seconds: every row found must be the host's, bit by bit."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from tests.hot_cases import check_invariants, make_hot, make_meta, random_page_table, to_device
from twilight_engine.layout import (
    COUNTER_DIRECT_ROWS,
    COUNTER_FETCHED_BYTES,
    COUNTER_HIT_ROWS,
    COUNTER_MISSED_ROWS,
    NO_ROW,
    NUM_COUNTERS,
    FetchLists,
    HotRows,
    RowLists,
    StepMeta,
)
from twilight_engine.ops.gather_rows import gather_rows
from twilight_engine.ops.hot_quotas import advance, rebalance_quotas, release_sequence
from twilight_engine.ops.resolve_rows import resolve_rows

SECONDS = 4.0
MIN_STEPS = 40  # however long they take: a first step hits nothing, and loads all kernels
FIRST_ROW = 7


class Life:
    """A pool of hot rows, its host rows, and sequences that keep asking for some favourites."""

    def __init__(
        self, device: torch.device, *, q_lens: list[int], hkv: int, page_size: int, num_chunks: int
    ) -> None:
        self.device, self.hkv = device, hkv
        num_seqs, pages_each = len(q_lens), -(-2000 // page_size)
        num_pages = num_seqs * pages_each + 2
        pinned = device.type == "cuda"
        self.host_kv = torch.empty(
            hkv, num_pages, page_size, 160, dtype=torch.bfloat16, pin_memory=pinned
        )
        self.host_kv.view(torch.int32).random_()
        self.truth = self.host_kv.flatten(1, 2).view(torch.int32).to(device)  # [Hkv, P * S, 80]
        pages = random_page_table(num_seqs, pages_each, num_pages)
        self.meta = to_device(make_meta(pages, page_size, q_lens=q_lens), device)
        self.hot = to_device(
            make_hot(
                num_chunks=num_chunks,
                num_pages=num_pages,
                hkv=hkv,
                page_size=page_size,
                num_seqs=num_seqs,
                first_row=FIRST_ROW,
            ),
            device,
        )
        slots = self.hot.slot_key.shape[0]
        self.rows = torch.zeros(FIRST_ROW + slots, 160, dtype=torch.bfloat16, device=device)
        self.counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64, device=device)
        self.favour = torch.rand(sum(q_lens), hkv, self.meta.max_len, device=device).pow(8)

    def lists(self) -> RowLists:
        """Ascending tokens, the favourites more often; sometimes few, sometimes too many."""
        share = torch.rand(*self.favour.shape[:2], 1, device=self.device)
        wanted = torch.rand_like(self.favour) < self.favour * share
        length = self.favour.shape[2]
        tokens = torch.arange(length, device=self.device).expand_as(wanted)
        tokens = tokens.masked_fill(~wanted, length).sort(dim=-1).values
        return RowLists(tokens.int().contiguous(), wanted.sum(-1).int())

    def listed_keys(self, lists: RowLists) -> tuple[Tensor, Tensor]:
        """Which list entries are valid, and the key of each."""
        capacity, size = lists.tokens.shape[2], self.meta.page_size
        valid = torch.arange(capacity, device=self.device) < lists.counts[..., None]
        tokens = lists.tokens.masked_fill(~valid, 0).long()
        table = self.meta.page_table[self.meta.query_seq.long()].long()  # [N, P_max]
        pages = table.gather(1, (tokens // size).flatten(1)).view_as(tokens)
        return valid, pages * size + tokens % size

    def check_rows(self, lists: RowLists, locations: Tensor) -> int:
        """Holds every row found against the host's; returns how many there were."""
        valid, keys = self.listed_keys(lists)
        n, h, i = (valid & (locations >= 0)).nonzero(as_tuple=True)
        found = self.rows.view(torch.int32)[locations[n, h, i].long()]
        assert torch.equal(found, self.truth[h, keys[n, h, i]])
        return n.numel()


def move_quotas(life: Life, step: int) -> None:
    """Now and then heads change weight, sequences rest or end."""
    hot, num_seqs = life.hot, life.meta.num_seqs
    if step % 7 == 0:
        hot.set_mean.mul_(torch.rand_like(hot.set_mean) * 2)
        rebalance_quotas(hot, torch.rand(num_seqs, device=life.device) < 0.8)
    if step % 31 == 0:
        seq = step % num_seqs
        release_sequence(hot, seq, life.meta.page_table[seq].contiguous())


CASES = [
    {"q_lens": [1], "hkv": 8, "page_size": 64, "num_chunks": 60},
    {"q_lens": [1, 3, 1, 2, 1], "hkv": 3, "page_size": 61, "num_chunks": 90},
    {"q_lens": [1] * 16, "hkv": 8, "page_size": 16, "num_chunks": 1500},
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=["one", "several-rows", "many"])
def test_rows_are_the_hosts(case: dict) -> None:  # type: ignore[type-arg]
    life = Life(torch.device("cuda"), **case)
    copies = torch.cuda.Stream()
    listed = found = step = 0
    end = time.monotonic() + SECONDS
    while step < MIN_STEPS or time.monotonic() < end:
        step += 1
        move_quotas(life, step)
        lists = life.lists()
        locations, fetch = resolve_rows(lists, life.hot, life.meta, counters=life.counters)
        copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(copies):
            gather_rows(life.host_kv, fetch, life.rows, counters=life.counters)
        torch.cuda.current_stream().wait_stream(copies)
        found += life.check_rows(lists, locations)
        listed += int(lists.counts.sum())
        if step % 10 == 1:
            check_invariants(life.hot)
        advance(life.hot)
    check_counters(life, listed, found)


def check_counters(life: Life, listed: int, found: int) -> None:
    counters = life.counters.tolist()
    assert counters[COUNTER_HIT_ROWS] > 0 and counters[COUNTER_MISSED_ROWS] > 0
    assert counters[COUNTER_DIRECT_ROWS] == listed - found
    assert counters[COUNTER_HIT_ROWS] + counters[COUNTER_MISSED_ROWS] == found
    assert counters[COUNTER_FETCHED_BYTES] == counters[COUNTER_MISSED_ROWS] * 320


def test_some_steps(device: torch.device) -> None:
    """The same, a few steps, on every backend."""
    life = Life(device, q_lens=[1, 2], hkv=2, page_size=16, num_chunks=12)
    listed = found = 0
    for step in range(1, 9):
        move_quotas(life, step)
        lists = life.lists()
        locations, fetch = resolve_rows(lists, life.hot, life.meta, counters=life.counters)
        gather_rows(life.host_kv, fetch, life.rows, counters=life.counters)
        found += life.check_rows(lists, locations)
        listed += int(lists.counts.sum())
        check_invariants(life.hot)
        advance(life.hot)
    check_counters(life, listed, found)


@pytest.mark.gpu
def test_a_step_can_be_captured() -> None:
    """A CUDA graph replayed over lists that change in place equals the same steps unrecorded."""
    life = Life(torch.device("cuda"), q_lens=[1, 1], hkv=4, page_size=64, num_chunks=40)
    start = to_device(life.hot, "cuda")
    batches = [life.lists() for _ in range(6)]
    lists = RowLists(batches[0].tokens.clone(), batches[0].counts.clone())
    locations = torch.full_like(lists.tokens, NO_ROW)
    fetch = FetchLists.empty(2, 4, 500, life.device)

    def one_step(hot: HotRows, meta: StepMeta) -> None:
        resolve_rows(lists, hot, meta, locations=locations, fetch=fetch)
        gather_rows(life.host_kv, fetch, life.rows)
        advance(hot)

    one_step(to_device(start, "cuda"), life.meta)  # first launches load the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_step(life.hot, life.meta)
    for batch in batches:
        lists.tokens.copy_(batch.tokens)
        lists.counts.copy_(batch.counts)
        graph.replay()
        life.check_rows(lists, locations)
        expected, _ = resolve_rows(
            batch, start, life.meta, fetch=FetchLists.empty(2, 4, 500, life.device)
        )
        advance(start)
        listed = life.listed_keys(lists)[0]
        assert torch.equal(locations[listed], expected[listed])
