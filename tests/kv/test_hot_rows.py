"""The hot cache against a dict-and-list model, over random lives of sequences."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.hot_cases import check_invariants, int32, make_meta
from twilight_engine.kv.hot_rows import allocate_hot_rows, hot_row_bytes, slots_within
from twilight_engine.layout import MAX_CHUNKS, NO_ROW, SLOTS_PER_CHUNK, RowLists
from twilight_engine.ops.hot_quotas import advance, rebalance_quotas, release_sequence
from twilight_engine.ops.resolve_rows import resolve_rows

HKV, PAGE_SIZE, PAGES_EACH, SEQS, CHUNKS, FIRST_ROW = 2, 8, 12, 3, 5, 11
LENGTH = PAGE_SIZE * PAGES_EACH
Owner = tuple[int, int]  # sequence slot, head
token_runs = st.lists(
    st.tuples(st.integers(0, LENGTH - 1), st.integers(1, 30)), min_size=0, max_size=3
)


class HotCache(RuleBasedStateMachine):
    """Model: for each (sequence, head), the step at which each key it holds was last used."""

    def __init__(self) -> None:
        super().__init__()
        self.hot = allocate_hot_rows(
            num_slots=CHUNKS * SLOTS_PER_CHUNK,
            num_pages=SEQS * PAGES_EACH,
            num_kv_heads=HKV,
            page_size=PAGE_SIZE,
            num_seq_slots=SEQS,
            first_row=FIRST_ROW,
            step=torch.zeros(1, dtype=torch.int32),
            device=torch.device("cpu"),
        )
        self.pages: dict[int, list[int]] = {}  # of the open sequences
        self.free_pages = list(range(SEQS * PAGES_EACH))
        self.held: dict[Owner, dict[int, int]] = {
            (s, h): {} for s in range(SEQS) for h in range(HKV)
        }

    def capacity(self, owner: Owner) -> int:
        index = owner[0] * HKV + owner[1]
        return int((self.hot.chunk_owner == index).sum()) * SLOTS_PER_CHUNK

    def resident(self, owner: Owner) -> set[int]:
        pages = self.pages.get(owner[0], [])
        known = (self.hot.slot_map[owner[1]].flatten() != NO_ROW).nonzero().flatten().tolist()
        return {key for key in known if key // PAGE_SIZE in pages}

    @precondition(lambda self: len(self.pages) < SEQS)
    @rule(order=st.randoms(use_true_random=False))
    def open_sequence(self, order: object) -> None:
        slot = min(set(range(SEQS)) - set(self.pages))
        order.shuffle(self.free_pages)  # type: ignore[attr-defined]
        self.pages[slot] = [self.free_pages.pop() for _ in range(PAGES_EACH)]

    @rule()
    def rebalance(self) -> None:
        active = torch.tensor([slot in self.pages for slot in range(SEQS)])
        before = {owner: self.capacity(owner) for owner in self.held}
        rebalance_quotas(self.hot, active)
        if self.pages:
            assert sum(map(self.capacity, self.held)) == CHUNKS * SLOTS_PER_CHUNK
        enough = len(self.pages) * HKV <= CHUNKS
        for owner, rows in self.held.items():
            if owner[0] not in self.pages:
                assert self.capacity(owner) == 0
            elif enough:
                assert self.capacity(owner) >= SLOTS_PER_CHUNK
            left = self.resident(owner)
            lost = max(0, before[owner] - self.capacity(owner))
            assert left <= rows.keys() and len(rows) - len(left) <= lost
            self.held[owner] = {key: rows[key] for key in left}

    @precondition(lambda self: self.pages)
    @rule(data=st.data(), passes=st.integers(1, 2))
    def step(self, data: st.DataObject, passes: int) -> None:
        """All open sequences decode; sometimes one of them with several query rows."""
        advance(self.hot)
        slots = sorted(self.pages)
        q_lens = [passes if i == 0 else 1 for i in range(len(slots))]
        meta = make_meta(
            int32([self.pages[s] for s in slots]), PAGE_SIZE, q_lens=q_lens, seq_slots=slots
        )
        lists = RowLists.empty(sum(q_lens), HKV, LENGTH, torch.device("cpu"))
        for n in range(sum(q_lens)):
            for h in range(HKV):
                runs = data.draw(token_runs)
                tokens = sorted({t % LENGTH for start, m in runs for t in range(start, start + m)})
                lists.tokens[n, h, : len(tokens)] = int32(tokens)
                lists.counts[n, h] = len(tokens)
        locations, fetch = resolve_rows(lists, self.hot, meta)
        for i, slot in enumerate(slots):
            for h in range(HKV):
                rows = range(int(meta.cu_seqlens_q[i]), int(meta.cu_seqlens_q[i + 1]))
                wanted = [self.keys(slot, lists, n, h) for n in rows]
                count = int(fetch.counts[i, h])
                self.check_segment(
                    (slot, h),
                    wanted,
                    fetch.src[i, h, :count].tolist(),
                    fetch.dst[i, h, :count].tolist(),
                )
                for n, keys in zip(rows, wanted, strict=True):
                    self.check_locations(h, keys, locations[n, h, : len(keys)].tolist())

    def keys(self, slot: int, lists: RowLists, n: int, h: int) -> list[int]:
        tokens = lists.tokens[n, h, : int(lists.counts[n, h])].tolist()
        return [self.pages[slot][t // PAGE_SIZE] * PAGE_SIZE + t % PAGE_SIZE for t in tokens]

    def check_segment(
        self, owner: Owner, wanted: list[list[int]], src: list[int], dst: list[int]
    ) -> None:
        """Hits, fetches and victims of one head are what the model allows; then it follows."""
        held, now = self.held[owner], int(self.hot.step)
        misses = list(dict.fromkeys(k for keys in wanted for k in keys if k not in held))
        used = {k for keys in wanted for k in keys if k in held}
        room = self.capacity(owner) - len(used)
        assert src == misses[: max(0, room)], "every miss that has room, once, in list order"
        assert len(set(dst)) == len(dst)
        left = self.resident(owner)
        assert used <= left, "a row used by this step was evicted"
        evicted = held.keys() - left
        free = self.capacity(owner) - len(held)
        assert len(evicted) == max(0, len(src) - free), "evicted without need, or over capacity"
        stamps = sorted(step for key, step in held.items() if key not in used)
        assert Counter(held[k] for k in evicted) == Counter(stamps[: len(evicted)]), (
            "not the oldest"
        )
        assert left == (held.keys() - evicted) | set(src)
        self.held[owner] = {key: now if key in used or key in src else held[key] for key in left}

    def check_locations(self, h: int, keys: list[int], locations: list[int]) -> None:
        assert locations == [int(self.hot.slot_map[h].flatten()[key]) for key in keys]
        slots = [row - FIRST_ROW for row in locations if row != NO_ROW]
        found = [key for key, row in zip(keys, locations, strict=True) if row != NO_ROW]
        assert self.hot.slot_key[slots].tolist() == found

    @precondition(lambda self: self.pages)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.pages)))
        pages = self.pages.pop(slot)
        release_sequence(self.hot, slot, int32(pages))
        assert (self.hot.slot_map[:, pages] == NO_ROW).all()
        assert (self.hot.set_mean[slot] == 0).all()
        self.free_pages += pages
        for h in range(HKV):
            assert self.capacity((slot, h)) == 0
            self.held[slot, h] = {}

    @invariant()
    def map_and_keys_agree(self) -> None:
        check_invariants(self.hot)
        for owner, rows in self.held.items():
            assert self.resident(owner) == rows.keys()
            assert len(rows) <= self.capacity(owner)


HotCache.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestHotCache = HotCache.TestCase


def test_slots_and_bytes() -> None:
    chunk = SLOTS_PER_CHUNK * (512 + 8) + 4
    assert slots_within(3 * chunk, 512) == 3 * SLOTS_PER_CHUNK
    assert slots_within(3 * chunk - 1, 512) == 2 * SLOTS_PER_CHUNK
    assert slots_within(0, 512) == 0
    assert slots_within(1 << 50, 512) == MAX_CHUNKS * SLOTS_PER_CHUNK
    shape = {"num_pages": 9, "num_kv_heads": 2, "page_size": 61, "num_seq_slots": 3}
    hot = allocate_hot_rows(
        num_slots=64,
        first_row=0,
        step=torch.zeros(1, dtype=torch.int32),
        device=torch.device("cpu"),
        **shape,
    )
    tensors = (hot.slot_map, hot.slot_key, hot.slot_stamp, hot.chunk_owner, hot.set_mean)
    taken = sum(t.numel() * t.element_size() for t in tensors) + 64 * 512
    assert hot_row_bytes(num_slots=64, row_bytes=512, **shape) == taken


@pytest.mark.parametrize("num_slots", [-32, 33, (MAX_CHUNKS + 1) * SLOTS_PER_CHUNK])
def test_a_bad_number_of_slots_is_named(num_slots: int) -> None:
    with pytest.raises(ValueError, match=f"num_slots is {num_slots}; it must be a multiple of 32"):
        allocate_hot_rows(
            num_slots=num_slots,
            num_pages=1,
            num_kv_heads=1,
            page_size=16,
            num_seq_slots=1,
            first_row=0,
            step=torch.zeros(1, dtype=torch.int32),
            device=torch.device("cpu"),
        )
