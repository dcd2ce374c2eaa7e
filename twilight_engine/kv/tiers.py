"""A layer's tiers and a step's buffers, and how they are allocated from the plan."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from twilight_engine.config import KVConfig
from twilight_engine.kv.hot_rows import allocate_hot_rows
from twilight_engine.kv.index import allocate_index
from twilight_engine.kv.lsh import make_projections, num_tables
from twilight_engine.kv.plan import MemoryPlan, ModelShape
from twilight_engine.layout import (
    ANNOUNCED_WORDS,
    NO_ROW,
    Announced,
    FetchLists,
    HotRows,
    IndexPages,
    LshHashes,
    Pruned,
    RowLists,
    Windows,
)
from twilight_engine.ops.estimate_scores import allocate_workspace
from twilight_engine.telemetry import LayerCounts


@dataclass(frozen=True)
class LayerKV:
    """One layer's tiers; a dense layer has `pages`, the others windows, index and hot rows."""

    host: Tensor  # [Hkv, P, S, 2 * D] on the CPU, pinned and mapped on a GPU
    pages: Tensor | None  # [Hkv, P, S, 2 * D] on the device
    windows: Windows | None
    index: IndexPages | None
    hot: HotRows | None
    lsh: LshHashes | None = None  # where the index keeps signatures


@dataclass(frozen=True)
class StepBuffers:
    """What a step of a sparse layer writes, at fixed addresses.

    All layers share the large tensors; counts and mass are the layer's own, in the step's log.
    """

    scores: Tensor  # [N, Hq, C] float32
    errors: Tensor  # [N, Hq, P] float32, of a sequence's pages
    estimate: Tensor | None  # workspace of estimate_scores; None on a CPU
    weights: Tensor  # [N, Hkv, C] float32, scratch of prune
    pruned: Pruned
    locations: Tensor  # [N, Hkv, C] int32
    fetch: FetchLists

    def first(self, n: int) -> StepBuffers:
        """The buffers of a step with n query rows."""
        if n == self.scores.shape[0]:
            return self
        lists = self.pruned
        return StepBuffers(
            self.scores[:n],
            self.errors[:n],
            self.estimate,
            self.weights[:n],
            Pruned(
                RowLists(lists.exact.tokens[:n], lists.exact.counts[:n]),
                lists.index_counts[:n],
                lists.grades[:n],
                lists.mass[:n],
            ),
            self.locations[:n],
            self.fetch.first(n),
        )


@dataclass(frozen=True)
class TierShape:
    """Allocates the tiers of a model's layers as planned."""

    model: ModelShape
    config: KVConfig
    plan: MemoryPlan
    max_num_seqs: int
    device: torch.device
    dtype: torch.dtype
    step: Tensor  # the counter of decode steps, which all layers share

    def dense_layer(self, host: Tensor) -> LayerKV:
        """A layer whose pages all stay on the device; `host` is its view of the arena."""
        return LayerKV(host, torch.zeros_like(host, device=self.device), None, None, None)

    def sparse_layer(self, host: Tensor, hot_slots: int) -> LayerKV:
        """A layer with windows, index and hot rows."""
        heads, dim, config = self.model.num_kv_heads, self.model.head_dim, self.config
        window_rows = self.max_num_seqs * heads * (config.num_sink + config.window_rows)
        rows = torch.zeros(window_rows + hot_slots, 2 * dim, dtype=self.dtype, device=self.device)
        index = allocate_index(
            self.plan.num_pages,
            heads,
            config.page_size,
            dim,
            config.k_index,
            config.v_index,
            self.device,
            lsh_tables=num_tables(config.lsh),
        )
        hot = None
        if hot_slots:
            hot = allocate_hot_rows(
                num_slots=hot_slots,
                first_row=window_rows,
                num_kv_heads=heads,
                num_pages=self.plan.num_pages,
                page_size=config.page_size,
                num_seq_slots=self.max_num_seqs,
                step=self.step,
                device=self.device,
            )
        windows = Windows(rows, heads, config.num_sink, config.window_rows)
        return LayerKV(host, None, windows, index, hot, self._hashes())

    @cached_property
    def _projections(self) -> Tensor | None:
        """The hash functions that all layers share; None without signatures."""
        if self.config.lsh is None:
            return None
        return make_projections(self.config.lsh, self.model.head_dim, self.device)

    def _hashes(self) -> LshHashes | None:
        """One layer's hash functions and centres."""
        if self.config.lsh is None or self._projections is None:
            return None
        shape = (self.max_num_seqs, self.model.num_kv_heads, self.model.head_dim)
        centres = torch.zeros(shape, dtype=torch.float32, device=self.device)
        return LshHashes(self.config.lsh[0], self._projections, centres)

    def step_buffers(self, counts: dict[int, LayerCounts]) -> dict[int, StepBuffers]:
        """Buffers for max_num_seqs query rows of capacity tokens, by layer, as `counts` is."""
        n, heads, capacity = self.max_num_seqs, self.model.num_kv_heads, self.plan.capacity

        def ints() -> Tensor:
            return torch.full((n, heads, capacity), NO_ROW, dtype=torch.int32, device=self.device)

        def floats(heads: int) -> Tensor:
            return torch.zeros(n, heads, capacity, device=self.device)

        if not counts:
            return {}
        num_q_heads, pages = self.model.num_q_heads, self.plan.pages_per_sequence
        scores, weights, locations = floats(num_q_heads), floats(heads), ints()
        errors = torch.zeros(n, num_q_heads, pages, device=self.device)
        estimate = allocate_workspace(n, num_q_heads, heads, self.device)
        exact, src, dst = ints(), ints(), ints()
        words = None
        if self.device.type == "cuda":
            shape = (n, heads, ANNOUNCED_WORDS)
            words = torch.full(shape, -1, dtype=torch.int64, device=self.device)
        grades = torch.zeros(n, heads, capacity, dtype=torch.uint8, device=self.device)
        return {
            layer: StepBuffers(
                scores=scores,
                errors=errors,
                estimate=estimate,
                weights=weights,
                pruned=Pruned(
                    exact=RowLists(exact, at.exact),
                    index_counts=at.index,
                    grades=grades,
                    mass=at.mass,
                ),
                locations=locations,
                fetch=FetchLists(
                    src,
                    dst,
                    at.missed,
                    at.direct,
                    None if words is None else Announced(words, self.step, layer),
                ),
            )
            for layer, at in counts.items()
        }
