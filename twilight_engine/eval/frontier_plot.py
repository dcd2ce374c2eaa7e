"""The frontier as a picture: KL against link bytes, colour by device bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from twilight_engine.eval.frontier import FrontierPoint

LABELLED = ("balanced", "lean", "paper", "dense-int4")


def plot_frontier(points: Sequence[FrontierPoint], title: str, path: Path) -> None:
    """Write a PNG; points of the Pareto front have a black edge and a name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 7), layout="constrained")
    floor = min((p.link_bytes for p in points if p.link_bytes > 0), default=1.0) / 3
    x = [max(p.link_bytes, floor) / 1e6 for p in points]
    y = [p.kl for p in points]
    share = [100 * p.device_share for p in points]
    edges = ["black" if p.on_front else "none" for p in points]
    dots = axes.scatter(x, y, c=share, s=70, cmap="viridis", edgecolors=edges, linewidths=1.5)
    figure.colorbar(dots, label="device bytes, % of the KV")
    for i, point in enumerate(points):
        if point.on_front or point.name in LABELLED:
            weight = "bold" if point.name in LABELLED else "normal"
            axes.annotate(
                point.name,
                (x[i], y[i]),
                xytext=(6, 4),
                textcoords="offset points",
                fontsize=8,
                fontweight=weight,
            )
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("link bytes a step, MB (no traffic is drawn at the left edge)")
    axes.set_ylabel("KL to dense attention, nats")
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=130)
    plt.close(figure)
