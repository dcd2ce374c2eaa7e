"""Graded attention of many query positions at once, in float32."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from twilight_engine.eval.simulation.grading import Grading
from twilight_engine.eval.simulation.quantisers import (
    quantised_keys,
    quantised_values,
    run_bounds,
)
from twilight_engine.layout import MOST_MASS, TIE_BITS


@dataclass(frozen=True)
class LayerTrace:
    """What one graded layer did at T steps.

    Attributes:
        wanted: [Hkv, T, L] bool, the exact rows beyond the resident ones.
        index_rows: [Hkv, T] rows of the index grade.
        estimated_mass: [Hkv, T] group-mean mass of the exact grade by the index.
        mass: [Hkv, T] the same of the true softmax; head_mass: [Hkv, G, T] of each query head.
        output_error: [Hkv, T] relative L2 error of the group's output.
    """

    wanted: Tensor
    index_rows: Tensor
    estimated_mass: Tensor
    mass: Tensor
    head_mass: Tensor
    output_error: Tensor


def simulate_layer(
    q: Tensor, keys: Tensor, values: Tensor, grading: Grading, softmax_scale: float
) -> tuple[Tensor, LayerTrace]:
    """Attention of the last T tokens of L, each over all tokens up to itself.

    Args:
        q: [T, Hq, D]; keys, values: [L, Hkv, D]; any float dtype.
    Returns: out [T, Hq, D] float32 and what was graded how.
    """
    step = _Step(q, keys, values, grading, softmax_scale)
    return step.run()


class _Step:
    """One layer's tensors; letters: H KV heads, G group, T steps, L tokens, P full pages."""

    def __init__(
        self, q: Tensor, keys: Tensor, values: Tensor, grading: Grading, scale: float
    ) -> None:
        steps, heads = q.shape[0], keys.shape[1]
        self.grading, self.size = grading, grading.page_size
        self.length = keys.shape[0]
        self.q = q.float().unflatten(1, (heads, -1)).permute(1, 2, 0, 3) * scale  # [H, G, T, D]
        self.keys = keys.float().transpose(0, 1)  # [H, L, D]
        self.values = values.float().transpose(0, 1)
        position = torch.arange(self.length - steps, self.length, device=q.device)[:, None]
        token = torch.arange(self.length, device=q.device)[None]
        window = (position + 1 - grading.num_recent).div(self.size, rounding_mode="floor")
        window = window.clamp(min=0) * self.size
        self.visible = token <= position  # [T, L]
        self.listed = (token >= grading.num_sink) & (token < window)
        self.resident = self.visible & ~self.listed
        self.full = int(window.max()) // self.size  # pages that some step lists

    def run(self) -> tuple[Tensor, LayerTrace]:
        grading = self.grading
        true = self._logits(self.keys)  # [H, G, T, L]
        pages = self._pages(self.keys)
        approximate, grid = quantised_keys(pages, grading.k_index)
        index = true.clone()
        index[..., : self.full * self.size] = self._logits(approximate.flatten(1, 2))
        estimate = torch.where(self.listed, index, true)
        candidates = self._candidates(pages)
        if candidates is not None and grading.tail == "renormalise":
            keep = candidates[:, None] | ~self.listed
            estimate = estimate.masked_fill(~keep, -math.inf)
        weights = self._softmax(estimate)
        allowed = self.listed if candidates is None else self.listed & candidates
        wanted, indexed = self._grade(weights, allowed, grid)
        exact = wanted | self.resident
        out = self._attend(true, index, exact, indexed, candidates)
        true_weights = self._softmax(true)
        dense = true_weights @ self.values[:, None]
        head_mass = (true_weights * exact[:, None]).sum(-1)
        error = (out - dense).flatten(3).norm(dim=-1) / dense.norm(dim=-1).clamp(min=1e-30)
        trace = LayerTrace(
            wanted=wanted,
            index_rows=indexed.sum(-1),
            estimated_mass=(weights.mean(1) * exact).sum(-1),
            mass=head_mass.mean(1),
            head_mass=head_mass,
            output_error=error.mean(1),
        )
        return out.permute(2, 0, 1, 3).flatten(1, 2), trace

    def _pages(self, x: Tensor) -> Tensor:
        pages: Tensor = x[:, : self.full * self.size].unflatten(1, (self.full, self.size))
        return pages

    def _logits(self, keys: Tensor) -> Tensor:
        logits: Tensor = self.q @ keys.transpose(1, 2)[:, None]
        return logits

    def _softmax(self, logits: Tensor) -> Tensor:
        weights: Tensor = logits.masked_fill(~self.visible, -math.inf).softmax(-1)
        return weights

    def _candidates(self, pages: Tensor) -> Tensor | None:
        """[H, T, L] what the selector leaves; None: everything."""
        if self.grading.selector == "all" or self.full == 0:
            return None
        if self.grading.selector == "streaming":
            return self._last_tokens().expand(len(pages), -1, -1)
        return self._best_blocks(pages)

    def _last_tokens(self) -> Tensor:
        """[T, L]: the last `selector_budget` tokens each step sees, in whole blocks."""
        budget, block = self.grading.selector_budget, self.grading.candidate_block
        seen = self.visible.sum(-1, keepdim=True)
        kept = (seen.double() * budget).ceil() if isinstance(budget, float) else budget
        token = torch.arange(self.length, device=seen.device)[None]
        inside: Tensor = (token // block + 1) * block > seen - kept
        return inside

    def _best_blocks(self, pages: Tensor) -> Tensor:
        """[H, T, L]: those of the largest upper bounds of q . k, as Quest has it."""
        budget, block = self.grading.selector_budget, self.grading.candidate_block
        lo, hi = run_bounds(pages, block)
        positive, negative = self.q.clamp(min=0), self.q.clamp(max=0)
        bound = positive @ hi.transpose(1, 2)[:, None] + negative @ lo.transpose(1, 2)[:, None]
        blocks = self.listed[:, : self.full * self.size].unflatten(1, (-1, block)).any(-1)
        bound = bound.masked_fill(~blocks, -math.inf)
        tokens = self.listed.sum(-1).double()
        tokens = tokens * budget if isinstance(budget, float) else torch.full_like(tokens, budget)
        keep = (tokens / block).ceil()[:, None]
        rank = bound.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        chosen = ((rank < keep) & blocks).any(1)  # [H, T, blocks], united over the group
        out = torch.zeros(*chosen.shape[:2], self.length, dtype=torch.bool, device=chosen.device)
        out[..., : self.full * self.size] = chosen.repeat_interleave(block, -1)
        return out

    def _grade(self, weights: Tensor, allowed: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        """(exact, index) [H, T, L] bool, beyond the resident rows."""
        grading = self.grading
        rows = weights.mean(1, keepdim=True) if grading.group_rule == "mean" else weights
        allowed = allowed.expand(*rows[:, 0].shape)[:, None].expand(rows.shape)
        resident = (rows * self.resident).double().sum(-1)
        ordered, order = rows.masked_fill(~allowed, -1.0).sort(-1, descending=True)
        before = ordered.clamp(min=0).double().cumsum(-1)
        before = before - ordered.clamp(min=0).double()
        p = torch.full_like(resident, grading.attn_top_p)
        if grading.mass_margin > 0:
            variance = grading.mass_margin**2 * self._mass_variance(weights, grid)
            p = (p + (p * (1 - p) * variance).sqrt()).clamp(max=MOST_MASS).maximum(p)
        if grading.attn_top_k is not None:
            rank = torch.arange(self.length, device=rows.device)
            budget = grading.attn_top_k - self.resident.sum(-1)
            wanted = (rank < budget[:, None]) & (ordered >= 0)
        else:
            wanted = _reaching(ordered, before, p - resident)
        chosen = torch.zeros_like(allowed).scatter(-1, order, wanted)
        if grading.index_top_p is None:
            indexed = torch.zeros_like(chosen)
        elif grading.index_top_p >= 1:
            indexed = allowed
        else:
            reach = (grading.index_top_p - resident).expand(p.shape)
            indexed = torch.zeros_like(allowed).scatter(
                -1, order, _reaching(ordered, before, reach)
            )
        exact = chosen.any(1)
        return exact, indexed.any(1) & ~exact

    def _mass_variance(self, weights: Tensor, grid: Tensor) -> Tensor:
        """[H, 1 or G, T] sum of the listed weights' variances, as ops.prune has it."""
        squared = self.q.square()
        if grid.shape[2] == 1:  # a step a channel
            pages = squared @ grid[:, :, 0].square().transpose(1, 2)[:, None]
        else:
            pages = squared.sum(-1, keepdim=True) * grid.square().mean((2, 3))[:, None, None]
        span = self.full * self.size
        error = (pages / 12).sqrt().repeat_interleave(self.size, -1)
        error = error * weights[..., :span] * self.listed[:, :span]
        if self.grading.group_rule == "mean":
            error = error.mean(1, keepdim=True)
        variance: Tensor = error.double().square().sum(-1)
        return variance

    def _attend(
        self,
        true: Tensor,
        index: Tensor,
        exact: Tensor,
        indexed: Tensor,
        candidates: Tensor | None,
    ) -> Tensor:
        """[H, G, T, D]: one softmax over the grades."""
        grading = self.grading
        from_host = self.resident if grading.value_only else exact
        logits = torch.where(from_host[:, None] if from_host.dim() == 3 else from_host, true, index)
        kept = self.visible.expand_as(exact)
        if grading.tail == "renormalise":
            kept = exact | indexed
        probs = logits.masked_fill(~kept[:, None], -math.inf).softmax(-1)
        out = (probs * exact[:, None]) @ self.values[:, None]
        if self.full == 0:
            return out
        values = self._pages(self.values)
        span = self.full * self.size
        if grading.index_top_p is not None:
            approximate = quantised_values(values, grading.v_index).flatten(1, 2)
            out = out + (probs * indexed[:, None])[..., :span] @ approximate[:, None]
        if grading.tail == "mean":
            tail = kept & ~exact & ~indexed
            by_page = (probs * tail[:, None])[..., :span].unflatten(-1, (self.full, self.size))
            out = out + by_page.sum(-1) @ values.mean(2).half().float()[:, None]
        return out


def _reaching(ordered: Tensor, before: Tensor, needed: Tensor) -> Tensor:
    """The smallest prefix of descending weights whose sum reaches `needed`, with its ties.

    Ties are weights that differ in their TIE_BITS low bits only, as in ops.prune.
    """
    wanted = (before < needed[..., None]) & (ordered >= 0)
    count = wanted.sum(-1, keepdim=True)
    leading = ordered.view(torch.int32) >> TIE_BITS
    threshold = leading.gather(-1, (count - 1).clamp(min=0))
    return (leading >= threshold) & (ordered >= 0) & (count > 0)
