"""Reference of lsh_codes: one table, one row at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.layout import IndexPages, LshHashes, StepMeta


def lsh_codes(x: Tensor, hashes: LshHashes) -> Tensor:
    """The signature [..., L] int16 of each vector of x [..., D] in each table."""
    codes = torch.zeros(*x.shape[:-1], hashes.num_tables, dtype=torch.int32, device=x.device)
    for column, direction in enumerate(hashes.projections.unbind(1)):
        table, bit = divmod(column, hashes.bits)
        codes[..., table] |= ((x.float() * direction).sum(-1) >= 0).int() << bit
    return codes.to(torch.int16)


def set_lsh_centres(k: Tensor, meta: StepMeta, hashes: LshHashes) -> None:
    """The mean of the first keys of the step's one sequence."""
    hashes.centres[int(meta.seq_slots[0])] = k[:2048].float().mean(0)


def write_lsh_codes(k: Tensor, meta: StepMeta, hashes: LshHashes, index: IndexPages) -> None:
    """Sign each row around its sequence's centre, in its place of the index."""
    assert index.lsh_codes is not None
    for n, (b, t) in enumerate(zip(meta.query_seq.tolist(), meta.positions.tolist(), strict=True)):
        page = int(meta.page_table[b, t // meta.page_size]) if t >= 0 else -1
        if page >= 0:
            centred = k[n].float() - hashes.centres[int(meta.seq_slots[b])]
            index.lsh_codes[page, :, t % meta.page_size] = lsh_codes(centred, hashes)
