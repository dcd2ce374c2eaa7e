"""Fetch, eviction, appends and attention race over random lists; every hot row stays the host's."""

from __future__ import annotations

import os
import time

import pytest
import torch

from tests.attention.model_shape import Shape
from tests.attention.stress import Case, Stress

SECONDS = float(os.environ.get("TWILIGHT_STRESS_S", "60"))

CASES = {
    "8b": Case(
        Shape(num_layers=4, num_q_heads=32, num_kv_heads=8, head_dim=128),
        page_size=64,
        max_len=2048,
        max_seqs=6,
        hot_share=0.02,
    ),
    "many": Case(
        Shape(num_layers=3, num_q_heads=6, num_kv_heads=2, head_dim=64),
        page_size=16,
        max_len=700,
        max_seqs=24,
        hot_share=0.1,
    ),
    "odd": Case(
        Shape(num_layers=3, num_q_heads=9, num_kv_heads=1, head_dim=80),
        page_size=61,
        max_len=3000,
        max_seqs=3,
        hot_share=0.04,
    ),
}


def episodes(stress: Stress, seconds: float, *, most: int | None = None) -> int:
    """Episodes of both tails until the time is up, `most` at most; returns how many."""
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end and count != most:
        tail = "mean" if count % 3 == 2 else "renormalise"
        stress.episode(stress.random.randint(3, 30), tail=tail, check_every=3)
        count += 1
        if count % 8 == 0:
            stress.check()
    stress.check()
    return count


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_hot_rows_and_outputs_under_stress(name: str) -> None:
    seed = time.time_ns()
    print(f"seed {seed}")
    stress = Stress(CASES[name], torch.device("cuda"), seed)
    assert episodes(stress, SECONDS / len(CASES)) > 3
    stress.close()


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(CASES))
def test_a_second_of_stress(name: str) -> None:
    stress = Stress(CASES[name], torch.device("cuda"))
    assert episodes(stress, 1.0) > 0
    stress.close()


SMALL = Case(
    Shape(num_layers=2, num_q_heads=4, num_kv_heads=2, head_dim=64),
    page_size=16,
    max_len=160,
    max_seqs=3,
    hot_share=0.2,
)


def test_some_episodes(device: torch.device) -> None:
    """The same, a little, on every backend."""
    stress = Stress(SMALL, device)
    assert episodes(stress, 60.0, most=3) == 3
    stress.close()


@pytest.mark.parametrize("what", ["row", "slot", "output", "host"])
def test_what_is_wrong_is_found(what: str) -> None:
    stress = Stress(SMALL, torch.device("cpu"))
    episodes(stress, 60.0, most=1)
    tiers = stress.cache.layers[1]
    assert tiers.hot is not None and tiers.windows is not None
    if what == "row":
        held = int((tiers.hot.slot_key >= 0).nonzero()[0])
        tiers.windows.rows[tiers.hot.first_row + held, 3] += 1
        stress._count_wrong_rows(1)
    elif what == "slot":
        held = int((tiers.hot.slot_key >= 0).nonzero()[0])
        tiers.hot.slot_key[held] = -1
        stress._count_wrong_rows(1)
    elif what == "output":
        keys = stress.keys(stress.sequences[0], 8)
        stress.truth[:, :, keys] += 1  # the rows that attention reads are others now
        stress.episode(3, tail="renormalise", check_every=1)
    else:
        longest = max(stress.sequences, key=lambda s: s.length)
        tiers.host[0, longest.pages[0], 0, 0] += 1
    with pytest.raises(AssertionError):
        stress.check()
    stress.close()
