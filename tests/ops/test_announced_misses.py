"""resolve_rows and then gather_rows, by the misses it announces: what it lists is what counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.hot_cases import (
    assert_same_state,
    check_invariants,
    make_hot,
    make_meta,
    random_lists,
    random_page_table,
    to_device,
)
from tests.ops.test_gather_rows import bits, host_rows
from tests.ops.test_resolve_rows import assert_same_lists
from twilight_engine.layout import (
    ANNOUNCED_WORDS,
    COUNTER_FETCHED_BYTES,
    COUNTER_MISSED_ROWS,
    NO_ROW,
    NUM_COUNTERS,
    SLOTS_PER_CHUNK,
    Announced,
    FetchLists,
    RowLists,
    StepMeta,
)
from twilight_engine.ops.gather_rows import gather_rows
from twilight_engine.ops.resolve_rows import resolve_rows
from twilight_engine.reference import gather_rows as gather_reference
from twilight_engine.reference import resolve_rows as resolve_reference

MOST_LAYERS = 1024  # kMostLayers in csrc/announced_misses.cuh
KEY_BITS = 2**32 - 1


class Cache:
    """Slots and rows twice: on the device under test, and on the CPU for the references."""

    def __init__(
        self, device: torch.device, meta: StepMeta, *, hkv: int, num_chunks: int, host_kv: Tensor
    ) -> None:
        self.device, self.meta, self.host = device, meta, host_kv
        self.want_hot = make_hot(
            num_chunks=num_chunks,
            num_pages=host_kv.shape[1],
            hkv=hkv,
            page_size=meta.page_size,
            num_seqs=max(1, int(meta.seq_slots.max()) + 1),
        )
        num_rows = self.want_hot.first_row + num_chunks * SLOTS_PER_CHUNK
        self.want_rows = torch.zeros(num_rows, host_kv.shape[3], dtype=host_kv.dtype)
        self.want_rows.view(torch.uint8).random_(0, 256)
        self.want_counters = torch.zeros(NUM_COUNTERS, dtype=torch.int64)
        self.hot = to_device(self.want_hot, device)
        self.rows = self.want_rows.clone().to(device)
        self.counters = self.want_counters.clone().to(device)
        shape = (meta.num_seqs, hkv, ANNOUNCED_WORDS)
        self.words = torch.full(shape, -1, dtype=torch.int64, device=device)

    def check_step(
        self,
        lists: RowLists,
        *,
        room: int | None = None,
        times: Tensor | None = None,
        counts: bool = True,
    ) -> int:
        """One step of both, counted or not; returns how many rows it fetched."""
        device, heads = self.device, lists.tokens.shape[1]
        num_seqs, slots = self.meta.num_seqs, self.want_hot.slot_key.shape[0]
        want_fetch = FetchLists.empty(num_seqs, heads, room or slots, torch.device("cpu"))
        fetch = to_device(want_fetch, device)
        if device.type == "cuda":
            fetch = replace(fetch, announced=Announced(self.words, self.hot.step, layer=3))
        want = resolve_reference.resolve_rows(
            lists, self.want_hot, self.meta, fetch=want_fetch, counters=self.want_counters
        )
        gather_reference.gather_rows(
            self.host, want[1], self.want_rows, counters=self.want_counters
        )
        found = resolve_rows(
            to_device(lists, device),
            self.hot,
            to_device(self.meta, device),
            fetch=fetch,
            counters=self.counters,
            shared_pages=False,
        )
        gather_rows(self.host, found[1], self.rows, counters=self.counters, times=times)
        if device.type == "cuda":
            self.check_announced(found[1])
        assert_same_lists(lists, found, want)
        assert_same_state(self.hot, self.want_hot)
        check_invariants(self.hot)
        assert torch.equal(self.counters.cpu(), self.want_counters)
        assert torch.equal(bits(self.rows), bits(self.want_rows))
        if counts:
            self.want_hot.step.add_(1)
            self.hot.step.add_(1)
        return int(want[1].counts.sum())

    def check_announced(self, fetch: FetchLists) -> None:
        """Where every sequence has one query row, the rows fetched are those announced first."""
        alone = self.meta.num_queries == self.meta.num_seqs
        assert (fetch.announced is not None) == alone
        if fetch.announced is None:
            return
        tag = int(self.hot.step) * MOST_LAYERS + fetch.announced.layer
        words, src, counts = self.words.cpu(), fetch.src.cpu(), fetch.counts.cpu()
        for segment in np.ndindex(*counts.shape):
            count = min(int(counts[segment]), ANNOUNCED_WORDS - 1)
            told = words[segment][: count + 1]
            assert (told >> 32 == tag).all()
            assert int(told[0] & KEY_BITS) >= int(counts[segment])
            keys = (told[1:] & KEY_BITS).sort().values
            if count == counts[segment]:
                assert torch.equal(keys, src[segment][:count].long().sort().values)


def make_cache(
    device: torch.device,
    *,
    hkv: int = 2,
    q_lens: list[int],
    num_chunks: int,
    length: int = 640,
    page_size: int = 16,
    width: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    seq_slots: list[int] | None = None,
) -> Cache:
    pages_each = -(-length // page_size)
    num_pages = len(q_lens) * pages_each + 3
    table = random_page_table(len(q_lens), pages_each, num_pages)
    meta = make_meta(table, page_size, q_lens=q_lens, seq_slots=seq_slots)
    host_kv = host_rows(hkv, num_pages, page_size, width, dtype)
    return Cache(device, meta, hkv=hkv, num_chunks=num_chunks, host_kv=host_kv)


@pytest.mark.parametrize(
    ("q_lens", "hkv", "num_chunks", "most"),
    [
        ([1], 8, 30, 60),  # some misses a list
        ([1], 1, 70, 600),
        ([1, 1], 8, 20, 90),  # more wanted than fits
        ([1] * 9, 8, 60, 40),
        ([2, 1], 2, 20, 90),  # several query rows: nothing is announced
        ([0, 1], 2, 20, 90),
    ],
)
def test_steps_match_references(
    device: torch.device, q_lens: list[int], hkv: int, num_chunks: int, most: int
) -> None:
    cache = make_cache(device, q_lens=q_lens, hkv=hkv, num_chunks=num_chunks)
    for _ in range(6):
        cache.check_step(random_lists(sum(q_lens), hkv, 640, most))
    assert cache.want_counters[COUNTER_MISSED_ROWS] > 0


@pytest.mark.parametrize(
    ("width", "dtype"),
    [
        (128, torch.bfloat16),
        (160, torch.float16),
        (192, torch.bfloat16),
        (512, torch.float32),
        (24, torch.bfloat16),  # three vectors a row
    ],
)
def test_row_sizes_match_references(device: torch.device, width: int, dtype: torch.dtype) -> None:
    cache = make_cache(device, q_lens=[1], num_chunks=60, width=width, dtype=dtype, page_size=61)
    for _ in range(3):
        cache.check_step(random_lists(1, 2, 640, 600))


@pytest.mark.parametrize(("num_chunks", "most"), [(900, 3500), (300, 14000), (1200, 14000)])
def test_long_lists_match_references(device: torch.device, num_chunks: int, most: int) -> None:
    """More misses than can be announced."""
    cache = make_cache(device, q_lens=[1], num_chunks=num_chunks, length=16000)
    fetched = [cache.check_step(random_lists(1, 2, 16000, most)) for _ in range(3)]
    assert max(fetched) > 2048


def test_steps_without_misses_note_no_times(device: torch.device) -> None:
    cache = make_cache(device, q_lens=[1], num_chunks=60)
    cache.want_hot.chunk_owner.fill_(0)
    cache.want_hot.chunk_owner[1::2] = 1
    cache.hot.chunk_owner.copy_(cache.want_hot.chunk_owner)
    lists = random_lists(1, 2, 640, 400)
    unset = torch.tensor([2**62, 0])
    times = unset.to(device) if device.type == "cuda" else None
    for step in range(3):
        fetched = cache.check_step(lists, times=times)
        assert (fetched > 0) == (step == 0)
        if times is None:
            continue
        start, end = times.tolist()
        assert (0 < start < end < 2**62) if step == 0 else times.tolist() == unset.tolist()
        times.copy_(unset)
    expected = int(cache.want_counters[COUNTER_MISSED_ROWS]) * 512
    assert int(cache.counters[COUNTER_FETCHED_BYTES]) == expected


def test_short_fetch_lists_match_references(device: torch.device) -> None:
    """Misses that the lists have no room for stay on the host."""
    cache = make_cache(device, q_lens=[1], num_chunks=60)
    for room in (1, 7, 40):
        cache.check_step(random_lists(1, 2, 640, 300), room=room)


def test_padding_and_heads_without_slots_match_references(device: torch.device) -> None:
    cache = make_cache(device, q_lens=[1, 1], num_chunks=20, seq_slots=[0, NO_ROW])
    cache.want_hot.chunk_owner.fill_(0)  # all of them the first head's
    cache.hot.chunk_owner.fill_(0)
    for _ in range(3):
        lists = random_lists(2, 2, 640, 200)
        lists.counts[1] = 0
        cache.check_step(lists)


def test_a_step_that_comes_again(device: torch.device) -> None:
    """What was announced under the same tag names other rows: the lists are right."""
    cache = make_cache(device, q_lens=[1], num_chunks=60)
    for _ in range(6):
        cache.check_step(random_lists(1, 2, 640, 300), counts=False)


def test_announcements_of_other_shapes_are_refused() -> None:
    cache = make_cache(torch.device("cpu"), q_lens=[1], num_chunks=20)
    fetch, lists = FetchLists.empty(1, 2, 4, cache.device), random_lists(1, 2, 640, 9)
    words = torch.zeros(1, 2, 2 * ANNOUNCED_WORDS, dtype=torch.int64)
    for wrong, message in (
        (words[..., :7].contiguous(), r"announced\.words has shape \[1, 2, 7\]"),
        (words[..., ::2].int(), r"announced\.words has dtype torch.int32"),
        (words[..., ::2], r"announced\.words has strides .*; it must be contiguous"),
    ):
        told = replace(fetch, announced=Announced(wrong, cache.hot.step, layer=0))
        with pytest.raises(ValueError, match=message):
            gather_rows(cache.host, told, cache.rows)
        with pytest.raises(ValueError, match=message):
            resolve_rows(lists, cache.hot, cache.meta, fetch=told)


@pytest.mark.gpu
def test_replayed_steps_match_references() -> None:
    """In a graph the gather is there while resolve_rows runs, and asks for rows early."""
    device = torch.device("cuda")
    cache = make_cache(device, q_lens=[1], hkv=8, num_chunks=200, length=6000)
    lists = to_device(random_lists(1, 8, 6000, 0), device)
    meta = to_device(cache.meta, device)
    fetch = FetchLists.empty(1, 8, 6000, device)
    told = Announced(cache.words, cache.hot.step, layer=0)
    locations = torch.empty_like(lists.tokens)

    def step() -> None:
        cache.hot.step.add_(1)
        _, found = resolve_rows(
            lists, cache.hot, meta, locations=locations, shared_pages=False,
            fetch=replace(fetch, announced=told),
        )  # fmt: skip
        assert found.announced is told
        gather_rows(cache.host, found, cache.rows)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(40):
        new = random_lists(1, 8, 6000, 900)
        lists.tokens.copy_(new.tokens)
        lists.counts.copy_(new.counts)
        graph.replay()
        cache.want_hot.step.add_(1)
        want = resolve_reference.resolve_rows(new, cache.want_hot, cache.meta)
        gather_reference.gather_rows(cache.host, want[1], cache.want_rows)
        assert_same_state(cache.hot, cache.want_hot)
        assert torch.equal(bits(cache.rows), bits(cache.want_rows))
