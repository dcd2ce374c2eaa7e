"""Lines and table of made-up results of lm-evaluation-harness, whose figures are easy to check."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.eval.harness import BALANCED, DENSE, ITEMS, METHODS, tiny_loaded
from twilight_engine.eval.lm_eval_lines import TaskLine, summarise_tasks
from twilight_engine.eval.lm_eval_table import tasks_table
from twilight_engine.eval.records import RunFolder
from twilight_engine.eval.respond import Responder

SCORES = {"dense": [1.0, 1.0, 0.0, 1.0], "balanced": [1.0, 0.0, 0.0, 1.0]}


def results(scores: list[float]) -> dict[str, Any]:
    """As simple_evaluate returns them."""
    mean = sum(scores) / len(scores)
    samples = [
        {"doc_id": i, "filter": name, "acc": share * score, "ppl": (score, 3)}
        for name, share in (("none", 1), ("strict", 0.5))
        for i, score in enumerate(scores)
    ]
    task = {
        "alias": "quiz",
        "sample_len": 4,
        "acc,none": mean,
        "acc_stderr,none": 0.25,
        "acc,strict": 2 * mean,  # as if it were no mean of its samples
        "acc_stderr,strict": "N/A",
        "ppl,none": math.inf if mean < 0.6 else 3.0,
        "ppl_stderr,none": "N/A",
    }
    group = {"alias": "all", "sample_len": 4, "acc,none": mean, "acc_stderr,none": "N/A"}
    return {"results": {"quiz": task, "all": group}, "samples": {"quiz": samples}}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[TaskLine]:
    folder = RunFolder(tmp_path_factory.mktemp("run"), {})
    responder = Responder(tiny_loaded(), METHODS[:2], folder)
    item = dataclasses.replace(ITEMS[0], metric=None, group="quiz")
    responder.respond([item], DENSE)
    found = {name: results(scores) for name, scores in SCORES.items()}
    return summarise_tasks(found, {"dense": DENSE, "balanced": BALANCED}, responder)


def test_a_line_a_task_metric_and_method(lines: list[TaskLine]) -> None:
    assert [(line.task, line.metric, line.method) for line in lines] == [
        (task, metric, method)
        for task, metric in [
            *(("quiz", "acc"), ("quiz", "acc, strict"), ("quiz", "ppl"), ("all", "acc"))
        ]
        for method in SCORES
    ]
    dense, own = lines[:2]
    assert (dense.value, dense.stderr, dense.change) == (0.75, 0.25, None)
    assert (own.value, own.change) == (0.5, -0.25)
    # Differences 0, -1, 0, 0: standard deviation 0.5 over 4 items.
    assert own.change_stderr == pytest.approx(0.25)
    assert own.costs["exact_rows"] is not None and own.step_s is not None and own.items == 4
    assert own.costs["link_bytes"] != dense.costs["exact_rows"] == 150 + 6


def test_what_is_no_mean_or_no_number_has_no_error(lines: list[TaskLine]) -> None:
    strict, ppl, group = lines[3], lines[5], lines[7]
    assert strict.change == -0.5 and strict.change_stderr is None and strict.stderr is None
    assert ppl.value is None and ppl.change is None
    assert group.change == -0.25 and group.change_stderr is None and group.costs == {}
    json.dumps([line.as_json() for line in lines], allow_nan=False)


def test_the_table(lines: list[TaskLine]) -> None:
    console = Console(file=io.StringIO(), width=200, highlight=False)
    console.print(tasks_table(lines, "lm-eval, tiny"))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    rows = [row for row in rows if row]
    assert rows[0][:5] == ["quiz", "acc", "4", "dense", "0.7500 ± 0.2500"]
    assert rows[1][:6] == ["", "", "", "balanced", "0.5000 ± 0.2500", "-0.2500 ± 0.2500"]
    assert rows[5][3:6] == ["balanced", "", ""] and rows[7][6:] == ["", "", "", ""]
    assert rows[1][9].endswith(" ms") and "of a difference from dense" in text


def test_without_dense_there_is_no_difference(tmp_path: Path) -> None:
    responder = Responder(tiny_loaded(), [BALANCED], RunFolder(tmp_path, {}))
    found = {"balanced": results(SCORES["balanced"])}
    assert all(
        line.change is None for line in summarise_tasks(found, {"balanced": BALANCED}, responder)
    )
