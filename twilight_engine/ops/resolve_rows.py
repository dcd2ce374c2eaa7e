"""Find each exact row's place on the device; make room for those that have none."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from twilight_engine.layout import (
    ANNOUNCED_WORDS,
    MAX_CHUNKS,
    SLOTS_PER_CHUNK,
    FetchLists,
    HotRows,
    RowLists,
    StepMeta,
)
from twilight_engine.ops.cpu import resolve_rows as cpu
from twilight_engine.ops.launch import check_dtype, check_shape, current_stream, kernels, ptr


def resolve_rows(
    exact: RowLists,
    hot: HotRows | None,
    meta: StepMeta,
    *,
    locations: Tensor | None = None,
    fetch: FetchLists | None = None,
    counters: Tensor | None = None,
    shared_pages: bool = True,
) -> tuple[Tensor, FetchLists]:
    """Look every list token up in the hot rows, evict for the misses, and list what to fetch.

    The key of token t of sequence b is page_table[b, t // S] * S + t % S. First every key that
    slot_map knows is stamped with the step, over all sequences; then each (sequence, KV head)
    walks its query rows: a key without a row gets a slot of the chunks this head owns, free ones
    first, then those unused for longest (ages above MAX_AGE count as equal, ties by slot), never
    one stamped with this step. The chosen slots go to the misses in list order by rising slot, so
    that a gather reads and writes in address order. A miss that finds no slot keeps NO_ROW: the
    attention reads it from the host. A token listed by several query rows is fetched once.

    Changes `hot` in place: slot_map, slot_key, slot_stamp, and set_mean (running mean with decay
    0.9 of a head's list length, the longest of the step's query rows; the first one counts fully).
    Whoever calls must gather `fetch` before anything reads the locations it fills.

    Args:
        exact: tokens [N, Hkv, C] int32, no token twice in a list; counts [N, Hkv].
        hot: the layer's slots; None: no hot rows, every location is NO_ROW.
        meta: the step; seq_slots NO_ROW marks a padding sequence, which gets no slots.
        locations: [N, Hkv, C] int32 to write to.
        fetch: lists to write to, any capacity; a full one leaves later misses at NO_ROW. Misses are
            announced there where a step has one query row a sequence and no pages in common.
        counters: [NUM_COUNTERS] int64; adds hit, missed (fetched) and direct (NO_ROW) list entries.
        shared_pages: sequences may have pages in common. False is faster for several sequences:
            on a GPU, no sequence waits for the hits of the others.
    Returns: locations (entries past a count are not written) and fetch, with `announced` if its
        misses have been announced.
    Raises: ValueError for shapes or dtypes other than these.
    Source: LRU at the granularity of decode steps; see csrc/resolve_rows.cu.
    """
    n, hkv, capacity = exact.tokens.shape
    if locations is None:
        locations = torch.empty_like(exact.tokens)
    if fetch is None:
        slots = hot.slot_key.shape[0] if hot is not None else 1
        room = max(1, min(capacity * n, slots))  # all query rows may be one sequence's
        fetch = FetchLists.empty(meta.num_seqs, hkv, room, exact.tokens.device)
    _check(exact, hot, meta, locations, fetch, counters)
    alone = meta.num_seqs == 1 or not shared_pages
    if hot is None or not alone or meta.num_queries != meta.num_seqs:
        fetch = replace(fetch, announced=None)
    told = fetch.announced
    if not exact.tokens.is_cuda:
        cpu.resolve_rows(exact, hot, meta, locations, fetch, counters)
        return locations, fetch
    kernels().resolve_rows(
        tokens=ptr(exact.tokens),
        counts=ptr(exact.counts),
        page_table=ptr(meta.page_table),
        seq_slots=ptr(meta.seq_slots),
        cu_seqlens_q=ptr(meta.cu_seqlens_q),
        query_seq=ptr(meta.query_seq),
        slot_map=ptr(hot.slot_map if hot else None),
        slot_key=ptr(hot.slot_key if hot else None),
        slot_stamp=ptr(hot.slot_stamp if hot else None),
        chunk_owner=ptr(hot.chunk_owner if hot else None),
        set_mean=ptr(hot.set_mean if hot else None),
        step=ptr(hot.step if hot else None),
        locations=ptr(locations),
        fetch_src=ptr(fetch.src),
        fetch_dst=ptr(fetch.dst),
        fetch_counts=ptr(fetch.counts),
        fetch_direct=ptr(fetch.direct),
        counters=ptr(counters),
        num_queries=n,
        num_seqs=meta.num_seqs,
        num_kv_heads=hkv,
        capacity=capacity,
        fetch_capacity=fetch.src.shape[2],
        table_pages=meta.page_table.shape[1],
        table_stride=meta.page_table.stride(0),
        keys_per_head=hot.slot_map[0].numel() if hot else 0,
        shared_pages=shared_pages,
        num_chunks=hot.chunk_owner.shape[0] if hot else 0,
        first_row=hot.first_row if hot else 0,
        page_size=meta.page_size,
        announced=ptr(told.words if told else None),
        layer=told.layer if told else 0,
        stream=current_stream(exact.tokens),
    )
    return locations, fetch


def _check(
    exact: RowLists,
    hot: HotRows | None,
    meta: StepMeta,
    locations: Tensor,
    fetch: FetchLists,
    counters: Tensor | None,
) -> None:
    n, hkv, capacity = exact.tokens.shape
    b = meta.num_seqs
    check_shape("meta.positions", meta.positions, (n,))
    check_shape("exact.counts", exact.counts, (n, hkv))
    check_shape("locations", locations, (n, hkv, capacity))
    check_shape("fetch.src", fetch.src, (b, hkv, None))
    check_shape("fetch.dst", fetch.dst, tuple(fetch.src.shape))
    check_shape("fetch.counts", fetch.counts, (b, hkv))
    check_shape("fetch.direct", fetch.direct, (b, hkv))
    check_announced(fetch)
    int32 = {
        "exact.tokens": exact.tokens,
        "exact.counts": exact.counts,
        "locations": locations,
        "fetch.src": fetch.src,
        "fetch.dst": fetch.dst,
        "fetch.counts": fetch.counts,
        "fetch.direct": fetch.direct,
    }
    for name, tensor in int32.items():
        check_dtype(name, tensor, torch.int32)
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")
    if counters is not None:
        check_dtype("counters", counters, torch.int64)
    if hot is not None:
        check_hot_rows(hot, hkv)
        if hot.slot_map.shape[2] != meta.page_size:
            raise ValueError(
                f"hot.slot_map has page size {hot.slot_map.shape[2]}; "
                f"it must be meta.page_size ({meta.page_size})"
            )


def check_announced(fetch: FetchLists) -> None:
    """ValueError unless the misses of these lists can be announced where they say, if they do."""
    if fetch.announced is None:
        return
    words = fetch.announced.words
    check_shape("fetch.announced.words", words, (*fetch.counts.shape, ANNOUNCED_WORDS))
    check_dtype("fetch.announced.words", words, torch.int64)
    if not words.is_contiguous():
        raise ValueError(
            f"fetch.announced.words has strides {words.stride()}; it must be contiguous"
        )


def check_hot_rows(hot: HotRows, num_kv_heads: int) -> None:
    """ValueError unless the slots' tensors fit each other and this number of KV heads."""
    chunks = hot.chunk_owner.shape[0]
    if chunks > MAX_CHUNKS:
        raise ValueError(
            f"hot.chunk_owner has {chunks} chunks; at most {MAX_CHUNKS} of {SLOTS_PER_CHUNK} slots "
            "a layer are allowed"
        )
    check_shape("hot.slot_map", hot.slot_map, (num_kv_heads, None, None))
    check_shape("hot.slot_key", hot.slot_key, (chunks * SLOTS_PER_CHUNK,))
    check_shape("hot.slot_stamp", hot.slot_stamp, (chunks * SLOTS_PER_CHUNK,))
    check_shape("hot.set_mean", hot.set_mean, (None, num_kv_heads))
