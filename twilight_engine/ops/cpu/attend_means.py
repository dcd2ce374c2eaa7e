"""The CPU path of attend_means: masked softmax sums by page, then one product with the means."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import GRADE_TAIL, IndexPages, StepMeta


def _tail_mask(grades: Tensor, meta: StepMeta, length: int) -> Tensor:
    """[N, Hkv, length] bool: tokens of the tail grade that a row sees and that are not resident."""
    tokens = torch.arange(length)
    window_starts = meta.window_starts[meta.query_seq.long()]
    first = meta.ctx_starts.clamp(min=meta.num_sink)[:, None]
    last = torch.minimum(window_starts, meta.positions + 1)[:, None]
    listed = (tokens >= first) & (tokens < last)  # [N, length]
    return (grades[:, :, :length] == GRADE_TAIL) & listed[:, None]


def attend_means(
    scores: Tensor, grades: Tensor, index: IndexPages, meta: StepMeta, out: Tensor, lse: Tensor
) -> None:
    """Fill out and lse; arguments are checked by the op."""
    n, hq, _ = scores.shape
    hkv, page_size = index.k_codes.shape[1], index.page_size
    group = hq // hkv
    length = min(scores.shape[2], grades.shape[2], int(meta.window_starts.max()))
    mask = _tail_mask(grades, meta, length)[:, :, None]
    s = scores[:, :, :length].view(n, hkv, group, length)
    s = torch.where(mask, s, -torch.inf)
    lse.copy_(torch.logsumexp(s, dim=-1).view(n, hq))
    weights = torch.exp(s - lse.view(n, hkv, group, 1)).nan_to_num_(nan=0.0)
    pages = -(-length // page_size)
    weights = torch.nn.functional.pad(weights, (0, pages * page_size - length))
    mass = weights.view(n, hkv, group, pages, page_size).sum(dim=-1)  # [N, Hkv, G, pages]
    table = meta.page_table[meta.query_seq.long(), :pages].long().clamp(min=0)
    v_mean = index.v_mean[table].float().transpose(1, 2)  # [N, Hkv, pages, D]
    out.copy_((mass @ v_mean).view_as(out))
