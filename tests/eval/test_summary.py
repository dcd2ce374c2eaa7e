"""Summary, table and plots of made-up records whose figures are easy to check."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from twilight_engine.eval.plots import plot_run
from twilight_engine.eval.records import Record
from twilight_engine.eval.summary import Line, summarise
from twilight_engine.eval.table import groups_table, results_table

METHODS = ["dense", "balanced", "quest:256"]


def record(method: str, number: int, **changes: Any) -> Record:
    made: Record = {
        "item": f"item-{number}",
        "method": method,
        "length": 1024,
        "task": "ruler",
        "group": "single" if number < 2 else "multi",
        "score": 1.0,
        "details": {"depth": number / 3},
        "steps": 10,
        "exact_rows": 1000.0,
        "index_rows": 20.0,
        "tail_rows": 0.0,
        "resident_rows": 100.0,
        "link_bytes": 2.0 * (1 << 20),
        "device_bytes": 1 << 20,
        "device_read_bytes": None if method == "quest:256" else 1 << 19,
        "mass": 0.9,
        "step_s": 0.03,
        "batch": 4,
    }
    return {**made, **changes}


def answered() -> list[Record]:
    scores = {
        "dense": [1.0, 1.0, 1.0, 0.0],
        "balanced": [1.0, 1.0, 0.5, 0.0],
        "quest:256": [0.0, 0.0, 0.0, 0.0],
    }
    found = [
        record(method, i, score=score)
        for method, row in scores.items()
        for i, score in enumerate(row)
    ]
    longer = [record("dense", i, length=2048, steps=30 * i, exact_rows=i) for i in range(4)]
    return longer + found


def predicted() -> list[Record]:
    nll = {"dense": [2.0, 3.0], "balanced": [2.1, 3.2]}
    return [
        record(
            method,
            i,
            nll=value,
            kl=None if method == "dense" else 0.01 * (i + 1),
            same_top=None if method == "dense" else 0.5 * (i + 1),
            targets=8,
        )
        for method, row in nll.items()
        for i, value in enumerate(row)
    ]


def test_scores_and_differences():
    lines = summarise(answered(), METHODS)
    assert [(line.length, line.method) for line in lines] == [
        *((1024, method) for method in METHODS),
        (2048, "dense"),
    ]
    dense, balanced, quest, _ = lines
    assert dense.score is not None and dense.score.value == 0.75 and dense.score.count == 4
    assert dense.score.low is not None and 0 <= dense.score.low < 0.75 < (dense.score.high or 0)
    assert dense.score_change is None
    assert {g: e.value for g, e in balanced.groups.items()} == {"single": 1.0, "multi": 0.25}
    change = balanced.score_change
    assert change is not None and change.value == pytest.approx(-0.125)
    # Differences 0, 0, -0.5, 0: standard deviation 0.25 over 4 items.
    assert change.high == pytest.approx(-0.125 + 1.96 * 0.25 / 2)
    assert quest.score is not None and quest.score.low == 0.0 and quest.score.high == 0.75


def test_groups_of_different_sizes_count_alike():
    scores = {"a": [1.0, 0.0, 1.0, 0.0], "b": [1.0, 0.0]}
    dense = {"a": [1.0, 1.0, 1.0, 0.0], "b": [1.0, 1.0]}
    records = [
        record(method, 10 * k + i, group=group, score=score)
        for method, groups in (("dense", dense), ("balanced", scores))
        for k, (group, row) in enumerate(groups.items())
        for i, score in enumerate(row)
    ]
    _, balanced = summarise(records, METHODS)
    assert balanced.score is not None and balanced.score.value == 0.5
    change = balanced.score_change
    assert change is not None and change.value == pytest.approx((-0.25 - 0.5) / 2)
    # Differences 0, -1, 0, 0 (deviation 0.5) and 0, -1 (0.7071): half the root of the squares' sum.
    half = 1.96 * math.hypot(0.5 / 2, math.sqrt(0.5) / math.sqrt(2)) / 2
    assert change.high == pytest.approx(change.value + half) and change.count == 6


def test_costs_are_means_over_steps():
    lines = summarise(answered(), METHODS)
    assert lines[3].costs["exact_rows"] == pytest.approx((30 * 1 + 60 * 2 + 90 * 3) / 180)
    assert lines[2].costs["device_read_bytes"] is None
    assert lines[1].costs["device_read_bytes"] == 1 << 19


def test_predictions():
    dense, balanced = summarise(predicted(), METHODS)
    assert dense.ppl == pytest.approx(math.exp(2.5)) and dense.kl is None
    assert dense.ppl_ratio is None
    ratio = balanced.ppl_ratio
    assert ratio is not None and ratio.value == pytest.approx(math.exp(0.15))
    half = 1.96 * math.sqrt(2 * 0.05**2) / math.sqrt(2)
    assert ratio.high == pytest.approx(math.exp(0.15 + half))
    assert balanced.kl is not None and balanced.kl.value == pytest.approx(0.015)
    assert balanced.same_top == 0.75 and balanced.score is None


def test_one_passage_has_no_interval():
    (line,) = summarise([r for r in predicted() if r["item"] == "item-0"][1:], METHODS)
    assert line.kl is not None and line.kl.low is None and line.ppl_ratio is None
    assert "1.0e-02" in printed([line])


def printed(lines: list[Line]) -> str:
    return shown(results_table(lines, "ruler, tiny"))


def shown(table: Table) -> str:
    console = Console(file=io.StringIO(), width=240, highlight=False)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table():
    text = printed(summarise(answered(), METHODS))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    rows = [row for row in rows if row]
    head = next(line for line in text.splitlines() if "method" in line)
    assert [cell.strip() for cell in head.split("┃")[1:-1]] == [
        *("tokens", "method", "single", "multi", "average", "- dense", "exact", "index", "tail"),
        *("mass", "link", "device read", "on device", "TPOT"),
    ]
    assert rows[1] == [
        *("1,024", "balanced", "100.0", "25.0", "62.5 [15.6, 100.0]", "-12.5 [-37.0, +12.0]"),
        *("1,000", "20", "0", "0.900", "2.00 MiB", "0.50 MiB", "1.00 MiB", "30.0 ms"),
    ]
    assert rows[2][11] == "" and rows[3][:2] == ["2,048", "dense"]
    assert "4 items a row" in text and "batches of 4" in text


def test_many_groups_have_a_table_of_their_own():
    records = [
        record(method, i, group=f"set {i}", score=i / 10 if method == "dense" else 0.25)
        for method in METHODS[:2]
        for i in range(9)
    ]
    lines = summarise(records, METHODS)
    assert "set 3" not in printed(lines) and "average" in printed(lines)
    table = groups_table(lines)
    assert table is not None
    text = shown(table)
    assert [cell.strip() for cell in text.splitlines()[1].split("┃")[1:-1]] == [
        *("tokens", "group", "items", "dense", "balanced")
    ]
    row = next(line for line in text.splitlines() if "set 3" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        *("1,024", "set 3", "1", "30.0", "25.0")
    ]
    assert groups_table(summarise(answered(), METHODS)) is None


def test_the_table_of_predictions():
    text = printed(summarise(predicted(), METHODS))
    assert "ppl / dense" in text and "same top" in text and "average" not in text
    assert "1.1618 [" in text and "1.5e-02 [" in text and "75.0%" in text


def test_a_summary_is_json():
    for records in (answered(), predicted()):
        lines = summarise(records, METHODS)
        text = json.dumps([line.as_json() for line in lines], allow_nan=False)
        assert json.loads(text)[0]["method"] == "dense"


def test_plots(tmp_path: Path):
    for records, names in (
        (answered(), ["scores.png", "depths.png"]),
        (predicted(), ["kl.png"]),
    ):
        if names == ["kl.png"]:
            records = [{**r, "details": {}} for r in records]
        paths = plot_run(summarise(records, METHODS), records, "title", tmp_path)
        assert [path.name for path in paths] == names
        assert all(path.stat().st_size > 5000 for path in paths)
