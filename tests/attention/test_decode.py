"""The decode pipeline: dense equality under every setting, grades that approximate, counts."""

from __future__ import annotations

import pytest

from tests.attention.documented import documented_selector
from tests.attention.model_shape import Run, Shape, make_cache
from tests.compare import compare
from twilight_engine.config import PRESETS, KVConfig, SparseConfig
from twilight_engine.layout import (
    COUNTER_DIRECT_BYTES,
    COUNTER_FETCHED_BYTES,
    COUNTER_STREAMED_BYTES,
    COUNTER_WRITTEN_BYTES,
)

HOT = {"no hot rows": 0, "too few hot rows": 4 * 4 * 32 * 512, "default hot rows": None}


@pytest.mark.parametrize("hot_bytes", list(HOT.values()), ids=list(HOT))
@pytest.mark.parametrize("fetch", ["row", "page"])
@pytest.mark.parametrize("selector", ["all", "quest"])
@pytest.mark.parametrize("preset", PRESETS)
def test_keeping_every_row_is_dense(preset, selector, fetch, hot_bytes, device):
    kv_config = KVConfig.preset(preset, page_size=16, num_recent=16, hot_bytes=hot_bytes)
    config = SparseConfig.preset(
        preset, attn_top_p=1.0, index_top_p=None, selector=selector, fetch=fetch
    )
    with make_cache(device, kv_config) as cache:
        run = Run(cache, [150, 67])
        decode = run.decoder([config, config])
        for _ in range(20):  # cold at first, then warm; crosses a page
            compare(*run.step(decode))


@pytest.mark.parametrize("dense_layers", ["all", (0, 1)])
def test_dense_policy(dense_layers, device):
    kv_config = KVConfig(page_size=16, num_recent=16, dense_layers=dense_layers)
    with make_cache(device, kv_config) as cache:
        run = Run(cache, [150, 5])
        decode = run.decoder([SparseConfig(policy="dense")] * 2)
        for _ in range(18):
            compare(*run.step(decode))
        steps = cache.log.request(run.sequences[0].sequence_id)
        streamed = steps.counters[:, :, COUNTER_STREAMED_BYTES]
        if dense_layers == "all":
            assert not streamed.any()
        else:
            assert (streamed[:, 2:] > 0).all() and not streamed[:, :2].any()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("page_size", [16, 61, 64])
def test_presets_approximate_dense(preset, page_size, device):
    kv_config = KVConfig.preset(preset, page_size=page_size, num_recent=page_size)
    with make_cache(device, kv_config) as cache:
        run = Run(cache, [400, 300])
        decode = run.decoder([SparseConfig.preset(preset)] * 2)
        for _ in range(4):
            out, expected = run.step(decode)
            error = (out - expected).norm() / expected.norm()
            assert error < {"balanced": 0.15, "lean": 0.25, "paper": 0.6}[preset]


@pytest.mark.parametrize("window", [40, 100])
def test_sliding_window_is_the_whole_context(window, device):
    shape = Shape(num_layers=3, windows=(None, window, window))
    kv_config = KVConfig(page_size=16, num_recent=16, dense_layers=(1,))
    config = SparseConfig(attn_top_p=1.0, index_top_p=None)
    with make_cache(device, kv_config, shape=shape) as cache:
        run = Run(cache, [150, 20])
        decode = run.decoder([config, config])
        for _ in range(20):
            compare(*run.step(decode))


def test_p_differs_by_sequence_and_layer(device):
    with make_cache(device, KVConfig(page_size=16, num_recent=16)) as cache:
        run = Run(cache, [400, 400])
        low = SparseConfig(attn_top_p=0.3, by_layer={3: SparseConfig(attn_top_p=0.9)})
        high = SparseConfig(attn_top_p=0.9, by_layer={3: SparseConfig(attn_top_p=0.3)})
        decode = run.decoder([low, high])
        run.step(decode)
        first, second = (cache.log.request(s.sequence_id) for s in run.sequences)
        assert first.exact[:, 2].sum() < second.exact[:, 2].sum()
        assert first.exact[:, 3].sum() > second.exact[:, 3].sum()


