"""A budget run as pictures: four panels of budgets, captured mass by layer, loss against p."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from twilight_engine.eval.budget.run import RULES, SOFTMAX
from twilight_engine.eval.budget.summary import BudgetSummary, Panel
from twilight_engine.eval.plots import STYLE

COLOURS = dict(zip((SOFTMAX, *RULES), ("#8a94a0", "#d1495b", "#35618f", "#5b8e7d"), strict=True))
DRAWN = (SOFTMAX, RULES[0], RULES[1])  # of the four panels; more would hide each other
BIT_COLOURS = {"int2": "#edae49", "int4": "#35618f", "int8": "#5b8e7d"}
GRID = "#e4e7eb"
LINEAR_ROWS = 1.0  # below, the axis of rows is linear, so that 0 has a place
MOST_NAMES = 6  # passages with their names at the axis


def plot_budget(summary: BudgetSummary, p: float, title: str, folder: Path) -> list[Path]:
    """Write dynamism.png, mass.png and perplexity.png into an existing folder; returns the paths.

    Args:
        p: which the first two show.
    Raises: ModuleNotFoundError without matplotlib (extra `plots`).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawings: dict[str, Callable[[], Any]] = {
        "dynamism.png": lambda: draw_dynamism(pyplot, summary, p, title),
        "mass.png": lambda: draw_mass(pyplot, summary, p, title),
        "perplexity.png": lambda: draw_losses(pyplot, summary, title),
    }
    paths = []
    with pyplot.rc_context(STYLE):
        for name, draw in drawings.items():
            figure = draw()
            paths.append(folder / name)
            figure.savefig(paths[-1])
            pyplot.close(figure)
    return paths


def draw_dynamism(pyplot: Any, summary: BudgetSummary, p: float, title: str) -> Any:
    """Budgets by prompt, query, layer and head, one scale for all panels."""
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.4), sharey=True)
    panels = [panel for panel in summary.panels[p] if panel.rule in DRAWN]
    for number, panel in enumerate(panels):
        shift = (number - (len(panels) - 1) / 2) * 0.22
        _draw_passages(axes[0, 0], panel, shift)
        _draw_steps(axes[0, 1], panel)
        _draw_layers(axes[1, 0], panel)
        _draw_heads(axes[1, 1], panel, summary)
    for panel_axes in axes.flat:
        _scale_rows(panel_axes)
        panel_axes.grid(axis="y", color=GRID)
        panel_axes.set_axisbelow(True)
    axes[0, 0].set_title("by prompt: mean, and the middle half of its queries")
    axes[0, 1].set_title("by query: mean and range over prompts")
    axes[1, 0].set_title("by layer: mean and range over heads")
    axes[1, 1].set_title("by head: all graded layers' heads, in order")
    names = [name.rsplit("/", 1) for name in summary.items]
    if len(names) <= MOST_NAMES:
        labels = [f"{name[:18]}\nfrom {start}" for name, start in names]
        axes[0, 0].set_xticks(range(len(labels)), labels, fontsize=8)
    else:
        axes[0, 0].set_xlabel("prompt")
    axes[0, 0].set_xlim(-0.6, len(names) - 0.4)
    axes[0, 1].set_xlabel("query, in order of decoding")
    axes[1, 0].set_xlabel(f"layer (the rules grade {summary.graded[0]}-{summary.graded[-1]})")
    axes[1, 1].set_xlabel("share of the heads, %")
    handles, labels = axes[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.supylabel("rows")
    figure.suptitle(f"{title}: rows needed at p = {p}", x=0.01, ha="left")
    return figure


def label_of(rule: str) -> str:
    """A rule's unit beside its name."""
    unit = "tokens a query head" if rule == SOFTMAX else "rows a KV head, residents apart"
    return f"{'true softmax' if rule == SOFTMAX else rule} ({unit})"


def _draw_passages(axes: Any, panel: Panel, shift: float) -> None:
    places = np.arange(len(panel.by_step)) + shift
    low, high = np.percentile(panel.by_step, [25, 75], axis=1)
    colour = COLOURS[panel.rule]
    axes.vlines(places, low, high, color=colour, lw=2)
    axes.plot(places, panel.by_step.mean(1), "o", color=colour, markersize=6)


def _draw_steps(axes: Any, panel: Panel) -> None:
    colour, steps = COLOURS[panel.rule], np.arange(panel.by_step.shape[1])
    if len(panel.by_step) > 1:
        low, high = panel.by_step.min(0), panel.by_step.max(0)
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
    axes.plot(steps, panel.by_step.mean(0), color=colour, label=label_of(panel.rule))


def _draw_layers(axes: Any, panel: Panel) -> None:
    colour, heads = COLOURS[panel.rule], panel.by_head
    low, high = heads.min(1), heads.max(1)
    axes.fill_between(panel.layers, low, high, color=colour, alpha=0.15, lw=0)
    axes.plot(panel.layers, heads.mean(1), "o-", color=colour, markersize=3)


def _draw_heads(axes: Any, panel: Panel, summary: BudgetSummary) -> None:
    graded = [panel.layers.index(layer) for layer in summary.graded]
    ordered = np.sort(panel.by_head[graded].ravel())[::-1]
    share = 100 * (np.arange(len(ordered)) + 0.5) / len(ordered)
    axes.plot(share, ordered, color=COLOURS[panel.rule])


def _scale_rows(axes: Any) -> None:
    axes.set_yscale("symlog", linthresh=LINEAR_ROWS, linscale=0.4)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")


def draw_mass(pyplot: Any, summary: BudgetSummary, p: float, title: str) -> Any:
    """Captured mass by layer, a line a format; p as a dotted line."""
    figure, axes = pyplot.subplots(figsize=(8, 4.6))
    rows = [row for row in summary.mass if row.p == p]
    layers = [row.layer for row in rows]
    for name in rows[0].captured:
        bits, along = name.split("_")
        style = {"color": BIT_COLOURS[bits], "ls": "-" if along == "channel" else "--"}
        values = [row.captured[name] for row in rows]
        axes.plot(layers, values, marker="o", ms=3, label=f"{bits.upper()} per {along}", **style)
    axes.axhline(p, color="black", lw=1, ls=":", label=f"p = {p}")
    axes.set_xlabel("layer")
    axes.set_ylabel("true mass of the rows that top-p picks")
    axes.set_title(title)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return figure


def draw_losses(pyplot: Any, summary: BudgetSummary, title: str) -> Any:
    """Perplexity and exact rows against p, a line a rule; dense perplexity as a dotted line."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4))
    for rule in RULES:
        losses = [loss for loss in summary.losses if loss.rule == rule]
        x, style = [loss.p for loss in losses], {"color": COLOURS[rule], "markersize": 5}
        left.plot(x, [loss.ppl for loss in losses], "o-", label=rule, **style)
        right.plot(x, [loss.exact_rows for loss in losses], "o-", **style)
    dense = summary.losses[0].ppl_dense
    left.axhline(dense, color="black", lw=1, ls=":", label=f"dense, {dense:.2f}")
    left.set_ylabel("perplexity")
    _scale_rows(right)
    right.set_ylabel("exact rows a KV head, residents apart")
    for axes in (left, right):
        axes.set_xlabel("p")
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
    left.legend(loc="best", frameon=False)
    figure.suptitle(title, x=0.01, ha="left")
    return figure
