"""What `twilight eval frontier` reads from its options and shows of its points."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twilight_engine.cli.evaluate_run import model_settings
from twilight_engine.cli.machine import ran_on

if TYPE_CHECKING:
    from rich.table import Table

    from twilight_engine.eval.frontier import FrontierPoint
    from twilight_engine.eval.items import Passage
    from twilight_engine.eval.simulation.grading import Grading
    from twilight_engine.models.load import LoadedModel


def pick(sweep: dict[str, Grading], only: str | None) -> dict[str, Grading]:
    """The gradings of these names; a name may hold a comma.

    Raises: ValueError for one that is not there.
    """
    if only is None:
        return sweep
    left, names = [part.strip() for part in only.split(",")], []
    while left:
        sizes = range(len(left), 0, -1)
        size = next((n for n in sizes if ", ".join(left[:n]) in sweep), None)
        if size is None:
            raise ValueError(f"--only names {left[0]!r}; allowed: {', '.join(sweep)}")
        names.append(", ".join(left[:size]))
        left = left[size:]
    return {name: sweep[name] for name in names}


def frontier_settings(
    model: str, loaded: LoadedModel, passages: Sequence[Passage], cache_shares: Sequence[float]
) -> dict[str, Any]:
    """What decides about a frontier's results besides the gradings."""
    from twilight_engine.eval.run import Workload

    first = passages[0]
    return {
        **model_settings("frontier", model, loaded),
        "tokens": len(first.context_ids) + len(first.target_ids),
        "targets": len(first.target_ids),
        "passages": [passage.item_id for passage in passages],
        "digest": Workload(len(first.context_ids), passages).digest,
        "cache_shares": list(cache_shares),
    }


def write_json(settings: dict[str, Any], points: Sequence[FrontierPoint], path: Path) -> None:
    record = {
        **settings,
        "machine": ran_on(settings["device"]),
        "points": [point.as_dict() for point in points],
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def frontier_table(points: Sequence[FrontierPoint], title: str) -> Table:
    """A row a grading and cache share, by KL; a star marks the front."""
    from rich.table import Table

    table = Table(title=title)
    for column in ("grading", "KL", "ppl / dense", "top-1", "exact rows", "mass", "mass kept"):
        table.add_column(column, justify="left" if column == "grading" else "right")
    for column in ("weakest head", "row cache", "link a step", "device", "front"):
        table.add_column(column, justify="right")
    ordered = sorted(points, key=lambda p: (p.kl, p.name, p.cache_share))
    for _, group in itertools.groupby(ordered, key=lambda p: p.name):
        for i, point in enumerate(group):
            shared = (
                point.name,
                f"{point.kl:.1e}",
                f"{point.ppl / point.ppl_dense:.4f}",
                f"{point.top1:.1%}",
                f"{point.exact_rows:.0f}",
                f"{point.mass:.3f}",
                f"{point.mass_kept_share:.1%}",
                f"{point.weakest_head:.2f}",
            )
            table.add_row(
                *(shared if i == 0 else ("",) * len(shared)),
                f"{100 * point.cache_share:g}%",
                f"{point.link_bytes / 1e6:.2f} MB",
                f"{point.device_share:.0%}",
                "*" if point.on_front else "",
            )
    return table
