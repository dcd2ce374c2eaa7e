"""A folder with everything a report has: report.json and the plots."""

from __future__ import annotations

import json
from pathlib import Path

from twilight_engine.cli.report_plots import plot_report
from twilight_engine.runtime.report import OffloadReport


def write_report(report: OffloadReport, folder: Path) -> list[Path]:
    """Write report.json and, where matplotlib is installed, the plots; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "report.json"
    data.write_text(json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n")
    try:
        return [data, *plot_report(report, folder)]
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return [data]
