"""Graded attention of one layer: select, estimate, prune, resolve, fetch, attend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twilight_engine.attention.selectors import (
    NEEDS_SIGNATURES,
    LayerView,
    LshSelector,
    make_selector,
)
from twilight_engine.attention.shared_config import shared_config
from twilight_engine.attention.step import append_step
from twilight_engine.config import SparseConfig
from twilight_engine.kv.cache import KVCache
from twilight_engine.kv.tiers import StepBuffers
from twilight_engine.layout import Pruned, RowLists, StepMeta
from twilight_engine.ops.attend_lower import attend_lower
from twilight_engine.ops.attend_rows import attend_rows
from twilight_engine.ops.attend_workspace import AttendState
from twilight_engine.ops.estimate_scores import estimate_scores
from twilight_engine.ops.gather_rows import NUM_BLOCKS, gather_rows
from twilight_engine.ops.merge_states import merge_states
from twilight_engine.ops.prune import list_all, prune
from twilight_engine.ops.resolve_rows import resolve_rows

# Thread blocks of a gather beside the lower grades: by the number of sequences, and at least. More
# put more reads on the link at once, which brings short lists sooner and long ones not, and slows
# the lower grades.
STEP_BLOCKS, LEAST_BLOCKS = 64, 16
# A step's K and V [N, Hkv, D] where the layer appends them itself.
NewRows = tuple[Tensor, Tensor] | None


class GradedAttention:
    """One softmax over three grades: exact rows, INT4 rows and page means (DESIGN: the method).

    The estimate gives every visible token an INT4 logit (resident tokens their exact one); prune
    grades them by mass; exact rows come from windows, hot rows or the host, while the lower grades
    are attended on a stream of their own.

    Args:
        cache: the engine's KV cache.
        layer: a sparse layer.
        configs: a SparseConfig for each sequence of the batch.
    Raises:
        ValueError: for configs that cannot share a batch or need tiers the cache lacks.
    """

    def __init__(self, cache: KVCache, layer: int, configs: Sequence[SparseConfig]) -> None:
        self.cache, self.layer = cache, layer
        self.config = config = shared_config(layer, configs)
        tiers = cache.layers[layer]
        assert tiers.windows is not None and tiers.index is not None
        self.tiers, self.windows, self.index = tiers, tiers.windows, tiers.index
        if config.index_top_p is not None and not config.keeps_every_row:
            if self.index.v_codes is None:
                raise ValueError(
                    f"index_top_p is {config.index_top_p}, but the cache keeps no INT4 V; build it "
                    "with KVConfig(v_index='int4'), or use index_top_p=None (preset 'lean')"
                )
        self.selector = make_selector(config)
        if isinstance(self.selector, LshSelector) and not config.keeps_every_row:
            if self.index.lsh_codes is None:
                raise ValueError(NEEDS_SIGNATURES)
        device = cache.device

        def floats(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        self.has_lower = config.index_top_p is not None or config.tail == "mean"
        self.top_p = floats([c.attn_top_p for c in configs])
        self.index_top_p = None
        if config.index_top_p is not None:
            self.index_top_p = floats([float(c.index_top_p or 0.0) for c in configs])
        self.top_k = None
        if config.attn_top_k is not None:
            budgets = [int(c.attn_top_k or 0) for c in configs]
            self.top_k = torch.tensor(budgets, dtype=torch.int32, device=device)

    @property
    def appends(self) -> bool:
        """Whether this layer appends the step's rows itself, beside its attention.

        The estimate brings the rows into the windows then, and nothing else needs them in a step;
        a selector reads what append_rows leaves, and without an estimate nobody brings them.
        """
        all_estimated = not self.config.keeps_every_row and self.config.selector == "all"
        return self.cache.append_stream is not None and all_estimated

    def __call__(self, q: Tensor, meta: StepMeta, new_rows: NewRows) -> Tensor:
        """Attention of the step's tokens.

        Args:
            q: [N, Hq, D].
            new_rows: the step's rows if this layer `appends`; None: they are appended already.
        Returns: [N, Hq, D] in q's dtype.
        """
        buffers = self._buffers(meta.num_queries)
        if self.config.keeps_every_row:
            exact = list_all(
                meta, self.windows.num_kv_heads, self.cache.plan.capacity, out=buffers.pruned.exact
            )
            locations = self._fetch(exact, meta, buffers)
            states = [self._attend_exact(q, exact, locations, meta)]
        else:
            states = self._attend_graded(q, meta, buffers, new_rows)
        out, _ = merge_states(states, q.dtype)
        return out

    def _attend_graded(
        self, q: Tensor, meta: StepMeta, buffers: StepBuffers, new_rows: NewRows
    ) -> list[AttendState]:
        pruned, scores, lse = self._prune(q, meta, buffers, new_rows)
        graded = None
        if self.cache.on_gpu and (self.has_lower or new_rows is not None):
            graded = self._current_stream.record_event()
        locations = self._fetch(pruned.exact, meta, buffers)
        states = self._start_lower(scores, lse, pruned, meta, graded)
        if new_rows is not None:
            self._append(new_rows, meta, graded)
        states.append(self._attend_exact(q, pruned.exact, locations, meta))
        if self.cache.side_stream is not None and self.has_lower:
            self._current_stream.wait_stream(self.cache.side_stream)
        if self.cache.append_stream is not None and new_rows is not None:
            self._current_stream.wait_stream(self.cache.append_stream)
        return states  # lse and the lower grades' state were kept until the streams met again

    @property
    def _current_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.cache.device)

    def _append(
        self, rows: tuple[Tensor, Tensor], meta: StepMeta, graded: torch.cuda.Event | None
    ) -> None:
        """Append the step's rows, on a stream beside resolve, fetch and attention.

        Beside estimate and prune its blocks would take the places of theirs, which want all
        multiprocessors.
        """
        stream = self.cache.append_stream
        assert stream is not None and graded is not None
        stream.wait_event(graded)
        with torch.cuda.stream(stream):
            append_step(self.cache, self.layer, *rows, meta)

    def _start_lower(
        self,
        scores: Tensor,
        lse: Tensor,
        pruned: Pruned,
        meta: StepMeta,
        graded: torch.cuda.Event | None,
    ) -> list[AttendState]:
        """Attend to the grades below exact, on a stream beside resolve and fetch.

        graded: recorded when prune was done.
        """
        if not self.has_lower:
            return []
        stream = self.cache.side_stream
        if stream is not None and graded is not None:
            stream.wait_event(graded)
        with torch.cuda.stream(stream):  # the current one where it is None
            state = attend_lower(
                scores,
                lse,
                pruned.grades,
                self.index,
                meta,
                tail=self.config.tail == "mean",
                index_counts=pruned.index_counts,
            )
        return [state]

    def _prune(
        self, q: Tensor, meta: StepMeta, buffers: StepBuffers, new_rows: NewRows = None
    ) -> tuple[Pruned, Tensor, Tensor]:
        """Select, estimate and grade every visible token: grades, scores, their log-sum-exp."""
        scale = self.cache.model.softmax_scale
        per_token = getattr(self.selector, "per_token", False)
        block = 1 if per_token else self.index.candidate_block
        view = LayerView(
            self.layer,
            self.index,
            self.windows,
            meta,
            scale,
            self.config.selector_budget,
            block,
            self.tiers.lsh,
        )
        candidates = self.selector.select(q, view)
        drop = self.config.tail != "mean"
        errors = None
        if self.config.mass_margin > 0 and self.top_k is None:
            errors = buffers.errors
        scores, lse = estimate_scores(
            q,
            self.index,
            self.windows,
            meta,
            softmax_scale=scale,
            candidates=candidates,
            block=block,
            left_out="drop" if drop else "midpoint",
            scores=buffers.scores,
            errors=errors,
            workspace=buffers.estimate,
            new_rows=new_rows,
        )
        pruned = prune(
            scores,
            lse,
            meta,
            top_p=self.top_p,
            index_top_p=self.index_top_p,
            top_k=self.top_k,
            group_rule=self.config.group_rule,
            num_kv_heads=self.windows.num_kv_heads,
            fetch_block=meta.page_size if self.config.fetch == "page" else 1,
            candidates=candidates,
            block=block,
            dropped=drop,
            errors=errors,
            margin=self.config.mass_margin,
            out=buffers.pruned,
            weights=buffers.weights,
        )
        return pruned, scores, lse

    def _fetch(self, exact: RowLists, meta: StepMeta, buffers: StepBuffers) -> Tensor:
        """Resolve against the hot rows, and gather what they lack; the locations of the rows."""
        log = self.cache.log
        counters = log.counters[self.layer]
        locations, fetch = resolve_rows(
            exact,
            self.tiers.hot,
            meta,
            locations=buffers.locations,
            fetch=buffers.fetch,
            counters=counters,
            shared_pages=self.cache.shares_pages,
        )
        if self.cache.on_gpu:
            gather_rows(
                self.tiers.host,
                fetch,
                self.windows.rows,
                counters=counters,
                times=log.link_ns[self.layer],
                num_blocks=self.gather_blocks(meta.num_seqs),
            )
            return locations
        with log.time_link():
            gather_rows(self.tiers.host, fetch, self.windows.rows, counters=counters)
        return locations

    def gather_blocks(self, num_seqs: int) -> int:
        """Thread blocks that fetch a step's rows."""
        return max(LEAST_BLOCKS, STEP_BLOCKS // num_seqs) if self.has_lower else NUM_BLOCKS

    def _attend_exact(
        self, q: Tensor, exact: RowLists, locations: Tensor, meta: StepMeta
    ) -> AttendState:
        """Attend over resident and fetched rows."""
        return attend_rows(
            q,
            self.windows,
            self.tiers.host,
            exact,
            locations,
            meta,
            softmax_scale=self.cache.model.softmax_scale,
            counters=self.cache.log.counters[self.layer],
        )

    def _buffers(self, n: int) -> StepBuffers:
        buffers = self.cache.buffers[self.layer]
        assert n <= buffers.scores.shape[0]
        return buffers.first(n)
