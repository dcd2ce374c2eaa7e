"""Answers to requests that come a method at a time, worked out for every method at once."""

from __future__ import annotations

from collections.abc import Sequence

from twilight_engine.eval.channels import with_channels
from twilight_engine.eval.engine import EvalEngine
from twilight_engine.eval.items import Item, Passage
from twilight_engine.eval.memory import MemoryBudget, room_for, tokens_of
from twilight_engine.eval.methods import Method
from twilight_engine.eval.progress import EvalProgress
from twilight_engine.eval.records import Record, RunFolder
from twilight_engine.eval.run import Workload, run
from twilight_engine.models.load import LoadedModel

SHORTEST = 256  # tokens; requests below it share caches of this size


class Responder:
    """Runs requests by all methods when the first of them asks, and remembers.

    So each prompt is prefilled once, whichever method asks for it later, and what the folder has
    is not worked out again. Requests of about the same length share caches and batches. Double
    Sparsity's channels are ranked on the first request's prompt.

    Args:
        methods: every method that will ask.
        folder: keeps each result as soon as it is there, by the request's id and the method.
        batch: most sequences that decode together.
        hot_bytes, budget: as EvalEngine's.
        show: whether there is a progress bar.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        methods: Sequence[Method],
        folder: RunFolder,
        *,
        batch: int = 32,
        hot_bytes: int | None = None,
        budget: MemoryBudget | None = None,
        show: bool = False,
    ) -> None:
        self.loaded, self.methods, self.folder = loaded, methods, folder
        self.batch, self.hot_bytes, self.budget, self.show = batch, hot_bytes, budget, show
        self._asked: dict[str, set[str]] = {}

    def respond(self, asked: Sequence[Item] | Sequence[Passage], method: Method) -> list[Record]:
        """The record of each request by this method, in their order.

        Raises: ValueError for a budget that does not hold one sequence of the longest.
        """
        if asked and not self._asked:
            first = asked[0]
            ids = first.context_ids if isinstance(first, Passage) else first.prompt_ids
            self.methods = with_channels(self.methods, self.loaded.model, ids)
        for item in asked:
            self._asked.setdefault(item.group, set()).add(item.item_id)
        workloads = by_length(asked)
        pairs = sum(len(workload.items) for workload in workloads) * len(self.methods)
        with EvalProgress(pairs, show=self.show) as progress:
            run(self._make_engine, workloads, self.methods, self.folder, progress)
        found = {record["item"]: record for record in self.folder.of([method.name])}
        return [found[item.item_id] for item in asked]

    def records(self, group: str, method: Method) -> list[Record]:
        """Of the requests of this group that were asked for so far."""
        asked = self._asked.get(group, set())
        return [r for r in self.folder.of([method.name]) if r["item"] in asked]

    def _make_engine(self, workload: Workload) -> EvalEngine:
        return EvalEngine(
            self.loaded,
            self.methods,
            max_len=room_for(workload.items),
            batch=min(self.batch, len(workload.items)),
            hot_bytes=self.hot_bytes,
            budget=self.budget,
        )


def by_length(asked: Sequence[Item] | Sequence[Passage]) -> list[Workload]:
    """Each request once, those that fit the same power of two of tokens together.

    Within a workload those with fewer steps come first, so that a batch ends at about one time.
    """
    workloads: dict[int, dict[str, Item | Passage]] = {}
    for item in asked:
        length = max(SHORTEST, 1 << (tokens_of(item) - 1).bit_length())
        workloads.setdefault(length, {})[item.item_id] = item
    found = []
    for length, unique in sorted(workloads.items()):
        items = sorted(unique.values(), key=lambda item: (_steps(item), tokens_of(item)))
        found.append(Workload(length, items))  # type: ignore[arg-type]  # all of one kind
    return found


def _steps(item: Item | Passage) -> int:
    return len(item.target_ids) if isinstance(item, Passage) else item.max_new_tokens
