"""estimate_scores on a CPU: INT4 dots in numba.

One thread: a layer takes a few ms, and a second pool of threads beside torch's makes the two wait
for each other where cores are few.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twilight_engine.layout import IndexPages, StepMeta, Windows
from twilight_engine.ops.cpu.halves import half_bits, halves_to_floats

Floats = NDArray[np.float32]
# Sums may be reordered, so that they vectorise; infinities and NaNs keep their meaning.
REORDER = {"reassoc", "contract"}


@numba.njit(cache=True, fastmath=REORDER)
def _dot(a: Floats, b: Floats) -> np.float32:
    total = np.float32(0)
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@numba.njit(cache=True, fastmath=REORDER)
def _dot_codes(
    codes: NDArray[np.uint8], folded: Floats, low: Floats, high: Floats, out: Floats
) -> None:
    """out[g, t] = folded[g] . codes of token t; codes is [T * D / 2] bytes, low and high buffers.

    The nibbles of all tokens are unpacked in one flat loop: twice as fast as token by token.
    """
    group, half = folded.shape[0], folded.shape[1] // 2
    for j in range(codes.shape[0]):
        low[j] = np.float32(np.int32(codes[j] & 15))
        high[j] = np.float32(np.int32(codes[j] >> 4))
    for t in range(codes.shape[0] // half):
        for g in range(group):
            total = np.float32(0)
            for i in range(half):
                total += folded[g, i] * low[t * half + i]
            for i in range(half):
                total += folded[g, half + i] * high[t * half + i]
            out[g, t] = total


@numba.njit(cache=True, fastmath=REORDER)
def _fold_channels(q: Floats, scale: Floats, low: Floats, folded: Floats, base: Floats) -> None:
    """folded = q * scale, even channels first, then the odd ones; base = q . low."""
    group, dim = q.shape
    half = dim // 2
    for g in range(group):
        for j in range(half):
            folded[g, j] = q[g, 2 * j] * scale[2 * j]
            folded[g, half + j] = q[g, 2 * j + 1] * scale[2 * j + 1]
        base[g] = _dot(q[g], low)


@numba.njit(cache=True)
def _list_scores(  # type: ignore[no-untyped-def]
    q, codes, scale_bits, bounds_bits, per_channel, page_table, query_seq, first, last,
    candidates, block, drop, scores,
):  # fmt: skip
    """q [N, Hkv, G, D], pre-scaled; list tokens of row n are first[n] <= t < last[n]."""
    n_rows, heads, group, dim = q.shape
    half = dim // 2
    size = codes.shape[2] // half
    runs = -(-size // block)
    scratch, row = np.empty(dim, np.uint32), np.empty(dim, np.float32)
    ones = np.ones(dim, np.float32)
    scale, low = np.empty(dim, np.float32), np.empty(dim, np.float32)
    folded = np.empty((group, dim), np.float32)
    base = np.empty(group, np.float32)  # q . min; of int4_token, the sum of q
    pair, pair_scratch = np.empty(2, np.float32), np.empty(2, np.uint32)
    even, odd = np.empty(size * half, np.float32), np.empty(size * half, np.float32)
    dots = np.empty((group, size), np.float32)
    for task in range(n_rows * heads):
        n, h = task // heads, task % heads
        if first[n] >= last[n]:
            continue
        if not per_channel:
            _fold_channels(q[n, h], ones, ones, folded, base)
        for p in range(first[n] // size, -(-last[n] // size)):
            page = page_table[query_seq[n], p]
            if per_channel:
                halves_to_floats(scale_bits[page, h, 0], scratch, scale)
                halves_to_floats(scale_bits[page, h, 1], scratch, low)
                _fold_channels(q[n, h], scale, low, folded, base)
            for run in range(runs):
                t0 = max(first[n], p * size + run * block)
                t1 = min(last[n], p * size + min((run + 1) * block, size))
                if t0 >= t1:
                    continue
                if candidates.size and candidates[n, h, p * runs + run] == 0:
                    if drop:
                        scores[n, h * group : (h + 1) * group, t0:t1] = -np.inf
                        continue
                    if per_channel:
                        for i in range(dim):
                            row[i] = low[i] + np.float32(7.5) * scale[i]
                    else:
                        halves_to_floats(bounds_bits[page, h, run, 0], scratch, low)
                        halves_to_floats(bounds_bits[page, h, run, 1], scratch, scale)
                        for i in range(dim):
                            row[i] = np.float32(0.5) * (low[i] + scale[i])
                    for g in range(group):
                        scores[n, h * group + g, t0:t1] = _dot(q[n, h, g], row)
                    continue
                o0, o1 = t0 - p * size, t1 - p * size
                _dot_codes(codes[page, h, o0 * half : o1 * half], folded, even, odd, dots)
                for t in range(t1 - t0):
                    if not per_channel:
                        halves_to_floats(scale_bits[page, h, o0 + t], pair_scratch, pair)
                    for g in range(group):
                        if per_channel:
                            value = dots[g, t] + base[g]
                        else:
                            value = pair[0] * dots[g, t] + pair[1] * base[g]
                        scores[n, h * group + g, t0 + t] = value


def _resident_scores(
    q: Tensor, windows: Windows, slot: int, tokens: Tensor, num_sink: int, out: Tensor
) -> None:
    """Exact dots of one query row, q [Hkv, G, D], with window rows; out [Hq, n tokens]."""
    place = torch.where(tokens < num_sink, tokens, num_sink + tokens % windows.window_rows)
    heads, per_head = windows.num_kv_heads, windows.rows_per_head
    begin = slot * heads * per_head
    rows = windows.rows[begin : begin + heads * per_head].view(heads, per_head, -1)
    keys = rows[:, place, : q.shape[-1]]
    torch.bmm(q, keys.transpose(1, 2), out=out.view(heads, q.shape[1], -1))


def estimate_scores(
    q: Tensor,
    index: IndexPages,
    windows: Windows,
    meta: StepMeta,
    *,
    softmax_scale: float,
    candidates: Tensor | None,
    block: int,
    left_out: str,
    scores: Tensor,
    lse: Tensor,
) -> None:
    """Writes scores and lse; see ops.estimate_scores."""
    by_token, drop = block == 1, left_out == "drop"
    scaled = (q * softmax_scale).view(q.shape[0], windows.num_kv_heads, -1, q.shape[2])
    seq = meta.query_seq.long()
    window_start = meta.window_starts[seq]
    last = torch.minimum(meta.positions + 1, window_start)
    first = meta.ctx_starts.clamp(min=meta.num_sink)
    none: NDArray[Any] = np.empty((0, 0, 0, 0, 0), np.uint16)
    _list_scores(
        scaled.numpy(),
        index.k_codes.flatten(2).numpy(),
        half_bits(index.k_scale),
        none if index.k_bounds is None else half_bits(index.k_bounds),
        index.k_index == "int4_channel",
        meta.page_table.numpy(),
        meta.query_seq.numpy(),
        first.numpy(),
        last.numpy(),
        np.empty((0, 0, 0), np.uint8) if candidates is None or by_token else candidates.numpy(),
        index.candidate_block,
        drop,
        scores[..., : meta.max_len].numpy(),
    )
    starts, stops = meta.ctx_starts.tolist(), (meta.positions + 1).tolist()
    slots, edges = meta.seq_slots[seq].tolist(), window_start.tolist()
    for n, (start, stop, slot, edge) in enumerate(zip(starts, stops, slots, edges, strict=True)):
        sink_stop = min(meta.num_sink, stop)
        for lo, hi in ((start, sink_stop), (max(start, edge, sink_stop), stop)):
            if lo < hi:
                resident = torch.empty(q.shape[1], hi - lo)
                tokens = torch.arange(lo, hi)
                _resident_scores(scaled[n], windows, slot, tokens, meta.num_sink, resident)
                scores[n, :, lo:hi] = resident
        if candidates is not None and by_token and drop:
            lo, hi = int(first[n]), int(last[n])
            left = (candidates[n, :, lo:hi] == 0).repeat_interleave(scaled.shape[2], dim=0)
            scores[n, :, lo:hi].masked_fill_(left, -torch.inf)
        torch.logsumexp(scores[n, :, start : max(start, stop)], dim=-1, out=lse[n])
