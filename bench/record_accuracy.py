"""Record runs of `twilight eval` in bench/results, or print them as the tables of docs/accuracy.md.

Reads the folders that the runs left behind, here or on another machine. A row takes the place of
that of the same case; one that the engine measured stays where a frontier only simulates it.

    python bench/record_accuracy.py runs/niah runs/ppl --model-name SmolLM2-135M --commit 0f3c2a1
    python bench/record_accuracy.py runs/niah runs/ppl --markdown
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from accuracy_table import frontier_table, task_table
from harness import RESULTS
from run_folders import (
    FRONTIER,
    Provenance,
    Row,
    accuracy_rows,
    frontier_rows,
    frontier_runs,
    task_runs,
)

MEASURED = "device_bytes"  # a metric that only the engine's runs have


def write(rows: Sequence[Row], path: Path) -> int:
    """Put rows into a file, each in the place of its case; returns how many were put.

    Raises: ValueError for a case that comes twice.
    """
    cases = [row["case"] for row in rows]
    twice = sorted({case for case in cases if cases.count(case) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)}: in more than one folder; record them one by one")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    there = {row["case"]: row for row in map(json.loads, text.splitlines())}
    put = {row["case"]: row for row in rows if not _hides(row, there.get(row["case"]))}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in {**there, **put}.values()]
    path.write_text("".join(lines), encoding="utf-8")
    return len(put)


def _hides(row: Row, there: Row | None) -> bool:
    """Whether a simulated row would take the place of a measured one."""
    return there is not None and MEASURED in there["metrics"] and MEASURED not in row["metrics"]


def record(folders: Sequence[Path], told: Provenance, results: Path) -> None:
    """Write the rows of all folders. Raises: ValueError for a folder that cannot be read."""
    frontiers = [folder for folder in folders if (folder / FRONTIER).exists()]
    tasks = [folder for folder in folders if folder not in frontiers]
    rows = [row for runs in task_runs(tasks, told.model) for row in accuracy_rows(runs, told)]
    measured = {row["case"] for row in rows}
    for folder, found in zip(frontiers, frontier_runs(frontiers, told.model), strict=True):
        simulated = frontier_rows(found, told, folder)
        rows += [row for row in simulated if row["case"] not in measured]
    for bench in ("accuracy", "frontier"):
        mine = [row for row in rows if row["bench"] == bench]
        if mine:
            path = results / f"{bench}.jsonl"
            print(f"{path}: {write(mine, path)} of {len(mine)} rows written")


def markdown(folders: Sequence[Path], model: str | None) -> str:
    """The tables of all folders."""
    frontiers = [folder for folder in folders if (folder / FRONTIER).exists()]
    tasks = task_runs([folder for folder in folders if folder not in frontiers], model)
    tables = [task_table(runs) for runs in tasks]
    tables += [frontier_table(found) for found in frontier_runs(frontiers, model)]
    return "\n\n".join("\n".join(table) for table in tables)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--model-name", help="what to call the model; default: its file's name")
    parser.add_argument("--gpu", help="default: what the run's summary says")
    parser.add_argument("--torch", metavar="VERSION", help="default: what the run's summary says")
    parser.add_argument("--commit", metavar="HASH", help="what was run; needed to record")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--markdown", action="store_true", help="print tables, record nothing")
    options = parser.parse_args(arguments)
    if not options.markdown and options.commit is None:
        parser.error("--commit is missing: the commit that was run")
    try:
        if options.markdown:
            print(markdown(options.folders, options.model_name))
            return
        told = Provenance(options.commit, options.model_name, options.gpu, options.torch)
        record(options.folders, told, options.results)
    except ValueError as error:
        sys.exit(f"record_accuracy: {error}")


if __name__ == "__main__":
    main()
