"""Which pages the sequences of a cache hold."""

from __future__ import annotations

import torch

from tests.kv.decoding import open_cache, tiny_model
from twilight_engine.config import KVConfig


def test_no_page_belongs_to_two_open_sequences(device: torch.device) -> None:
    """resolve_rows relies on it where the cache says so."""
    with open_cache(tiny_model(device), KVConfig(page_size=16)) as cache:
        assert not cache.shares_pages
        first, second, third = (cache.open_sequence(n) for n in (40, 16, 100))
        cache.close_sequence(second)
        cache.extend(first, 90)
        fourth = cache.open_sequence(50)
        cache.extend(third, 200)
        held = first.pages + third.pages + fourth.pages
        assert len(set(held)) == len(held)
        assert all(cache.pool.references(page) == 1 for page in held)
