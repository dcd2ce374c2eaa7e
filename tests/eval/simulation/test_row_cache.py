from __future__ import annotations

import pytest
import torch

from twilight_engine.eval.simulation.row_cache import lru_misses, miss_curve, split_by_head


@pytest.mark.parametrize("cold_steps", [0, 3])
def test_the_curve_is_the_cache_of_every_size(cold_steps):
    generator = torch.Generator().manual_seed(3)
    wanted = torch.rand(2, 12, 40, generator=generator) < torch.rand(1, 1, 40) * 0.4
    curve = miss_curve(wanted, cold_steps=cold_steps)
    assert curve.shape == (2, 41)
    for slots in range(41):
        misses = lru_misses(wanted, torch.tensor([slots, slots]))[:, cold_steps:]
        assert torch.allclose(curve[:, slots], misses.double().mean(1))


def test_heads_split_a_layer_by_their_mean_sets():
    means = torch.tensor([30.0, 10.0, 0.0]).double()
    assert split_by_head(means, 20).tolist() == [15, 5, 0]
    assert split_by_head(torch.zeros(2).double(), 20).tolist() == [0, 0]
