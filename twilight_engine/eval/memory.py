"""How many sequences the caches of all methods hold at once, within a budget."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from twilight_engine.config import KVConfig
from twilight_engine.eval.items import Item, Passage, Question
from twilight_engine.eval.methods import Method
from twilight_engine.kv.cache import CachedModel, KVCache
from twilight_engine.kv.plan import MemoryPlan, ModelShape

GIB = 1 << 30
# What a method keeps on the device of a context; the plan's other tiers are scratch.
KEPT_TIERS = ("index", "hash functions", "windows", "hot rows", "slot maps", "dense layers")


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes the caches may take together, weights not included; None: no limit."""

    device_bytes: int | None = None
    host_bytes: int | None = None


@dataclass(frozen=True)
class CacheShape:
    """The caches of a run: what every method's KVConfig is made for.

    Args:
        max_len: tokens a sequence may come to have.
        hot_bytes: hot rows a sequence, over all layers, for methods whose KVConfig leaves it open.
    """

    model: CachedModel
    dtype: torch.dtype
    max_len: int
    hot_bytes: int

    def kv_config(self, method: Method, batch: int) -> KVConfig:
        """The method's KVConfig with the run's hot rows, the same bytes for every method."""
        if method.is_dense or method.kv.hot_bytes is not None:
            return method.kv
        return dataclasses.replace(method.kv, hot_bytes=self.hot_bytes * batch)

    def plan(self, kv_config: KVConfig, batch: int) -> MemoryPlan:
        return KVCache.plan_for(
            self.model,
            kv_config,
            max_model_len=self.max_len,
            max_num_seqs=batch,
            dtype=self.dtype,
        )

    def plans(self, methods: Sequence[Method], batch: int) -> list[MemoryPlan]:
        """A plan for each distinct cache."""
        configs = dict.fromkeys(self.kv_config(method, batch) for method in methods)
        return [self.plan(config, batch) for config in configs]


def default_hot_bytes(model: ModelShape, dtype: torch.dtype, max_len: int) -> int:
    """What the default preset takes for the hot rows of one sequence of max_len tokens."""
    plan = KVCache.plan_for(model, KVConfig(), max_model_len=max_len, max_num_seqs=1, dtype=dtype)
    row_bytes = 2 * model.head_dim * dtype.itemsize
    return sum(plan.hot_slots) * row_bytes


def device_bytes_kept(plan: MemoryPlan, batch: int) -> int:
    """Device bytes a sequence of max_len tokens takes under this plan, scratch not included."""
    return sum(plan.device.get(tier, 0) for tier in KEPT_TIERS) // batch


def choose_batch(
    shape: CacheShape,
    methods: Sequence[Method],
    *,
    batch: int,
    budget: MemoryBudget,
    step_bytes: int = 0,
) -> int:
    """The most sequences, up to `batch`, for which all caches of the methods fit the budget.

    Args:
        step_bytes: device bytes a sequence takes besides, for what its steps keep.
    Raises: ValueError if not even one sequence fits; it says what to lower.
    """
    for count in range(batch, 0, -1):
        plans = shape.plans(methods, count)
        device = sum(plan.device_bytes for plan in plans) + step_bytes * count
        host = sum(plan.host_bytes for plan in plans)
        over_device = budget.device_bytes is not None and device > budget.device_bytes
        over_host = budget.host_bytes is not None and host > budget.host_bytes
        if not over_device and not over_host:
            return count
    what, need, have = "host", host, budget.host_bytes
    if over_device:
        what, need, have = "device", device, budget.device_bytes
    raise ValueError(
        f"one sequence of {shape.max_len} tokens in the {len(plans)} caches of these methods needs "
        f"{need / GIB:.2f} GiB of {what} memory; the budget is {(have or 0) / GIB:.2f} GiB: lower "
        "the length, compare fewer methods at once, or raise the budget"
    )


def even_batches(count: int, most: int) -> list[range]:
    """`count` items as batches of nearly equal size, none larger than `most`."""
    batches = -(-count // most)
    edges = [i * count // batches for i in range(batches + 1)] if batches else [0]
    return [range(a, b) for a, b in itertools.pairwise(edges)]


def room_for(items: Sequence[Item] | Sequence[Passage], question: Question = "prefill") -> int:
    """The max_len that these need, whichever of them share a batch.

    A sequence keeps its place, and decodes, until the last one of its batch has ended: the longest
    prefill and the most steps count, be they of one item or of two.
    """
    prefilled, steps = 1, 0
    for item in items:
        if isinstance(item, Passage):
            done = max(1, len(item.context_ids) - 1)
            prefilled = max(prefilled, done)
            steps = max(steps, 1, tokens_of(item) - 1 - done)
            continue
        decoded = item.question_ids if question == "decode" else ()
        prefilled = max(prefilled, len(item.prompt_ids) - len(decoded))
        # The prefill gives the first token, or the question's last step does; none feeds the last.
        steps = max(steps, len(decoded) + item.max_new_tokens - 1)
    return prefilled + steps


def tokens_of(item: Item | Passage) -> int:
    """The most tokens that an item comes to, its answer or targets included."""
    if isinstance(item, Passage):
        return len(item.context_ids) + len(item.target_ids)
    return len(item.prompt_ids) + item.max_new_tokens
