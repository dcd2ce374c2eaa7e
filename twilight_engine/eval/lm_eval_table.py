"""lm-evaluation-harness's results on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from twilight_engine.eval.lm_eval_lines import TaskLine

MEBI = 1 << 20
COLUMNS = ("task", "metric", "items", "method", "value", "- dense", "exact", "link", "on device")


def tasks_table(lines: Sequence[TaskLine], title: str) -> Table:
    """A row for each task, metric and method; errors are standard errors, as lm-eval's."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    for name in (*COLUMNS, "TPOT"):
        left = name in ("task", "metric", "method")
        table.add_column(name, justify="left" if left else "right", no_wrap=name == "method")
    last: tuple[str, str] | None = None
    for line in lines:
        here = (line.task, line.metric)
        if last is not None and here != last:
            table.add_section()
        named = ("", "", "") if here == last else (*here, str(line.items))
        last = here
        table.add_row(
            *named,
            line.method,
            _with_error(line.value, line.stderr, ".4f"),
            _with_error(line.change, line.change_stderr, "+.4f"),
            _cost(line, "exact_rows", ",.0f", 1, ""),
            _cost(line, "link_bytes", ",.2f", MEBI, " MiB"),
            _cost(line, "device_bytes", ",.2f", MEBI, " MiB"),
            "" if line.step_s is None else f"{line.step_s * 1e3:.1f} ms",
        )
    table.caption = (
        "± standard error, of a difference from dense on the same items; exact rows a KV head of "
        "the graded layers; bytes and time a decode step of one sequence"
    )
    return table


def _with_error(value: float | None, error: float | None, form: str) -> str:
    if value is None:
        return ""
    return f"{value:{form}}" + ("" if error is None else f" ± {error:.4f}")


def _cost(line: TaskLine, name: str, form: str, unit: int, suffix: str) -> str:
    value = line.costs.get(name)
    return "" if value is None else f"{value / unit:{form}}{suffix}"
