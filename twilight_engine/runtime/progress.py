"""Progress of a run, as bars on stderr or not at all."""

from __future__ import annotations

from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class RunProgress(Protocol):
    """Told what a run has done; both counts grow."""

    def prefilled(self, tokens: float) -> None: ...
    def decoded(self, tokens: int) -> None: ...


class NoProgress:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def prefilled(self, tokens: float) -> None:
        return None

    def decoded(self, tokens: int) -> None:
        return None


class ProgressBars:
    """Two bars with rates: prompt tokens through prefill, and tokens generated.

    Args:
        prompt_tokens: over all sequences of the run.
        max_tokens: most tokens the run can generate; it may end earlier.
    """

    def __init__(self, prompt_tokens: int, max_tokens: int) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} tokens"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
        )
        self._bars = Progress(*columns, console=Console(stderr=True))
        self._prefill = self._bars.add_task("prefill", total=prompt_tokens, rate="")
        self._decode = self._bars.add_task("decode ", total=max_tokens, rate="", start=False)
        self._decoding = False

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()

    def prefilled(self, tokens: float) -> None:
        self._advance(self._prefill, tokens)

    def decoded(self, tokens: int) -> None:
        if not self._decoding:
            self._bars.start_task(self._decode)
            self._decoding = True
        self._advance(self._decode, tokens)

    def _advance(self, task_id: TaskID, tokens: float) -> None:
        task = self._bars.tasks[task_id]
        done = task.completed + tokens
        rate = f"{done / task.elapsed:,.1f} tokens/s" if task.elapsed else ""
        self._bars.update(task_id, completed=done, rate=rate)


def make_progress(show: bool, *, prompt_tokens: int, max_tokens: int) -> ProgressBars | NoProgress:
    """Bars where they are wanted and there is something to do."""
    return ProgressBars(prompt_tokens, max_tokens) if show and max_tokens else NoProgress()
