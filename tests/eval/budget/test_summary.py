"""Summary, tables and plots of made-up records whose figures are easy to check."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console, RenderableType

from twilight_engine.eval.budget.measure import FORMATS
from twilight_engine.eval.budget.plots import plot_budget
from twilight_engine.eval.budget.run import RULES, SOFTMAX
from twilight_engine.eval.budget.summary import BudgetSummary, Spread, summarise_budget
from twilight_engine.eval.budget.table import loss_table, mass_table, spread_table

MASSES, ITEMS, STEPS = (0.8, 0.9), ("novel/0", "novel/900"), 4


def record(rule: str, p: float, passage: int) -> dict[str, Any]:
    """Rows of layers 1 and 2 of 3, two heads, passage and step: (10 * layer + head) * scale."""
    scale = (1 + passage) * np.array([1.0, 2.0, 1.0, 4.0])
    heads = np.array([[10.0, 11.0], [20.0, 21.0]])
    rows = heads[:, :, None] * scale
    made = {
        "length": 1000,
        "item": ITEMS[passage],
        "method": f"{rule}@{p}",
        "rule": rule,
        "p": p,
        "nll_dense": 2.0 + passage,
        "layers": [1, 2],
        "by_step": rows.mean((0, 1)).tolist(),
        "by_head": rows.mean(2).tolist(),
        "percentiles": np.percentile(rows, np.arange(101)).tolist(),
        "mean_square": float((rows**2).mean()),
    }
    if rule == SOFTMAX:
        captured = {name: [0.5 + 0.1 * passage, p, 0.6] for name in FORMATS}
        dense = [[500.0, 600.0]]
        return {
            **made,
            "layers": [0, 1, 2],
            "by_head": dense + made["by_head"],
            "captured": captured,
            "captured_low": {name: [x / 2 for x in row] for name, row in captured.items()},
        }
    more = {"nll": 2.1 + passage, "kl": 0.01 * (1 + passage), "mass": 0.9, "index_rows": 30.0}
    return {**made, **more}


@pytest.fixture(scope="module")
def summary() -> BudgetSummary:
    records = [
        record(rule, p, passage) for passage in (1, 0) for rule in (SOFTMAX, *RULES) for p in MASSES
    ]
    return summarise_budget(records, ITEMS, MASSES)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """[passages, layers, heads, steps] of the records."""
    scale = np.array([[1.0], [2.0]]) * np.array([1.0, 2.0, 1.0, 4.0])
    return np.array([[10.0, 11.0], [20.0, 21.0]])[None, :, :, None] * scale[:, None, None]


def spread(summary: BudgetSummary, axis: str, rule: str = "balanced") -> Spread:
    (found,) = [s for s in summary.spreads if (s.rule, s.p, s.axis) == (rule, 0.8, axis)]
    return found


@pytest.mark.parametrize("rule", [SOFTMAX, *RULES])
@pytest.mark.parametrize(
    ("axis", "over"),
    [("passage", (1, 2, 3)), ("step", (1, 2)), ("layer", (0, 2, 3)), ("head", (0, 3))],
)
def test_spreads_are_of_means_over_the_other_axes(summary, rows, axis, over, rule):
    values, got = rows.mean(over).ravel(), spread(summary, axis, rule)
    assert got.count == values.size and got.mean == pytest.approx(values.mean())
    assert got.max == pytest.approx(values.max())
    assert got.median == pytest.approx(np.median(values))
    assert got.p95 == pytest.approx(np.percentile(values, 95))
    assert got.cv == pytest.approx(values.std() / values.mean())


def test_single_budgets(summary, rows):
    got = spread(summary, "single")
    assert got.count == rows.size and got.mean == pytest.approx(rows.mean())
    assert got.max == rows.max() and got.cv == pytest.approx(rows.std() / rows.mean())
    assert got.median == pytest.approx(np.median(rows), rel=0.1)


def test_no_rows_at_all_have_no_variation():
    records = [record(rule, 0.8, 0) for rule in (SOFTMAX, *RULES)]
    for made in records:
        made |= {"by_step": [0.0] * STEPS, "percentiles": [0.0] * 101, "mean_square": 0.0}
    got = summarise_budget(records, ITEMS[:1], (0.8,))
    assert {s.cv for s in got.spreads if s.axis in ("passage", "step", "single")} == {None}
    assert printed(spread_table(got, 0.8, 188.0))


def test_mass_and_losses(summary):
    layers = [row for row in summary.mass if row.p == 0.9]
    assert [row.layer for row in layers] == [0, 1, 2]
    assert layers[0].captured["int4_token"] == pytest.approx(0.55)
    assert layers[1].captured["int2_channel"] == pytest.approx(0.9)
    assert layers[0].low["int8_token"] == pytest.approx(0.275)
    (loss,) = [row for row in summary.losses if (row.rule, row.p) == ("paper", 0.9)]
    assert loss.ppl == pytest.approx(math.exp(2.6))
    assert loss.ppl_dense == pytest.approx(math.exp(2.5))
    assert loss.kl == pytest.approx(0.015) and loss.index_rows == 30
    assert loss.exact_rows == pytest.approx(15.5 * 3)
    assert loss.exact_share == pytest.approx(15.5 * 3 / 1000)


def test_json(summary):
    found = json.loads(json.dumps(summary.as_json(), allow_nan=False))
    assert found["passages"] == list(ITEMS) and found["graded_layers"] == [1, 2]
    assert len(found["budgets"]) == 2 * 4 * 5 and len(found["loss"]) == 2 * 3
    assert found["mass_by_layer"][0].keys() == {"p", "layer", "captured", "low"}


def printed(table: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=200, highlight=False)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def cells(text: str) -> list[list[str]]:
    return [[c.strip() for c in row.split("│")[1:-1]] for row in text.splitlines() if "│" in row]


def test_tables(summary):
    text = printed(spread_table(summary, 0.9, 188.4))
    assert "p = 0.9" in text and "beyond 188 resident ones" in text and "layers 1-2" in text
    rows = cells(text)
    assert [row[1] for row in rows[:5]] == [
        *("by prompt", "by query", "by layer", "by head", "each one")
    ]
    assert rows[5] == ["balanced", "by prompt", "2", "46", "39", "46", "54", "60", "62", "0.33"]
    rows = cells(printed(mass_table(summary, 0.9)))
    assert rows[1] == ["int4 per channel", "0.683", "0", "0.550", "0.275"]
    text = printed(loss_table(summary))
    assert "dense: perplexity 12.182" in text
    assert cells(text)[1] == ["", "0.9", "13.464", "1.1052", "1.5e-02", "46", "4.7%", "30", "0.900"]


def test_plots(summary, tmp_path: Path):
    paths = plot_budget(summary, 0.9, "title", tmp_path)
    assert [path.name for path in paths] == ["dynamism.png", "mass.png", "perplexity.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)
