"""Reference of index_pages: the index format of docs/index_format.md, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.config import QUEST_BLOCK
from twilight_engine.layout import IndexPages, StepMeta, Windows

FP16_MAX = 65504.0


def round_down(x: Tensor) -> Tensor:
    """The largest float16 <= x, float32 in; saturates at +-65504; zero is +0."""
    x = x.clamp(-FP16_MAX, FP16_MAX) + 0.0
    half = x.half()
    bits = half.view(torch.int16)
    below = torch.where(half > 0, bits - 1, torch.where(half < 0, bits + 1, -0x7FFF))
    return torch.where(half.float() > x, below.to(torch.int16), bits).view(torch.float16)


def round_up(x: Tensor) -> Tensor:
    """The smallest float16 >= x, float32 in; saturates at +-65504; zero is +0."""
    return (-round_down(-x).float() + 0.0).half()


def quantise(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, min) float16 of the 4-bit grid over [lo, hi], float32: min + 15 * scale >= hi."""
    hi = hi.clamp(-FP16_MAX, FP16_MAX)
    minimum = round_down(lo)
    # A tensor of 15s: torch turns division by a scalar into a product on some devices.
    scale = round_up((hi - minimum.float()) / torch.full_like(hi, 15.0))
    short = minimum.double() + 15 * scale.double() < hi.double()
    next_up = (scale.view(torch.int16) + 1).view(torch.float16)
    return torch.where(short, next_up, scale), minimum


def encode(x: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """Packed codes [..., D // 2] of x [..., D]: round half to even, clamped to 0..15."""
    code = ((x - minimum.float()) / scale.float()).round().clamp(0, 15)
    code = torch.where(scale == 0, 0.0, code).to(torch.uint8)
    return code[..., 0::2] | (code[..., 1::2] << 4)


def unpack_codes(codes: Tensor) -> Tensor:
    """Codes [..., D // 2] uint8 as numbers [..., D] float32, channels in order."""
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).float()


def index_pages(k: Tensor, v: Tensor, page_ids: Tensor, index: IndexPages) -> None:
    """Quantise whole pages of K and V into the index."""
    for m, page in enumerate(page_ids.tolist()):
        if page < 0:
            continue
        keys = k[m].transpose(0, 1).float()  # [Hkv, S, D]
        values = v[m].transpose(0, 1).float()
        if index.k_index == "int4_channel":
            scale, minimum = quantise(keys.amin(1), keys.amax(1))  # [Hkv, D]
            index.k_scale[page] = torch.stack([scale, minimum], dim=1)
            index.k_codes[page] = encode(keys, scale[:, None], minimum[:, None])
        else:
            scale, minimum = quantise(keys.amin(2), keys.amax(2))  # [Hkv, S]
            index.k_scale[page] = torch.stack([scale, minimum], dim=2)
            index.k_codes[page] = encode(keys, scale[..., None], minimum[..., None])
            assert index.k_bounds is not None
            for run, tokens in enumerate(torch.split(keys, QUEST_BLOCK, dim=1)):
                bounds = [round_down(tokens.amin(1)), round_up(tokens.amax(1))]
                index.k_bounds[page, :, run] = torch.stack(bounds, dim=1)
        if index.v_codes is not None and index.v_scale is not None:
            scale, minimum = quantise(values.amin(2), values.amax(2))
            index.v_scale[page] = torch.stack([scale, minimum], dim=2)
            index.v_codes[page] = encode(values, scale[..., None], minimum[..., None])
        index.v_mean[page] = values.mean(1).clamp(-FP16_MAX, FP16_MAX).half()


def index_window_pages(windows: Windows, meta: StepMeta, index: IndexPages) -> None:
    """Index each page that this step's rows completed, from the ring of recent rows."""
    size, heads, dim = meta.page_size, windows.num_kv_heads, index.head_dim
    per_head = windows.rows[
        : windows.rows.shape[0] // windows.rows_per_head * windows.rows_per_head
    ]
    per_head = per_head.view(-1, windows.rows_per_head, 2 * dim)  # by slot * Hkv + head
    for b, t in zip(meta.query_seq.tolist(), meta.positions.tolist(), strict=True):
        if t < 0 or (t + 1) % size:
            continue
        slot = int(meta.seq_slots[b])
        first = windows.num_sink + (t + 1 - size) % windows.window_rows
        rows = per_head[slot * heads : (slot + 1) * heads, first : first + size].transpose(0, 1)
        page = meta.page_table[b, t // size].view(1)
        index_pages(rows[None, ..., :dim], rows[None, ..., dim:], page, index)
