"""Reference of estimate_errors: page by page."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import IndexPages, StepMeta


def estimate_errors(
    q: Tensor, index: IndexPages, meta: StepMeta, *, softmax_scale: float
) -> Tensor:
    """See ops.estimate_errors; 0 beyond a sequence's pages."""
    heads = index.k_codes.shape[1]
    group = q.shape[1] // heads
    errors = torch.zeros(*q.shape[:2], meta.page_table.shape[1], device=q.device)
    for n, b in enumerate(meta.query_seq.tolist()):
        for j, page in enumerate(meta.page_table[b].tolist()):
            for h in range(q.shape[1] if page >= 0 else 0):
                scale = index.k_scale[page, h // group].float()
                query = q[n, h].float()
                if index.k_index == "int4_channel":
                    variance = (query * scale[0]).square().sum() / 12
                else:
                    variance = query.square().sum() * scale[:, 0].square().mean() / 12
                errors[n, h, j] = softmax_scale * variance.sqrt()
    return errors
