"""Reference of twilight_engine.ops.attend_index."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import IndexPages, RowLists, StepMeta


def unpack_codes(codes: Tensor) -> Tensor:
    """4-bit codes [..., D // 2] uint8 as [..., D] float32; the low nibble is the even channel."""
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).float()


def attend_index(
    scores: Tensor, index: IndexPages, index_list: RowLists, meta: StepMeta
) -> tuple[Tensor, Tensor]:
    """Sum of exp(score) * v_hat over the listed tokens, normalised; shapes as in the op."""
    assert index.v_codes is not None and index.v_scale is not None
    n, hq, _ = scores.shape
    hkv = index.k_codes.shape[1]
    out = torch.zeros(n, hq, index.head_dim, device=scores.device)
    lse = torch.full((n, hq), -torch.inf, device=scores.device)
    for i in range(n):
        table = meta.page_table[meta.query_seq[i].long()].long()
        for h in range(hkv):
            group = slice(h * hq // hkv, (h + 1) * hq // hkv)
            tokens = index_list.tokens[i, h, : int(index_list.counts[i, h])].long()
            page, offset = table[tokens // index.page_size], tokens % index.page_size
            scale = index.v_scale[page, h, offset].float()  # [L, 2]: scale, min
            codes = unpack_codes(index.v_codes[page, h, offset])  # [L, D]
            v = codes * scale[:, :1] + scale[:, 1:]
            s = scores[i, group][:, tokens].float()  # [G, L]
            lse[i, group] = torch.logsumexp(s, dim=-1)
            weights = torch.exp(s - lse[i, group, None]).nan_to_num(nan=0.0)
            out[i, group] = weights @ v
    return out, lse
