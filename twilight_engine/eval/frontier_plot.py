"""The frontier as a picture: KL against link bytes, by device bytes and cache size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twilight_engine.eval.frontier import FrontierPoint

LABELLED = ("balanced", "lean", "paper", "dense", "dense-int4")
SHAPES = "osD^vP*X"  # by cache share, ascending; the last for all beyond
# Of a name from its point, in points of type, nearest first.
OFFSETS = [
    (side * x, y)
    for distance in range(8, 80, 9)
    for x, y in ((distance, distance), (distance, -distance), (8, distance), (8, -distance))
    for side in (1, -1)
]
LEAST_KL = 1e-8  # less is rounding: none
DOT = 5  # half the side of what a point covers, in pixels

Place = tuple[float, float]


def plot_frontier(points: Sequence[FrontierPoint], title: str, path: Path) -> None:
    """Write a PNG; points of the Pareto front have a black edge and a name, others are pale.

    With several cache shares a line joins the points of a grading, and its name stands once.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(12, 8), layout="constrained")
    floor = min((p.link_bytes for p in points if p.link_bytes > 0), default=1.0) / 3
    least = min((p.kl for p in points if p.kl > LEAST_KL), default=1.0) / 3
    places = [(max(p.link_bytes, floor) / 1e6, max(p.kl, least)) for p in points]
    axes.set(xscale="log", yscale="log")
    _draw_dots(figure, axes, points, places)
    axes.set_xlabel("link bytes a step, MB (no traffic is drawn at the left edge)")
    axes.set_ylabel("KL to dense attention, nats (none is drawn at the lower edge)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    figure.canvas.draw()  # places the axes, which the names go by
    _draw_names(figure, axes, points, places)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_dots(
    figure: Any, axes: Any, points: Sequence[FrontierPoint], places: Sequence[Place]
) -> None:
    shares = sorted({point.cache_share for point in points})
    colours = [100 * point.device_share for point in points]
    scale = {"cmap": "viridis", "vmin": min(colours), "vmax": max(colours)}
    for name in dict.fromkeys(point.name for point in points):
        line = [place for place, p in zip(places, points, strict=True) if p.name == name]
        axes.plot(*zip(*line, strict=True), color="#c5cad0", lw=0.8, zorder=1)
    for front in (False, True):
        for share in shares:
            mine = [
                i for i, p in enumerate(points) if (p.cache_share, p.on_front) == (share, front)
            ]
            axes.scatter(
                [places[i][0] for i in mine],
                [places[i][1] for i in mine],
                c=[colours[i] for i in mine],
                s=70 if len(shares) == 1 else 42,
                marker=_shape(share, shares),
                edgecolors="black" if front else "none",
                linewidths=1.2,
                alpha=1.0 if front else 0.4,
                zorder=3 if front else 2,
                **scale,
            )
    dots = axes.scatter([], [], c=[], **scale)
    figure.colorbar(dots, label="device bytes, % of the KV")
    if len(shares) > 1:
        for share in shares:
            label = f"{100 * share:g}%"
            axes.scatter([], [], marker=_shape(share, shares), color="#555", label=label)
        axes.legend(title="row cache, of the rows", loc="upper right")


def _shape(share: float, shares: Sequence[float]) -> str:
    return SHAPES[min(shares.index(share), len(SHAPES) - 1)]


def _draw_names(
    figure: Any, axes: Any, points: Sequence[FrontierPoint], places: Sequence[Place]
) -> None:
    """At the leftmost point of the front, of the known gradings at the leftmost at all.

    A name goes to the first of OFFSETS where it covers no other name and no point of the front; one
    that finds no room is left to the table.
    """
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    frame = axes.get_window_extent()
    centres = axes.transData.transform([places[i] for i, p in enumerate(points) if p.on_front])
    taken = [Bbox.from_bounds(x, y, 0, 0).padded(DOT) for x, y in centres]
    names = dict.fromkeys(point.name for point in points)
    for name in sorted(names, key=lambda name: name not in LABELLED):
        mine = [i for i, point in enumerate(points) if point.name == name]
        front = [i for i in mine if points[i].on_front]
        if not front and name not in LABELLED:
            continue
        place = min(places[i] for i in front or mine)
        for x, y in OFFSETS:
            text = axes.annotate(
                name,
                place,
                xytext=(x, y),
                textcoords="offset points",
                fontsize=8,
                fontweight="bold" if name in LABELLED else "normal",
                ha="left" if x > 0 else "right",
                va="center",
                arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "#888"},
                zorder=4,
            )
            text.update_positions(figure.canvas.get_renderer())
            box = Text.get_window_extent(text)  # without the line to the point
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()