def test_configs_that_cannot_share_a_batch_are_refused(device):
    with make_cache(device, KVConfig(page_size=16, num_recent=16)) as cache:
        run = Run(cache, [40, 40])
        with pytest.raises(ValueError, match="may differ in attn_top_p"):
            run.decoder([SparseConfig(), SparseConfig(tail="renormalise")])
        with pytest.raises(ValueError, match="cannot mix policies"):
            run.decoder([SparseConfig(), SparseConfig(policy="dense")])


def test_index_grade_needs_v_codes(device):
    with make_cache(device, KVConfig(page_size=16, num_recent=16, v_index="none")) as cache:
        run = Run(cache, [40])
        with pytest.raises(ValueError, match="keeps no INT4 V"):
            run.decoder([SparseConfig()])


@pytest.mark.parametrize("hot_bytes", list(HOT.values()), ids=list(HOT))
def test_counts_agree_with_the_bytes_that_moved(hot_bytes, device):
    kv_config = KVConfig(page_size=16, num_recent=16, hot_bytes=hot_bytes)
    with make_cache(device, kv_config) as cache:
        run = Run(cache, [300, 200])
        written = cache.log.counters[:, COUNTER_WRITTEN_BYTES].cpu()
        row_bytes = cache.row_bytes * cache.model.num_kv_heads
        assert (written == 500 * row_bytes).all()
        decode = run.decoder([SparseConfig(attn_top_p=0.6, index_top_p=0.9)] * 2)
        for _ in range(6):
            run.step(decode)
        a, b = (cache.log.request(s.sequence_id) for s in run.sequences)
        for column, counts in ((COUNTER_FETCHED_BYTES, "missed"), (COUNTER_DIRECT_BYTES, "direct")):
            rows = getattr(a, counts).sum(-1) + getattr(b, counts).sum(-1)
            assert (a.counters[:, :, column] == rows * cache.row_bytes).all()
        assert (a.counters[:, :, COUNTER_WRITTEN_BYTES] == 2 * row_bytes).all()
        grades = a.exact + a.index + a.tail + a.resident
        assert (grades == a.context[:, None, None]).all()
        assert a.exact[:, 2:].sum() > 0 and a.index[:, 2:].sum() > 0 and not a.exact[:, :2].any()
        if hot_bytes == 0:
            assert (a.direct == a.exact).all() and a.hit_rate == 0
        else:
            assert a.hit_rate > 0


def test_closing_a_sequence_returns_everything(device):
    cache = make_cache(device, KVConfig(page_size=16, num_recent=16))
    free = cache.free_tokens
    for _ in range(5):
        run = Run(cache, [300, 200])
        decode = run.decoder([SparseConfig()] * 2)
        for _ in range(3):
            run.step(decode)
        for sequence in run.sequences:
            cache.close_sequence(sequence)
            cache.close_sequence(sequence)
        assert cache.free_tokens == free
        for layer in cache.layers:
            if layer.hot is not None:
                assert (layer.hot.slot_key == -1).all() and (layer.hot.slot_map == -1).all()
                assert (layer.hot.chunk_owner == -1).all()
    cache.close()
    cache.close()
    assert cache.registered_bytes == 0


def test_reused_pages_and_slots_give_dense_results(device):
    with make_cache(device, KVConfig(page_size=16, num_recent=16), max_model_len=320) as cache:
        config = SparseConfig(attn_top_p=1.0, index_top_p=None)
        for seed in range(3):
            run = Run(cache, [300, 200], seed=seed)
            decode = run.decoder([config, config])
            for _ in range(4):
                compare(*run.step(decode))
            for sequence in run.sequences:
                cache.close_sequence(sequence)


def test_user_selector_limits_candidates(device):
    selector = documented_selector("LastBlocks")(64)
    config = SparseConfig(attn_top_p=0.999, index_top_p=None, selector=selector)
    with make_cache(device, KVConfig(page_size=16, num_recent=16)) as cache:
        run = Run(cache, [200])
        decode = run.decoder([config])
        run.step(decode)
        steps = cache.log.request(run.sequences[0].sequence_id)
        # 201 tokens, the window starts at 176: blocks at 144 and 160 lie within the last 64 tokens.
        assert (steps.exact[:, 2:] <= 32).all() and steps.exact[:, 2:].max() > 0
