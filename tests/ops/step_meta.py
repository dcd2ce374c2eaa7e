"""Steps with random page tables and slots, for the op tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twilight_engine.layout import NO_ROW, StepMeta


def make_meta(
    device: torch.device,
    seq_lens: Sequence[int],
    *,
    q_lens: Sequence[int] | None = None,
    page_size: int = 16,
    num_sink: int = 4,
    num_recent: int | None = None,
    sliding: int | None = None,
) -> StepMeta:
    """Sequences whose last q_lens tokens are the query rows; pages dealt out at random."""
    q_lens = q_lens or [1] * len(seq_lens)
    recent = page_size if num_recent is None else num_recent
    counts = [-(-length // page_size) for length in seq_lens]
    ids = torch.randperm(sum(counts) + 2)[: sum(counts)].int().split(counts)
    table = torch.full((len(seq_lens), max([1, *counts]) + 1), NO_ROW, dtype=torch.int32)
    for b, pages in enumerate(ids):
        table[b, : len(pages)] = pages
    seq = [b for b, n in enumerate(q_lens) for _ in range(n)]
    positions = [seq_lens[b] - n + i for b, n in enumerate(q_lens) for i in range(n)]
    starts = [0 if sliding is None else max(0, p + 1 - sliding) for p in positions]
    edges = [max(0, length - recent) // page_size * page_size for length in seq_lens]

    def ints(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return StepMeta(
        page_table=table.to(device),
        seq_slots=torch.randperm(len(seq_lens) + 1)[: len(seq_lens)].int().to(device),
        seq_lens=ints(seq_lens),
        window_starts=ints(edges),
        cu_seqlens_q=ints([0, *torch.tensor(q_lens).cumsum(0).tolist()]),
        query_seq=ints(seq),
        positions=ints(positions),
        ctx_starts=ints(starts),
        page_size=page_size,
        num_sink=num_sink,
        max_len=max(seq_lens) + 3,
    )
