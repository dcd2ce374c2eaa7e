"""What the device may hold of a context, and what is left of it for hot rows."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from twilight_engine.config import KVConfig
from twilight_engine.eval.frontier import ITEM_BYTES
from twilight_engine.eval.memory import GIB, KEPT_TIERS
from twilight_engine.kv.plan import MemoryPlan, ModelShape, plan_memory


@dataclass(frozen=True)
class DeviceBudget:
    """Device bytes that one sequence may keep: index, windows, hot rows, slot maps, dense layers.

    Args:
        base: the preset's cache config; its dense layers and hot rows are what a search changes.
        context: tokens of the sequence.
        total_bytes: the budget.
    """

    model: ModelShape
    base: KVConfig
    context: int
    total_bytes: int

    @classmethod
    def parse(
        cls, text: str | None, model: ModelShape, base: KVConfig, context: int
    ) -> DeviceBudget:
        """From '0.4' or '40%' of the KV's bytes, '6GiB', or None for what the preset takes.

        Raises: ValueError for other words, or less than the least that graded layers need.
        """
        as_preset = cls(model, base, context, 0)
        kv_bytes = as_preset._plan(base).host_bytes
        total = _kept(as_preset._plan(base)) if text is None else _parse_bytes(text, kv_bytes)
        budget = dataclasses.replace(as_preset, total_bytes=total)
        if budget.hot_kv_share(()) is None:
            least = budget._least(()) / kv_bytes
            raise ValueError(
                f"--device-budget is {text!r}, {total / kv_bytes:.1%} of the KV of {context} "
                f"tokens; the index, the recent windows and a few hot rows alone take {least:.1%}"
            )
        return budget

    @property
    def kv_share(self) -> float:
        """The budget as a share of the bytes of all KV."""
        return self.total_bytes / self._plan(self.base).host_bytes

    def hot_kv_share(self, dense_layers: tuple[int, ...]) -> float | None:
        """Hot rows beside these dense layers, as KVConfig.hot_kv_share; None: they don't fit."""
        plan = self._smallest(dense_layers)
        room = self.total_bytes - _kept(plan) + plan.device["hot rows"]
        if room < plan.device["hot rows"]:
            return None
        row = 2 * self.model.head_dim * ITEM_BYTES
        graded = self.model.num_layers - len(plan.dense_layers)
        share = room * row / (row + 8) / plan.host_bytes  # a slot's state takes 8 bytes
        return min(share, graded / self.model.num_layers)

    def _least(self, dense_layers: tuple[int, ...]) -> int:
        return _kept(self._smallest(dense_layers))

    def _smallest(self, dense_layers: tuple[int, ...]) -> MemoryPlan:
        """A plan with as few hot rows as there may be."""
        return self._plan(
            dataclasses.replace(
                self.base, dense_layers=dense_layers, hot_bytes=None, hot_kv_share=0.0
            )
        )

    def _plan(self, kv_config: KVConfig) -> MemoryPlan:
        return plan_memory(
            self.model,
            kv_config,
            max_model_len=self.context,
            max_num_seqs=1,
            dtype_bytes=ITEM_BYTES,
        )


def _kept(plan: MemoryPlan) -> int:
    return sum(plan.device[tier] for tier in KEPT_TIERS)


def _parse_bytes(text: str, kv_bytes: int) -> int:
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%|GiB)?\s*", text)
    number = float(match[1]) if match else 0.0
    unit = match[2] if match else None
    if number <= 0 or (unit is None and number > 1):
        raise ValueError(
            f"--device-budget is {text!r}; it must be a share of the KV's bytes like 0.4 or 40%, "
            "or GiB like 6GiB"
        )
    if unit == "GiB":
        return int(number * GIB)
    return int(number * kv_bytes / (100 if unit == "%" else 1))
