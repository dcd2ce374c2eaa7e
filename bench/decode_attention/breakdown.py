"""Each op of the step alone: the layers of one real step in turn, replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from decode_attention.machine import Machine, granules_of
from decode_attention.policies import OpenGraded, PolicyDecode
from decode_attention.steps import StepRun
from decode_attention.timing import Replay, spread, time_work
from decode_attention.workload import Workload
from twilight_engine.attention.selectors import LayerView
from twilight_engine.layout import FetchLists, Pruned, StepMeta
from twilight_engine.ops.append_rows import append_rows
from twilight_engine.ops.attend_lower import attend_lower
from twilight_engine.ops.attend_rows import attend_rows
from twilight_engine.ops.attend_workspace import AttendState
from twilight_engine.ops.estimate_scores import allocate_workspace, estimate_scores
from twilight_engine.ops.gather_rows import gather_rows
from twilight_engine.ops.merge_states import merge_states
from twilight_engine.ops.prune import allocate_pruned, prune
from twilight_engine.ops.resolve_rows import resolve_rows

BEFORE_ATTENTION = ("append", "select", "estimate", "prune", "resolve", "fetch")
ATTENTION = ("attend_lower", "attend_rows", "merge")
OPS = (*BEFORE_ATTENTION, *ATTENTION)
HOT_STATE = ("slot_map", "slot_key", "slot_stamp", "set_mean")


@dataclass(frozen=True)
class OpTimes:
    """Microseconds a layer of each op; those of the fetch with cold and with warm translations."""

    us: dict[str, dict[str, float]]
    fetch_warm_us: float
    granules: float  # a layer
    granules_by_row: float


class LayerOps:
    """The ops of one layer's step over tensors of its own, in order; each can run again."""

    def __init__(self, graded: OpenGraded, q: Tensor, k: Tensor, v: Tensor, meta: StepMeta) -> None:
        self.graded, self.q, self.k, self.v, self.meta = graded, q, k, v, meta
        self.cache, self.config = graded.cache, graded.config
        self.scale = self.cache.model.softmax_scale
        n, heads = meta.num_queries, graded.windows.num_kv_heads
        capacity, device = self.cache.plan.capacity, self.cache.device
        self.scores = torch.empty(n, q.shape[1], capacity, device=device)
        self.weights = torch.empty(n, heads, capacity, device=device)
        self.workspace = allocate_workspace(n, q.shape[1], heads, device)
        self.pruned: Pruned = allocate_pruned(n, heads, capacity, device)
        self.places = torch.empty(n, heads, capacity, dtype=torch.int32, device=device)
        self.lists = FetchLists.empty(n, heads, capacity, device)
        self.candidates: Tensor | None = None
        self.errors: Tensor | None = None
        if self.config.mass_margin > 0 and self.config.attn_top_k is None:
            self.errors = torch.empty(n, q.shape[1], meta.page_table.shape[1], device=device)
        self.states: dict[str, AttendState] = {}

    def names(self) -> list[str]:
        """The ops that this config runs."""
        config = self.config
        optional = {
            "select": config.selector != "all",
            "attend_lower": config.index_top_p is not None or config.tail == "mean",
        }
        return [name for name in OPS if optional.get(name, True)]

    def append(self) -> None:
        graded = self.graded
        host, index = graded.tiers.host, graded.index
        append_rows(self.k, self.v, graded.windows, host, self.meta, index=index)

    def select(self) -> None:
        graded = self.graded
        view = LayerView(
            graded.layer,
            graded.index,
            graded.windows,
            self.meta,
            self.scale,
            self.config.selector_budget,
            graded.index.candidate_block,
        )
        self.candidates = graded.selector.select(self.q, view)

    def estimate(self) -> None:
        _, self.lse = estimate_scores(
            self.q,
            self.graded.index,
            self.graded.windows,
            self.meta,
            softmax_scale=self.scale,
            candidates=self.candidates,
            left_out="midpoint" if self.config.tail == "mean" else "drop",
            scores=self.scores,
            errors=self.errors,
            workspace=self.workspace,
        )

    def prune(self) -> None:
        prune(
            self.scores,
            self.lse,
            self.meta,
            top_p=self.graded.top_p,
            index_top_p=self.graded.index_top_p,
            top_k=self.graded.top_k,
            group_rule=self.config.group_rule,
            num_kv_heads=self.graded.windows.num_kv_heads,
            fetch_block=self.meta.page_size if self.config.fetch == "page" else 1,
            candidates=self.candidates,
            block=self.graded.index.candidate_block,
            dropped=self.config.tail != "mean",
            errors=self.errors,
            margin=self.config.mass_margin,
            out=self.pruned,
            weights=self.weights,
        )

    def resolve(self) -> None:
        resolve_rows(
            self.pruned.exact,
            self.graded.tiers.hot,
            self.meta,
            locations=self.places,
            fetch=self.lists,
            shared_pages=self.graded.cache.shares_pages,
        )

    def fetch(self) -> None:
        graded = self.graded
        blocks = graded.gather_blocks(self.meta.num_seqs)
        gather_rows(graded.tiers.host, self.lists, graded.windows.rows, num_blocks=blocks)

    def attend_lower(self) -> None:
        self.states["lower"] = attend_lower(
            self.scores,
            self.lse,
            self.pruned.grades,
            self.graded.index,
            self.meta,
            tail=self.config.tail == "mean",
            index_counts=self.pruned.index_counts,
        )

    def attend_rows(self) -> None:
        self.states["rows"] = attend_rows(
            self.q,
            self.graded.windows,
            self.graded.tiers.host,
            self.pruned.exact,
            self.places,
            self.meta,
            softmax_scale=self.scale,
        )

    def merge(self) -> None:
        merge_states(list(self.states.values()), self.q.dtype)

    def op(self, name: str) -> Callable[[], None]:
        run: Callable[[], None] = getattr(self, name)
        return run


