"""The search on a tiny model: every choice against all that was measured."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from tests.runtime.tiny import CONFIG
from twilight_engine.config import KVConfig, SparseConfig
from twilight_engine.eval.calibration.budget import DeviceBudget
from twilight_engine.eval.calibration.quotas import fetched_rows
from twilight_engine.eval.calibration.sample import Sample, Setting
from twilight_engine.eval.calibration.search import (
    BY_LAYER,
    TIE,
    Candidate,
    Result,
    Search,
    Tolerance,
)
from twilight_engine.eval.items import Passage
from twilight_engine.eval.simulation.grading import Grading
from twilight_engine.models.load import load_model

LENGTH, TARGETS, LAYERS = 420, 14, 5
KV = KVConfig(page_size=16, num_recent=16)
MASSES = [(p, q) for p in (0.5, 0.6, 0.7, 0.8) for q in (0.9, 0.99)]
PRESET = Setting(0.8, 0.99, (0, 1))
LOOSE = Tolerance(ppl=1.0, kl=1.0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = dataclasses.replace(
        CONFIG, num_layers=LAYERS, sliding_windows=(), max_position_embeddings=1024
    )
    loaded = load_model(config, dtype=torch.float32, device="cpu", load_format="dummy")
    for layer in loaded.model.layers:  # sharper attention than random weights have
        layer.attention.qkv_proj.weight.mul_(6.0)
    return loaded.model


def passage(seed: int) -> Passage:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, CONFIG.vocab_size, (LENGTH + TARGETS,), generator=generator).tolist()
    return Passage(f"p{seed}", tuple(ids[:LENGTH]), tuple(ids[LENGTH:]))


@pytest.fixture(scope="module")
def halves(model) -> tuple[Sample, Sample]:
    base = Grading.of(KV, SparseConfig(), LAYERS)
    return (
        Sample(model, base, [passage(1), passage(2)]),
        Sample(model, base, [passage(3), passage(4)]),
    )


def search(model, halves, tolerance: Tolerance, *, by_layer=False, budget=None) -> Result:
    made = DeviceBudget.parse(budget, model.config, KV, 8192)
    return Search(*halves, made, tolerance).run(PRESET, MASSES, by_layer=by_layer)


@pytest.fixture(scope="module")
def loose(model, halves) -> Result:
    return search(model, halves, LOOSE)


def halfway(result: Result) -> Tolerance:
    """A tolerance that part of what a search has measured keeps to."""
    kls = sorted(candidate.kl.high or 0.0 for candidate in result.candidates)
    return Tolerance(ppl=1.0, kl=kls[len(kls) // 2] * 1.0001)


def least(candidates: tuple[Candidate, ...]) -> float:
    return min(candidate.link_bytes for candidate in candidates if candidate.within)


def test_the_choice_is_the_least_bytes_of_all_within_tolerance(model, halves, loose) -> None:
    assert all(candidate.within for candidate in loose.candidates)
    tolerance = halfway(loose)
    result = search(model, halves, tolerance)
    within = [c for c in result.candidates if c.within]
    assert 0 < len(within) < len(result.candidates)
    for candidate in result.candidates:
        assert candidate.within == ((candidate.kl.high or 0) <= tolerance.kl)
    first = result.checked[0].candidate
    assert first.within and first.link_bytes <= TIE * least(result.candidates)
    assert result.chosen is not None and result.chosen.held_out.kl.value <= tolerance.kl
    # A tighter tolerance never fetches less.
    assert first.link_bytes >= loose.checked[0].candidate.link_bytes / TIE


def test_stages_try_masses_and_then_dense_layers(loose) -> None:
    swept = [c for c in loose.candidates if c.stage == "masses"]
    assert {(c.setting.attn_top_p, c.setting.index_top_p) for c in swept} == set(MASSES)
    assert {c.setting.dense_layers for c in swept} == {(0, 1)}
    dense = {c.setting.dense_layers for c in loose.candidates}
    assert {(), (0,), (0, 1)} <= dense


def test_hot_rows_take_what_the_budget_leaves(model, loose) -> None:
    budget = DeviceBudget.parse(None, model.config, KV, 8192)
    for candidate in loose.candidates:
        shares = candidate.hot_shares
        assert shares is not None and sum(shares) == pytest.approx(1)
        assert all(shares[i] == 0 for i in candidate.setting.dense_layers)
        room = budget.hot_kv_share(candidate.setting.dense_layers)
        assert candidate.hot_kv_share == pytest.approx(room)


def test_link_bytes_are_those_behind_the_shares(halves, loose) -> None:
    candidate = loose.candidates[0]
    found = halves[0].measure(candidate.setting)
    parts = np.array(candidate.hot_shares)[2:] * candidate.hot_kv_share * LAYERS
    assert candidate.link_bytes == pytest.approx(fetched_rows(found.curves, parts) * 2 * 64 * 2)
    assert loose.preset is not None
    assert loose.preset.candidate.hot_shares == pytest.approx((0, 0, 1 / 3, 1 / 3, 1 / 3))


def test_a_miss_on_the_held_out_passages_takes_the_next(model, halves, loose) -> None:
    """The check's tolerance stands just below what the first choice loses there."""
    lost = [(c.candidate, c.held_out.kl.value) for c in loose.checked]

    class Strict(Tolerance):
        def holds_in(self, found) -> bool:
            return found.kl.value < lost[0][1]

    result = search(model, halves, Strict(ppl=1.0, kl=1.0))
    assert result.checked[0].candidate.setting == lost[0][0].setting
    assert not result.checked[0].held_out.within and result.chosen is result.checked[-1]
    assert result.chosen.held_out.kl.value < lost[0][1]
    bytes_ = [c.candidate.link_bytes for c in result.checked]
    assert all(after >= before / TIE for before, after in itertools.pairwise(bytes_))


