"""A grading to simulate: the engine's knobs, and formats that only the simulation has."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from twilight_engine.config import QUEST_BLOCK, KVConfig, SparseConfig

KFormat = Literal["exact", "int8_token", "int4_channel", "int4_token", "int2_channel"]
VFormat = Literal["none", "int2", "int4", "int8"]
Rule = Literal["mean", "union"]
SELECTORS = ("all", "quest", "streaming")  # those that are simulated
BITS = {"none": 0, "int2": 2, "int4": 4, "int8": 8}


@dataclass(frozen=True)
class Grading:
    """How simulated layers attend; the fields are KVConfig's and SparseConfig's where they share
    a name.

    Attributes:
        k_index, v_index: what the device keeps of every row; "exact" K stands for no quantiser.
        attn_top_k: exact rows a KV head in place of attn_top_p.
        value_only: exact rows take their logit from the index, and only V crosses the link.
        selector, selector_budget: SparseConfig's; an int budget counts tokens.
        dense_layers: layers that attend to every row exactly.
    """

    attn_top_p: float = 0.75
    attn_top_k: int | None = None
    index_top_p: float | None = 0.99
    group_rule: Rule = "mean"
    tail: Literal["mean", "renormalise"] = "mean"
    k_index: KFormat = "int4_channel"
    v_index: VFormat = "int4"
    value_only: bool = False
    selector: Literal["all", "quest", "streaming"] = "all"
    selector_budget: float | int = 0.25
    mass_margin: float = 1.0
    dense_layers: tuple[int, ...] = (0, 1)
    page_size: int = 64
    num_sink: int = 4
    num_recent: int = 128

    def replace(self, **changes: object) -> Grading:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @classmethod
    def of(cls, kv: KVConfig, sparse: SparseConfig, num_layers: int) -> Grading:
        """The grading of an engine's configs.

        Raises: NotImplementedError for what the simulation does not have.
        """
        if sparse.policy == "dense" or kv.dense_layers == "all" or sparse.keeps_every_row:
            return cls(dense_layers=tuple(range(num_layers)))
        if sparse.selector not in SELECTORS or sparse.fetch != "row":
            raise NotImplementedError(
                f"selector {sparse.selector!r}, fetch {sparse.fetch!r}; simulated: "
                f"{', '.join(map(repr, SELECTORS))}, fetch 'row'"
            )
        if sparse.selector != "all" and sparse.tail != "renormalise":
            raise NotImplementedError(
                f"selector {sparse.selector!r} with tail {sparse.tail!r}; simulated: 'renormalise'"
            )
        if sparse.selector == "quest" and kv.k_index != "int4_token":
            raise NotImplementedError(
                f"selector 'quest' with k_index {kv.k_index!r}; simulated: its bounds over "
                f"{QUEST_BLOCK} tokens, with 'int4_token'"
            )
        return cls(
            attn_top_p=sparse.attn_top_p,
            attn_top_k=sparse.attn_top_k,
            index_top_p=sparse.index_top_p,
            group_rule=sparse.group_rule,
            tail=sparse.tail,
            mass_margin=sparse.mass_margin,
            k_index=kv.k_index,
            v_index=kv.v_index,
            selector=sparse.selector,
            selector_budget=sparse.selector_budget,
            dense_layers=tuple(i for i in kv.dense_layers if isinstance(i, int)),
            page_size=kv.page_size,
            num_sink=kv.num_sink,
            num_recent=kv.num_recent,
        )

    @property
    def candidate_block(self) -> int:
        """Tokens of one selector decision: a page where K is per channel, else Quest's block."""
        return self.page_size if self.k_index.endswith("channel") else QUEST_BLOCK

    def index_bytes_a_token(self, head_dim: int) -> float:
        """Device bytes of the index for one token of one KV head."""
        size = self.page_size
        keys = {
            "exact": 2.0 * head_dim,
            "int8_token": head_dim + 4.0,
            "int4_channel": head_dim / 2 + 4.0 * head_dim / size,
            "int4_token": head_dim / 2 + 4.0 + 4.0 * head_dim / 16,
            "int2_channel": head_dim / 4 + 4.0 * head_dim / size,
        }[self.k_index]
        bits = BITS[self.v_index]
        values = bits * head_dim / 8 + 4.0 if bits else 0.0
        return keys + values + 2.0 * head_dim / size  # and the mean V of the page

    def fetched_bytes_a_row(self, row_bytes: int) -> float:
        """Link bytes of one missed row."""
        return row_bytes / 2 if self.value_only else float(row_bytes)
