"""How layers share the hot rows: what each fetches with a cache of any size, and the best split."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twilight_engine.eval.simulation.row_cache import miss_curve, split_by_head

Array = NDArray[np.float64]

# Cache sizes that a curve is taken at, as shares of a layer's rows: finer where caches are small.
SIZES: Array = (np.arange(257) / 256) ** 2
# Of an equal part of the hot rows, what each graded layer gets whatever the sample says.
LEAST_PART = 0.1


def layer_curve(wanted: Tensor, cold_steps: int) -> Array:
    """[len(SIZES)] rows a step that a layer fetches with a cache of each size.

    The heads share it in proportion to their mean sets, as the engine's quotas do.

    Args:
        wanted: [H, T, L] bool, the exact rows of each step.
    """
    heads, _, length = wanted.shape
    curve = miss_curve(wanted, cold_steps=cold_steps)
    means = wanted.sum(-1).double().mean(1)
    slots = [split_by_head(means, float(size) * heads * length) for size in SIZES]
    places = torch.stack(slots, dim=-1).clamp(max=length)  # [H, sizes]
    total: Array = curve.gather(1, places).sum(0).cpu().numpy()
    return total


def fetched_rows(curves: Array, parts: Array) -> float:
    """Rows a step that all layers fetch.

    Args:
        curves: [n, len(SIZES)], `layer_curve` of each graded layer.
        parts: [n] their caches, as shares of a layer's rows.
    """
    pairs = zip(parts, curves, strict=True)
    return float(sum(np.interp(part, SIZES, curve) for part, curve in pairs))


def best_parts(curves: Array, sets: Array, total: float) -> Array:
    """The split of a cache over layers that fetches least, by the curves of a sample.

    Every layer gets LEAST_PART of an equal part. The rest goes along the curves' lower convex
    hulls, steepest first; what no curve can use is shared in proportion to the mean sets, for
    generations longer than the sample's.

    Args:
        curves: [n, len(SIZES)]; sets: [n] mean exact rows.
        total: the parts' sum, at most n.
    """
    count = len(curves)
    least = LEAST_PART * total / max(count, 1)
    parts = np.full(count, least)
    room = total - parts.sum()
    steps = [(slope, i, width) for i in range(count) for slope, width in _hull(curves[i])]
    for slope, i, width in sorted(steps):
        if slope >= 0 or room <= 0:
            break
        taken = min(width, room, 1 - parts[i])
        parts[i] += taken
        room -= taken
    return _fill(parts, sets, room)


def _fill(parts: Array, weights: Array, room: float) -> Array:
    """Add `room` in proportion to the weights; no part grows beyond 1."""
    weights = np.maximum(weights, 1e-9)
    while room > 1e-9:
        free = parts < 1
        if not free.any():
            break
        added = np.where(free, room * weights / weights[free].sum(), 0.0)
        grown = np.minimum(parts + added, 1.0)
        room -= float((grown - parts).sum())
        parts = grown
    return parts


def _hull(curve: Array) -> list[tuple[float, float]]:
    """(slope, width) of the segments of the lower convex hull over SIZES, left to right."""
    corners: list[int] = []
    for i in range(len(SIZES)):
        while len(corners) > 1 and _slope(curve, corners[-2], corners[-1]) >= _slope(
            curve, corners[-1], i
        ):
            corners.pop()
        corners.append(i)
    pairs = itertools.pairwise(corners)
    return [(_slope(curve, a, b), float(SIZES[b] - SIZES[a])) for a, b in pairs]


def _slope(curve: Array, a: int, b: int) -> float:
    return float((curve[b] - curve[a]) / (SIZES[b] - SIZES[a]))
