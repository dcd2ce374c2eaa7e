"""Reference of twilight_engine.ops.merge_states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_states(
    outs: Sequence[Tensor], lses: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Softmax-weighted merge of attention states; shapes as in the op."""
    all_lse = torch.stack([lse.float() for lse in lses])  # [M, N, Hq]
    lse = torch.logsumexp(all_lse, dim=0)
    weights = torch.exp(all_lse - lse).nan_to_num(nan=0.0)  # all states empty: -inf - -inf
    filled = torch.stack([out.float() for out in outs])  # [M, N, Hq, D]
    filled = torch.where(weights[..., None] > 0, filled, 0.0)
    return (weights[..., None] * filled).sum(dim=0).to(dtype), lse
