"""The progress of an evaluation, as a bar on stderr or not at all."""

from __future__ import annotations

from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class EvalProgress:
    """One bar over the (item, method) pairs, with what is being done before it.

    Args:
        total: pairs of the run.
        show: False shows nothing.
    """

    def __init__(self, total: int, *, show: bool) -> None:
        columns = (
            TextColumn("{task.description:<32}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), disable=not show)
        self._task = self._bar.add_task("", total=total)
        self._read = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def doing(self, what: str) -> None:
        """Say what comes next."""
        self._read = 0.0
        self._bar.update(self._task, description=what)

    def prefilled(self, tokens: float) -> None:
        self._read += tokens
        self._bar.update(self._task, description=f"prefill, {self._read:,.0f} tokens")

    def done(self, pairs: int) -> None:
        self._bar.advance(self._task, pairs)
