"""Reference of twilight_engine.ops.attend_means."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import GRADE_TAIL, IndexPages, StepMeta
from twilight_engine.reference.step_tokens import resident_mask, visible_tokens


def attend_means(
    scores: Tensor, grades: Tensor, index: IndexPages, meta: StepMeta
) -> tuple[Tensor, Tensor]:
    """Sum of exp(score) * v_mean[page] over the tail tokens, normalised; shapes as in the op."""
    n, hq, _ = scores.shape
    hkv = index.k_codes.shape[1]
    out = torch.zeros(n, hq, index.head_dim, device=scores.device)
    lse = torch.full((n, hq), -torch.inf, device=scores.device)
    for i in range(n):
        table = meta.page_table[meta.query_seq[i].long()].long()
        tokens = visible_tokens(meta, i)[~resident_mask(meta, i)].to(scores.device)
        for h in range(hkv):
            group = slice(h * hq // hkv, (h + 1) * hq // hkv)
            tail = tokens[grades[i, h][tokens] == GRADE_TAIL]
            v = index.v_mean[table[tail // index.page_size], h].float()  # [L, D]
            s = scores[i, group][:, tail].float()  # [G, L]
            lse[i, group] = torch.logsumexp(s, dim=-1)
            weights = torch.exp(s - lse[i, group, None]).nan_to_num(nan=0.0)
            out[i, group] = weights @ v
    return out, lse
