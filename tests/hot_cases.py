"""Steps, lists and slot caches for the tests of the hot rows, and what must always hold of them."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor

from twilight_engine.kv.hot_rows import allocate_hot_rows
from twilight_engine.layout import NO_ROW, SLOTS_PER_CHUNK, HotRows, RowLists, StepMeta

T = TypeVar("T")


def to_device(value: T, device: torch.device | str) -> T:
    """A copy of a dataclass with its tensors on the device; always fresh tensors."""
    fields: dict[str, Any] = {
        f.name: getattr(value, f.name)
        for f in dataclasses.fields(value)  # type: ignore[arg-type]
    }
    return dataclasses.replace(  # type: ignore[type-var]
        value,
        **{k: v.clone().to(device) if isinstance(v, Tensor) else v for k, v in fields.items()},
    )


def int32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_meta(
    page_table: Tensor, page_size: int, *, q_lens: list[int], seq_slots: list[int] | None = None
) -> StepMeta:
    """A step whose sequences fill their pages; what resolve_rows does not read is plausible."""
    num_seqs = page_table.shape[0]
    length = page_table.shape[1] * page_size
    ends = torch.tensor([0, *q_lens]).cumsum(0)
    return StepMeta(
        page_table=page_table,
        seq_slots=int32(seq_slots if seq_slots is not None else list(range(num_seqs))),
        seq_lens=int32([length] * num_seqs),
        window_starts=int32([length] * num_seqs),
        cu_seqlens_q=ends.int(),
        query_seq=torch.arange(num_seqs).repeat_interleave(torch.tensor(q_lens)).int(),
        positions=torch.cat([torch.arange(length - q, length) for q in q_lens]).int(),
        ctx_starts=torch.zeros(sum(q_lens), dtype=torch.int32),
        page_size=page_size,
        num_sink=0,
        max_len=length,
    )


def random_page_table(num_seqs: int, pages_each: int, num_pages: int) -> Tensor:
    """Distinct pages in no particular order."""
    return torch.randperm(num_pages)[: num_seqs * pages_each].view(num_seqs, pages_each).int()


def random_lists(n: int, hkv: int, length: int, most: int, capacity: int | None = None) -> RowLists:
    """Ascending random tokens, up to `most` a list; what lies past a count is rubbish."""
    capacity = capacity or length
    lists = RowLists(torch.full((n, hkv, capacity), 1 << 30).int(), torch.zeros(n, hkv).int())
    for row in range(n):
        for h in range(hkv):
            count = int(torch.randint(0, most + 1, ()))
            tokens = torch.randperm(length)[:count].sort().values
            lists.tokens[row, h, :count] = tokens.int()
            lists.counts[row, h] = count
    return lists


def make_hot(
    *,
    num_chunks: int,
    num_pages: int,
    hkv: int,
    page_size: int,
    num_seqs: int,
    first_row: int = 7,
) -> HotRows:
    """An empty cache on the CPU whose chunks are lent at random, some to nobody."""
    hot = allocate_hot_rows(
        num_slots=num_chunks * SLOTS_PER_CHUNK,
        num_pages=num_pages,
        num_kv_heads=hkv,
        page_size=page_size,
        num_seq_slots=num_seqs,
        first_row=first_row,
        step=torch.ones(1, dtype=torch.int32),
        device=torch.device("cpu"),
    )
    hot.chunk_owner.copy_(torch.randint(-1, num_seqs * hkv, (num_chunks,)).int())
    return hot


def check_invariants(hot: HotRows) -> None:
    """Map and keys are inverse to each other; slots that nobody owns are empty."""
    hot = to_device(hot, "cpu")
    hkv = hot.slot_map.shape[0]
    owner = hot.chunk_owner.repeat_interleave(SLOTS_PER_CHUNK)
    assert (hot.slot_key[owner == NO_ROW] == NO_ROW).all()
    held = (hot.slot_key != NO_ROW).nonzero().flatten()
    where = hot.slot_map.flatten(1)[(owner[held] % hkv).long(), hot.slot_key[held].long()]
    assert torch.equal(where.long(), held + hot.first_row)
    assert int((hot.slot_map != NO_ROW).sum()) == held.numel()


def assert_same_state(actual: HotRows, expected: HotRows) -> None:
    for f in dataclasses.fields(HotRows):
        a, e = getattr(actual, f.name), getattr(expected, f.name)
        if f.name == "set_mean":
            torch.testing.assert_close(a.cpu(), e.cpu())
        elif isinstance(e, Tensor):
            assert torch.equal(a.cpu(), e.cpu()), f.name
