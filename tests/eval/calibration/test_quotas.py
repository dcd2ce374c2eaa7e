"""How layers share the hot rows: against a search over every split."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from twilight_engine.eval.calibration.quotas import (
    LEAST_PART,
    SIZES,
    best_parts,
    fetched_rows,
    layer_curve,
)
from twilight_engine.eval.simulation.row_cache import lru_misses, split_by_head


def curves_of(*halves: float) -> np.ndarray:
    """Convex curves: each layer fetches 100 rows with no cache, half as many at its own size."""
    return np.stack([100 * 2 ** (-SIZES / half) for half in halves])


def test_the_best_parts_beat_every_other_split():
    curves = curves_of(0.01, 0.05, 0.3)
    sets = np.array([10.0, 50.0, 300.0])
    total = 0.3
    parts = best_parts(curves, sets, total)
    assert parts.sum() == pytest.approx(total)
    assert (parts >= LEAST_PART * total / 3 - 1e-12).all()
    grid = np.linspace(0.01, total, 30)
    splits = [(a, b, total - a - b) for a, b in itertools.product(grid, grid) if a + b < total]
    best = min(fetched_rows(curves, np.array(split)) for split in splits)
    assert fetched_rows(curves, parts) <= 1.02 * best
    assert fetched_rows(curves, parts) < 0.95 * fetched_rows(curves, np.full(3, total / 3))


def test_what_no_curve_can_use_goes_by_the_sets():
    flat = np.stack([np.where(SIZES < 0.01, 5.0, 1.0)] * 2)
    parts = best_parts(flat, np.array([30.0, 10.0]), 0.4)
    # 0.02 whatever the curve says, 0.01 along it, and three quarters of the rest to the first.
    assert parts.tolist() == pytest.approx([0.285, 0.115], abs=0.002)


def test_no_part_is_larger_than_its_layer():
    curves = curves_of(0.9, 0.001)
    parts = best_parts(curves, np.array([1000.0, 1.0]), 1.7)
    assert parts.tolist() == pytest.approx([1.0, 0.7])
    assert best_parts(curves, np.zeros(2), 2.0).tolist() == [1.0, 1.0]


def test_a_curve_is_the_row_cache_of_the_layer():
    generator = torch.Generator().manual_seed(1)
    wanted = torch.rand(3, 30, 200, generator=generator) < 0.1
    wanted[1] &= torch.rand(30, 200, generator=generator) < 0.3
    curve = layer_curve(wanted, cold_steps=5)
    means = wanted.sum(-1).double().mean(1)
    for i in (0, 60, 120, 256):
        slots = split_by_head(means, SIZES[i] * 3 * 200)
        misses = lru_misses(wanted, slots)[:, 5:].sum(0).double().mean().item()
        assert curve[i] == pytest.approx(misses)
    assert (np.diff(curve) <= 1e-9).all()
