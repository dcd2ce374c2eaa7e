"""Plots of the records: us against context for each policy, and the breakdown beside its floor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OPS = {
    "append": "#b9c4cc",
    "estimate": "#35618f",
    "errors": "#7ba3cc",
    "prune": "#5b8e7d",
    "resolve": "#a9c9bd",
    "fetch": "#d1495b",
    "attend_lower": "#edae49",
    "attend_rows": "#7b5ea7",
    "merge": "#555555",
}
POLICY_ORDER = ("balanced", "lean", "paper", "sdpa-resident", "dense-resident", "dense-streamed")
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """The last record of each case. Raises: ValueError for a file that is not there."""
    if not path.is_file():
        raise ValueError(f"no records to plot: {path} does not exist; run a case with --json first")
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return {row["case"]: row for row in rows}


def draw(records: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
    """Draw what the records allow; returns the paths.

    Raises: ValueError if there is nothing to draw; ModuleNotFoundError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with pyplot.rc_context(STYLE):
        policies = policy_lines(records)
        if policies:
            drawn.append(_policies(pyplot, policies, _machine(records), folder))
        bars = {
            case.removeprefix("breakdown/"): row["metrics"]
            for case, row in records.items()
            if case.startswith("breakdown/") and case.count("/") == 2
        }
        if bars:
            drawn.append(_breakdown(pyplot, bars, _machine(records), folder))
    if not drawn:
        raise ValueError("no record of the cases policies or breakdown to draw")
    return drawn


def policy_lines(records: dict[str, dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Policy -> (tokens, us), by tokens."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for case, row in records.items():
        parts = case.split("/")
        if parts[0] == "policies" and len(parts) == 3:
            lines.setdefault(parts[1], []).append((int(parts[2]), row["metrics"]["step_us"]))
    return {name: sorted(points) for name, points in lines.items()}


def _machine(records: dict[str, dict[str, Any]]) -> str:
    return str(next(iter(records.values()))["gpu"])


def _policies(
    pyplot: Any, lines: dict[str, list[tuple[int, float]]], machine: str, folder: Path
) -> Path:
    figure, axes = pyplot.subplots(figsize=(8, 5))
    order = sorted(lines, key=lambda n: (n not in POLICY_ORDER, -lines[n][-1][1]))
    for i, name in enumerate(order):
        tokens, us = zip(*lines[name], strict=True)
        ours = name in ("balanced", "lean", "paper")
        axes.plot(
            tokens,
            us,
            marker="o",
            label=name,
            color=pyplot.cm.tab20(i % 20),
            linewidth=2.5 if ours else 1.2,
            linestyle="--" if "resident" in name else "-",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({tokens for points in lines.values() for tokens, _ in points})
    axes.set_xticks(ticks, [f"{t // 1024}K" if t >= 1024 else str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.set_ylabel("us a layer and step")
    axes.set_title(f"Decode attention by policy, batch 1 ({machine})")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, reverse=True)
    path = folder / "decode_attention_policies.png"
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _breakdown(pyplot: Any, bars: dict[str, dict[str, float]], machine: str, folder: Path) -> Path:
    figure, axes = pyplot.subplots(figsize=(8, 1.6 + 0.8 * len(bars)))
    for y, metrics in enumerate(bars.values()):
        left = 0.0
        for name, colour in OPS.items():
            us = metrics.get(f"{name}_us", 0.0)
            label = name if y == 0 else None
            axes.barh(y, us, left=left, height=0.55, color=colour, label=label)
            left += us
        marks = (("floor_us", "floor", "#c1121f", "-"), ("step_us", "whole step", "black", ":"))
        for key, label, colour, line in marks:
            x = metrics[key]
            axes.plot([x, x], [y - 0.38, y + 0.38], color=colour, linestyle=line, linewidth=2)
            axes.annotate(
                f"{label} {x:.0f}",
                (x, y + 0.38 if key == "floor_us" else y - 0.42),
                ha="center",
                va="bottom" if key == "floor_us" else "top",
                fontsize=7,
                color=colour,
            )
    axes.set_yticks(range(len(bars)), [name.replace("/b", " tokens, batch ") for name in bars])
    axes.set_xlim(0, 1.12 * axes.get_xlim()[1])
    axes.set_ylim(-0.8, len(bars) - 0.3)
    axes.set_xlabel("us a layer and step, each op alone")
    axes.set_title(f"Where a step's time goes ({machine})")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    path = folder / "decode_attention_breakdown.png"
    figure.savefig(path)
    pyplot.close(figure)
    return path
