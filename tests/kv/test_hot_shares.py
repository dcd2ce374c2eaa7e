"""Hot rows by layer: what the plan makes of the shares, and that attention stays what it was."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.kv.decoding import decode, open_cache, prefilled, tiny_model
from tests.runtime.tiny import CONFIG, KV
from twilight_engine.config import KVConfig, SparseConfig
from twilight_engine.kv.plan import MemoryPlan, plan_memory
from twilight_engine.layout import SLOTS_PER_CHUNK

ROW = 2 * CONFIG.head_dim * 4
CHUNK = SLOTS_PER_CHUNK * ROW
SHARES = (0.0, 0.75, 0.25)
EXACT = SparseConfig(attn_top_p=1.0)


def plan(**changes: Any) -> MemoryPlan:
    config = dataclasses.replace(KV, **changes)
    return plan_memory(CONFIG, config, max_model_len=256, max_num_seqs=2, dtype_bytes=4)


def test_equal_shares_are_the_plan_without_shares() -> None:
    assert plan(hot_shares=(0.0, 0.5, 0.5)) == plan()
    assert plan().hot_slots == (0, *[(1 << 17) // CHUNK * SLOTS_PER_CHUNK] * 2)


def test_slots_follow_the_shares_within_the_budget() -> None:
    made = plan(hot_shares=SHARES, hot_bytes=16 * CHUNK)
    assert made.hot_slots == (0, 12 * SLOTS_PER_CHUNK, 4 * SLOTS_PER_CHUNK)
    assert made.device["hot rows"] == 16 * SLOTS_PER_CHUNK * (ROW + 8)


def test_a_layer_without_hot_rows_has_no_slot_map() -> None:
    made = plan(hot_shares=(0.0, 1.0, 0.0), hot_bytes=4 * CHUNK)
    assert made.hot_slots == (0, 4 * SLOTS_PER_CHUNK, 0)
    assert made.device["slot maps"] * 2 == plan().device["slot maps"]


def test_a_share_of_the_kv_grows_with_it() -> None:
    kv_rows = 3 * 2 * 512  # layers, KV heads, tokens of both sequences
    made = plan(hot_bytes=None, hot_kv_share=0.5, hot_shares=SHARES)
    assert made.hot_slots == (0, int(0.375 * kv_rows), int(0.125 * kv_rows))
    tiny = plan(hot_bytes=None, hot_kv_share=0.0)
    assert tiny.hot_slots == (0, 4 * SLOTS_PER_CHUNK, 4 * SLOTS_PER_CHUNK)  # a chunk a head


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hot_shares": (0.5, 0.4)}, r"hot_shares is \(0.5, 0.4\); .* add up to 1"),
        ({"hot_shares": (1.5, -0.5)}, r"hot_shares is \(1.5, -0.5\); .* >= 0"),
        ({"hot_shares": ("all",)}, r"hot_shares is \('all',\)"),
        ({"hot_kv_share": 1.5}, r"hot_kv_share is 1.5; it must lie in \[0, 1\]"),
        ({"hot_kv_share": 0.1, "hot_bytes": 9}, r"hot_bytes is 9 and hot_kv_share 0.1; give one"),
    ],
)
def test_wrong_shares_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVConfig(**changes)


def test_shares_that_do_not_fit_the_model_are_named() -> None:
    with pytest.raises(ValueError, match="hot_shares has 2 entries; the model has 3 layers"):
        plan(hot_shares=(0.5, 0.5))
    with pytest.raises(ValueError, match=r"gives hot rows to layers \[0\], which are dense"):
        plan(hot_shares=(0.5, 0.25, 0.25))


def test_uneven_shares_change_what_is_fetched_and_nothing_else() -> None:
    """Every row exact is dense attention, cold and warm; fewer rows, and logits stay the same."""
    model = tiny_model(torch.device("cpu"))
    found = {}
    for shares in (None, SHARES, (0.0, 0.0, 1.0)):
        config = dataclasses.replace(KV, hot_bytes=8 * CHUNK, hot_shares=shares)
        with open_cache(model, config) as cache:
            sequences = prefilled(model, cache, [180, 90])
            for step, sparse in enumerate((EXACT, SparseConfig(policy="dense"), SparseConfig())):
                out = decode(model, cache, sequences, sparse, steps=20, first=20 * step)
                found[shares, step] = out
    for shares in (None, SHARES, (0.0, 0.0, 1.0)):
        for step in range(3):
            mine, equal = found[shares, step], found[None, step]
            assert torch.allclose(mine.logits, equal.logits, atol=1e-4)
            for a, b in zip(mine.steps, equal.steps, strict=True):
                assert (a.exact == b.exact).all()
    missed = {shares: found[shares, 0].steps[0] for shares in (None, SHARES, (0.0, 0.0, 1.0))}
    late = {shares: (s.missed + s.direct)[5:].sum(axis=(0, 2)) for shares, s in missed.items()}
    assert late[SHARES][1] < late[None][1] and late[SHARES][2] > late[None][2]
    assert late[(0.0, 0.0, 1.0)][1] == missed[None].exact[5:, 1].sum()


def test_every_row_under_uneven_shares_gives_the_dense_logits() -> None:
    model = tiny_model(torch.device("cpu"))
    logits = []
    for sparse in (EXACT, SparseConfig(policy="dense")):
        config = dataclasses.replace(KV, hot_bytes=8 * CHUNK, hot_shares=SHARES)
        with open_cache(model, config) as cache:
            sequences = prefilled(model, cache, [180, 90])
            logits.append(decode(model, cache, sequences, sparse, steps=20).logits)
    assert torch.allclose(*logits, atol=1e-4)
    assert torch.equal(logits[0].argmax(-1), logits[1].argmax(-1))