def test_nothing_is_chosen_where_nothing_is_within(model, halves) -> None:
    result = search(model, halves, Tolerance(ppl=1e-9, kl=1e-12), by_layer=True)
    assert result.chosen is None and not result.checked
    assert {c.stage for c in result.candidates} == {"masses"}


def test_by_layer_lowers_some_layers_within_tolerance(model, halves, loose) -> None:
    plain = search(model, halves, halfway(loose))
    result = search(model, halves, halfway(loose), by_layer=True)
    lowered = [c for c in result.candidates if c.stage == BY_LAYER]
    assert lowered and any(c.within for c in lowered)
    best = result.checked[0].candidate
    assert best.setting.by_layer and best.link_bytes < plain.checked[0].candidate.link_bytes
    assert best.link_bytes <= plain.checked[0].candidate.link_bytes * TIE
    for candidate in lowered:
        for layer, p in candidate.setting.by_layer:
            assert layer not in candidate.setting.dense_layers
            assert p < candidate.setting.attn_top_p


def test_a_layer_of_its_own_is_simulated(halves) -> None:
    """Lowering every layer one by one is lowering all."""
    each = Setting(0.7, 0.99, (0, 1), by_layer=((2, 0.4), (3, 0.4), (4, 0.4)))
    together = Setting(0.4, 0.99, (0, 1))
    one, other = halves[0].measure(each), halves[0].measure(together)
    assert one.kl == other.kl and np.array_equal(one.curves, other.curves)
    assert halves[0].measure(dataclasses.replace(each, by_layer=((2, 0.4),))).kl != one.kl


def test_a_budget_for_everything_keeps_everything(model, halves) -> None:
    result = search(model, halves, Tolerance(), budget="1GiB")
    assert result.chosen is not None
    assert result.chosen.candidate.setting.dense_layers == tuple(range(LAYERS))
    assert result.chosen.held_out.link_bytes == 0 and result.chosen.candidate.hot_shares is None


@pytest.mark.parametrize("changes", [{"ppl": 0.0}, {"kl": -1.0}, {"kl": float("nan")}])
def test_tolerances_are_checked(changes) -> None:
    with pytest.raises(ValueError, match=r"--(ppl|kl)-tolerance is .*; it must be > 0"):
        Tolerance(**changes)
