"""index_pages on a CPU: numba passes for ranges and codes, torch for the small tensors between.

The passes run on one thread: they take 17 ms of a core for 6,144 tokens of 3 heads of 64 channels,
and on two busy cores a pool of numba threads beside torch's made that 5 times slower.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from twilight_engine.config import QUEST_BLOCK
from twilight_engine.layout import IndexPages, StepMeta, Windows
from twilight_engine.reference.index_pages import FP16_MAX, quantise, round_down, round_up


@numba.njit(cache=True, error_model="numpy")
def _channel_ranges(x: Any, run: int, lo: Any, hi: Any) -> None:
    for m, h in np.ndindex(x.shape[0], x.shape[2]):
        for s in range(x.shape[1]):
            r = s // run
            for d in range(x.shape[3]):
                value = x[m, s, h, d]
                if s % run == 0:
                    lo[m, h, r, d] = value
                    hi[m, h, r, d] = value
                lo[m, h, r, d] = min(lo[m, h, r, d], value)
                hi[m, h, r, d] = max(hi[m, h, r, d], value)


@numba.njit(cache=True, error_model="numpy")
def _token_ranges(x: Any, lo: Any, hi: Any) -> None:
    for m, h in np.ndindex(x.shape[0], x.shape[2]):
        for s in range(x.shape[1]):
            low = x[m, s, h, 0]
            high = low
            for d in range(x.shape[3]):
                low = min(low, x[m, s, h, d])
                high = max(high, x[m, s, h, d])
            lo[m, h, s] = low
            hi[m, h, s] = high


@numba.njit(cache=True, error_model="numpy")
def _encode(x: Any, scale: Any, minimum: Any, codes: Any) -> None:
    """scale and minimum [M, Hkv, S, D] by broadcast; codes [M, Hkv, S, D // 2]."""
    for m, h in np.ndindex(x.shape[0], x.shape[2]):
        for s in range(x.shape[1]):
            for j in range(x.shape[3] // 2):
                byte = 0
                for nibble in range(2):
                    d = 2 * j + nibble
                    step = scale[m, h, s, d]
                    if step > 0:
                        code = np.rint((x[m, s, h, d] - minimum[m, h, s, d]) / step)
                        byte |= int(min(max(code, np.float32(0)), np.float32(15))) << (4 * nibble)
                codes[m, h, s, j] = byte


def _codes(x: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    pages, size, heads, dim = x.shape
    shape = (pages, heads, size, dim)
    codes = torch.empty(pages, heads, size, dim // 2, dtype=torch.uint8)
    scale, minimum = scale.float().expand(shape), minimum.float().expand(shape)
    _encode(x.numpy(), scale.numpy(), minimum.numpy(), codes.numpy())
    return codes


def _channel_range(x: Tensor, run: int) -> tuple[Tensor, Tensor]:
    """Min and max of each channel over runs of tokens, [M, Hkv, runs, D] float32."""
    pages, size, heads, dim = x.shape
    lo, hi = torch.empty(2, pages, heads, -(-size // run), dim).unbind()
    _channel_ranges(x.numpy(), run, lo.numpy(), hi.numpy())
    return lo, hi


def _by_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, [M, Hkv, S, 2] scale and min) with one grid a token."""
    pages, size, heads, _ = x.shape
    lo, hi = torch.empty(2, pages, heads, size).unbind()
    _token_ranges(x.numpy(), lo.numpy(), hi.numpy())
    scale, minimum = quantise(lo, hi)
    return _codes(x, scale[..., None], minimum[..., None]), torch.stack([scale, minimum], dim=-1)


def index_pages_cpu(k: Tensor, v: Tensor, page_ids: Tensor, index: IndexPages) -> None:
    """Quantise whole pages; see ops.index_pages."""
    if k.dtype != torch.float32:
        raise NotImplementedError(f"k has dtype {k.dtype}; supported on a CPU: torch.float32")
    kept = page_ids >= 0
    if not bool(kept.all()):
        k, v, page_ids = k[kept], v[kept], page_ids[kept]
    if k.shape[0] == 0:
        return
    ids = page_ids.long()
    if index.k_bounds is None:
        scale, minimum = quantise(*_channel_range(k, k.shape[1]))  # [M, Hkv, 1, D]
        index.k_codes[ids] = _codes(k, scale, minimum)
        index.k_scale[ids] = torch.cat([scale, minimum], dim=2)
    else:
        index.k_codes[ids], index.k_scale[ids] = _by_token(k)
        lo, hi = _channel_range(k, QUEST_BLOCK)
        index.k_bounds[ids] = torch.stack([round_down(lo), round_up(hi)], dim=3)
    if index.v_codes is not None and index.v_scale is not None:
        index.v_codes[ids], index.v_scale[ids] = _by_token(v)
    index.v_mean[ids] = v.mean(1).clamp(-FP16_MAX, FP16_MAX).half()


def index_window_pages_cpu(windows: Windows, meta: StepMeta, index: IndexPages) -> None:
    """Index each page this step completed; see ops.append_rows."""
    size, heads, dim = meta.page_size, windows.num_kv_heads, index.head_dim
    rows, per_head = windows.rows, windows.rows_per_head
    for b, t in zip(meta.query_seq.tolist(), meta.positions.tolist(), strict=True):
        if t < 0 or (t + 1) % size:
            continue
        slot = int(meta.seq_slots[b])
        first = slot * heads * per_head + windows.num_sink + (t + 1 - size) % windows.window_rows
        page = rows.as_strided(  # [1, S, Hkv, 2D]
            (1, size, heads, 2 * dim),
            (rows.numel(), 2 * dim, per_head * 2 * dim, 1),
            rows.storage_offset() + first * 2 * dim,
        )
        page_id = meta.page_table[b, t // size].view(1)
        index_pages_cpu(page[..., :dim], page[..., dim:], page_id, index)
