"""The frontier as a picture: KL against link bytes, by device bytes and cache size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twilight_engine.eval.frontier import FrontierPoint

LABELLED = ("balanced", "lean", "paper", "dense-int4")
SHAPES = "osD^vP*X"  # by cache share, ascending; the last for all beyond
LEAST_KL = 1e-9  # what is drawn of none at all


def plot_frontier(points: Sequence[FrontierPoint], title: str, path: Path) -> None:
    """Write a PNG; points of the Pareto front have a black edge and a name.

    With several cache shares a line joins the points of a grading, and its name stands once.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 7), layout="constrained")
    floor = min((p.link_bytes for p in points if p.link_bytes > 0), default=1.0) / 3
    places = [(max(p.link_bytes, floor) / 1e6, max(p.kl, LEAST_KL)) for p in points]
    _draw_dots(figure, axes, points, places)
    _draw_names(axes, points, places)
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("link bytes a step, MB (no traffic is drawn at the left edge)")
    axes.set_ylabel("KL to dense attention, nats")
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    axes.set_axisbelow(True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_dots(
    figure: Any, axes: Any, points: Sequence[FrontierPoint], places: Sequence[tuple[float, float]]
) -> None:
    shares = sorted({point.cache_share for point in points})
    colours = [100 * point.device_share for point in points]
    for name in dict.fromkeys(point.name for point in points):
        line = [place for place, p in zip(places, points, strict=True) if p.name == name]
        axes.plot(*zip(*line, strict=True), color="#b0b6bd", lw=0.8, zorder=1)
    for i, share in enumerate(shares):
        mine = [j for j, point in enumerate(points) if point.cache_share == share]
        dots = axes.scatter(
            [places[j][0] for j in mine],
            [places[j][1] for j in mine],
            c=[colours[j] for j in mine],
            s=70 if len(shares) == 1 else 42,
            cmap="viridis",
            vmin=min(colours),
            vmax=max(colours),
            marker=SHAPES[min(i, len(SHAPES) - 1)],
            edgecolors=["black" if points[j].on_front else "none" for j in mine],
            linewidths=1.2,
            label=f"{share:.1%}",
        )
    figure.colorbar(dots, label="device bytes, % of the KV")
    if len(shares) > 1:
        axes.legend(title="row cache, of the rows", loc="best", frameon=False)


def _draw_names(
    axes: Any, points: Sequence[FrontierPoint], places: Sequence[tuple[float, float]]
) -> None:
    """At the leftmost point of the front, of the known gradings at the leftmost at all."""
    for name in dict.fromkeys(point.name for point in points):
        mine = [i for i, point in enumerate(points) if point.name == name]
        front = [i for i in mine if points[i].on_front]
        if not front and name not in LABELLED:
            continue
        axes.annotate(
            name,
            min(places[i] for i in front or mine),
            xytext=(6, 4),
            textcoords="offset points",
            fontsize=8,
            fontweight="bold" if name in LABELLED else "normal",
        )
