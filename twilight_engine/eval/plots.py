"""Pictures of a run: scores by method, needle heat maps, KL against bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twilight_engine.eval.records import Record
from twilight_engine.eval.summary import DENSE, Line

COLOURS = ("#35618f", "#d1495b", "#edae49", "#5b8e7d", "#7b5ea7")  # by length
MOST_COLUMNS = 4  # heat maps side by side
LEAST_KL = 1e-9  # what is drawn of none at all
LINEAR_MIB = 0.01  # below, the axis of link bytes is linear, so that 0 has a place
DEPTH_STEP = 0.1  # rows of a heat map
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}


def plot_run(
    lines: Sequence[Line], records: Sequence[Record], title: str, folder: Path
) -> list[Path]:
    """Draw what the records allow into an existing folder; returns the paths.

    Raises: ModuleNotFoundError without matplotlib (extra `plots`).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawings: dict[str, Callable[[], Any]] = {}
    if any(line.score is not None for line in lines):
        drawings["scores.png"] = lambda: draw_scores(pyplot, lines, title)
    if any("depth" in record.get("details", {}) for record in records):
        methods = list(dict.fromkeys(line.method for line in lines))
        drawings["depths.png"] = lambda: draw_depths(pyplot, records, methods, title)
    if any(line.kl is not None for line in lines):
        drawings["kl.png"] = lambda: draw_kl(pyplot, lines, title)
    paths = []
    with pyplot.rc_context(STYLE):
        for name, draw in drawings.items():
            figure = draw()
            paths.append(folder / name)
            figure.savefig(paths[-1])
            pyplot.close(figure)
    return paths


def draw_scores(pyplot: Any, lines: Sequence[Line], title: str) -> Any:
    """Mean score and interval of each method, a dot a length; dense's as a dotted line."""
    methods = list(dict.fromkeys(line.method for line in lines))
    lengths = sorted({line.length for line in lines})
    height = 1.6 + len(methods) * max(0.28, 0.16 * len(lengths))
    figure, axes = pyplot.subplots(figsize=(7.2, height))
    for i, length in enumerate(lengths):
        colour = COLOURS[i % len(COLOURS)]
        shift = (i - (len(lengths) - 1) / 2) * 0.7 / max(len(lengths), 1)
        named = f"{length:,} tokens"
        for line in lines:
            if line.length != length or line.score is None:
                continue
            score, place = line.score, methods.index(line.method) + shift
            ends = [100 * (score.low or 0.0), 100 * (score.high or 0.0)]
            axes.plot(ends, [place, place], color=colour, lw=1.6)
            axes.plot(100 * score.value, place, "o", color=colour, markersize=6, label=named)
            named = "_nolegend_"
            if line.method == DENSE:
                axes.axvline(100 * score.value, color=colour, lw=1, ls=":", zorder=0)
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.set_xlim(right=101)
    axes.set_xlabel("score, %, with 95 % interval; dotted: dense")
    axes.set_title(title)
    axes.grid(axis="x", color="#e4e7eb")
    axes.set_axisbelow(True)
    if len(lengths) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return figure


def draw_depths(pyplot: Any, records: Sequence[Record], methods: Sequence[str], title: str) -> Any:
    """A heat map a method: mean score by the needle's depth and the context's length."""
    placed = [record for record in records if "depth" in record.get("details", {})]
    depths = sorted({_depth(record) for record in placed})
    lengths = sorted({record["length"] for record in placed})
    columns = min(MOST_COLUMNS, len(methods))
    rows = -(-len(methods) // columns)
    width = max(1.9, 0.55 * len(lengths) + 0.8)
    size = (1.2 + width * columns, 1.2 + (0.9 + 0.26 * len(depths)) * rows)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False
    )
    image = None
    for panel, method in zip(panels.flat, methods, strict=False):
        cells = _mean_scores([r for r in placed if r["method"] == method], depths, lengths)
        image = panel.imshow(cells, vmin=0, vmax=100, cmap="RdYlBu", aspect="auto")
        panel.set_title(method)
        panel.spines[:].set_visible(False)
        panel.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
        panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        for (i, j), value in np.ndenumerate(cells):
            if not np.isnan(value):
                colour = "black" if 20 < value < 85 else "white"
                place = {"ha": "center", "va": "center", "fontsize": 7}
                panel.text(j, i, f"{value:.0f}", color=colour, **place)
    for panel in panels.flat[len(methods) :]:
        panel.set_visible(False)
    figure.suptitle(title, x=0.01, ha="left")
    figure.supxlabel("tokens of the context")
    figure.supylabel("depth of the needle")
    if image is not None:
        figure.colorbar(image, ax=panels, shrink=0.8).set_label("score, %")
    return figure


def draw_kl(pyplot: Any, lines: Sequence[Line], title: str) -> Any:
    """KL to dense against link bytes a step; bytes of 0 at the left edge."""
    figure, axes = pyplot.subplots(figsize=(7.6, 4.6))
    lengths = sorted({line.length for line in lines})
    drawn = [line for line in lines if line.kl is not None]
    for line in drawn:
        assert line.kl is not None
        colour = COLOURS[lengths.index(line.length) % len(COLOURS)]
        link = (line.costs["link_bytes"] or 0.0) / (1 << 20)
        kl = max(line.kl.value, LEAST_KL)
        if line.kl.low is not None and line.kl.high is not None:
            ends = [max(line.kl.low, LEAST_KL), max(line.kl.high, LEAST_KL)]
            axes.plot([link, link], ends, color=colour, lw=1)
        label = f"{line.length:,} tokens"
        axes.plot(link, kl, "o", color=colour, markersize=5, label=label)
        near = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": 8}
        axes.annotate(line.method, (link, kl), color=colour, **near)
    axes.set_yscale("log")
    most = max((line.costs["link_bytes"] or 0.0) / (1 << 20) for line in drawn)
    axes.set_xscale("symlog", linthresh=LINEAR_MIB, linscale=0.5)
    axes.set_xlim(-LINEAR_MIB / 5, max(2 * most, LINEAR_MIB * 10))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    if len(unique) > 1:
        axes.legend(unique.values(), unique.keys(), loc="best", frameon=False)
    axes.set_xlabel("MiB over the link a step, one sequence")
    axes.set_ylabel("KL(dense || method), nats a token")
    axes.set_title(title)
    axes.grid(color="#e4e7eb")
    axes.set_axisbelow(True)
    return figure


def _depth(record: Record) -> float:
    """The needle's depth, to the nearest DEPTH_STEP."""
    depth: float = record["details"]["depth"]
    return round(depth / DEPTH_STEP) * DEPTH_STEP


def _mean_scores(
    records: Sequence[Record], depths: Sequence[float], lengths: Sequence[int]
) -> NDArray[np.float64]:
    """[depths, lengths] mean score in per cent, NaN where there is no item."""
    cells = np.full((len(depths), len(lengths)), np.nan)
    for i, depth in enumerate(depths):
        for j, length in enumerate(lengths):
            here = [
                record["score"]
                for record in records
                if record["length"] == length and _depth(record) == depth
            ]
            if here:
                cells[i, j] = 100 * statistics.fmean(here)
    return cells


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"
