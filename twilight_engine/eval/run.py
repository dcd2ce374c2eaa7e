"""A run: every method over every item, what is there already left out, results as they come."""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from twilight_engine.eval.engine import Answer, EvalEngine, Prediction
from twilight_engine.eval.items import Item, Passage, Question
from twilight_engine.eval.methods import Method
from twilight_engine.eval.metrics import METRICS
from twilight_engine.eval.progress import EvalProgress
from twilight_engine.eval.records import Record, RunFolder


@dataclass(frozen=True)
class Workload:
    """Items of one context length, or passages; an engine is made for each workload."""

    length: int
    items: Sequence[Item] | Sequence[Passage]

    @property
    def digest(self) -> str:
        """A hash of all that is asked: items of the same names with other texts differ in it."""
        text = repr([dataclasses.astuple(item) for item in self.items])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


MakeEngine = Callable[[Workload], EvalEngine]


def run(
    make_engine: MakeEngine,
    workloads: Sequence[Workload],
    methods: Sequence[Method],
    folder: RunFolder,
    progress: EvalProgress,
    *,
    question: Question = "prefill",
) -> None:
    """Fill the folder with every (item, method) pair that it lacks.

    Args:
        make_engine: builds the engine of a workload, with these methods.
        question: see EvalEngine.answer; passages have none.
    """
    for workload in workloads:
        pairs = [(item, method) for item in workload.items for method in methods]
        lacking = [
            (item, method)
            for item, method in pairs
            if not folder.has(workload.length, item.item_id, method.name)
        ]
        progress.done(len(pairs) - len(lacking))
        if not lacking:
            continue
        progress.doing("taking memory")
        with make_engine(workload) as engine:
            for batch in engine.batches(len(workload.items)):
                _run_batch(engine, workload, batch, folder, progress, question)


def _run_batch(
    engine: EvalEngine,
    workload: Workload,
    batch: range,
    folder: RunFolder,
    progress: EvalProgress,
    question: Question,
) -> None:
    """The methods that some item of the batch lacks."""
    chosen = [workload.items[i] for i in batch]
    lacking = [
        method
        for method in engine.methods
        if not all(folder.has(workload.length, item.item_id, method.name) for item in chosen)
    ]
    if not lacking:
        return
    progress.doing("prefill")
    results: Iterator[Sequence[Answer | Prediction]]
    if isinstance(chosen[0], Passage):
        if engine.kept_targets and not any(m.is_dense for m in lacking):
            # What the others are compared with is not on disk.
            lacking = [*(m for m in engine.methods if m.is_dense), *lacking]
        passages = [p for p in chosen if isinstance(p, Passage)]
        results = engine.predict(passages, lacking, on_tokens=progress.prefilled)
    else:
        items = [i for i in chosen if isinstance(i, Item)]
        results = engine.answer(items, lacking, question=question, on_tokens=progress.prefilled)
    following = iter([*(method.name for method in lacking[1:]), ""])
    for found in results:
        before = len(folder.records)
        folder.add(_record(result, workload.length) for result in found)
        progress.done(len(folder.records) - before)
        progress.doing(next(following))


def _record(result: Answer | Prediction, length: int) -> Record:
    """A line of results.jsonl."""
    item = result.passage if isinstance(result, Prediction) else result.item
    common = {"item": item.item_id, "method": result.method.name, "length": length}
    costs = {**dataclasses.asdict(result.cost), "step_s": result.step_s, "batch": result.batch}
    if isinstance(result, Prediction):
        return {**common, "task": "ppl", "group": item.group, **_prediction(result), **costs}
    return {**common, **_answer(result), **costs}


def _answer(answer: Answer) -> dict[str, Any]:
    item = answer.item
    score = None
    if item.metric is not None:
        score = float(METRICS[item.metric](answer.text, item.answers, **item.details))
    return {
        "task": item.task,
        "group": item.group,
        "score": score,
        "text": answer.text,
        "answers": list(item.answers),
        "details": dict(item.details),
        "prompt_tokens": len(item.prompt_ids),
        "new_tokens": len(answer.token_ids),
    }


def _prediction(prediction: Prediction) -> dict[str, Any]:
    kl, same = prediction.kl, prediction.same_top
    return {
        "targets": len(prediction.nll),
        "nll": statistics.fmean(prediction.nll),
        "all_top": all(prediction.is_top),
        "kl": None if kl is None else statistics.fmean(kl),
        "same_top": None if same is None else statistics.fmean(same),
        "prompt_tokens": len(prediction.passage.context_ids),
    }
