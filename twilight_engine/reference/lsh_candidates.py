"""Reference of lsh_candidates: one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import LSH_MIN_TABLES, IndexPages, StepMeta, num_blocks


def lsh_candidates(
    q_codes: Tensor, index: IndexPages, meta: StepMeta, *, candidates: Tensor | None = None
) -> Tensor:
    """List tokens whose signature agrees with a query head's of the group in two tables."""
    assert index.lsh_codes is not None
    size, heads = meta.page_size, index.lsh_codes.shape[1]
    if candidates is None:
        shape = (meta.num_queries, heads, num_blocks(meta.max_len, 1, size))
        candidates = torch.empty(shape, dtype=torch.uint8, device=q_codes.device)
    candidates.zero_()
    for n, b in enumerate(meta.query_seq.tolist()):
        first = max(int(meta.ctx_starts[n]), meta.num_sink)
        end = min(int(meta.positions[n]) + 1, int(meta.window_starts[b]))
        queries = q_codes[n].unflatten(0, (heads, -1))  # [Hkv, G, L]
        for t in range(first, end):
            page = int(meta.page_table[b, t // size])
            if page >= 0:
                keys = index.lsh_codes[page, :, t % size]  # [Hkv, L]
                agree = (queries == keys[:, None]).sum(-1)
                candidates[n, :, t] = (agree >= LSH_MIN_TABLES).any(1)
    return candidates
