"""Methods to compare: a name, the memory it keeps and how its steps attend.

A method is written as one word, `base[+preset][@p][:tokens]`:

    dense                   every row, resident on the device
    dense-int4              INT4 K (per channel) and V of every row, none exact but the residents
    balanced, lean, paper   a preset; balanced@0.9 with another attn_top_p
    top_k:1024              the 1,024 rows a KV head with the largest INT4 estimate, nothing else
    quest:1024              a selector on its own: its best 1,024 tokens a query head, nothing else
    double_sparsity:1024    likewise; its channels come from the run's first text (eval.channels)
    quest+paper@0.85        a selector (a quarter of the context) under a preset's pruning
    lsh, lsh+balanced       LSH tables of K 10, L 150; lsh:8x75 has others. They have no budget.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from twilight_engine.config import (
    EVERY_CANDIDATE,
    MAGICPIG_LSH,
    PRESETS,
    SELECTORS,
    KVConfig,
    SparseConfig,
)

DEFAULT_METHOD = "balanced"  # the default preset; records name it `default`

# The table of docs/accuracy.md.
TABLE_METHODS = (
    *("dense", "dense-int4", "balanced", "lean", "paper"),
    *("quest:256", "quest:1024", "quest:4096", "quest+paper@0.85"),
    *("double_sparsity:256", "double_sparsity:1024", "double_sparsity:4096"),
    *("double_sparsity+paper@0.85", "double_sparsity+paper@0.95"),
    *("lsh", "lsh+paper@0.95", "streaming:1024"),
)


@dataclass(frozen=True)
class Method:
    """One way to decode, under the word that names it."""

    name: str
    kv: KVConfig
    sparse: SparseConfig

    @property
    def is_dense(self) -> bool:
        return self.kv.dense_layers == "all"


def parse_method(word: str) -> Method:
    """The method a word names.

    Raises: ValueError with what is allowed, for any other word.
    """
    match = re.fullmatch(
        r"(?P<base>[a-z_0-9]+(?:-int4)?)(?:\+(?P<preset>[a-z]+))?(?:@(?P<p>[\d.]+))?"
        r"(?::(?:(?P<lsh>\d+x\d+)|(?P<k>\d+)))?",
        word,
    )
    if match is None:
        raise _unknown(word)
    base, preset = match["base"], match["preset"]
    p = float(match["p"]) if match["p"] else None
    tokens = int(match["k"]) if match["k"] else None
    if base == "lsh" and tokens is None and (preset or p is None):
        bits, tables = map(int, match["lsh"].split("x")) if match["lsh"] else MAGICPIG_LSH
        return _lsh(word, preset, p, (bits, tables))
    if base == "lsh" or match["lsh"]:
        raise _unknown(word)
    if base in ("dense", "dense-int4") and (preset, p, tokens) == (None, None, None):
        return _dense(word)
    if base in PRESETS and preset is None and tokens is None:
        return _preset(word, base, p)
    if base == "top_k" and (preset, p) == (None, None) and tokens is not None:
        sparse = SparseConfig(attn_top_k=tokens, index_top_p=None, tail="renormalise")
        return Method(word, KVConfig.preset("lean"), sparse)
    if base in SELECTORS[1:] and preset in PRESETS:
        return _preset(word, str(preset), p, selector=base, tokens=tokens)
    if base in SELECTORS[1:] and (preset, p) == (None, None) and tokens is not None:
        return _plain_selector(word, base, tokens)
    raise _unknown(word)


def parse_methods(words: str) -> list[Method]:
    """Methods separated by commas; 'table' stands for TABLE_METHODS. Each name once."""
    names: list[str] = []
    for word in words.split(","):
        names += TABLE_METHODS if word.strip() == "table" else [word.strip()]
    return [parse_method(name) for name in dict.fromkeys(names)]


def _dense(word: str) -> Method:
    if word == "dense":
        return Method(word, KVConfig(dense_layers="all"), SparseConfig(policy="dense"))
    # top_k 1 lists nothing beyond the resident rows, and the index grade takes all the rest.
    return Method(word, KVConfig(), SparseConfig(attn_top_k=1, index_top_p=1.0))


def _preset(
    word: str, preset: str, p: float | None, selector: str | None = None, tokens: int | None = None
) -> Method:
    sparse = SparseConfig.preset(preset)
    if selector is not None:
        budget = 0.25 if tokens is None else tokens
        sparse = sparse.replace(selector=selector, selector_budget=budget)
    if p is not None:
        index_top_p = sparse.index_top_p
        if index_top_p is not None:
            index_top_p = max(index_top_p, p)
        sparse = sparse.replace(attn_top_p=p, index_top_p=index_top_p)
    return Method(word, KVConfig.preset(preset), sparse)


def _plain_selector(word: str, selector: str, tokens: int) -> Method:
    """Everything the selector keeps is exact, everything else is dropped."""
    # Quest's bounds are over 16 tokens, which the index per token keeps.
    kv = KVConfig.preset("paper" if selector == "quest" else "lean")
    return Method(word, kv, PLAIN.replace(selector=selector, selector_budget=tokens))


def _lsh(word: str, preset: str | None, p: float | None, tables: tuple[int, int]) -> Method:
    """The tables' candidates, all exact and nothing else, or under a preset's pruning."""
    if preset is None:
        return Method(word, KVConfig.preset("lean", lsh=tables), PLAIN.replace(selector="lsh"))
    method = _preset(word, preset, p, selector="lsh")
    return dataclasses.replace(method, kv=dataclasses.replace(method.kv, lsh=tables))


# Whatever the selector keeps is exact, and nothing else counts.
PLAIN = SparseConfig(
    attn_top_k=EVERY_CANDIDATE, index_top_p=None, group_rule="union", tail="renormalise"
)


def _unknown(word: str) -> ValueError:
    budgeted = [name for name in SELECTORS[1:] if name != "lsh"]
    return ValueError(
        f"unknown method {word!r}; allowed: dense, dense-int4, {', '.join(PRESETS)}, top_k:N, "
        "SELECTOR:N, SELECTOR+PRESET, with @p after a preset; selectors: "
        f"{', '.join(budgeted)}; and lsh or lsh+PRESET, with :BITSxTABLES at the end"
    )
