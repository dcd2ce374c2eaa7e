"""The search: which setting fetches least within the tolerances and the device budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from twilight_engine.eval.calibration.budget import DeviceBudget
from twilight_engine.eval.calibration.quotas import Array, best_parts, fetched_rows
from twilight_engine.eval.calibration.sample import Measurement, Sample, Setting
from twilight_engine.eval.frontier import ITEM_BYTES
from twilight_engine.eval.summary import Estimate

GRID, DENSE, BY_LAYER = "masses", "dense layers", "by layer"
TIE = 1.01  # link bytes this much above the least count as equal: the fewest index rows decide
STEP, ROUNDS, LEAST_P = 0.1, 2, 0.1  # by layer: how far attn_top_p is lowered, how often, to what


@dataclass(frozen=True)
class Tolerance:
    """What a setting may lose.

    Args:
        ppl: perplexity above dense attention's, as a share of it.
        kl: mean KL(dense || setting) of the next token, nats.
    """

    ppl: float = 0.005
    kl: float = 1e-3

    def __post_init__(self) -> None:
        for name, value in (("--ppl-tolerance", self.ppl), ("--kl-tolerance", self.kl)):
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be > 0")

    def shown_by(self, found: Measurement) -> bool:
        """Whether the sample shows it: even the upper ends of both intervals are within."""
        kl, ratio = found.kl.high, found.ppl_ratio.high
        assert kl is not None and ratio is not None
        return kl <= self.kl and ratio <= 1 + self.ppl

    def holds_in(self, found: Measurement) -> bool:
        """Whether both means are within."""
        return found.kl.value <= self.kl and found.ppl_ratio.value <= 1 + self.ppl


@dataclass(frozen=True)
class Candidate:
    """A setting with its hot rows, measured.

    Attributes:
        stage: of the search.
        hot_kv_share, hot_shares: as in KVConfig; no shares where every layer is dense.
        kl, ppl_ratio, exact_rows, index_rows: as in Measurement.
        link_bytes: from the host a step of one sequence, behind those hot rows.
        within: the tolerances hold.
    """

    stage: str
    setting: Setting
    hot_kv_share: float
    hot_shares: tuple[float, ...] | None
    kl: Estimate
    ppl_ratio: Estimate
    link_bytes: float
    exact_rows: float
    index_rows: float
    within: bool


@dataclass(frozen=True)
class Checked:
    """A candidate on the held-out passages, in the same fields."""

    candidate: Candidate
    held_out: Candidate


@dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
        preset: the preset as it is, equal hot rows in the same budget, on both halves; None where
            its dense layers don't fit the budget.
        candidates: all that were measured, in that order.
        checked: those that were tried on the held-out passages, until one held.
        chosen: the last of them, if it held.
    """

    preset: Checked | None
    candidates: tuple[Candidate, ...]
    checked: tuple[Checked, ...]
    chosen: Checked | None


