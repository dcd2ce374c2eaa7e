"""Queries under which the pipeline lists as many exact rows as a workload wants.

The length of each query is found by bisection on the pipeline itself: a longer one has fewer exact
rows. A layer's search is one CUDA graph, replayed for every step: a workload has thousands of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from decode_attention.policies import OpenGraded, PolicyDecode
from decode_attention.timing import Replay
from decode_attention.workload import Workload
from twilight_engine.layout import RowLists, StepMeta

LOGITS = (1.0, 64.0)  # of a key of 1: where the bisection looks
BISECTIONS = 12


@dataclass(frozen=True)
class Match:
    """How the sets that the pipeline chose compare with the wanted ones."""

    wanted: float  # rows a (layer, request, KV head), mean
    got: float
    recall: float  # share of the wanted rows that are in the exact list


class Search:
    """The bisection of one layer's queries, over tensors at fixed addresses.

    Args:
        exact_rows: the pipeline's exact lists for queries [B, Hq, D].
    """

    def __init__(self, workload: Workload, exact_rows: Callable[[Tensor], RowLists]) -> None:
        shape, device = workload.shape, workload.device
        self._exact_rows, self._scale = exact_rows, shape.softmax_scale
        self._head_lengths, self._dtype = workload.head_lengths, workload.queries.dtype
        self._wanted = torch.ones(
            workload.batch, shape.num_kv_heads, dtype=torch.int32, device=device
        )
        self._channel = torch.zeros(shape.head_dim, device=device)
        self._run = Replay(device, self._bisect)

    def __call__(self, wanted: Tensor, channel: int) -> Tensor:
        """Queries along a channel [B, Hq, D] with about `wanted` [B, Hkv] exact rows."""
        self._wanted.copy_(wanted.clamp(min=1))
        self._channel.zero_()
        self._channel[channel] = 1
        self._run()
        return self._found

    def _bisect(self) -> None:
        wanted = self._wanted
        low, high = (torch.full(wanted.shape, x, device=wanted.device).log() for x in LOGITS)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            many = self._exact_rows(self._query(middle.exp())).counts > wanted
            low, high = torch.where(many, middle, low), torch.where(many, high, middle)
        self._found = self._query(high.exp())

    def _query(self, logit: Tensor) -> Tensor:
        """[B, Hq, D] along the channel; a key of 1 has this logit [B, Hkv]."""
        lengths = (logit[..., None] * self._head_lengths / self._scale).flatten(1)
        return (lengths[..., None] * self._channel).to(self._dtype)


def calibrate(workload: Workload, decode: PolicyDecode) -> Match:
    """Set every query of the workload by this decode's pipeline, from the prompt on."""
    decode.begin_step()
    decode.advance()
    got: list[float] = []
    recall: list[float] = []
    sizes: list[float] = []
    looked_at = {0, workload.steps // 2, workload.steps - 1}
    for layer, graded in decode.layers.items():
        exact_rows = partial(_exact_rows, graded, decode.meta)
        search = Search(workload, exact_rows)
        for t in range(workload.steps):
            wanted = workload.counts(t, layer)
            workload.queries[t, layer] = q = search(wanted, t)
            if t in looked_at:
                sizes.append(float(wanted.float().mean()))
                _compare(exact_rows(q), workload.wanted[t][layer], got, recall)
    decode.end_step()
    workload.rewind()
    return Match(float(np.mean(sizes)), float(np.mean(got)), float(np.mean(recall)))


def _exact_rows(graded: OpenGraded, meta: StepMeta, q: Tensor) -> RowLists:
    return graded.prune(q, meta).exact


def _compare(
    lists: RowLists, wanted: list[list[np.ndarray]], got: list[float], recall: list[float]
) -> None:
    counts = lists.counts.cpu().numpy()
    tokens = lists.tokens[..., : max(1, int(counts.max()))].cpu().numpy()
    for b, heads in enumerate(wanted):
        for h, rows in enumerate(heads):
            chosen = tokens[b, h, : counts[b, h]]
            got.append(float(len(chosen)))
            if len(rows):
                recall.append(float(np.isin(rows, chosen).mean()))
