"""The offload report as pictures: budget by layer and head, rows by grade, bytes by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from twilight_engine.cli.units import format_bytes
from twilight_engine.runtime.report import OffloadReport

GRADE_COLOURS = {
    "resident": "#35618f",
    "exact": "#d1495b",
    "index": "#edae49",
    "tail": "#c9d1d9",
}
DENSE_COLOUR, MOVED_COLOUR = "#8a94a0", "#d1495b"
MOST_LABELLED_HEADS = 8  # beyond, the numbers in the heat map no longer fit their cells
DARK = 0.45  # of the colour map, from here on white text reads better
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}


def plot_report(report: OffloadReport, folder: Path) -> list[Path]:
    """Write budget.png, rows.png and bytes.png into an existing folder; returns their paths.

    Raises: ModuleNotFoundError without matplotlib (extra `plots`).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawings = {"budget.png": draw_budget, "rows.png": draw_rows, "bytes.png": draw_bytes}
    paths = []
    with pyplot.rc_context(STYLE):
        for name, draw in drawings.items():
            figure = draw(pyplot, report)
            paths.append(folder / name)
            figure.savefig(paths[-1])
            pyplot.close(figure)
    return paths


def plain_number(value: float, _: object) -> str:
    return f"{value:,.0f}"


def plain_bytes(value: float, _: object) -> str:
    return format_bytes(value)


def draw_budget(pyplot: Any, report: OffloadReport) -> Any:
    """Heat map of the mean exact rows of each KV head, layers from top to bottom."""
    rows = report.rows["exact"].mean_by_head
    layers, heads = report.shape.offloaded_layers, report.shape.num_kv_heads
    height = max(2.5, 1.4 + 0.17 * len(layers))
    figure, axes = pyplot.subplots(figsize=(max(4.6, 2.6 + 0.5 * heads), height))
    if rows.size:
        import matplotlib.ticker
        from matplotlib.colors import LogNorm

        top = max(float(rows.max()), 2.0)
        norm = LogNorm(vmin=1.0, vmax=top)
        image = axes.imshow(
            np.maximum(rows, 1.0),
            aspect="auto",
            cmap="magma_r",
            norm=norm,
            interpolation="nearest",
        )
        figure.colorbar(
            image, ax=axes, format=matplotlib.ticker.FuncFormatter(plain_number)
        ).set_label("exact rows a step, log scale")
        if heads <= MOST_LABELLED_HEADS:
            for (layer, head), value in np.ndenumerate(rows):
                colour = "white" if norm(max(value, 1.0)) > DARK else "black"
                label = f"{value:,.0f}"
                axes.text(head, layer, label, ha="center", va="center", color=colour, fontsize=8)
    step = max(1, len(layers) // 30)
    axes.set_yticks(range(0, len(layers), step), [str(i) for i in layers[::step]])
    axes.set_xticks(range(heads))
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    axes.set_title("Budget by layer and KV head")
    return figure


def draw_rows(pyplot: Any, report: OffloadReport) -> Any:
    """Rows of each grade over the decode steps: shares of the context, and the exact ones alone."""
    series = report.by_step
    steps = np.arange(1, len(series["context"]) + 1)
    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(7.2, 5.4), sharex=True)
    stack = [series[grade] for grade in GRADE_COLOURS]
    total = np.maximum(np.sum(stack, axis=0), 1)
    upper.stackplot(
        steps,
        [100 * rows / total for rows in stack],
        colors=list(GRADE_COLOURS.values()),
        labels=list(GRADE_COLOURS),
    )
    upper.set_ylim(0, 100)
    upper.margins(x=0)
    upper.set_ylabel("% of the context")
    upper.set_title("Rows by grade, mean over offloaded layers and KV heads")
    upper.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, reverse=True)
    for grade in ("exact", "index", "resident"):
        lower.plot(steps, series[grade], color=GRADE_COLOURS[grade], label=grade, linewidth=1.6)
    lower.set_ylim(bottom=0)
    lower.margins(x=0)
    lower.set_ylabel("rows a KV head")
    lower.set_xlabel("decode step")
    lower.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def draw_bytes(pyplot: Any, report: OffloadReport) -> Any:
    """Host-to-device bytes of each step, ours and a dense offload's, on one log scale."""
    import matplotlib.ticker

    series = report.by_step
    steps = np.arange(1, len(series["context"]) + 1)
    figure, axes = pyplot.subplots(figsize=(7.2, 3.6))
    moved = series["moved_bytes"]
    axes.plot(steps, series["dense_bytes"], color=DENSE_COLOUR, label="dense offload")
    if (moved > 0).any():
        shown = np.where(moved > 0, moved, np.nan)
        axes.plot(steps, shown, "o-", color=MOVED_COLOUR, markersize=3, label="moved")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(base=2, numticks=9))
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(plain_bytes))
    axes.set_ylabel("host to device")
    axes.set_xlabel("decode step")
    ratio = "nothing moved" if report.ratio is None else f"{report.ratio:,.1f} times fewer"
    axes.set_title(f"Bytes by decode step: {ratio} than a dense offload")
    axes.margins(x=0.01)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure
