"""lsh_candidates on a CPU: one numba pass, on one thread."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from torch import Tensor

from twilight_engine.layout import LSH_MIN_TABLES, StepMeta


@numba.njit(cache=True)
def _agreements(mine: Any, theirs: Any) -> Any:
    """Equal entries of two [L] arrays; int16, so that the loop runs in vector registers."""
    total = np.int16(0)
    for i in range(mine.shape[0]):
        total += np.int16(mine[i] == theirs[i])
    return total


@numba.njit(cache=True)
def _candidates(
    q_codes: Any, k_codes: Any, table: Any, query_seq: Any, positions: Any, ctx_starts: Any,
    window_starts: Any, num_sink: int, least: int, candidates: Any,
) -> None:  # fmt: skip
    heads, size = k_codes.shape[1], k_codes.shape[2]
    group = q_codes.shape[1] // heads
    for n in range(q_codes.shape[0]):
        b = query_seq[n]
        first = max(ctx_starts[n], num_sink)
        end = min(positions[n] + 1, window_starts[b])
        for h in range(heads):
            candidates[n, h] = 0
            for t in range(first, end):
                page = table[b, t // size]
                if page < 0:
                    continue
                for g in range(h * group, (h + 1) * group):
                    if _agreements(k_codes[page, h, t % size], q_codes[n, g]) >= least:
                        candidates[n, h, t] = 1
                        break


def lsh_candidates_cpu(
    q_codes: Tensor, k_codes: Tensor, meta: StepMeta, candidates: Tensor
) -> None:
    """Compare the signatures of every list token; see ops.lsh_candidates."""
    _candidates(
        q_codes.numpy(),
        k_codes.numpy(),
        meta.page_table.numpy(),
        meta.query_seq.numpy(),
        meta.positions.numpy(),
        meta.ctx_starts.numpy(),
        meta.window_starts.numpy(),
        meta.num_sink,
        LSH_MIN_TABLES,
        candidates.numpy(),
    )
