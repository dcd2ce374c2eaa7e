"""Which tokens a query row of a step sees, and which of them are resident (layout.StepMeta)."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import StepMeta


def visible_tokens(meta: StepMeta, n: int) -> Tensor:
    """Positions that query row n sees, ascending."""
    first, last = int(meta.ctx_starts[n]), int(meta.positions[n])
    return torch.arange(first, last + 1)


def resident_mask(meta: StepMeta, n: int) -> Tensor:
    """Which of visible_tokens(meta, n) are sinks or window tokens."""
    tokens = visible_tokens(meta, n)
    window_start = int(meta.window_starts[int(meta.query_seq[n])])
    return (tokens < meta.num_sink) | (tokens >= window_start)


def page_rows(page_table: Tensor, tokens: Tensor, page_size: int) -> Tensor:
    """Rows `page * page_size + offset` of tokens of the sequence with this line of the table."""
    tokens = tokens.long()
    return page_table.cpu()[tokens // page_size].long() * page_size + tokens % page_size
