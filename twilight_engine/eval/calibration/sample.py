"""Passages of a text, prefilled once, and what any setting loses and wants on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from twilight_engine.eval.calibration.quotas import SIZES, Array, layer_curve
from twilight_engine.eval.frontier import COLD_STEPS
from twilight_engine.eval.items import Passage
from twilight_engine.eval.metrics import Z_95
from twilight_engine.eval.simulation.grading import Grading
from twilight_engine.eval.simulation.passage import (
    Outcome,
    kl_divergence,
    prefill_passage,
    simulate,
)
from twilight_engine.eval.summary import Estimate
from twilight_engine.models.decoder import DecoderModel


@dataclass(frozen=True)
class Setting:
    """What a calibration chooses, but for the hot rows.

    Args:
        by_layer: (layer, attn_top_p) of the layers that differ, ascending.
    """

    attn_top_p: float
    index_top_p: float | None
    dense_layers: tuple[int, ...]
    by_layer: tuple[tuple[int, float], ...] = ()

    def gradings(self, base: Grading) -> tuple[Grading, dict[int, Grading]]:
        """What to simulate: of all layers, and of those that differ."""
        main = base.replace(
            attn_top_p=self.attn_top_p,
            index_top_p=self.index_top_p,
            dense_layers=self.dense_layers,
        )
        return main, {layer: main.replace(attn_top_p=p) for layer, p in self.by_layer}


@dataclass(frozen=True)
class Measurement:
    """One setting on a sample.

    Attributes:
        kl: KL(dense || setting) a target, nats.
        ppl_ratio: perplexity / dense's on the same targets; the interval is of paired differences.
        layers: the graded ones.
        curves: [layers, len(SIZES)] rows a step fetched with a cache of each size.
        sets: [layers] mean exact rows of a step, over all heads.
        exact_rows, index_rows: mean of a graded layer and KV head.
    """

    kl: Estimate
    ppl_ratio: Estimate
    layers: tuple[int, ...]
    curves: Array
    sets: Array
    exact_rows: float
    index_rows: float


class Sample:
    """Passages in memory: K and V of every layer, and dense attention's predictions.

    Args:
        base: the preset's grading, whose other fields every setting shares.
        done: called after each passage and setting.
    Raises: NotImplementedError for a model with sliding windows.
    """

    def __init__(
        self,
        model: DecoderModel,
        base: Grading,
        passages: Sequence[Passage],
        done: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.base, self.done = model, base, done
        self.ids = [passage.item_id for passage in passages]
        dense = Grading(dense_layers=tuple(range(model.config.num_layers)))
        self._prefilled = [
            prefill_passage(model, list(p.context_ids), list(p.target_ids)) for p in passages
        ]
        self._dense = [simulate(model, p, dense).log_probs for p in self._prefilled]

    def measure(self, setting: Setting, *, passages: int | None = None) -> Measurement:
        """The setting on all passages, or on the first few."""
        grading, by_layer = setting.gradings(self.base)
        kls, differences, parts = [], [], []
        for prefilled, dense in zip(
            self._prefilled[:passages], self._dense[:passages], strict=True
        ):
            outcome = simulate(self.model, prefilled, grading, by_layer)
            targets = prefilled.next_ids[:, None]
            kls.append(kl_divergence(dense, outcome.log_probs))
            differences.append((dense - outcome.log_probs).gather(-1, targets)[:, 0])
            parts.append(_wanted(outcome))
            self.done()
        num_heads = self.model.config.num_kv_heads
        sets = np.mean([part.sets for part in parts], axis=0)
        return Measurement(
            kl=_estimate(torch.cat(kls)),
            ppl_ratio=_exp(_estimate(torch.cat(differences))),
            layers=parts[0].layers,
            curves=np.mean([part.curves for part in parts], axis=0),
            sets=sets,
            exact_rows=float(sets.mean()) / num_heads if len(sets) else 0.0,
            index_rows=float(np.mean([part.index_rows for part in parts])),
        )


@dataclass(frozen=True)
class _Wanted:
    """What a passage's graded layers want; see Measurement."""

    layers: tuple[int, ...]
    curves: Array
    sets: Array
    index_rows: float


def _wanted(outcome: Outcome) -> _Wanted:
    traces = outcome.traces
    curves = [layer_curve(trace.wanted, COLD_STEPS) for trace in traces.values()]
    sets = [trace.wanted.sum(-1).double().mean(1).sum().item() for trace in traces.values()]
    index = [trace.index_rows.double().mean().item() for trace in traces.values()]
    return _Wanted(
        layers=tuple(traces),
        curves=np.array(curves).reshape(len(traces), len(SIZES)),
        sets=np.array(sets),
        index_rows=sum(index) / max(len(index), 1),
    )


def _estimate(values: torch.Tensor) -> Estimate:
    """Mean over targets, with its 95 % interval by normal approximation."""
    half_width = Z_95 * values.double().std().item() / math.sqrt(len(values))
    return Estimate.around(values.double().tolist(), half_width)


def _exp(log: Estimate) -> Estimate:
    assert log.low is not None and log.high is not None
    return Estimate(math.exp(log.value), math.exp(log.low), math.exp(log.high), log.count)
