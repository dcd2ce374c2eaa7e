"""From lm-evaluation-harness's results by method to a line a task, metric and method."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real  # numpy's numbers too
from typing import Any

from twilight_engine.eval.methods import Method
from twilight_engine.eval.records import Record
from twilight_engine.eval.respond import Responder
from twilight_engine.eval.summary import COSTS, DENSE, mean_cost

NO_FILTER = "none"


@dataclass(frozen=True)
class TaskLine:
    """One metric of one task, or group of tasks, by one method.

    Attributes:
        metric: lm-eval's name, with its filter behind a comma if there is one.
        value: None where it is not finite.
        stderr: lm-eval's; None where it knows none.
        change: value minus dense's; None without dense.
        change_stderr: standard error of the mean difference on the same items, for metrics that
            are means of items' scores.
        items: how many items, of a group its tasks'.
        costs, step_s: as summary.Line's; empty and None for a group.
    """

    task: str
    metric: str
    method: str
    value: float | None
    stderr: float | None
    change: float | None
    change_stderr: float | None
    items: int
    costs: dict[str, float | None]
    step_s: float | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise_tasks(
    found: Mapping[str, dict[str, Any]], methods: Mapping[str, Method], responder: Responder
) -> list[TaskLine]:
    """Lines by task, then metric, then method, from simple_evaluate's results of each method."""
    first = next(iter(found.values()))["results"]
    dense = found.get(DENSE)
    return [
        _line(task, key, method, results, dense, responder.records(task, methods[method]))
        for task, metrics in first.items()
        for key in metrics
        if _is_metric(key, metrics[key])
        for method, results in found.items()
    ]


def _is_metric(key: str, value: object) -> bool:
    metric, comma, _ = key.partition(",")
    return bool(comma) and not metric.endswith("_stderr") and isinstance(value, Real)


def _line(
    task: str,
    key: str,
    method: str,
    results: dict[str, Any],
    dense: dict[str, Any] | None,
    records: Sequence[Record],
) -> TaskLine:
    metric, _, filtered = key.partition(",")
    own = results["results"][task]
    value = _number(own[key])
    change, change_stderr = None, None
    known = None if dense is None or method == DENSE else _number(dense["results"][task][key])
    if dense is not None and known is not None and value is not None:
        change = value - known
        pairs = _pairs(_scores(results, task, key), _scores(dense, task, key))
        # A metric that is no mean has no standard error by differences.
        if len(pairs) > 1 and math.isclose(statistics.fmean(pairs), change, abs_tol=1e-9):
            change_stderr = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return TaskLine(
        task=task,
        metric=metric if filtered == NO_FILTER else f"{metric}, {filtered}",
        method=method,
        value=value,
        stderr=_number(own.get(f"{metric}_stderr,{filtered}")),
        change=change,
        change_stderr=change_stderr,
        items=own.get("sample_len", 0),
        costs={cost: mean_cost(records, cost) for cost in COSTS} if records else {},
        step_s=statistics.fmean(r["step_s"] for r in records) if records else None,
    )


def _scores(results: dict[str, Any], task: str, key: str) -> dict[int, float]:
    """By item, what it scores in a metric; items whose score is no number are left out."""
    metric, _, filtered = key.partition(",")
    found = {}
    for sample in results["samples"].get(task, ()):
        score = _number(sample.get(metric))
        if sample["filter"] == filtered and score is not None:
            found[sample["doc_id"]] = score
    return found


def _pairs(own: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    return [own[item] - other[item] for item in own if item in other]


def _number(value: object) -> float | None:
    """A finite number; lm-eval says "N/A" where it knows none."""
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None
