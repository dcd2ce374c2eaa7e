"""What the numba attention paths share: a chunk of rows, and the merge of chunk states.

A chunk's state is (o [G, D], max [G], sum [G]) with o not yet divided by sum. `reassoc`,
`contract` and `nsz` let LLVM vectorise the dot products; infinities and nans keep their meaning.
Rows are passed as (array, row number): a slice a row would cost more than its arithmetic.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray
from torch import Tensor

CHUNK_TOKENS = 256  # scores of a chunk stay in L1; enough chunks to fill the cores at 8K tokens
VECTORISE = {"reassoc", "contract", "nsz"}


@njit(cache=True, fastmath=VECTORISE)
def score_row(q, rows, row, softmax_scale, scores, i):  # type: ignore[no-untyped-def]
    """scores[g, i] = softmax_scale * q[g] . K of rows[row]."""
    for g in range(q.shape[0]):
        dot = np.float32(0)
        for d in range(q.shape[1]):
            dot += q[g, d] * rows[row, d]
        scores[g, i] = dot * softmax_scale


@njit(cache=True, fastmath=VECTORISE)
def add_row(out, weights, i, rows, row, first):  # type: ignore[no-untyped-def]
    """out[g] += weights[g, i] * rows[row, first:]."""
    for g in range(out.shape[0]):
        w = weights[g, i]
        for d in range(out.shape[1]):
            out[g, d] += w * rows[row, first + d]


@njit(cache=True)
def exponentiate(scores, length, state):  # type: ignore[no-untyped-def]
    """Turn scores[g, :length] into exp(score - max); state[g] = (max, sum), empty: (-inf, 0)."""
    for g in range(scores.shape[0]):
        top = np.float32(-np.inf)
        for i in range(length):
            top = max(top, scores[g, i])
        total = np.float32(0)
        for i in range(length):
            scores[g, i] = np.exp(scores[g, i] - top) if top > -np.inf else np.float32(0)
            total += scores[g, i]
        state[g, 0], state[g, 1] = top, total


@njit(cache=True)
def merge_chunks(chunk_out, chunk_state, num_chunks, out, lse):  # type: ignore[no-untyped-def]
    """out[g] and lse[g] from the first num_chunks chunk states [n, G, D] and [n, G, 2]."""
    for g in range(out.shape[0]):
        top = np.float32(-np.inf)
        for c in range(num_chunks):
            top = max(top, chunk_state[c, g, 0])
        out[g, :] = np.float32(0)
        lse[g] = -np.inf
        if top == -np.inf:
            continue
        total = np.float32(0)
        for c in range(num_chunks):
            w = np.exp(chunk_state[c, g, 0] - top)
            total += w * chunk_state[c, g, 1]
            for d in range(out.shape[1]):
                out[g, d] += w * chunk_out[c, g, d]
        for d in range(out.shape[1]):
            out[g, d] /= total
        lse[g] = top + np.log(total)


@njit(parallel=True, cache=True)
def merge_segments(chunk_out, chunk_state, lengths, out, lse):  # type: ignore[no-untyped-def]
    """merge_chunks for every (query row, KV head); lengths [N, Hkv] int64 tokens or rows."""
    n_rows, num_kv_heads = lengths.shape
    for task in prange(n_rows * num_kv_heads):
        n, h = task // num_kv_heads, task % num_kv_heads
        chunks = (lengths[n, h] + CHUNK_TOKENS - 1) // CHUNK_TOKENS
        merge_chunks(chunk_out[n, h], chunk_state[n, h], chunks, out[n, h], lse[n, h])


class ChunkStates:
    """Buffers for the states of every (query row, KV head)'s chunks, and their merge."""

    def __init__(self, lengths: NDArray[np.int64], group: int, head_dim: int) -> None:
        n, hkv = lengths.shape
        max_chunks = max(1, -(-int(lengths.max(initial=0)) // CHUNK_TOKENS))
        self.lengths = lengths
        self.out = np.empty((n, hkv, max_chunks, group, head_dim), np.float32)
        self.state = np.empty((n, hkv, max_chunks, group, 2), np.float32)

    def merge_into(self, out: Tensor, lse: Tensor) -> None:
        """Fill out [N, Hq, D] and lse [N, Hq]."""
        n, hkv, _, group, head_dim = self.out.shape
        merge_segments(
            self.out,
            self.state,
            self.lengths,
            out.view(n, hkv, group, head_dim).numpy(),
            lse.view(n, hkv, group).numpy(),
        )
