"""Copy a prefilled sequence from one cache into another that keeps other tiers."""

from __future__ import annotations

import torch

from twilight_engine.attention.step import page_table, prefill_meta
from twilight_engine.attention.store import store_rows
from twilight_engine.kv.cache import KVCache, SequenceKV


@torch.inference_mode()
def copy_sequence(source: KVCache, sequence: SequenceKV, target: KVCache) -> SequenceKV:
    """Open a sequence in `target` that holds the tokens of a sequence of `source`.

    Layer by layer, the rows come from the source's host arena and go to every tier of the target,
    as prefill would have written them: bit by bit the same state without running the model.

    Args:
        source, target: caches of one model, dtype and device; their KVConfigs may differ.
        sequence: open in `source`, with at least one token, outside a step.
    Returns: the new sequence, with pages for its tokens.
    Raises:
        ValueError: for caches of different models, dtypes or devices, or an empty sequence.
        OutOfPages: if the target has no room.
    Side effects: runs on torch's current stream, the one that prefilled.
    """
    _check(source, sequence, target)
    length, dim = sequence.length, source.model.head_dim
    pages = torch.tensor(sequence.pages[: -(-length // source.config.page_size)], dtype=torch.int32)
    shape = (source.model.num_kv_heads, len(pages), source.config.page_size, 2 * dim)
    rows = torch.empty(shape, dtype=source.dtype, device=source.device)
    stream = torch.cuda.current_stream(source.device).cuda_stream if source.on_gpu else 0
    copied = target.open_sequence(length)
    try:
        table = page_table(target, [copied])
        meta = prefill_meta(target, table, copied.slot, 0, length)
        for layer in range(source.model.num_layers):
            source.transfers.to_device(layer, pages, rows, stream=stream)
            tokens = rows.flatten(1, 2)[:, :length].transpose(0, 1)  # [L, Hkv, 2D]
            k, v = tokens.split(dim, dim=-1)
            store_rows(target, layer, k, v, meta, first_page=0)
    except BaseException:
        target.close_sequence(copied)
        raise
    copied.length = length
    return copied


def _check(source: KVCache, sequence: SequenceKV, target: KVCache) -> None:
    if sequence.length < 1:
        raise ValueError("the sequence has no tokens to copy; prefill it first")

    def shape(cache: KVCache) -> str:
        model = cache.model
        return (
            f"{model.num_layers} layers, {model.num_kv_heads} KV heads of {model.head_dim}, "
            f"{cache.dtype} on {cache.device}"
        )

    if shape(source) != shape(target):
        raise ValueError(
            f"the source cache is for {shape(source)}, the target for {shape(target)}; they must "
            "be alike"
        )
