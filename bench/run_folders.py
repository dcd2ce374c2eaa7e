"""Folders of `twilight eval`, read back into rows of bench/results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twilight_engine.eval.frontier import CACHE_SHARE
from twilight_engine.eval.methods import DEFAULT_METHOD, TABLE_METHODS, parse_method
from twilight_engine.eval.metrics import confidence_interval
from twilight_engine.eval.records import RESULTS, SETTINGS, Record, RunFolder
from twilight_engine.eval.summary import DENSE, Estimate, Line, summarise

FRONTIER, SUMMARY = "frontier.json", "summary.json"
COSTS = ("exact_rows", "link_bytes", "device_bytes")
SIMULATED = ("ppl", "ppl_dense", "kl", "exact_rows", "link_bytes", "device_share")
DIGITS = 5  # of a metric, significant

Row = dict[str, Any]


@dataclass(frozen=True)
class Provenance:
    """What the rows say of a run besides its results; None: what the folders know."""

    commit: str
    model: str | None = None
    gpu: str | None = None
    torch: str | None = None


@dataclass
class TaskRuns:
    """Folders of one model and task, their records together; each as its first folder has it."""

    model: str
    task: str
    digests: dict[str, str] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    folders: dict[tuple[int, str], Path] = field(default_factory=dict)  # by length and method

    def add(self, folder: Path, settings: dict[str, Any]) -> None:
        """Take a folder's records.

        Raises: ValueError for other items of a length than before, or a broken file.
        """
        for length, digest in settings["items"].items():
            known = self.digests.setdefault(length, digest)
            if known != digest:
                raise ValueError(
                    f"{folder} has other items of {length} tokens ({digest}) than a folder before "
                    f"it ({known}); record them on their own"
                )
        have = {(r["length"], r["item"], r["method"]) for r in self.records}
        for record in RunFolder(folder, settings).records:
            if (record["length"], record["item"], record["method"]) not in have:
                self.records.append(record)
                self.folders.setdefault((record["length"], record["method"]), folder)

    def lines(self) -> list[Line]:
        """The summary; methods as the table of the docs has them, others behind."""
        methods = list(dict.fromkeys(record["method"] for record in self.records))
        first = [method for method in TABLE_METHODS if method in methods]
        return summarise(self.records, [*first, *(m for m in methods if m not in first)])


def task_runs(folders: Sequence[Path], model: str | None) -> list[TaskRuns]:
    """The folders of niah, ruler, ppl and their like, by model and task.

    Args:
        model: what to call the model; None: the name of its file.
    Raises: ValueError for a folder that no run has written, or for one name of several models.
    """
    found: dict[tuple[str, str], TaskRuns] = {}
    for folder in folders:
        if not (folder / SETTINGS).exists() or not (folder / RESULTS).exists():
            raise ValueError(f"{folder} lacks {SETTINGS} or {RESULTS}; is it a run of eval?")
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        decoded = settings["question"] == "decode"
        task = settings["task"] + ("-decode" if decoded else "")
        runs = found.setdefault(
            (settings["model"], task), TaskRuns(model or Path(settings["model"]).stem, task)
        )
        runs.add(folder, settings)
    check_one_model([name for name, _ in found], model)
    return list(found.values())


def frontier_runs(folders: Sequence[Path], model: str | None) -> list[dict[str, Any]]:
    """frontier.json of each folder, its model by the name it shall have."""
    found = [json.loads((folder / FRONTIER).read_text(encoding="utf-8")) for folder in folders]
    check_one_model([record["model"] for record in found], model)
    return [{**record, "model": model or Path(record["model"]).stem} for record in found]


def check_one_model(names: Sequence[str], model: str | None) -> None:
    if model is not None and len(set(names)) > 1:
        raise ValueError(
            f"--model-name {model!r} for runs of {sorted(set(names))}; one model, please"
        )


def accuracy_rows(runs: TaskRuns, told: Provenance) -> Iterator[Row]:
    """A row a length and method."""
    lines = runs.lines()
    dense = {line.length: line for line in lines if line.method == DENSE}
    for line in lines:
        folder = runs.folders[line.length, line.method]
        machine = json.loads((folder / SUMMARY).read_text()) if (folder / SUMMARY).exists() else {}
        case = f"{runs.model}/{runs.task}/{line.length}/{shown(line.method)}"
        metrics = measured(line, dense.get(line.length), runs.records)
        yield row("accuracy", case, metrics, machine.get("machine", {}), told, folder)


def measured(line: Line, dense: Line | None, records: Sequence[Record]) -> dict[str, float]:
    """The metrics that a line has."""
    found: dict[str, float | None] = {}
    if line.score is not None:
        found["score"] = line.score.value
        found["score_dense"] = dense and dense.score and dense.score.value
        mine = [
            record["score"]
            for record in records
            if (record["length"], record["method"]) == (line.length, line.method)
        ]
        change = half_width(line.score_change)
        found["ci95"] = confidence_interval(mine) if change is None else change
    else:
        found |= {"ppl": line.ppl, "ppl_dense": dense and dense.ppl}
        found["kl"] = line.kl and line.kl.value
    found |= {name: line.costs[name] for name in COSTS}
    found["items"] = line.items
    return {name: value for name, value in found.items() if value is not None}


def half_width(estimate: Estimate | None) -> float | None:
    if estimate is None or estimate.low is None or estimate.high is None:
        return None
    return (estimate.high - estimate.low) / 2


def frontier_rows(record: dict[str, Any], told: Provenance, folder: Path) -> Iterator[Row]:
    """A row a grading and cache share; for those that are methods, at the usual share, another of
    the accuracy they had in the simulation."""
    place = f"{record['model']}/{{}}/{record['tokens']}"
    for point in record["points"]:
        metrics = {name: value for name, value in point.items() if name != "name"}
        usual = point["cache_share"] == CACHE_SHARE
        name = point["name"] if usual else f"{point['name']}, cache {point['cache_share']:g}"
        case = f"{place.format('frontier')}/{name}"
        yield row("frontier", case, metrics, record["machine"], told, folder)
        if usual and is_method(point["name"]):
            simulated = {name: point[name] for name in (*SIMULATED, "mass_kept_share")}
            simulated["items"] = len(record["passages"])
            case = f"{place.format('ppl')}/{shown(point['name'])}"
            yield row("accuracy", case, simulated, record["machine"], told, folder)


def row(
    bench: str,
    case: str,
    metrics: dict[str, Any],
    machine: dict[str, str],
    told: Provenance,
    folder: Path,
) -> Row:
    """A line of bench/results. Raises: ValueError where no one says what it ran on."""
    known = {"gpu": told.gpu or machine.get("gpu"), "torch": told.torch or machine.get("torch")}
    for name, value in known.items():
        if value is None:
            raise ValueError(f"{folder} doesn't say what {name} it ran on; give --{name}")
    return {
        "bench": bench,
        "case": case,
        "gpu": known["gpu"],
        "commit": told.commit,
        "torch": known["torch"],
        "metrics": {name: rounded(value) for name, value in metrics.items()},
    }


def rounded(value: float | bool) -> float | bool:
    return value if isinstance(value, (bool, int)) else float(f"{value:.{DIGITS}g}")


def shown(method: str) -> str:
    """A method's name in a case."""
    return "default" if method == DEFAULT_METHOD else method


def is_method(name: str) -> bool:
    try:
        parse_method(name)
    except ValueError:
        return False
    return True
