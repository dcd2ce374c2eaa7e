"""From a budget run's records to its tables: spread by axis, captured mass by layer, loss by p."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twilight_engine.eval.budget.run import RULES, SOFTMAX
from twilight_engine.eval.records import Record

AXES = ("passage", "step", "layer", "head", "single")
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """How budgets vary along one axis, each a mean over all the others.

    Attributes:
        rule: "softmax" (tokens a query head) or a rule (exact rows a KV head, residents apart).
        axis: passage, step (of any passage), layer, head (of any layer), or single: no mean at
            all. Of graded layers.
        count: how many budgets. max, mean, p25, median, p75, p95: of them, in rows.
        cv: standard deviation / mean; None where the mean is 0.
    """

    rule: str
    p: float
    axis: str
    count: int
    mean: float
    p25: float
    median: float
    p75: float
    p95: float
    max: float
    cv: float | None


@dataclass(frozen=True)
class LayerMass:
    """True mass that top-p captures in one layer by quantised K; over query heads and steps.

    Attributes:
        captured: format -> mean. low: format -> 5th percentile.
    """

    p: float
    layer: int
    captured: dict[str, float]
    low: dict[str, float]


@dataclass(frozen=True)
class Loss:
    """What a rule loses at one p and the rows it keeps; means over targets and graded layers.

    Attributes:
        kl: KL(dense || rule) of the next token, nats. exact_rows, index_rows: a KV head, residents
            apart. exact_share: exact_rows of the tokens of a passage. mass: realised, group mean.
    """

    rule: str
    p: float
    ppl: float
    ppl_dense: float
    kl: float
    exact_rows: float
    exact_share: float
    index_rows: float
    mass: float


@dataclass(frozen=True)
class Panel:
    """One rule's budgets at one p, for the figure.

    Attributes:
        by_step: [passages, T], of graded layers. layers: [K] their numbers here, dense ones
            included for the softmax. by_head: [K, H], over passages and steps.
    """

    rule: str
    by_step: Array
    layers: list[int]
    by_head: Array


@dataclass(frozen=True)
class BudgetSummary:
    """Everything that a budget run found."""

    items: tuple[str, ...]
    length: int
    masses: tuple[float, ...]
    graded: tuple[int, ...]
    spreads: list[Spread]
    mass: list[LayerMass]
    losses: list[Loss]
    panels: dict[float, list[Panel]]

    def as_json(self) -> dict[str, Any]:
        """Without the panels, which the results' lines have."""
        return {
            "passages": list(self.items),
            "graded_layers": list(self.graded),
            "budgets": [_plain(spread) for spread in self.spreads],
            "mass_by_layer": [_plain(row) for row in self.mass],
            "loss": [_plain(loss) for loss in self.losses],
        }


def summarise_budget(
    records: Sequence[Record], items: Sequence[str], masses: Sequence[float]
) -> BudgetSummary:
    """Over the records of these passages, for these p; every rule has one of each."""
    found = {(r["rule"], r["p"], r["item"]): r for r in records}

    def of(rule: str, p: float) -> list[Record]:
        return [found[rule, p, item] for item in items]

    graded = of(RULES[0], masses[0])[0]["layers"]
    panels = {p: [_panel(rule, of(rule, p)) for rule in (SOFTMAX, *RULES)] for p in masses}
    spreads = [
        spread
        for p in masses
        for panel in panels[p]
        for spread in _spreads(panel, p, of(panel.rule, p), graded)
    ]
    return BudgetSummary(
        items=tuple(items),
        length=records[0]["length"],
        masses=tuple(masses),
        graded=tuple(graded),
        spreads=spreads,
        mass=[row for p in masses for row in _masses(p, of(SOFTMAX, p))],
        losses=[_loss(rule, p, of(rule, p)) for rule in RULES for p in masses],
        panels=panels,
    )


def _panel(rule: str, records: Sequence[Record]) -> Panel:
    return Panel(
        rule=rule,
        by_step=np.array([record["by_step"] for record in records]),
        layers=records[0]["layers"],
        by_head=np.mean([record["by_head"] for record in records], axis=0),
    )


def _spreads(
    panel: Panel, p: float, records: Sequence[Record], graded: Sequence[int]
) -> list[Spread]:
    heads = panel.by_head[[panel.layers.index(layer) for layer in graded]]
    values = {
        "passage": panel.by_step.mean(1),
        "step": panel.by_step.ravel(),
        "layer": heads.mean(1),
        "head": heads.ravel(),
    }
    spreads = [_spread(panel.rule, p, axis, values[axis]) for axis in values]
    mean = float(panel.by_step.mean())
    square = float(np.mean([record["mean_square"] for record in records]))
    pooled = np.array([record["percentiles"] for record in records]).ravel()
    single = _spread(panel.rule, p, "single", pooled)
    exact = {
        "count": panel.by_step.size * heads.size,
        "mean": mean,
        "cv": math.sqrt(max(square - mean * mean, 0.0)) / mean if mean else None,
    }
    return [*spreads, Spread(**{**_plain(single), **exact})]


def _spread(rule: str, p: float, axis: str, values: Array) -> Spread:
    p25, median, p75, p95 = np.percentile(values, [25, 50, 75, 95]).tolist()
    mean = float(values.mean())
    return Spread(
        rule=rule,
        p=p,
        axis=axis,
        count=values.size,
        mean=mean,
        p25=p25,
        median=median,
        p75=p75,
        p95=p95,
        max=float(values.max()),
        cv=float(values.std()) / mean if mean else None,
    )


def _masses(p: float, records: Sequence[Record]) -> list[LayerMass]:
    def mean(key: str, name: str) -> Array:
        return np.asarray(np.mean([record[key][name] for record in records], axis=0))

    names = list(records[0]["captured"])
    captured = {name: mean("captured", name) for name in names}
    low = {name: mean("captured_low", name) for name in names}
    return [
        LayerMass(
            p=p,
            layer=layer,
            captured={name: float(captured[name][i]) for name in names},
            low={name: float(low[name][i]) for name in names},
        )
        for i, layer in enumerate(records[0]["layers"])
    ]


def _loss(rule: str, p: float, records: Sequence[Record]) -> Loss:
    def mean(key: str) -> float:
        return float(np.mean([record[key] for record in records]))

    rows = float(np.mean([record["by_step"] for record in records]))
    return Loss(
        rule=rule,
        p=p,
        ppl=math.exp(mean("nll")),
        ppl_dense=math.exp(mean("nll_dense")),
        kl=mean("kl"),
        exact_rows=rows,
        exact_share=rows / records[0]["length"],
        index_rows=mean("index_rows"),
        mass=mean("mass"),
    )


def _plain(row: Any) -> dict[str, Any]:
    return {field.name: getattr(row, field.name) for field in fields(row)}
