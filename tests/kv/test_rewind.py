"""rewind: a sequence cut back decodes, bit by bit, as if the later tokens had never been."""

from __future__ import annotations

import pytest
import torch

from tests.kv.decoding import decode, open_cache, prefilled, tiny_model
from twilight_engine.config import KVConfig, SparseConfig
from twilight_engine.kv.rewind import rewind

KV = KVConfig(page_size=16, num_recent=32, dense_layers=(0,), hot_bytes=1 << 17)
METHODS = {
    "balanced": SparseConfig(),
    "lean": SparseConfig.preset("lean"),
    "paper": SparseConfig.preset("paper"),
    "streamed": SparseConfig(policy="dense"),
    "every row": SparseConfig(attn_top_p=1.0),
}


@pytest.mark.parametrize("method", ["balanced", "streamed"])
@pytest.mark.parametrize("steps", [1, 52])  # 52 steps turn the ring of 48 rows over
def test_decoding_again_gives_the_same(method, steps, device):
    """Prompts inside the window, in mid-page, at a page's edge and one token behind it."""
    model, lengths, sparse = tiny_model(device), [3, 29, 48, 150, 160, 161], METHODS[method]
    with open_cache(model, KV, slots=len(lengths)) as cache:
        sequences = prefilled(model, cache, lengths)
        first = decode(model, cache, sequences, sparse, steps=steps)
        rewind(cache, sequences, lengths)
        decode(model, cache, sequences, sparse, steps=steps).assert_same(first)


def test_what_other_methods_did_leaves_no_trace(device):
    model, lengths = tiny_model(device), [7, 96, 201]
    with open_cache(model, KV) as cache:
        sequences = prefilled(model, cache, lengths)
        alone = {}
        for name, method in METHODS.items():
            alone[name] = decode(model, cache, sequences, method, steps=20)
            rewind(cache, sequences, lengths)
        for name in reversed(METHODS):
            decode(model, cache, sequences, METHODS[name], steps=20).assert_same(alone[name])
            rewind(cache, sequences, lengths)
    with open_cache(model, KV) as fresh:
        sequences = prefilled(model, fresh, lengths)
        decode(model, fresh, sequences, METHODS["balanced"], steps=20).assert_same(
            alone["balanced"]
        )


@pytest.mark.parametrize("kept", [1, 16, 25])
def test_a_cut_behind_the_prompt_keeps_what_was_decoded(kept, device):
    """Pages that filled behind the cut are indexed again when they fill again."""
    model, lengths = tiny_model(device), [40, 100]
    method = SparseConfig(attn_top_p=0.5, index_top_p=0.9)
    with open_cache(model, KV) as cache:
        sequences = prefilled(model, cache, lengths)
        start = decode(model, cache, sequences, method, steps=kept)
        rewind(cache, sequences, [length + kept for length in lengths])  # cold hot rows
        after = decode(model, cache, sequences, method, steps=34, first=kept)
        other = decode(model, cache, sequences, method, steps=30, first=500)
        rewind(cache, sequences, [length + kept for length in lengths])
        decode(model, cache, sequences, method, steps=34, first=kept).assert_same(after)
        rewind(cache, sequences, lengths)
        decode(model, cache, sequences, method, steps=kept).assert_same(start)
        assert not torch.equal(other.logits, after.logits[-30:])


def test_one_sequence_alone_is_cut_back(device):
    model = tiny_model(device)
    with open_cache(model, KV) as cache:
        one, two = prefilled(model, cache, [90, 120])
        first = decode(model, cache, [one], SparseConfig(), steps=10)
        rewind(cache, [one], [90])
        again = decode(model, cache, [one, two], SparseConfig(policy="dense"), steps=10)
        assert two.length == 130 and one.length == 100
        rewind(cache, [one, two], [90, 120])
        decode(model, cache, [one], SparseConfig(), steps=10).assert_same(first)
        assert again.logits.shape[1] == 2


@pytest.mark.parametrize("length", [0, 41])
def test_a_length_out_of_range_is_refused(length):
    model = tiny_model(torch.device("cpu"))
    with open_cache(model, KV) as cache:
        (sequence,) = prefilled(model, cache, [40])
        with pytest.raises(ValueError, match=rf"lengths has {length} .* \[1, 40\]"):
            rewind(cache, [sequence], [length])
        assert sequence.length == 40
