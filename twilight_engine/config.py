"""Configuration: what memory an engine holds, and how a step attends.

`KVConfig` fixes memory for an engine's life. `SparseConfig` may differ by request. Both check
themselves where they are built; everything below trusts them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PRESETS = ("balanced", "lean", "paper")
DEFAULT_PRESET = "balanced"

KIndex = Literal["int4_channel", "int4_token"]
VIndex = Literal["none", "int4"]
GroupRule = Literal["mean", "union"]
Tail = Literal["mean", "renormalise"]
Fetch = Literal["row", "page"]
Policy = Literal["graded", "dense"]

SELECTORS = ("all", "quest", "double_sparsity", "double_sparsity_online", "lsh", "streaming")
EVERY_CANDIDATE = 1 << 30  # as attn_top_k: whatever a selector keeps is exact
QUEST_BLOCK = 16  # tokens a bound covers where K codes are per token (Quest's page)
MAGICPIG_LSH = (10, 150)  # the paper's first setting of KVConfig.lsh
MAX_LSH_BITS = 16  # of one signature, which is stored as 16 bits
LSH_TABLES = (2, 512)  # a candidate agrees in two tables, so fewer than two find nothing
SUM_SLACK = 1e-3  # what shares written with six decimals may miss 1 by


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _share(name: str, value: float) -> None:
    if not _is_share(value) or value == 0:
        raise ValueError(f"{name} is {value!r}; it must lie in (0, 1]")


def _lsh_shape(value: Any) -> tuple[int, int]:
    """(bits a table, tables) of KVConfig.lsh, checked."""
    least, most = LSH_TABLES
    if isinstance(value, (tuple, list)) and len(value) == 2:
        bits, tables = value
        if all(isinstance(x, int) and not isinstance(x, bool) for x in (bits, tables)):
            if 1 <= bits <= MAX_LSH_BITS and least <= tables <= most:
                return bits, tables
    raise ValueError(
        f"lsh is {value!r}; it must be (bits a table, tables) with bits in [1, {MAX_LSH_BITS}] and "
        f"tables in [{least}, {most}], such as (10, 150), or None"
    )


@dataclass(frozen=True)
class KVConfig:
    """Where the KV cache lives and what the device keeps of it, for an engine's life.

    Args:
        page_size: tokens a page; the unit of allocation and of the index.
        k_index: how the device copy of K is quantised: per channel over a page, or per token.
        v_index: whether the device also keeps an INT4 copy of V.
        dense_layers: layers whose KV stays on the device at full precision, or "all".
        num_sink: first tokens of a sequence, always exact and on the device.
        num_recent: at least this many last tokens are exact and on the device; >= page_size.
        host_bytes: byte budget of the host arena; None: what max_model_len * max_num_seqs needs.
        hot_bytes: byte budget of the hot rows over all layers; None: a share of the context.
        lsh: (bits a table, tables) of the signatures that the device keeps of every K row, for the
            selector `lsh`: 2 bytes a table, token and KV head; MagicPIG's settings are (10, 150)
            and (8, 75). None: no signatures.
        hot_kv_share: the same as a share of all KV bytes, in place of hot_bytes.
        hot_shares: each layer's share of the hot rows, one a layer of the model, 0 for a dense one;
            None: the same for all graded layers.
    """

    page_size: int = 64
    k_index: KIndex = "int4_channel"
    v_index: VIndex = "int4"
    dense_layers: tuple[int, ...] | Literal["all"] = (0, 1)
    num_sink: int = 4
    num_recent: int = 128
    host_bytes: int | None = None
    hot_bytes: int | None = None
    lsh: tuple[int, int] | None = None
    hot_kv_share: float | None = None
    hot_shares: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.page_size, int) or self.page_size < 1:
            raise ValueError(f"page_size is {self.page_size!r}; it must be a whole number >= 1")
        _one_of("k_index", self.k_index, ("int4_channel", "int4_token"))
        _one_of("v_index", self.v_index, ("none", "int4"))
        if self.dense_layers != "all":
            layers = tuple(self.dense_layers)
            if any(not isinstance(i, int) or i < 0 for i in layers):
                raise ValueError(
                    f"dense_layers is {self.dense_layers!r}; it must be 'all' or layer numbers >= 0"
                )
            object.__setattr__(self, "dense_layers", layers)
        if self.num_sink < 0:
            raise ValueError(f"num_sink is {self.num_sink}; it must be >= 0")
        if self.num_recent < self.page_size:
            raise ValueError(
                f"num_recent is {self.num_recent}; it must be at least page_size "
                f"({self.page_size}), because an open page is read from the window"
            )
        for name in ("host_bytes", "hot_bytes"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}; it must be >= 0, or None for the default")
        if self.lsh is not None:
            object.__setattr__(self, "lsh", _lsh_shape(self.lsh))
        self._check_hot_shares()

    def _check_hot_shares(self) -> None:
        share, shares = self.hot_kv_share, self.hot_shares
        if share is not None and not _is_share(share):
            raise ValueError(f"hot_kv_share is {share!r}; it must lie in [0, 1], or be None")
        if share is not None and self.hot_bytes is not None:
            raise ValueError(
                f"hot_bytes is {self.hot_bytes} and hot_kv_share {share}; give one of them"
            )
        if shares is None:
            return
        shares = tuple(shares)
        if not all(map(_is_share, shares)) or abs(sum(shares) - 1) > SUM_SLACK:
            raise ValueError(
                f"hot_shares is {shares!r}; it must be shares >= 0, one a layer, that add up to 1"
            )
        object.__setattr__(self, "hot_shares", shares)

    @property
    def window_rows(self) -> int:
        """Rows of a sequence's ring of recent tokens: a multiple of page_size."""
        return -(-self.num_recent // self.page_size) * self.page_size + self.page_size

    @classmethod
    def preset(cls, name: str, **changes: Any) -> KVConfig:
        """The memory a preset needs, with some fields changed."""
        _one_of("preset", name, PRESETS)
        base: dict[str, dict[str, Any]] = {
            "balanced": {},
            "lean": {"v_index": "none"},
            "paper": {"k_index": "int4_token", "v_index": "none"},
        }
        return cls(**{**base[name], **changes})


@dataclass(frozen=True)
class SparseConfig:
    """How a decode step attends; may differ by request and, through `by_layer`, by layer.

    Args:
        policy: "graded" (select, prune, fetch) or "dense" (every row at full precision: from the
            device in dense layers, streamed from the host in the others).
        attn_top_p: attention mass that the exact rows must reach, in (0, 1]; 1 keeps every row.
        attn_top_k: exact rows a KV head, in place of attn_top_p.
        index_top_p: mass up to which rows keep an INT4 V; None: no index grade.
        group_rule: top-p on the mean weight of a GQA group, or the union of its heads' sets.
        tail: "mean" gives dropped tokens the mean V of their page, "renormalise" drops them.
        selector: a name of SELECTORS, or an object with the Selector interface.
        selector_budget: tokens the selector may keep: a share of the context in (0, 1], or a count.
        mass_margin: standard errors of the estimated mass, by the index's own quantiser, that
            attn_top_p is raised by, so that the true mass reaches it (docs/method.md); 0: none.
        fetch: "row" fetches the rows wanted, "page" every row of a page that holds one.
        by_layer: another SparseConfig for some layers.
        audit_every: of every so many decode steps of a sequence, one has a (layer, KV head) of its
            graded layers checked exactly against the host's rows, in the background, and reported
            in the metrics; None: no audits. That of by_layer's configs has no say.
    """

    policy: Policy = "graded"
    attn_top_p: float = 0.75
    attn_top_k: int | None = None
    index_top_p: float | None = 0.99
    group_rule: GroupRule = "mean"
    tail: Tail = "mean"
    selector: Any = "all"
    selector_budget: float | int = 0.25
    mass_margin: float = 1.0
    fetch: Fetch = "row"
    by_layer: Mapping[int, SparseConfig] = field(default_factory=dict)
    audit_every: int | None = None

    def __post_init__(self) -> None:
        _one_of("policy", self.policy, ("graded", "dense"))
        _share("attn_top_p", self.attn_top_p)
        if self.attn_top_k is not None and self.attn_top_k < 1:
            raise ValueError(f"attn_top_k is {self.attn_top_k}; it must be >= 1, or None")
        if self.index_top_p is not None:
            _share("index_top_p", self.index_top_p)
            if self.attn_top_k is None and self.index_top_p < self.attn_top_p < 1:
                raise ValueError(
                    f"index_top_p is {self.index_top_p}; it must be at least attn_top_p "
                    f"({self.attn_top_p}), or None for no index grade"
                )
        _one_of("group_rule", self.group_rule, ("mean", "union"))
        _one_of("tail", self.tail, ("mean", "renormalise"))
        _one_of("fetch", self.fetch, ("row", "page"))
        if self.audit_every is not None and (
            not isinstance(self.audit_every, int) or self.audit_every < 1
        ):
            raise ValueError(
                f"audit_every is {self.audit_every!r}; it must be a whole number >= 1, or None"
            )
        if self.mass_margin < 0:
            raise ValueError(f"mass_margin is {self.mass_margin}; it must be >= 0")
        if isinstance(self.selector, str):
            _one_of("selector", self.selector, SELECTORS)
        elif not callable(getattr(self.selector, "select", None)):
            raise ValueError(
                f"selector is {self.selector!r}; allowed: {', '.join(map(repr, SELECTORS))}, or an "
                "object with a select(q, view) method (see docs/selectors.md)"
            )
        if isinstance(self.selector_budget, float):
            _share("selector_budget", self.selector_budget)
        elif self.selector_budget < 1:
            raise ValueError(
                f"selector_budget is {self.selector_budget!r}; it must be a share in (0, 1] as a "
                "float, or a token count >= 1 as an int"
            )

    def layer(self, index: int) -> SparseConfig:
        """The config of one layer."""
        return self.by_layer.get(index, self)

    def replace(self, **changes: Any) -> SparseConfig:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    @property
    def keeps_every_row(self) -> bool:
        """Whether every row is exact by rule, so that no sum of floats decides."""
        return self.attn_top_k is None and self.attn_top_p >= 1

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SparseConfig:
        """A preset of the method (docs/method.md), with some fields changed."""
        _one_of("preset", name, PRESETS)
        base: dict[str, dict[str, Any]] = {
            "balanced": {},
            "lean": {"attn_top_p": 0.95, "index_top_p": None},
            "paper": {
                "attn_top_p": 0.95,
                "index_top_p": None,
                "group_rule": "union",
                "tail": "renormalise",
                "mass_margin": 0.0,
                "selector": "quest",
                "selector_budget": 0.25,
            },
        }
        return cls(**{**base[name], **changes})
