"""Which sequences run together: static batches of one attention graph that fit the host's pages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from twilight_engine.config import SparseConfig
from twilight_engine.runtime.request import Sequence


def graph_key(config: SparseConfig) -> tuple[Any, ...]:
    """What decides a step's kernels; sequences with equal keys can share a batch.

    attn_top_p, index_top_p and attn_top_k are device arrays, one value a sequence, so only their
    absence, and attn_top_p >= 1, which keeps every row by rule, count here. audit_every does not.
    """
    selector = config.selector if isinstance(config.selector, str) else id(config.selector)
    layers = tuple((i, graph_key(config.by_layer[i])) for i in sorted(config.by_layer))
    if config.policy == "dense":
        return ("dense", layers)
    return (
        config.policy,
        config.attn_top_k is None,
        config.keeps_every_row,
        config.index_top_p is None,
        config.group_rule,
        config.tail,
        selector,
        (type(config.selector_budget), config.selector_budget),
        config.fetch,
        config.mass_margin,
        layers,
    )


class StaticScheduler:
    """Hands out batches in order of arrival: the first waiting sequence and those that fit it.

    A batch reserves the pages its sequences may come to need, so that none runs out in the middle.
    """

    def __init__(self, sequences: Iterable[Sequence], *, max_num_seqs: int, page_size: int) -> None:
        self._waiting = list(sequences)
        self._max_num_seqs = max_num_seqs
        self._page_size = page_size

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def next_batch(self, free_tokens: int) -> list[Sequence]:
        """Take the next batch; the first sequence is always in it.

        Args:
            free_tokens: tokens that the free pages hold.
        """
        batch: list[Sequence] = []
        left: list[Sequence] = []
        key = graph_key(self._waiting[0].request.sparse)
        for sequence in self._waiting:
            tokens = -(-sequence.total_tokens // self._page_size) * self._page_size
            fits = len(batch) < self._max_num_seqs and tokens <= free_tokens
            if not batch or (fits and graph_key(sequence.request.sparse) == key):
                batch.append(sequence)
                free_tokens -= tokens
            else:
                left.append(sequence)
        self._waiting = left
        return batch
