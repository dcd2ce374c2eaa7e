"""Write a run of one sequence's rows to every tier of a layer."""

from __future__ import annotations

from torch import Tensor

from twilight_engine.kv.cache import KVCache
from twilight_engine.layout import StepMeta
from twilight_engine.ops.append_rows import append_rows
from twilight_engine.ops.index_pages import index_pages
from twilight_engine.ops.lsh_codes import set_lsh_centres, write_lsh_codes


def store_rows(
    cache: KVCache, layer: int, k: Tensor, v: Tensor, meta: StepMeta, *, first_page: int
) -> None:
    """Store rows that begin at a page: host, window, device pages, and the index of full pages.

    Args:
        k, v: [T, Hkv, D] of the cache's dtype; any strides but 1 over D.
        meta: the step of these tokens, of one sequence (attention.step.prefill_meta).
        first_page: number of the sequence's page that the first token opens; 0 opens a sequence,
            whose keys are hashed around the mean of the first ones stored (set_lsh_centres).
    Side effects: runs on torch's current stream.
    """
    tiers, size = cache.layers[layer], cache.config.page_size
    append_rows(
        k, v, tiers.windows, tiers.host, meta, pages=tiers.pages, counters=cache.log.counters[layer]
    )
    if tiers.index is None:
        return
    if tiers.lsh is not None:
        if first_page == 0:
            set_lsh_centres(k, meta, tiers.lsh)
        write_lsh_codes(k, meta, tiers.lsh, tiers.index)
    full = k.shape[0] // size
    if full == 0:
        return
    pages = meta.page_table[0, first_page : first_page + full]
    index_pages(
        k[: full * size].unflatten(0, (full, size)),
        v[: full * size].unflatten(0, (full, size)),
        pages,
        tiers.index,
    )
