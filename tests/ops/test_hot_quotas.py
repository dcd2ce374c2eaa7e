"""Quotas, and the end of a sequence, against the reference, bit by bit."""

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
from twilight_engine.layout import NO_ROW, HotRows
from twilight_engine.ops.hot_quotas import advance, rebalance_quotas, release_sequence
from twilight_engine.ops.resolve_rows import resolve_rows
from twilight_engine.reference import hot_quotas as reference


def warm(num_chunks: int, hkv: int, num_seqs: int) -> tuple[HotRows, torch.Tensor]:
    """A cache in the middle of its life, on the CPU, and the page table of its sequences."""
    num_pages = num_seqs * 10 + 2
    hot = make_hot(
        num_chunks=num_chunks, num_pages=num_pages, hkv=hkv, page_size=16, num_seqs=num_seqs
    )
    pages = random_page_table(num_seqs, 10, num_pages)
    meta = make_meta(pages, 16, q_lens=[1] * num_seqs)
    for _ in range(3):
        resolve_rows(random_lists(num_seqs, hkv, 160, 120), hot, meta)
        advance(hot)
    return hot, pages


@pytest.mark.parametrize("hkv", [1, 3, 8])
@pytest.mark.parametrize(("num_chunks", "num_seqs"), [(1, 1), (7, 3), (64, 4), (1100, 2), (40, 17)])
def test_rebalance_matches_reference(
    device: torch.device, num_chunks: int, num_seqs: int, hkv: int
) -> None:
    want, _ = warm(num_chunks, hkv, num_seqs)
    hot = to_device(want, device)
    for share in (1.0, 0.5, 0.0, 1.0):
        active = torch.rand(num_seqs) < share
        reference.rebalance_quotas(want, active)
        rebalance_quotas(hot, active.to(device))
        assert_same_state(hot, want)
        check_invariants(hot)
        mean = torch.rand(num_seqs, hkv).mul(5000).mul(torch.rand(num_seqs, 1) < 0.7)
        want.set_mean.copy_(mean)
        hot.set_mean.copy_(mean)


def test_quotas_follow_the_means_and_nobody_goes_without(device: torch.device) -> None:
    hot = to_device(make_hot(num_chunks=100, num_pages=4, hkv=2, page_size=16, num_seqs=3), device)
    hot.set_mean.copy_(torch.tensor([[900.0, 100.0], [0.0, 0.0], [5.0, 5.0]]))
    rebalance_quotas(hot, torch.tensor([True, True, False], device=device))
    owned = torch.bincount(hot.chunk_owner.cpu().long(), minlength=6)
    # 96 chunks by weight 900 : 100 : 500 : 500 (no history: the mean), one more for each
    assert owned.tolist() == [44, 6, 25, 25, 0, 0]
    hot.set_mean[0, 0] = 1e6
    rebalance_quotas(hot, torch.tensor([1, 1, 0], dtype=torch.uint8, device=device))
    owned = torch.bincount(hot.chunk_owner.cpu().long(), minlength=6)
    assert owned.sum() == 100 and (owned[:4] >= 1).all()


def test_chunks_that_stay_keep_their_rows(device: torch.device) -> None:
    hot, _ = warm(20, 2, 2)
    hot = to_device(hot, device)
    active = torch.ones(2, dtype=torch.bool, device=device)
    rebalance_quotas(hot, active)
    before = to_device(hot, "cpu")
    rebalance_quotas(hot, active)
    assert_same_state(hot, before)


@pytest.mark.parametrize("hkv", [1, 3])
def test_release_matches_reference(device: torch.device, hkv: int) -> None:
    want, pages = warm(40, hkv, 3)
    hot = to_device(want, device)
    for seq in (1, 0, 2):
        page_ids = torch.cat([pages[seq], int32([NO_ROW])])
        reference.release_sequence(want, seq, page_ids)
        release_sequence(hot, seq, page_ids.to(device))
        assert_same_state(hot, want)
        check_invariants(hot)
        assert (hot.slot_map[:, pages[seq].long()] == NO_ROW).all()
        assert not (hot.chunk_owner.cpu().div(hkv, rounding_mode="floor") == seq).any()
    assert (hot.slot_key == NO_ROW).all() and (hot.slot_map == NO_ROW).all()


def test_release_frees_others_slots_of_its_pages(device: torch.device) -> None:
    want, pages = warm(40, 2, 3)
    hot = to_device(want, device)
    for state, act in ((want, reference.release_sequence), (hot, release_sequence)):
        act(state, 0, pages[1].to(state.slot_key.device))
    assert_same_state(hot, want)
    check_invariants(hot)


def test_no_pages_and_no_slots(device: torch.device) -> None:
    hot = to_device(make_hot(num_chunks=0, num_pages=4, hkv=2, page_size=16, num_seqs=3), device)
    rebalance_quotas(hot, torch.ones(3, dtype=torch.bool, device=device))
    hot.set_mean.fill_(3)
    release_sequence(hot, 2, torch.empty(0, dtype=torch.int32, device=device))
    assert hot.set_mean.cpu().tolist() == [[3, 3], [3, 3], [0, 0]]


def test_advance_counts_steps(device: torch.device) -> None:
    hot = to_device(make_hot(num_chunks=1, num_pages=4, hkv=2, page_size=16, num_seqs=3), device)
    advance(hot)
    assert hot.step.item() == 2


def test_bad_arguments_are_named(device: torch.device) -> None:
    hot = to_device(make_hot(num_chunks=1, num_pages=4, hkv=2, page_size=16, num_seqs=3), device)
    with pytest.raises(ValueError, match=r"active has shape \[2\]; it must be \[3\]"):
        rebalance_quotas(hot, torch.ones(2, dtype=torch.bool, device=device))
    with pytest.raises(ValueError, match=r"active has dtype torch\.float32"):
        rebalance_quotas(hot, torch.ones(3, device=device))
    with pytest.raises(ValueError, match=r"seq_slot is 3; it must lie in \[0, 3\)"):
        release_sequence(hot, 3, torch.empty(0, dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match=r"page_ids has dtype torch\.int64"):
        release_sequence(hot, 0, torch.empty(0, dtype=torch.int64, device=device))
    crowd = dataclasses.replace(hot, set_mean=torch.zeros(1025, 2, device=device))
    with pytest.raises(ValueError, match=r"2050 .* at most 2048"):
        rebalance_quotas(crowd, torch.ones(1025, dtype=torch.bool, device=device))
