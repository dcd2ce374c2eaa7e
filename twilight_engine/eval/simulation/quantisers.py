"""K and V as an index would give them back: quantised and dequantised, page by page."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.reference.index_pages import quantise
from twilight_engine.reference.index_pages import round_down as fp16_below
from twilight_engine.reference.index_pages import round_up as fp16_above


def _grid(x: Tensor, dim: int, levels: int) -> tuple[Tensor, Tensor]:
    """(scale, min) float32 of a grid of `levels` steps over x along dim, kept."""
    lo, hi = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    if levels == 15:
        scale, minimum = quantise(lo, hi)
        return scale.float(), minimum.float()
    minimum = fp16_below(lo).float()
    return fp16_above((hi - minimum) / levels).float(), minimum


def _through(x: Tensor, dim: int, levels: int) -> tuple[Tensor, Tensor]:
    """x on its grid, and the grid's step, both float32."""
    scale, minimum = _grid(x, dim, levels)
    codes = ((x - minimum) / scale).round().clamp(0, levels)
    codes = torch.where(scale == 0, 0.0, codes)
    return minimum + scale * codes, scale


def quantised_keys(keys: Tensor, k_index: str) -> tuple[Tensor, Tensor]:
    """Dequantised K and the quantiser's step.

    Args:
        keys: [Hkv, P, S, D] float32, full pages.
        k_index: a Grading's.
    Returns: keys [Hkv, P, S, D]; step, broadcast against it: [Hkv, P, 1, D] or [Hkv, P, S, 1].
    """
    if k_index == "exact":
        return keys, torch.zeros_like(keys[:, :, :1])
    dim = 2 if k_index.endswith("channel") else 3
    return _through(keys, dim, 2 ** int(k_index[3]) - 1)


def quantised_values(values: Tensor, v_index: str) -> Tensor:
    """Dequantised V [Hkv, P, S, D], per token."""
    return _through(values, 3, 2 ** int(v_index[3:]) - 1)[0]


def run_bounds(keys: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(lo, hi) [Hkv, blocks, D] of K over runs of `block` tokens; pages hold whole runs."""
    runs = keys.unflatten(2, (-1, block)).flatten(1, 2)  # [Hkv, blocks, block, D]
    return fp16_below(runs.amin(2)).float(), fp16_above(runs.amax(2)).float()