def time_ops(
    workload: Workload, machine: Machine, decode: PolicyDecode, *, at: int, repeats: int
) -> OpTimes:
    """Time the ops of step `at`, with the hot rows that the steps before it left.

    The L2 is cold before each run, and the translations before a fetch; the workload is taken back
    to the prompt.
    """
    run = StepRun(workload, machine, decode)
    run.run(at, stop=at)
    run.begin(at)
    shape = workload.shape
    layers = [
        LayerOps(decode.layers[i], run.q[i], workload.new_k[i], workload.new_v[i], decode.meta)
        for i in range(shape.num_layers)
    ]
    times: dict[str, dict[str, float]] = {}
    fetch_warm_us = 0.0
    for name in layers[0].names():
        restore = _restorer(layers) if name == "resolve" else lambda: None
        work = Replay(workload.device, partial(run_all, layers, name))

        cold = name in ("append", "fetch")  # they reach the host

        def before(restore: Callable[[], None] = restore, cold: bool = cold) -> None:
            restore()
            (machine.cool if cold else machine.flush_l2)()

        measured = time_work(workload.device, work, repeats=repeats, before=before)
        times[name] = spread([us / shape.num_layers for us in measured])
        if name == "fetch":
            warm = time_work(workload.device, work, repeats=repeats, before=machine.flush_l2)
            fetch_warm_us = spread([us / shape.num_layers for us in warm])["us"]
    decode.end_step()
    granules = [
        granules_of(
            ops.lists.src,
            ops.lists.counts,
            workload.cache.row_bytes,
            ops.graded.tiers.host.stride(0) * ops.graded.tiers.host.element_size(),
        )
        for ops in layers
    ]
    missed = sum(int(ops.lists.counts.sum()) for ops in layers)
    workload.rewind()
    return OpTimes(
        times, fetch_warm_us, float(np.mean(granules)), sum(granules) / missed if missed else 0.0
    )


def run_all(layers: list[LayerOps], *names: str) -> None:
    """The named ops of each layer, one layer after another."""
    for layer in layers:
        for name in names:
            layer.op(name)()


def _restorer(layers: list[LayerOps]) -> Callable[[], None]:
    """Puts the hot rows of every layer back to what they are now: resolve changes them."""
    kept = []
    for layer in layers:
        hot = layer.graded.tiers.hot
        if hot is not None:
            tensors = [getattr(hot, name) for name in HOT_STATE]
            kept += [(tensor, tensor.clone()) for tensor in tensors]

    def restore() -> None:
        for tensor, was in kept:
            tensor.copy_(was)

    return restore
