"""From a run's records to one line a length and method: scores, differences from dense, costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from twilight_engine.eval.metrics import Z_95, confidence_interval
from twilight_engine.eval.records import Record

DENSE = "dense"
COSTS = (
    *("exact_rows", "index_rows", "tail_rows", "resident_rows"),
    *("link_bytes", "device_bytes", "device_read_bytes", "mass"),
)


@dataclass(frozen=True)
class Estimate:
    """A mean over items with its 95 % confidence interval; no ends where there is one item."""

    value: float
    low: float | None
    high: float | None
    count: int

    @classmethod
    def around(cls, values: Sequence[float], half_width: float | None) -> Estimate:
        mean = statistics.fmean(values)
        if half_width is None:
            return cls(mean, None, None, len(values))
        return cls(mean, mean - half_width, mean + half_width, len(values))


@dataclass
class Line:
    """One method at one length, over its items.

    Attributes:
        items: how many.
        groups: mean score of each group, in [0, 1].
        score: mean over all groups; None for passages.
        score_change: score minus dense's on the same items; None without dense.
        ppl: exp of the mean -log p; None for items with answers, like all that follow.
        ppl_ratio: ppl / dense's on the same passages.
        kl: KL(dense || method) a target, in nats.
        same_top: share of targets where dense has the same most probable token.
        costs: means over the items' decode steps (eval.cost.Cost), weighted by steps.
        step_s: mean seconds a step of the batches; `batch` is their mean size.
    """

    length: int
    method: str
    items: int
    costs: dict[str, float | None]
    step_s: float
    batch: float
    groups: dict[str, Estimate] = field(default_factory=dict)
    score: Estimate | None = None
    score_change: Estimate | None = None
    ppl: float | None = None
    ppl_ratio: Estimate | None = None
    kl: Estimate | None = None
    same_top: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(records: Sequence[Record], methods: Sequence[str]) -> list[Line]:
    """A line for each length and method that has records, in the order of the methods."""
    lengths = sorted({record["length"] for record in records})
    lines = []
    for length in lengths:
        here = [record for record in records if record["length"] == length]
        dense = {record["item"]: record for record in here if record["method"] == DENSE}
        for method in methods:
            mine = [record for record in here if record["method"] == method]
            if mine:
                lines.append(_line(length, method, mine, dense))
    return lines


def _line(length: int, method: str, mine: list[Record], dense: dict[str, Record]) -> Line:
    line = Line(
        length=length,
        method=method,
        items=len(mine),
        costs={name: mean_cost(mine, name) for name in COSTS},
        step_s=statistics.fmean(record["step_s"] for record in mine),
        batch=statistics.fmean(record["batch"] for record in mine),
    )
    pairs = [(record, dense[record["item"]]) for record in mine if record["item"] in dense]
    if method == DENSE:
        pairs = []
    if "nll" in mine[0]:
        _add_prediction(line, mine, pairs)
        return line
    for group in dict.fromkeys(record["group"] for record in mine):
        line.groups[group] = _score([r["score"] for r in mine if r["group"] == group])
    line.score = _inside(_mean_of_groups(_by_group(mine, [record["score"] for record in mine])))
    if pairs:
        changes = [own["score"] - other["score"] for own, other in pairs]
        line.score_change = _mean_of_groups(_by_group([own for own, _ in pairs], changes))
    return line


def _by_group(records: Sequence[Record], values: Sequence[float]) -> list[list[float]]:
    groups: dict[str, list[float]] = {}
    for record, value in zip(records, values, strict=True):
        groups.setdefault(record["group"], []).append(value)
    return list(groups.values())


def _mean_of_groups(groups: Sequence[Sequence[float]]) -> Estimate:
    """The mean over groups, each of which counts alike however many items it has.

    Groups of one size are pooled, which gives the same mean and a closer interval; of others, the
    interval is that of the mean of independent means.
    """
    if len({len(group) for group in groups}) == 1:
        values = [value for group in groups for value in group]
        return Estimate.around(values, confidence_interval(values))
    mean = statistics.fmean(statistics.fmean(group) for group in groups)
    half = math.hypot(*(confidence_interval(group) for group in groups)) / len(groups)
    return Estimate(mean, mean - half, mean + half, sum(map(len, groups)))


def _add_prediction(line: Line, mine: list[Record], pairs: list[tuple[Record, Record]]) -> None:
    line.ppl = math.exp(statistics.fmean(record["nll"] for record in mine))
    if pairs:
        logs = [own["nll"] - other["nll"] for own, other in pairs]
        log = Estimate.around(logs, _half_width(logs))
        ends = [None if x is None else math.exp(x) for x in (log.low, log.high)]
        line.ppl_ratio = Estimate(math.exp(log.value), ends[0], ends[1], log.count)
    compared = [record for record in mine if record["kl"] is not None]
    if compared:
        kl = [record["kl"] for record in compared]
        line.kl = Estimate.around(kl, _half_width(kl))
        line.same_top = statistics.fmean(record["same_top"] for record in compared)


def _score(scores: list[float]) -> Estimate:
    return _inside(Estimate.around(scores, confidence_interval(scores)))


def _inside(found: Estimate) -> Estimate:
    """With the interval in [0, 1], as scores are."""
    low, high = max(0.0, found.low or 0.0), min(1.0, found.high or 0.0)
    return Estimate(found.value, low, high, found.count)


def _half_width(values: list[float]) -> float | None:
    """Of the 95 % interval of a mean of unbounded values, by normal approximation."""
    if len(values) < 2:
        return None
    return Z_95 * statistics.stdev(values) / math.sqrt(len(values))


def mean_cost(records: Sequence[Record], name: str) -> float | None:
    """Over all steps of the records; None where a record does not know."""
    known = [r for r in records if r[name] is not None and r["steps"]]
    if not known or len(known) < sum(1 for r in records if r["steps"]):
        return None
    steps = [record["steps"] for record in known]
    return statistics.fmean((record[name] for record in known), weights=steps)
