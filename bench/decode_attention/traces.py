"""Selections of a real decode (selection_trace.npz), scaled to the shape under test.

The trace is one sequence of some 31K tokens: 64 steps, layers 0-23, 2 KV heads. For another context
copies of it (each some steps later) are laid side by side, stretched to fill the context, and where
more rows are wanted over each other, turned so that they do not meet; then thinned by a hash of the
position. So rows stay clustered and return in the next step as they did. A bench's layer takes one
trace layer (2 and up); its heads are the trace's two, later in time; another request has the heads
swapped and is later again. Sinks and the recent window are left out: they are resident.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

RULES = {"mean80": 0.007, "mean90": 0.027, "mean95": 0.066}  # share of the context, layers 2+
FIRST_LAYER = 2  # the engine keeps the first two dense
SINK_TOKENS, WINDOW_TOKENS = 4, 192  # of the trace, resident with the engine's defaults
HEAD_SHIFT, REQUEST_SHIFT, COPY_SHIFT = 16, 7, 13  # steps that copies of a set are apart
HASH = 2654435761  # Knuth's multiplier
TURN = 10007  # tokens that scattered heads are apart


@dataclass(frozen=True)
class Trace:
    """Sets of listed rows: sets[layer - FIRST_LAYER][head][step] are ascending positions."""

    sets: list[list[list[NDArray[np.int64]]]]
    context: int


def nearest_rule(share: float) -> str:
    """The trace's rule whose own share of the context is nearest."""
    return min(RULES, key=lambda rule: abs(math.log(share / RULES[rule])))


def require_file(path: Path) -> None:
    """ValueError where there is no trace file."""
    if not path.is_file():
        raise ValueError(
            f"--trace is {path}, which is no file; it must be selection_trace.npz, the recorded "
            "selections that the benches replay (it is not part of the repository)"
        )


def load_trace(path: Path, rule: str) -> Trace:
    """Read one rule's sets. Raises: ValueError for a missing file or one without these arrays."""
    require_file(path)
    names = ("shape", "n_start", f"{rule}_indices", f"{rule}_offsets")
    with np.load(path) as arrays:
        missing = [name for name in names if name not in arrays]
        if missing:
            raise ValueError(f"--trace {path} lacks the arrays {', '.join(missing)}")
        shape, start, indices, offsets = (arrays[name] for name in names)
    layers, heads, steps = (int(n) for n in shape)
    context = int(start)
    sets: list[list[list[NDArray[np.int64]]]] = []
    for layer in range(FIRST_LAYER, layers):
        sets.append([])
        for head in range(heads):
            first = (layer * heads + head) * steps
            rows = [indices[offsets[i] : offsets[i + 1]] for i in range(first, first + steps)]
            inside = [
                r[(r >= SINK_TOKENS) & (r < context - WINDOW_TOKENS)].astype(np.int64) for r in rows
            ]
            sets[-1].append(inside)
    return Trace(sets, context)


class ScaledTrace:
    """The sets of a bench: `rows(layer, request, head, step)`.

    Args:
        trace: what to scale.
        num_layers: layers of the bench, spread over the trace's.
        first, last: the tokens that can be listed.
        share: mean set size as a share of `tokens`; None: the trace's own counts.
        tokens: the context.
        scatter: put every token elsewhere, by one permutation of the context: as many rows, which
            return as they did, but without their clusters.
    """

    def __init__(
        self,
        trace: Trace,
        *,
        num_layers: int,
        first: int,
        last: int,
        share: float | None,
        tokens: int,
        scatter: bool = False,
    ) -> None:
        self.trace, self.first, self.last = trace, first, last
        random = np.random.default_rng(0)
        self._places = random.permutation(last - first).astype(np.int32) if scatter else None
        self._layers = _spread_layers(trace, num_layers)
        mean = float(np.mean([_mean_size(layer) for layer in self._layers]))
        copies = 1.0 if share is None else share * tokens / max(mean, 1e-9)
        self.copies = max(1, math.ceil(copies))
        self.keep = copies / self.copies
        self.tiles = min(self.copies, max(1, tokens // trace.context))  # side by side

    def rows(self, layer: int, request: int, head: int, step: int) -> NDArray[np.int32]:
        """Ascending, distinct tokens in [first, last).

        An empty set becomes one row, always the same: no query has a small set without one.
        """
        heads = self._layers[layer]
        sets = heads[(head + request) % len(heads)]
        parts = []
        salt = 31 * head + 1009 * request + 7919 * layer
        for copy in range(self.copies):
            later = HEAD_SHIFT * (head // len(heads)) + REQUEST_SHIFT * request + COPY_SHIFT * copy
            rows = sets[reflected(step + later, len(sets))]
            place = self._thinned(rows, copy + salt) / self.trace.context
            turn = (copy // self.tiles) * self.tiles / self.copies
            parts.append(copy % self.tiles + (place + turn) % 1.0)
        span = self.last - self.first
        places = (np.concatenate(parts) * (span / self.tiles)).astype(np.int32)
        if self._places is not None:
            # Turned by head, so that heads and requests do not share their places.
            places = self._places[(places + salt * TURN % span) % span]
        listed = np.zeros(span, dtype=bool)
        listed[places] = True
        if not len(places):
            listed[span // 2] = True
        return (self.first + np.flatnonzero(listed)).astype(np.int32)

    def _thinned(self, rows: NDArray[np.int64], salt: int) -> NDArray[np.int64]:
        """The rows that a hash of their position keeps: the same ones in every step."""
        mixed = ((rows + salt * 65537) * HASH) & 0xFFFFFFFF
        return rows[mixed < self.keep * 2**32]


def _mean_size(layer: list[list[NDArray[np.int64]]]) -> float:
    return float(np.mean([len(rows) for head in layer for rows in head]))


def _spread_layers(trace: Trace, num_layers: int) -> list[list[list[NDArray[np.int64]]]]:
    """Layers evenly apart; of one alone, that whose sets are nearest to the mean size."""
    if num_layers == 1:
        mean = float(np.mean([_mean_size(layer) for layer in trace.sets]))
        return [min(trace.sets, key=lambda layer: abs(_mean_size(layer) - mean))]
    spread = np.linspace(0, len(trace.sets) - 1, num_layers)
    return [trace.sets[round(i)] for i in spread]


def reflected(step: int, length: int) -> int:
    """Steps to and fro over a trace, so that neighbours stay neighbours."""
    place = step % max(1, 2 * (length - 1))
    return min(place, 2 * (length - 1) - place)
