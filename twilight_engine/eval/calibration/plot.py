"""The sweep as a picture: what each setting loses against what it fetches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twilight_engine.eval.calibration.report import setting_name
from twilight_engine.eval.calibration.search import (
    BY_LAYER,
    DENSE,
    GRID,
    Candidate,
    Result,
    Tolerance,
)
from twilight_engine.eval.plots import COLOURS, STYLE

MARKS = {"preset": "*", GRID: "o", DENSE: "s", BY_LAYER: "^"}
LEAST_MB = 1e-4  # what is drawn of none at all


def plot_sweep(result: Result, tolerance: Tolerance, title: str, path: Path) -> None:
    """Write a PNG: KL and perplexity with intervals, tolerances as dashed lines, held out in red.

    Raises: ModuleNotFoundError without matplotlib (extra `plots`).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(8.4, 7.6), sharex=True)
        for candidate in _drawn(result):
            mark, colour = MARKS[candidate.stage], COLOURS[0]
            _draw(upper, lower, candidate, mark, colour, filled=candidate.within)
        if result.chosen is not None:
            _draw(upper, lower, result.chosen.held_out, "D", COLOURS[1], filled=True)
            _draw(upper, lower, result.chosen.candidate, "o", COLOURS[1], filled=False, size=13)
            title += f"\nchosen (ringed): {setting_name(result.chosen.candidate)}"
        upper.axhline(tolerance.kl, color="black", lw=1, ls="--")
        lower.axhline(100 * tolerance.ppl, color="black", lw=1, ls="--")
        lower.axhline(0, color="#9aa5b1", lw=1)
        upper.set(xscale="log", yscale="log", title=title, ylabel="KL to dense, nats a token")
        lower.set(xscale="log", ylabel="perplexity above dense, %")
        lower.set_xlabel("MB over the link a step, one sequence")
        for axes in (upper, lower):
            axes.grid(color="#e4e7eb")
            axes.set_axisbelow(True)
        _legend(pyplot, figure, result)
        figure.savefig(path)
        pyplot.close(figure)


def _drawn(result: Result) -> Sequence[Candidate]:
    preset = [result.preset.candidate] if result.preset is not None else []
    return [*result.candidates, *preset]


def _draw(
    upper: Any,
    lower: Any,
    candidate: Candidate,
    mark: str,
    colour: str,
    *,
    filled: bool,
    size: int = 6,
) -> None:
    place = max(candidate.link_bytes / 1e6, LEAST_MB)
    ratio = candidate.ppl_ratio
    look = {
        "marker": mark,
        "markersize": 11 if mark == "*" else size,
        "color": colour,
        "markerfacecolor": colour if filled else "none",
        "ls": "none",
    }
    assert ratio.low is not None and ratio.high is not None
    upper.plot(place, candidate.kl.value, **look)
    lower.plot([place, place], [100 * (x - 1) for x in (ratio.low, ratio.high)], color=colour, lw=1)
    lower.plot(place, 100 * (ratio.value - 1), **look)


def _legend(pyplot: Any, figure: Any, result: Result) -> None:
    stages = dict.fromkeys(candidate.stage for candidate in _drawn(result))
    line = pyplot.Line2D
    handles = [
        line([], [], ls="none", marker=MARKS[stage], color=COLOURS[0], label=stage)
        for stage in stages
    ]
    empty = {"color": COLOURS[0], "markerfacecolor": "none"}
    handles.append(line([], [], ls="none", marker="o", label="not shown to be within", **empty))
    if result.chosen is not None:
        handles.append(
            line([], [], ls="none", marker="D", color=COLOURS[1], label="chosen, on held-out text")
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
