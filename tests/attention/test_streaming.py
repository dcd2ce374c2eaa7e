"""The selector `streaming`: which blocks it keeps, and what a step then attends to."""

from __future__ import annotations

import pytest
import torch

from tests.attention.model_shape import Run, make_cache
from tests.ops.step_meta import make_meta
from twilight_engine.attention.selectors import LayerView, make_selector
from twilight_engine.config import PRESETS, KVConfig, SparseConfig
from twilight_engine.eval.methods import parse_method
from twilight_engine.kv.index import allocate_index
from twilight_engine.layout import Windows, block_of


@pytest.mark.parametrize(("page_size", "block"), [(64, 64), (64, 16), (61, 16)])
@pytest.mark.parametrize("budget", [1, 100, 5000, 0.25, 1.0])
def test_keeps_the_blocks_of_the_last_tokens(device, page_size, block, budget):
    meta = make_meta(device, [700, 130], page_size=page_size)
    index = allocate_index(1, 2, page_size, 64, "int4_channel", "none", device)
    windows = Windows(torch.zeros(1, 128, device=device), 2, 4, 2 * page_size)
    view = LayerView(0, index, windows, meta, 1.0, budget, block)
    mask = make_selector(SparseConfig(selector="streaming")).select(
        torch.zeros(2, 6, 64, device=device), view
    )
    tokens = torch.arange(meta.max_len)
    for n, length in enumerate((700, 130)):
        kept = -(-budget * length // 1) if isinstance(budget, float) else budget
        wanted = block_of(tokens[(tokens >= length - kept) & (tokens < length)], block, page_size)
        seen = block_of(tokens[tokens < length], block, page_size).unique()
        for head in range(2):
            got = seen[mask[n, head].cpu()[seen] != 0]
            assert torch.equal(got, wanted.unique())


def test_plain_attends_to_nothing_else(device):
    method = parse_method("streaming:200")
    kv = KVConfig(page_size=16, num_recent=32, v_index="none", dense_layers=(0,))
    with make_cache(device, kv) as cache:
        run = Run(cache, [300])
        run.step(run.decoder([method.sparse]))
        steps = cache.log.request(run.sequences[0].sequence_id)
    context, start = 301, (301 - 32) // 16 * 16
    first = (context - 200) // 16 * 16
    assert (steps.exact[0, 1:] == start - first).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_row_at_one_bypasses_it(device, preset):
    with make_cache(device, KVConfig.preset(preset, dense_layers=(0,))) as cache:
        run = Run(cache, [300])
        config = SparseConfig.preset(preset, selector="streaming", attn_top_p=1.0)
        if preset == "balanced":
            config = config.replace(index_top_p=1.0)
        got, want = run.step(run.decoder([config]))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_each_preset_prunes_what_it_keeps(device):
    """Under page means the promise is about the whole context: the window alone cannot keep it."""
    with make_cache(device, KVConfig(page_size=16, num_recent=32, dense_layers=(0,))) as cache:
        run = Run(cache, [300])
        few = SparseConfig(selector="streaming", selector_budget=64)
        run.step(run.decoder([few]))
        steps = cache.log.request(run.sequences[0].sequence_id)
    assert (steps.exact[0, 1:] <= 48).all() and (steps.mass[0, 1:] < 1).all()
