"""The estimate in plain torch: dequantise, multiply, mask."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.config import QUEST_BLOCK
from twilight_engine.layout import IndexPages, StepMeta, Windows, block_of
from twilight_engine.reference.estimate_errors import estimate_errors


def dequantise_keys(index: IndexPages, pages: Tensor, head: int) -> Tensor:
    """[n] page ids -> their K [n, S, D] float32 of one KV head, from the codes."""
    packed = index.k_codes[pages, head]  # [n, S, D / 2]
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).float()
    scale = index.k_scale[pages, head].float()
    if index.k_index == "int4_channel":  # [n, 2, D]
        return scale[:, 1:] + scale[:, :1] * codes
    return scale[..., 1:] + scale[..., :1] * codes  # [n, S, 2]


def midpoint_keys(index: IndexPages, pages: Tensor, head: int) -> Tensor:
    """[n] page ids -> the middle of each token's block bounds, [n, S, D] float32."""
    size = index.page_size
    if index.k_index == "int4_channel":
        scale = index.k_scale[pages, head].float()
        return (scale[:, 1:] + 7.5 * scale[:, :1]).expand(-1, size, -1)
    if index.k_bounds is None:
        raise ValueError("index.k_bounds is None; int4_token needs the bounds of its runs")
    middle = index.k_bounds[pages, head].float().mean(dim=2)  # [n, runs, D]
    return middle[:, torch.arange(size, device=pages.device) // QUEST_BLOCK]


def estimate_scores(
    q: Tensor,
    index: IndexPages,
    windows: Windows,
    meta: StepMeta,
    *,
    softmax_scale: float,
    candidates: Tensor | None = None,
    block: int | None = None,
    left_out: str = "midpoint",
    scores: Tensor | None = None,
    lse: Tensor | None = None,
    errors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ops.estimate_scores; token by token, head by head."""
    n_rows, num_q_heads, head_dim = q.shape
    heads, group = windows.num_kv_heads, num_q_heads // windows.num_kv_heads
    size = meta.page_size
    if scores is None:
        scores = torch.empty(n_rows, num_q_heads, meta.max_len, device=q.device)
    if lse is None:
        lse = torch.empty(n_rows, num_q_heads, device=q.device)
    for n in range(n_rows):
        b, slot = int(meta.query_seq[n]), int(meta.seq_slots[meta.query_seq[n]])
        start, stop = int(meta.ctx_starts[n]), int(meta.positions[n]) + 1
        t = torch.arange(start, max(start, stop), device=q.device)
        resident = (t < meta.num_sink) | (t >= meta.window_starts[b])
        pages = meta.page_table[b, t[~resident] // size].long()
        offsets = t[~resident] % size
        place = torch.where(t < meta.num_sink, t, meta.num_sink + t % windows.window_rows)
        for h in range(heads):
            k = torch.empty(len(t), head_dim, device=q.device)
            row = (slot * heads + h) * windows.rows_per_head + place[resident]
            k[resident] = windows.rows[row, :head_dim].float()
            k[~resident] = dequantise_keys(index, pages, h)[range(len(pages)), offsets]
            kept = torch.ones(len(t), dtype=torch.bool, device=q.device)
            if candidates is not None:
                blocks = block_of(t, block or index.candidate_block, size)
                kept = resident | (candidates[n, h, blocks] != 0)
                if block != 1:
                    middle = midpoint_keys(index, pages, h)[range(len(pages)), offsets]
                    k[~resident] = torch.where(kept[~resident, None], k[~resident], middle)
            q_heads = slice(h * group, (h + 1) * group)
            s = softmax_scale * (q[n, q_heads].float() @ k.T)  # [G, visible tokens]
            if left_out == "drop":
                s[:, ~kept] = -torch.inf
            scores[n, q_heads, start : start + len(t)] = s
            lse[n, q_heads] = torch.logsumexp(s, dim=-1)
    if errors is not None:
        of_pages = estimate_errors(q, index, meta, softmax_scale=softmax_scale)
        count = min(errors.shape[2], of_pages.shape[2])
        errors[..., :count] = of_pages[..., :count]
    return scores, lse
