"""layer_budgets against a loop over single heads and steps, and where the answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from twilight_engine.eval.budget.measure import FORMATS, layer_budgets
from twilight_engine.eval.simulation.quantisers import quantised_keys

STEPS, LENGTH, Q_HEADS, KV_HEADS, DIM, PAGE = 3, 49, 4, 2, 8, 16
MASSES = (0.3, 0.8, 1.0)
SCALE = DIM**-0.5


@pytest.fixture(scope="module")
def case() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    q = 4 * torch.randn(STEPS, Q_HEADS, DIM, generator=generator)
    return q, torch.randn(LENGTH, KV_HEADS, DIM, generator=generator)


def budgets(q: torch.Tensor, keys: torch.Tensor, masses: tuple[float, ...] = MASSES):
    return layer_budgets(q, keys, masses, softmax_scale=SCALE, page_size=PAGE)


def picked(weights: torch.Tensor, p: float) -> list[int]:
    """The tokens of the smallest set whose weights reach p, by adding them one by one."""
    order = sorted(range(len(weights)), key=lambda i: -weights[i].item())
    total, chosen = 0.0, []
    for token in order:
        chosen.append(token)
        total += weights[token].item()
        if total >= p and p < 1:
            break
    return chosen


def test_like_a_loop(case):
    q, keys = case
    got = budgets(q, keys)
    pages = (LENGTH - STEPS) // PAGE  # the last one is open at the first step, and exact
    assert pages == LENGTH // PAGE - 1
    for name in FORMATS:
        approximate = keys.clone()
        full = keys[: pages * PAGE].transpose(0, 1).unflatten(1, (pages, PAGE))
        approximate[: pages * PAGE] = quantised_keys(full, name)[0].flatten(1, 2).transpose(0, 1)
        for i, p in enumerate(MASSES):
            for h in range(Q_HEADS):
                for t in range(STEPS):
                    seen, kv = LENGTH - STEPS + t + 1, h // (Q_HEADS // KV_HEADS)
                    true = (keys[:seen, kv] @ q[t, h] * SCALE).softmax(0)
                    estimate = (approximate[:seen, kv] @ q[t, h] * SCALE).softmax(0)
                    assert got.rows[i, h, t] == len(picked(true, p))
                    want = true[picked(estimate, p)].sum().item()
                    assert got.captured[name][i, h, t].item() == pytest.approx(want, abs=1e-5)


def test_uniform_weights_need_their_share(case):
    q, keys = case
    got = budgets(torch.zeros_like(q), keys, (0.31, 0.5))
    for t in range(STEPS):
        seen = LENGTH - STEPS + t + 1
        for i, p in enumerate((0.31, 0.5)):
            assert got.rows[i, :, t].tolist() == [math.ceil(p * seen)] * Q_HEADS


def test_more_bits_capture_what_p_says(case):
    q, keys = case
    got = budgets(q, keys, (0.8,))
    short = {
        name: (0.8 - captured).clamp(min=0).mean().item() for name, captured in got.captured.items()
    }
    for along in ("channel", "token"):
        assert short[f"int8_{along}"] < 0.002
        assert short[f"int8_{along}"] <= short[f"int4_{along}"] < short[f"int2_{along}"]


def test_a_passage_without_a_full_page(case):
    q, keys = case
    got = layer_budgets(q, keys, (0.8,), softmax_scale=SCALE, page_size=64)
    assert all((captured >= 0.8 - 1e-6).all() for captured in got.captured.values())
