"""The frontier's run: every grading on every passage, what is on disk already left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from twilight_engine.eval.frontier import CACHE_SHARE, FrontierPoint, mark_front, measure, points
from twilight_engine.eval.items import Passage
from twilight_engine.eval.records import RunFolder
from twilight_engine.eval.simulation.grading import Grading
from twilight_engine.eval.simulation.passage import prefill_passage, simulate
from twilight_engine.models.decoder import DecoderModel


@torch.inference_mode()
def frontier(
    model: DecoderModel,
    passages: Sequence[Passage],
    sweep: Mapping[str, Grading],
    folder: RunFolder,
    *,
    cache_shares: Sequence[float] = (CACHE_SHARE,),
    progress: Callable[[int], None] = lambda count: None,
) -> list[FrontierPoint]:
    """Simulate the gradings that the folder lacks on every passage; then all points.

    Args:
        sweep: name -> grading.
        folder: takes a record a passage and grading, as it comes; of the same model, passages and
            cache shares.
        cache_shares: of a graded layer's rows that its row cache holds; a point each.
        progress: called with how many gradings of a passage are done more.
    Raises: NotImplementedError for a model with sliding windows.
    """
    dense = Grading(dense_layers=tuple(range(model.config.num_layers)))
    for passage in passages:
        length = len(passage.context_ids) + len(passage.target_ids)
        lacking = [name for name in sweep if not folder.has(length, passage.item_id, name)]
        progress(len(sweep) - len(lacking))
        if not lacking:
            continue
        prefilled = prefill_passage(model, list(passage.context_ids), list(passage.target_ids))
        reference = simulate(model, prefilled, dense)
        for name in lacking:
            outcome = simulate(model, prefilled, sweep[name])
            targets = prefilled.next_ids
            found = measure(
                model, sweep[name], outcome, reference, targets, length - 1, cache_shares
            )
            folder.add([{"length": length, "item": passage.item_id, "method": name, **found}])
            progress(1)
    return mark_front([point for name in sweep for point in points(name, folder.of([name]))])
