"""Rotary embeddings where requests differ (test_families.py holds each scaling to transformers)."""

from __future__ import annotations

import pytest
import torch

from tests.compare import compare
from twilight_engine.layers.rope import Rope
from twilight_engine.loaders import RopeConfig

DYNAMIC = RopeConfig(rope_type="dynamic", factor=4.0)


def rope(config: RopeConfig, device: torch.device) -> Rope:
    return Rope(config, 16, 32, device)


def test_dynamic_lengths_of_a_batch_are_each_requests_own(device: torch.device) -> None:
    lengths = [10, 32, 33, 500]
    positions = torch.tensor([3, 31, 40, 499], device=device)
    batch = rope(DYNAMIC, device)(positions, torch.tensor(lengths, device=device))
    for row, length in enumerate(lengths):
        alone = rope(DYNAMIC, device)(positions[row : row + 1], length)
        compare(batch.cos[row], alone.cos[0])
        compare(batch.sin[row], alone.sin[0])


def test_dynamic_is_the_default_up_to_the_trained_length(device: torch.device) -> None:
    positions = torch.arange(32, device=device)
    plain = rope(RopeConfig(), device)(positions)
    for length in (1, 32):
        compare(rope(DYNAMIC, device)(positions, length).cos, plain.cos)
    assert not torch.allclose(rope(DYNAMIC, device)(positions, 64).cos, plain.cos)


def test_dynamic_needs_lengths(device: torch.device) -> None:
    with pytest.raises(ValueError, match="lengths is None; dynamic NTK"):
        rope(DYNAMIC, device)(torch.arange(3, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_rotates_pairs_half_a_head_apart(dtype: torch.dtype, device: torch.device) -> None:
    positions = torch.tensor([0, 5, 100_000], device=device)
    rotary = rope(RopeConfig(theta=5e5), device)(positions)
    x = torch.randn(3, 2, 16, device=device, dtype=dtype)
    pairs = torch.complex(x[..., :8].double(), x[..., 8:].double())
    angles = positions.double()[:, None, None] * 5e5 ** (
        -torch.arange(8, device=device, dtype=torch.float64) / 8
    )
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((turned.real, turned.imag), -1)
    got = rotary.apply(x)
    assert got.dtype == dtype
    near = slice(0, 2)  # at 100,000 the angle itself carries float32's rounding
    compare(got[near], expected[near].to(dtype))
    assert (got[2].double() - expected[2]).abs().max() < 0.05
    part = rotary.slice(1, 3)
    assert torch.equal(part.apply(x[1:]), got[1:])
