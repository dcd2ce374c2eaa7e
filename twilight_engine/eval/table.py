"""A run's summary on a terminal: one table, a row for each length and method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rich.table import Table

from twilight_engine.eval.summary import Estimate, Line

Cell = Callable[[Line], str]
MEBI = 1 << 20
MOST_GROUPS = 8  # in columns; more have a table of their own


def results_table(lines: Sequence[Line], title: str) -> Table:
    """Scores or predictions, then rows by grade, bytes and time, with intervals of 95 %."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    columns = _columns(lines)
    for name in columns:
        left = name in ("tokens", "method")
        table.add_column(name, justify="left" if left else "right", no_wrap=name == "method")
    last = None
    for line in lines:
        if last is not None and line.length != last:
            table.add_section()
        table.add_row(*(cell(line) for cell in columns.values()))
        last = line.length
    table.caption = (
        f"95 % intervals; {_span(line.items for line in lines)} items a row; rows a KV head of the "
        "graded layers; bytes and times a decode step, link and read bytes of one sequence, in "
        f"batches of {_span(round(line.batch) for line in lines)}"
    )
    return table


def groups_table(lines: Sequence[Line]) -> Table | None:
    """Scores of groups that are too many for `results_table`: a row each, a column a method."""
    groups = _groups(lines)
    if len(groups) <= MOST_GROUPS:
        return None
    methods = list(dict.fromkeys(line.method for line in lines))
    table = Table()
    for name in ("tokens", "group", "items", *methods):
        table.add_column(name, justify="left" if name in ("tokens", "group") else "right")
    for length in dict.fromkeys(line.length for line in lines):
        here = {line.method: line for line in lines if line.length == length}
        for group in groups:
            found = {m: line.groups[group] for m, line in here.items() if group in line.groups}
            cells = [_percent(found[m].value) if m in found else "" for m in methods]
            items = _span(estimate.count for estimate in found.values())
            table.add_row(f"{length:,}", group, items, *cells)
        table.add_section()
    return table


def _groups(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(group for line in lines for group in line.groups))


def _columns(lines: Sequence[Line]) -> dict[str, Cell]:
    columns: dict[str, Cell] = {
        "tokens": lambda line: f"{line.length:,}",
        "method": lambda line: line.method,
    }
    groups = _groups(lines)
    if any(line.ppl is not None for line in lines):
        columns |= {
            "ppl": lambda line: "" if line.ppl is None else f"{line.ppl:.3f}",
            "ppl / dense": lambda line: _with_interval(line.ppl_ratio, lambda x: f"{x:.4f}"),
            "KL": lambda line: _with_interval(line.kl, lambda x: f"{x:.1e}"),
            "same top": lambda line: "" if line.same_top is None else f"{line.same_top:.1%}",
        }
    elif groups:
        if 1 < len(groups) <= MOST_GROUPS:
            columns |= {group: _group(group) for group in groups}
        columns |= {
            "average": lambda line: _with_interval(line.score, _percent),
            "- dense": lambda line: _with_interval(line.score_change, _signed_percent),
        }
    columns |= {
        "exact": _rows("exact_rows"),
        "index": _rows("index_rows"),
        "tail": _rows("tail_rows"),
        "mass": lambda line: _number(line.costs["mass"], lambda x: f"{x:.3f}"),
        "link": _bytes("link_bytes"),
        "device read": _bytes("device_read_bytes"),
        "on device": _bytes("device_bytes"),
        "TPOT": lambda line: f"{line.step_s * 1e3:.1f} ms",
    }
    return columns


def _group(group: str) -> Cell:
    return lambda line: _percent(line.groups[group].value) if group in line.groups else ""


def _rows(name: str) -> Cell:
    return lambda line: _number(line.costs[name], lambda x: f"{x:,.0f}")


def _bytes(name: str) -> Cell:
    return lambda line: _number(line.costs[name], lambda x: f"{x / MEBI:,.2f} MiB")


def _number(value: float | None, form: Callable[[float], str]) -> str:
    return "" if value is None else form(value)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _signed_percent(value: float) -> str:
    return f"{100 * value:+.1f}"


def _with_interval(estimate: Estimate | None, form: Callable[[float], str]) -> str:
    if estimate is None:
        return ""
    if estimate.low is None or estimate.high is None:
        return form(estimate.value)
    return f"{form(estimate.value)} [{form(estimate.low)}, {form(estimate.high)}]"


def _span(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    return f"{found[0]}" if len(found) == 1 else f"{found[0]}-{found[-1]}"