class Search:
    """Settings on a sample, measured as they come up.

    Args:
        sample: the passages to choose on; held_out: those to check the choice on.
    """

    def __init__(
        self, sample: Sample, held_out: Sample, budget: DeviceBudget, tolerance: Tolerance
    ) -> None:
        self.sample, self.held_out = sample, held_out
        self.budget, self.tolerance = budget, tolerance
        self.num_layers = budget.model.num_layers
        self.candidates: list[Candidate] = []
        self._measured: dict[Setting, Measurement] = {}

    def run(
        self, preset: Setting, masses: Sequence[tuple[float, float | None]], *, by_layer: bool
    ) -> Result:
        """Sweep the masses, then the dense layers, then layers one by one; check the best.

        Args:
            preset: the preset's own setting.
            masses: (attn_top_p, index_top_p) to try.
        """
        dense = preset.dense_layers
        while self.budget.hot_kv_share(dense) is None:
            dense = dense[:-1]
        for attn_top_p, index_top_p in masses:
            self._try(GRID, Setting(attn_top_p, index_top_p, dense))
        self._try_dense_layers()
        if by_layer:
            self._lower_layers()
        checked = self._check()
        chosen = checked[-1] if checked and checked[-1].held_out.within else None
        return Result(self._preset(preset), tuple(self.candidates), tuple(checked), chosen)

    def best(self, without: Sequence[Candidate] = ()) -> Candidate | None:
        """The candidate within tolerance with the least link bytes; None: there is none."""
        within = [c for c in self.candidates if c.within and c not in without]
        if not within:
            return None
        least = min(c.link_bytes for c in within)
        tied = [c for c in within if c.link_bytes <= TIE * least]
        return min(tied, key=lambda c: (c.index_rows, c.link_bytes))

    def _measure(self, setting: Setting) -> Measurement:
        if setting not in self._measured:
            self._measured[setting] = self.sample.measure(setting)
        return self._measured[setting]

    def _try(self, stage: str, setting: Setting) -> Candidate:
        for there in self.candidates:
            if there.setting == setting:
                return there
        found = self._measure(setting)
        parts = best_parts(found.curves, found.sets, self._room(setting))
        within = self.tolerance.shown_by(found)
        self.candidates.append(self._candidate(stage, setting, found, parts, within))
        return self.candidates[-1]

    def _room(self, setting: Setting) -> float:
        """The hot rows beside a setting's dense layers, in layers' worth of rows."""
        share = self.budget.hot_kv_share(setting.dense_layers)
        assert share is not None  # only settings that fit are tried
        return share * self.num_layers

    def _candidate(
        self, stage: str, setting: Setting, found: Measurement, parts: Array, within: bool
    ) -> Candidate:
        by_layer = np.zeros(self.num_layers)
        by_layer[list(found.layers)] = parts
        total = float(parts.sum())
        row_bytes = 2 * self.budget.model.head_dim * ITEM_BYTES
        return Candidate(
            stage=stage,
            setting=setting,
            hot_kv_share=total / self.num_layers,
            hot_shares=tuple((by_layer / total).tolist()) if total else None,
            kl=found.kl,
            ppl_ratio=found.ppl_ratio,
            link_bytes=fetched_rows(found.curves, parts) * row_bytes,
            exact_rows=found.exact_rows,
            index_rows=found.index_rows,
            within=within,
        )

    def _try_dense_layers(self) -> None:
        """The best masses with fewer dense layers, and with those dense that fetch most."""
        best = self.best()
        if best is None:
            return
        setting = best.setting
        first = [tuple(range(count)) for count in range(3)]
        none = self._measure(dataclasses.replace(setting, dense_layers=()))
        parts = best_parts(none.curves, none.sets, self._room(Setting(1.0, None, ())))
        fetched = [fetched_rows(none.curves[[i]], parts[[i]]) for i in range(len(parts))]
        order = np.argsort(fetched)[::-1].tolist()
        powers = [1 << k for k in range(self.num_layers.bit_length())]
        counts = [*(c for c in powers if c < self.num_layers), self.num_layers]
        greedy = [tuple(sorted(order[:count])) for count in counts]
        for dense in dict.fromkeys([*first, *greedy]):
            fits = len(dense) <= self.num_layers and self.budget.hot_kv_share(dense) is not None
            if fits:
                self._try(DENSE, dataclasses.replace(setting, dense_layers=dense))

    def _lower_layers(self) -> None:
        """Lower attn_top_p in as many layers as the tolerances allow, the cheapest in KL first.

        Each layer is lowered alone on the first passage, which gives the order; then the longest
        run of it that stays within is searched for, every step of the search on all passages.
        """
        for _ in range(ROUNDS):
            best = self.best()
            if best is None:
                return
            order = self._cheapest(best.setting)
            low, high = 0, len(order)
            while low < high:
                middle = (low + high + 1) // 2
                tried = self._try(BY_LAYER, _lowered(best.setting, order[:middle]))
                low, high = (middle, high) if tried.within else (low, middle - 1)
            if low == 0:
                return

    def _cheapest(self, setting: Setting) -> list[int]:
        """Layers whose attn_top_p can be lowered, least KL a row saved first.

        Rows are counted behind equal caches: behind the fitted ones a layer saves few itself, but
        the slots it no longer needs save more elsewhere (that order left 20 % more link bytes).
        """
        before = self.sample.measure(setting, passages=1)
        part = np.array([self._room(setting) / max(len(before.layers), 1)])
        costs = {}
        for i, layer in enumerate(before.layers):
            lowered = _lowered(setting, [layer])
            if lowered == setting:
                continue
            after = self.sample.measure(lowered, passages=1)
            rows = [fetched_rows(found.curves[[i]], part) for found in (before, after)]
            saved = rows[0] - rows[1]
            if saved > 0:
                costs[layer] = (after.kl.value - before.kl.value) / saved
        return sorted(costs, key=lambda layer: costs[layer])

    def _check(self) -> list[Checked]:
        """The best candidates on the held-out passages, until one stays within tolerance there."""
        checked: list[Checked] = []
        while (best := self.best([c.candidate for c in checked])) is not None:
            checked.append(Checked(best, self._on_held_out(best)))
            if checked[-1].held_out.within:
                break
        return checked

    def _on_held_out(self, candidate: Candidate) -> Candidate:
        found = self.held_out.measure(candidate.setting)
        parts = self._parts(candidate, found.layers)
        within = self.tolerance.holds_in(found)
        return self._candidate("held out", candidate.setting, found, parts, within)

    def _parts(self, candidate: Candidate, layers: tuple[int, ...]) -> Array:
        """The candidate's hot rows in these layers, as shares of a layer's rows."""
        shares = np.array(candidate.hot_shares or [0.0] * self.num_layers)
        parts: Array = shares[list(layers)] * candidate.hot_kv_share * self.num_layers
        return parts

    def _preset(self, setting: Setting) -> Checked | None:
        if self.budget.hot_kv_share(setting.dense_layers) is None:
            return None
        found = self._measure(setting)
        count = len(found.layers)
        parts = np.full(count, self._room(setting) / max(count, 1))
        within = self.tolerance.shown_by(found)
        made = self._candidate("preset", setting, found, parts, within)
        return Checked(made, self._on_held_out(made))


def _lowered(setting: Setting, layers: Sequence[int]) -> Setting:
    """The setting with attn_top_p a step lower in these layers, where there is room for one."""
    by_layer = dict(setting.by_layer)
    for layer in layers:
        p = round(by_layer.get(layer, setting.attn_top_p) - STEP, 6)
        if p >= LEAST_P:
            by_layer[layer] = p
    return dataclasses.replace(setting, by_layer=tuple(sorted(by_layer.items())))
