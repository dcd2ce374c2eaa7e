"""Top-p of the true softmax, and of the softmax that a quantised K would have, head by head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twilight_engine.attention.prefill import causal_attention
from twilight_engine.eval.simulation.passage import PrefilledPassage
from twilight_engine.eval.simulation.quantisers import quantised_keys

# Bits and granularity: a scale and a minimum a channel of a page, or a token.
FORMATS = tuple(f"int{bits}_{along}" for along in ("channel", "token") for bits in (2, 4, 8))


@dataclass(frozen=True)
class LayerBudgets:
    """What top-p takes in one layer, for P masses, Hq query heads and T steps.

    Attributes:
        rows: [P, Hq, T] int64, the fewest tokens whose true weights reach each mass.
        captured: format -> [P, Hq, T], true mass of the tokens that top-p picks by the weights of
            a K index of that format.
    """

    rows: Tensor
    captured: dict[str, Tensor]


class BudgetObserver:
    """Dense attention of a passage's steps that measures top-p on the way; callable as `attend`.

    Args:
        masses: p, each in (0, 1]; with none, nothing is measured.
    Attributes:
        layers: a LayerBudgets a layer, once the steps have run.
    """

    def __init__(
        self,
        passage: PrefilledPassage,
        *,
        masses: Sequence[float],
        softmax_scale: float,
        page_size: int,
    ) -> None:
        self.passage, self.masses = passage, tuple(masses)
        self.softmax_scale, self.page_size = softmax_scale, page_size
        self.layers: list[LayerBudgets] = []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = torch.cat([self.passage.keys[layer], k])
        values = torch.cat([self.passage.values[layer], v])
        scale, size = self.softmax_scale, self.page_size
        if self.masses:
            found = layer_budgets(q, keys, self.masses, softmax_scale=scale, page_size=size)
            self.layers.append(found)
        out = causal_attention(q, keys, values, softmax_scale=scale, sliding_window=None)
        return out.to(q.dtype)


def layer_budgets(
    q: Tensor,
    keys: Tensor,
    masses: Sequence[float],
    *,
    softmax_scale: float,
    page_size: int,
    formats: Sequence[str] = FORMATS,
) -> LayerBudgets:
    """Plain top-p, as the paper's figures have it: a query head, all visible tokens, no margin.

    Pages that are full before the first step are quantised; the tokens after them are exact.

    Args:
        q: [T, Hq, D] of the last T tokens; keys: [L, Hkv, D]; any float dtype.
        masses: each in (0, 1]; 1 takes every visible token by rule.
    """
    steps, length = len(q), len(keys)
    grouped = q.float().unflatten(1, (keys.shape[1], -1)).permute(1, 2, 0, 3) * softmax_scale
    position = torch.arange(length - steps, length, device=q.device)
    hidden = torch.arange(length, device=q.device) > position[:, None]  # [T, L]
    pages = (length - steps) // page_size
    rows: list[Tensor] = []
    captured: dict[str, list[Tensor]] = {name: [] for name in formats}
    for head, queries in enumerate(grouped):  # a KV head at a time: the sorts are the memory
        k = keys[:, head].float()
        logits = queries @ k.T  # [G, T, L]
        weights = logits.masked_fill(hidden, -math.inf).softmax(-1)
        rows.append(_prefix(weights, masses, position + 1)[0])
        full = k[: pages * page_size].unflatten(0, (pages, page_size))[None]
        for name in formats:
            estimate = logits.clone()
            approximate = quantised_keys(full, name)[0].flatten(0, 2)
            estimate[..., : pages * page_size] = queries @ approximate.T
            estimate = estimate.masked_fill(hidden, -math.inf).softmax(-1)
            counts, order = _prefix(estimate, masses, position + 1)
            reached = weights.gather(-1, order).double().cumsum(-1)
            captured[name].append(reached.gather(-1, (counts - 1).permute(1, 2, 0)))
    return LayerBudgets(
        rows=torch.cat(rows, 1),
        captured={name: torch.cat(parts).permute(2, 0, 1) for name, parts in captured.items()},
    )


def _prefix(weights: Tensor, masses: Sequence[float], visible: Tensor) -> tuple[Tensor, Tensor]:
    """([P, G, T] sizes of the smallest sets that reach each mass, [G, T, L] tokens by weight)."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    reached = ordered.double().cumsum(-1)
    wanted = torch.tensor(masses, dtype=torch.float64, device=weights.device)
    counts = torch.searchsorted(reached, wanted.expand(*reached.shape[:2], -1).contiguous()) + 1
    counts = counts.minimum(visible[:, None])
    everything = visible[:, None].expand_as(counts)
    counts = torch.where(wanted >= 1, everything, counts)
    return counts.permute(2, 0, 1), order
