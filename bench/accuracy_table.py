"""The tables of docs/accuracy.md, in Markdown, from folders of `twilight eval`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from run_folders import TaskRuns, half_width

from twilight_engine.eval.frontier import CACHE_SHARE
from twilight_engine.eval.methods import DEFAULT_METHOD
from twilight_engine.eval.metrics import confidence_interval
from twilight_engine.eval.summary import Line

SCORES = "Score ± 95 % interval, in brackets the difference from dense on the same items; %."
PPL = "Perplexity / dense ± 95 % interval; KL, nats; exact rows a head; link bytes a step."


def task_table(runs: TaskRuns) -> Iterator[str]:
    """A row a method, a column a length."""
    cells = {(line.method, line.length): line for line in runs.lines()}
    lengths = sorted({length for _, length in cells})
    items = sorted({line.items for line in cells.values()})
    predicts = any(line.ppl is not None for line in cells.values())
    count = f"{items[0]}" if len(items) == 1 else f"{items[0]}-{items[-1]}"
    yield f"### {runs.model}, {runs.task} ({count} {'passages' if predicts else 'items'} a length)"
    yield ""
    yield PPL if predicts else SCORES
    yield ""
    yield from table(
        ["method", *(f"{length:,}" for length in lengths)],
        [
            [named(method), *(cell(cells.get((method, length)), runs) for length in lengths)]
            for method in dict.fromkeys(method for method, _ in cells)
        ],
    )


def cell(line: Line | None, runs: TaskRuns) -> str:
    if line is None:
        return ""
    if line.score is None:
        return prediction(line)
    mine = [
        record["score"]
        for record in runs.records
        if (record["length"], record["method"]) == (line.length, line.method)
    ]
    text = f"{100 * line.score.value:.1f} ± {100 * confidence_interval(mine):.1f}"
    if line.score_change is None:
        return text
    width = half_width(line.score_change)
    return f"{text} ({100 * line.score_change.value:+.1f} ± {100 * (width or 0.0):.1f})"


def prediction(line: Line) -> str:
    rows, link = line.costs["exact_rows"], line.costs["link_bytes"]
    if line.ppl_ratio is None:
        parts = [f"perplexity {line.ppl:.3f}"]
    else:
        width = half_width(line.ppl_ratio)
        parts = [f"{line.ppl_ratio.value:.4f}" + ("" if width is None else f" ± {width:.4f}")]
    if line.kl is not None:
        parts.append(f"{line.kl.value:.1e}")
    parts.append("" if rows is None else f"{rows:,.0f} rows")
    parts.append("" if link is None else f"{link / 1e6:,.2f} MB")
    return "; ".join(part for part in parts if part)


def frontier_table(record: dict[str, Any]) -> Iterator[str]:
    """A row a grading; those of several cache shares have one a share, by KL."""
    points = sorted(record["points"], key=lambda p: (p["kl"], -p["link_bytes"]))
    shares = len({p["cache_share"] for p in points}) > 1
    count = len(record["passages"])
    passages = f"{count} passage{'s' * (count > 1)} x {record['targets']} targets"
    yield f"### {record['model']}, {record['tokens']:,} tokens ({passages})"
    yield ""
    names = ["KL, nats", "perplexity / dense", "same top token", "exact rows a head (share)"]
    names += ["link a step", "device, of the KV", "device reads a step", "front"]
    yield from table(
        ["grading", *(["row cache"] if shares else []), *names],
        [
            [
                named(p["name"]),
                *([f"{100 * p['cache_share']:g}%"] if shares else []),
                f"{p['kl']:.1e}",
                f"{p['ppl'] / p['ppl_dense']:.4f}",
                f"{p['top1']:.1%}",
                f"{p['exact_rows']:.0f} ({p['exact_share']:.1%})",
                f"{p['link_bytes'] / 1e6:.2f} MB",
                f"{p['device_share']:.0%}",
                f"{p['device_reads'] / 1e6:.1f} MB",
                "*" if p["on_front"] else "",
            ]
            for p in points
        ],
    )
    if not shares and points[0]["cache_share"] != CACHE_SHARE:
        yield f"\nRow cache: {100 * points[0]['cache_share']:g}% of the graded layers' rows."


def named(method: str) -> str:
    return f"**{method}**" if method == DEFAULT_METHOD else method


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for cells in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(cells)} |"
