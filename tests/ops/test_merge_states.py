"""merge_states against its reference and against one softmax over everything."""

from __future__ import annotations

import pytest
import torch

from tests.compare import compare
from twilight_engine.ops.merge_states import merge_states
from twilight_engine.reference.merge_states import merge_states as reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 14, 80), (17, 6, 256)])
@pytest.mark.parametrize("num_states", [1, 3, 8])
def test_equals_reference(
    num_states: int, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    outs = [torch.randn(shape).to(device) for _ in range(num_states)]
    lses = [10 * torch.randn(shape[:2]).to(device) for _ in range(num_states)]
    lses[0][::2] = -torch.inf
    outs[0][::2] = torch.nan  # what an empty state holds is ignored
    out, lse = merge_states(outs, lses, dtype)
    want = reference(outs, lses, dtype)
    assert out.dtype == dtype
    compare(out, want[0])
    compare(lse, want[1])


def test_all_empty_gives_zero_and_minus_infinity(device: torch.device) -> None:
    outs = [torch.full((2, 3, 64), torch.nan, device=device)] * 2
    lses = [torch.full((2, 3), -torch.inf, device=device)] * 2
    out, lse = merge_states(outs, lses, torch.float32)
    assert not out.any() and torch.isneginf(lse).all()


def test_merging_halves_is_one_softmax(device: torch.device) -> None:
    scores, v = 3 * torch.randn(2, 3, 100).to(device), torch.randn(2, 3, 100, 64).to(device)
    outs, lses = [], []
    for part in (slice(0, 30), slice(30, 31), slice(31, 100)):
        s = scores[..., part]
        outs.append((s.softmax(-1)[..., None] * v[..., part, :]).sum(-2))
        lses.append(s.logsumexp(-1))
    out, lse = merge_states(outs, lses, torch.float32)
    compare(out, (scores.softmax(-1)[..., None] * v).sum(-2))
    compare(lse, scores.logsumexp(-1))


def test_bad_arguments_are_named(device: torch.device) -> None:
    out, lse = torch.zeros(1, 2, 64, device=device), torch.zeros(1, 2, device=device)
    with pytest.raises(ValueError, match="there are 9 outs and 9 lses"):
        merge_states([out] * 9, [lse] * 9, torch.float32)
    with pytest.raises(ValueError, match="there are 1 outs and 2 lses"):
        merge_states([out], [lse] * 2, torch.float32)
    with pytest.raises(ValueError, match=r"lses\[0\] has shape"):
        merge_states([out], [lse[:, :1]], torch.float32)
    with pytest.raises(ValueError, match=r"outs\[0\] has dtype"):
        merge_states([out.half()], [lse], torch.float32)
