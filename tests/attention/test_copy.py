"""copy_sequence: a copy decodes, bit by bit, as a sequence prefilled where it lies."""

from __future__ import annotations

import pytest
import torch

from tests.kv.decoding import decode, open_cache, prefilled, tiny_model
from twilight_engine.attention.copy import copy_sequence
from twilight_engine.config import KVConfig, SparseConfig
from twilight_engine.kv.errors import OutOfPages

BASE = KVConfig(page_size=16, num_recent=32, dense_layers=(0,), hot_bytes=1 << 17)
KINDS = {
    "dense": (
        KVConfig(page_size=16, num_recent=32, dense_layers="all"),
        SparseConfig(policy="dense"),
    ),
    "balanced": (BASE, SparseConfig()),
    "lean": (KVConfig.preset("lean", page_size=64), SparseConfig.preset("lean")),
    "paper": (
        KVConfig.preset("paper", page_size=16, num_recent=16, dense_layers=()),
        SparseConfig.preset("paper"),
    ),
}
LENGTHS = [5, 64, 150]


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", ["dense", "balanced"])
def test_a_copy_is_what_prefill_would_have_made(source, target, device):
    model = tiny_model(device)
    kv_config, sparse = KINDS[target]
    with open_cache(model, kv_config) as cache:
        sequences = prefilled(model, cache, LENGTHS)
        expected = decode(model, cache, sequences, sparse, steps=8)
    with open_cache(model, KINDS[source][0]) as first, open_cache(model, kv_config) as second:
        originals = prefilled(model, first, LENGTHS)
        copies = [copy_sequence(first, s, second) for s in originals]
        assert [s.length for s in copies] == LENGTHS
        decode(model, second, copies, sparse, steps=8).assert_same(expected)
        # The original is as it was.
        for layer in range(model.config.num_layers):
            for s, c in zip(originals, copies, strict=True):
                mine, theirs = (
                    cache.host.layer(layer)[:, pages].flatten(1, 2)[:, : s.length]
                    for cache, pages in ((first, s.pages), (second, c.pages))
                )
                assert torch.equal(mine, theirs)


def test_a_copy_that_finds_no_room_leaves_none_taken():
    model = tiny_model(torch.device("cpu"))
    with open_cache(model, BASE) as first, open_cache(model, BASE, slots=1) as second:
        one, two = prefilled(model, first, [30, 40])
        kept = copy_sequence(first, one, second)
        free = second.free_tokens
        with pytest.raises(OutOfPages, match="max_num_seqs"):
            copy_sequence(first, two, second)
        assert second.free_tokens == free
        second.close_sequence(kept)
        assert copy_sequence(first, two, second).length == 40


def test_caches_of_other_models_and_empty_sequences_are_refused():
    model = tiny_model(torch.device("cpu"))
    other = tiny_model(torch.device("cpu"))
    other.config = model.config.__class__(**{**vars(model.config), "num_kv_heads": 1})
    with open_cache(model, BASE) as first, open_cache(other, BASE) as second:
        (sequence,) = prefilled(model, first, [30])
        with pytest.raises(ValueError, match=r"3 layers, 2 KV heads .* 3 layers, 1 KV heads"):
            copy_sequence(first, sequence, second)
        with pytest.raises(ValueError, match="no tokens to copy"):
            copy_sequence(first, first.open_sequence(10), first)
