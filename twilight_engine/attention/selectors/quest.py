"""Selector `quest`: the blocks whose upper bound of q . k is largest, per query head."""

from __future__ import annotations

from torch import Tensor

from twilight_engine.attention.selectors.base import LayerView
from twilight_engine.ops.quest_scores import quest_scores
from twilight_engine.ops.select_blocks import select_blocks


class QuestSelector:
    """Quest (arXiv 2406.10774): page bounds from the index, top blocks, union over a GQA group."""

    def select(self, q: Tensor, view: LayerView) -> Tensor | None:
        scores = quest_scores(
            q, view.index, view.meta, softmax_scale=view.softmax_scale, block=view.block
        )
        return select_blocks(
            scores,
            view.meta,
            budget=view.budget,
            block=view.block,
            page_size=view.meta.page_size,
            num_kv_heads=view.windows.num_kv_heads,
        )
