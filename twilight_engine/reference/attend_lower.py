"""Reference of twilight_engine.ops.attend_lower."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import GRADE_INDEX, GRADE_TAIL, IndexPages, StepMeta
from twilight_engine.reference.step_tokens import resident_mask, visible_tokens


def unpack_codes(codes: Tensor) -> Tensor:
    """4-bit codes [..., D // 2] uint8 as [..., D] float32; the low nibble is the even channel."""
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).float()


def attend_lower(
    scores: Tensor,
    lse: Tensor,
    grades: Tensor,
    index: IndexPages,
    meta: StepMeta,
    *,
    tail: bool = True,
) -> tuple[Tensor, Tensor]:
    """The state merged: out [N, Hq, D] and lse [N, Hq] over the lower grades; lse is not read."""
    n, hq, _ = scores.shape
    hkv = index.k_codes.shape[1]
    out = torch.zeros(n, hq, index.head_dim, device=scores.device)
    lower_lse = torch.full((n, hq), -torch.inf, device=scores.device)
    for i in range(n):
        table = meta.page_table[meta.query_seq[i].long()].long()
        tokens = visible_tokens(meta, i)[~resident_mask(meta, i)].to(scores.device)
        for h in range(hkv):
            group = slice(h * hq // hkv, (h + 1) * hq // hkv)
            grade = grades[i, h][tokens]
            taken = (grade == GRADE_INDEX) | ((grade == GRADE_TAIL) & tail)
            listed, is_tail = tokens[taken], grade[taken] == GRADE_TAIL
            page, offset = table[listed // index.page_size], listed % index.page_size
            v = index.v_mean[page, h].float()  # [L, D]
            if index.v_codes is not None and index.v_scale is not None:
                scale = index.v_scale[page, h, offset].float()  # [L, 2]: scale, min
                codes = unpack_codes(index.v_codes[page, h, offset])  # [L, D]
                v = torch.where(is_tail[:, None], v, codes * scale[:, :1] + scale[:, 1:])
            s = scores[i, group][:, listed].float()  # [G, L]
            lower_lse[i, group] = torch.logsumexp(s, dim=-1)
            weights = torch.exp(s - lower_lse[i, group, None]).nan_to_num(nan=0.0)
            out[i, group] = weights @ v
    return out, lower_lse
