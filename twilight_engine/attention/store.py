"""Write a run of one sequence's rows to every tier of a layer."""

from __future__ import annotations

from torch import Tensor

from twilight_engine.kv.cache import KVCache
from twilight_engine.layout import StepMeta
from twilight_engine.ops.append_rows import append_rows
from twilight_engine.ops.index_pages import index_pages


def store_rows(
    cache: KVCache, layer: int, k: Tensor, v: Tensor, meta: StepMeta, *, first_page: int
) -> None:
    """Store rows that begin at a page: host, window, device pages, and the index of full pages.

    Args:
        k, v: [T, Hkv, D] of the cache's dtype; any strides but 1 over D.
        meta: the step of these tokens, of one sequence (attention.step.prefill_meta).
        first_page: number of the sequence's page that the first token opens.
    Side effects: runs on torch's current stream.
    """
    tiers, size = cache.layers[layer], cache.config.page_size
    append_rows(
        k, v, tiers.windows, tiers.host, meta, pages=tiers.pages, counters=cache.log.counters[layer]
    )
    full = k.shape[0] // size
    if tiers.index is None or full == 0:
        return
    pages = meta.page_table[0, first_page : first_page + full]
    index_pages(
        k[: full * size].unflatten(0, (full, size)),
        v[: full * size].unflatten(0, (full, size)),
        pages,
        tiers.index,
    )
