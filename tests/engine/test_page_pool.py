"""The page pool against a model of dicts and lists, and its messages."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from twilight_engine.kv import OutOfPages
from twilight_engine.kv.pages import PagePool

CAPACITY = 24


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(CAPACITY)
        self.references: dict[int, int] = {}
        self.exact: dict[int, bool] = {}
        self.last_epoch: dict[int, int] = {}  # of the releases of a page that is held
        self.pending: dict[int, int] = {}  # page -> epoch that it waits for
        self.completed = -1

    def free(self) -> list[int]:
        return [p for p in range(CAPACITY) if p not in self.references and p not in self.pending]

    def longest_run(self) -> int:
        best = run = 0
        free = set(self.free())
        for page in range(CAPACITY):
            run = run + 1 if page in free else 0
            best = max(best, run)
        return best

    @rule(n=st.integers(0, CAPACITY + 2), exact=st.booleans(), after=st.integers(-1, CAPACITY))
    def allocate(self, n: int, exact: bool, after: int) -> None:
        free, longest = self.free(), self.longest_run()
        if n > len(free):
            with pytest.raises(OutOfPages) as caught:
                self.pool.allocate(n, exact=exact, after=after)
            assert (caught.value.wanted, caught.value.free) == (n, len(free))
            return
        pages = self.pool.allocate(n, exact=exact, after=after)
        assert len(set(pages)) == n and set(pages) <= set(free) and pages == sorted(pages)
        if 0 < n <= longest:
            assert pages[-1] - pages[0] == n - 1
        wished = list(range(after + 1, after + 1 + n))
        starts_run = after + 1 in free and after not in free
        if after >= 0 and starts_run and set(wished) <= set(free):
            assert pages == wished
        for page in pages:
            self.references[page] = 1
            self.exact[page] = exact
            self.last_epoch[page] = -1

    @precondition(lambda self: self.references)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        pages = data.draw(st.lists(st.sampled_from(sorted(self.references)), max_size=5))
        self.pool.share(pages)
        for page in pages:
            self.references[page] += 1

    @precondition(lambda self: self.references)
    @rule(data=st.data(), ahead=st.integers(-2, 3))
    def release(self, data: st.DataObject, ahead: int) -> None:
        pages = data.draw(st.lists(st.sampled_from(sorted(self.references)), max_size=8))
        epoch = self.completed + ahead
        if any(pages.count(p) > self.references[p] for p in pages):
            with pytest.raises(ValueError, match="nobody holds it"):
                self.pool.release(pages, epoch=epoch)
            return
        self.pool.release(pages, epoch=epoch)
        for page in pages:
            self.references[page] -= 1
            self.last_epoch[page] = max(self.last_epoch[page], epoch)
        for page in set(pages):
            if self.references[page] == 0:
                del self.references[page]
                del self.exact[page]
                wait = self.last_epoch.pop(page)
                if wait > self.completed:
                    self.pending[page] = wait

    @rule(ahead=st.integers(-1, 3))
    def complete(self, ahead: int) -> None:
        self.pool.complete(self.completed + ahead)
        self.completed = max(self.completed, self.completed + ahead)
        self.pending = {p: e for p, e in self.pending.items() if e > self.completed}

    @precondition(lambda self: self.references)
    @rule(data=st.data())
    def mark_sparse(self, data: st.DataObject) -> None:
        pages = data.draw(st.lists(st.sampled_from(sorted(self.references)), max_size=5))
        self.pool.mark_sparse(pages)
        for page in pages:
            self.exact[page] = False

    @rule(page=st.integers(-3, CAPACITY + 3))
    def touch_what_nobody_holds(self, page: int) -> None:
        if page in self.references:
            return
        held = sorted(self.references)[:2]
        for call in (self.pool.share, self.pool.release, self.pool.mark_sparse):
            with pytest.raises(ValueError, match=f"page {page} "):
                call([*held, page])

    @invariant()
    def agrees(self) -> None:
        assert self.pool.num_free == len(self.free())
        assert self.pool.num_pending == len(self.pending)
        for page in range(-1, CAPACITY + 1):
            assert self.pool.references(page) == self.references.get(page, 0)
            assert self.pool.is_exact(page) == self.exact.get(page, False)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_fork_and_release_return_every_page() -> None:
    pool = PagePool(10)
    parent = pool.allocate(6)
    pool.share(parent[:4])  # a fork shares the full pages
    child = parent[:4] + pool.allocate(1, after=parent[-1])
    pool.release(parent, epoch=3)
    assert (pool.num_free, pool.num_pending) == (3, 2)
    pool.release(child, epoch=2)
    pool.complete(2)
    assert (pool.num_free, pool.num_pending) == (4, 6)  # the parent's epoch holds shared pages too
    pool.complete(3)
    assert (pool.num_free, pool.num_pending) == (10, 0)
    with pytest.raises(ValueError, match="page 0 cannot be released: nobody holds it"):
        pool.release(parent)


def test_messages() -> None:
    pool = PagePool(4)
    pages = pool.allocate(3)
    pool.release(pages[:2], epoch=0)
    with pytest.raises(OutOfPages) as caught:
        pool.allocate(3)
    assert str(caught.value) == (
        "out of KV pages: 3 wanted, 1 free of 4 (2 more wait for copies to end); "
        "raise KVConfig.host_bytes, or run fewer or shorter requests"
    )
    with pytest.raises(ValueError, match="page 9 is not one of the pool's 4"):
        pool.share([9])
    with pytest.raises(ValueError, match="num_pages is 0"):
        PagePool(0)
    with pytest.raises(ValueError, match="n is -1; it must be >= 0"):
        pool.allocate(-1)
