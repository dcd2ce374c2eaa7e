"""Static batches: who runs together, in which order, within which pages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twilight_engine import SparseConfig
from twilight_engine.runtime.scheduler import StaticScheduler, graph_key

BASE = SparseConfig()


def waiting(total_tokens: int, sparse: SparseConfig = BASE) -> Any:
    """What the scheduler reads of a sequence."""
    return SimpleNamespace(total_tokens=total_tokens, request=SimpleNamespace(sparse=sparse))


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_top_p": 0.5},
        {"index_top_p": 0.99},
        {"attn_top_p": 0.9, "index_top_p": 0.95},
        {"audit_every": 3},
    ],
)
def test_shares_of_mass_and_audits_may_differ_in_a_batch(changes: dict[str, Any]) -> None:
    assert graph_key(BASE.replace(**changes)) == graph_key(BASE)


def test_budgets_may_differ_in_a_batch() -> None:
    assert graph_key(BASE.replace(attn_top_k=5)) == graph_key(BASE.replace(attn_top_k=9))


@pytest.mark.parametrize(
    "changes",
    [
        {"policy": "dense"},
        {"attn_top_p": 1.0},
        {"attn_top_k": 64},
        {"index_top_p": None},
        {"group_rule": "union"},
        {"tail": "renormalise"},
        {"selector": "quest"},
        {"selector_budget": 0.5},
        {"fetch": "page"},
        {"by_layer": {2: SparseConfig(policy="dense")}},
    ],
)
def test_other_fields_split_batches(changes: dict[str, Any]) -> None:
    assert graph_key(BASE.replace(**changes)) != graph_key(BASE)


def test_a_share_of_one_is_not_one_token() -> None:
    assert graph_key(BASE.replace(selector_budget=1.0)) != graph_key(
        BASE.replace(selector_budget=1)
    )


def test_a_batch_keeps_to_the_pages_that_are_free() -> None:
    """Pages of 16: 20, 10 and 40 tokens take 32, 16 and 48."""
    sequences = [waiting(20), waiting(40), waiting(10)]
    scheduler = StaticScheduler(sequences, max_num_seqs=8, page_size=16)
    assert scheduler.next_batch(free_tokens=64) == [sequences[0], sequences[2]]
    assert scheduler.next_batch(free_tokens=64) == [sequences[1]]
    assert not scheduler


@given(
    st.lists(st.tuples(st.integers(1, 100), st.sampled_from([0.5, 0.8, 1.0]))),
    st.integers(1, 4),
    st.integers(100, 300),
)
def test_every_sequence_runs_once_and_in_order(
    wanted: list[tuple[int, float]], max_num_seqs: int, free_tokens: int
) -> None:
    sequences = [waiting(tokens, SparseConfig(attn_top_p=p)) for tokens, p in wanted]
    scheduler = StaticScheduler(sequences, max_num_seqs=max_num_seqs, page_size=1)
    order = {id(s): i for i, s in enumerate(sequences)}
    ran: list[int] = []
    first: list[int] = []
    while scheduler:
        batch = scheduler.next_batch(free_tokens)
        assert 1 <= len(batch) <= max_num_seqs
        assert sum(s.total_tokens for s in batch) <= free_tokens
        assert len({graph_key(s.request.sparse) for s in batch}) == 1
        first.append(order[id(batch[0])])
        ran += [order[id(s)] for s in batch]
    assert sorted(ran) == list(range(len(sequences)))
    assert first == sorted(first), "the longest waiting sequence runs next"
