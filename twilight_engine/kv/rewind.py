"""Take sequences back to an earlier length, as if the later tokens had never been decoded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twilight_engine.kv.cache import KVCache, SequenceKV
from twilight_engine.layout import FetchLists, Windows
from twilight_engine.ops.gather_rows import gather_rows
from twilight_engine.ops.hot_quotas import release_sequence


def rewind(cache: KVCache, sequences: Sequence[SequenceKV], lengths: Sequence[int]) -> None:
    """Cut each sequence to its first `lengths[i]` tokens; another method can decode from there.

    The ring of recent rows gets back what later tokens overwrote, read from the host; hot rows are
    dropped, so the next step starts cold. Pages stay with the sequence, and the rows and index
    pages behind the cut are written again when tokens come: an open page is never read from the
    index, and a page that fills again is indexed again, as is the signature of each new row.

    Args:
        sequences: open sequences of this cache, outside a step.
        lengths: tokens to keep, at least 1 and at most the sequence's length.
    Raises: ValueError for other lengths.
    Side effects: runs on torch's current stream, the one that decoded.
    """
    for sequence, length in zip(sequences, lengths, strict=True):
        if not 1 <= length <= sequence.length:
            raise ValueError(
                f"lengths has {length} for a sequence of {sequence.length} tokens; it must lie in "
                f"[1, {sequence.length}]"
            )
    pages = [torch.tensor(s.pages, dtype=torch.int32).to(cache.device) for s in sequences]
    lists: FetchLists | None = None
    for tiers in cache.layers:
        if tiers.windows is not None:
            if lists is None:  # the windows of all layers have one geometry
                lists = _overwritten(cache, tiers.windows, sequences, lengths)
            gather_rows(tiers.host, lists, tiers.windows.rows)
        if tiers.hot is not None:
            for sequence, ids in zip(sequences, pages, strict=True):
                release_sequence(tiers.hot, sequence.slot, ids)
    for sequence, length in zip(sequences, lengths, strict=True):
        sequence.length = length


def _overwritten(
    cache: KVCache, windows: Windows, sequences: Sequence[SequenceKV], lengths: Sequence[int]
) -> FetchLists:
    """Where the ring rows lie that tokens behind the cut took: on the host, and in the pool."""
    ring, size, heads = windows.window_rows, cache.config.page_size, windows.num_kv_heads
    # Token t overwrote t - ring; what lies further back was not in the ring at the cut.
    ranges = [
        range(max(0, length - ring), max(0, min(length, sequence.length - ring)))
        for sequence, length in zip(sequences, lengths, strict=True)
    ]
    shape = (len(ranges), heads, max(1, *map(len, ranges)))
    src, dst = (torch.zeros(shape, dtype=torch.int32) for _ in range(2))
    counts = torch.tensor([[len(r)] * heads for r in ranges], dtype=torch.int32)
    for b, (sequence, tokens) in enumerate(zip(sequences, ranges, strict=True)):
        t = torch.arange(tokens.start, tokens.stop, dtype=torch.int32)
        ids = torch.tensor(sequence.pages, dtype=torch.int32)
        src[b, :, : len(t)] = ids[t // size] * size + t % size
        first = (sequence.slot * heads + torch.arange(heads)) * windows.rows_per_head
        place = first[:, None] + windows.num_sink + t % ring
        dst[b, :, : len(t)] = place.int()

    def moved(x: Tensor) -> Tensor:
        return x.to(cache.device)

    return FetchLists(moved(src), moved(dst), moved(counts), moved(torch.zeros_like(counts)))
