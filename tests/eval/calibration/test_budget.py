"""The device budget: what a user may write, and that the plan keeps to it."""

from __future__ import annotations

import dataclasses

import pytest

from tests.attention.model_shape import Shape
from twilight_engine.config import KVConfig
from twilight_engine.eval.calibration.budget import DeviceBudget
from twilight_engine.eval.memory import device_bytes_kept
from twilight_engine.kv.plan import MemoryPlan, plan_memory

SHAPE = Shape(num_layers=12, num_q_heads=4, num_kv_heads=2)
CONTEXT = 16384
BASE = KVConfig()
KV_BYTES = CONTEXT * 12 * 2 * 2 * 64 * 2


def parse(text: str | None, base: KVConfig = BASE) -> DeviceBudget:
    return DeviceBudget.parse(text, SHAPE, base, CONTEXT)


def plan(kv_config: KVConfig) -> MemoryPlan:
    return plan_memory(SHAPE, kv_config, max_model_len=CONTEXT, max_num_seqs=1, dtype_bytes=2)


def test_a_budget_is_a_share_gib_or_the_presets() -> None:
    assert parse("0.5").total_bytes == parse("50%").total_bytes == KV_BYTES // 2
    assert parse(" 2 GiB ").total_bytes == 2 << 30
    assert parse("0.5").kv_share == 0.5
    assert parse(None).total_bytes == device_bytes_kept(plan(BASE), 1)
    assert parse(None).hot_kv_share((0, 1)) == pytest.approx(10 / 12 / 16, rel=1e-3)


@pytest.mark.parametrize("dense", [(), (0,), (0, 1), (3, 5, 7)])
@pytest.mark.parametrize("text", ["0.6", None])
def test_the_plan_keeps_to_the_budget(dense: tuple[int, ...], text: str | None) -> None:
    budget = parse(text)
    share = budget.hot_kv_share(dense)
    if text is None and len(dense) > 2:
        assert share is None or share < budget.hot_kv_share(())
    if share is not None:
        made = dataclasses.replace(BASE, dense_layers=dense, hot_kv_share=share)
        kept = device_bytes_kept(plan(made), 1)
        assert 0.99 * budget.total_bytes < kept <= budget.total_bytes


def test_more_than_everything_is_no_more_hot_rows_than_rows() -> None:
    assert parse("2GiB").hot_kv_share(()) == 1.0
    assert parse("2GiB").hot_kv_share((0, 1, 2)) == 0.75
    assert parse("2GiB").hot_kv_share(tuple(range(12))) == 0.0
    assert parse("0.5").hot_kv_share(tuple(range(12))) is None


@pytest.mark.parametrize("text", ["1.5", "0", "half", "6GB", "-1", "1e3", "%", ""])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"--device-budget is .* a share of the KV's bytes like"):
        parse(text)


def test_a_budget_below_the_index_is_refused() -> None:
    with pytest.raises(ValueError, match=r"10.0% of the KV of 16384 tokens; .* take 3\d\.\d%"):
        parse("10%")
    lean = KVConfig.preset("lean")
    with pytest.raises(ValueError, match=r"10.0% of the KV of 16384 tokens; .* take 1\d\.\d%"):
        parse("0.1", lean)
