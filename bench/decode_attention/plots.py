"""Plots of the records: us against context for each policy, and the breakdown beside its floor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OPS = {
    "append": "#b9c4cc",
    "estimate": "#35618f",
    "prune": "#5b8e7d",
    "resolve": "#a9c9bd",
    "fetch": "#d1495b",
    "attend_lower": "#edae49",
    "attend_rows": "#7b5ea7",
    "merge": "#555555",
}
POLICIES = {  # colour; the engine's presets are drawn thick, what keeps the KV on the device dashed
    "balanced": "#c1121f",
    "lean": "#e07a3f",
    "paper": "#edae49",
    "sdpa-resident": "#222222",
    "dense-resident": "#888888",
    "dense-streamed": "#35618f",
    "topk-page-copies": "#4c8fbd",
    "topk-cpu-gather": "#86b7d6",
    "topk-zero-copy": "#2f6b4f",
    "topk-previous-set": "#5fa37f",
    "topk-lru": "#9bc9ae",
}
PRESETS = ("balanced", "lean", "paper")
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
    for name in sorted(lines, key=lambda name: -lines[name][-1][1]):  # as they end, top to bottom
        tokens, us = zip(*lines[name], strict=True)
        axes.plot(
            tokens,
            us,
            marker="o",
            markersize=4,
            label=f"{name}  {us[-1]:,.0f}",
            color=POLICIES.get(name),
            linewidth=2.5 if name in PRESETS else 1.2,
            linestyle="--" if "resident" in name else "-",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({tokens for points in lines.values() for tokens, _ in points})
    axes.set_xticks(ticks, [_tokens(t) for t in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", alpha=0.25)
    axes.set_xlabel("tokens")
    axes.set_ylabel("us a layer and step")
    axes.set_title(f"Decode attention by policy, batch 1 ({machine})")
    axes.legend(
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        frameon=False,
        title=f"us at {_tokens(ticks[-1])} tokens",
    )
    path = folder / "decode_attention_policies.png"
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _breakdown(pyplot: Any, bars: dict[str, dict[str, float]], machine: str, folder: Path) -> Path:
    """A panel a shape, each with a scale of its own: they differ by a factor of ten."""
    figure, panels = pyplot.subplots(
        len(bars), figsize=(8, 0.6 + 1.3 * len(bars)), squeeze=False, sharex=False
    )
    names = [n for n in OPS if any(bar.get(f"{n}_us", 0.0) > 0 for bar in bars.values())]
    order = sorted(bars, key=lambda name: [int(x) for x in name.split("/b")])
    for axes, name in zip(panels[:, 0], order, strict=True):
        metrics, left = bars[name], 0.0
        for op in names:
            us = metrics.get(f"{op}_us", 0.0)
            axes.barh(0, us, left=left, height=0.6, color=OPS[op], label=op)
            left += us
        for key, label, colour, line in (
            ("floor_us", "floor", "#c1121f", "-"),
            ("step_us", "whole step", "black", ":"),
        ):
            x = metrics[key]
            axes.plot([x, x], [-0.42, 0.42], color=colour, linestyle=line, linewidth=2)
            axes.annotate(
                f"{label} {x:,.0f}", (x, 0.45), ha="center", va="bottom", fontsize=8, color=colour
            )
        tokens, batch = name.split("/b")
        axes.set_yticks([0], [f"{_tokens(int(tokens))} tokens\nbatch {batch}"])
        axes.set_xlim(0, 1.08 * max(left, metrics["step_us"]))
        axes.set_ylim(-0.5, 0.8)
    panels[-1, 0].set_xlabel("us a layer and step; each op alone, cold L2")
    figure.suptitle(f"Where a step's time goes ({machine})", fontsize="large")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    path = folder / "decode_attention_breakdown.png"
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)
