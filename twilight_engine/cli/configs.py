"""From options to the two configs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from twilight_engine.config import DEFAULT_PRESET, MAGICPIG_LSH, KVConfig, SparseConfig


def engine_configs(
    preset: str | None,
    *,
    policy: str | None,
    attn_top_p: float | None,
    attn_top_k: int | None,
    index_top_p: str | None,
    selector: str | None,
    fetch: str | None,
    page_size: int | None,
    dense_layers: str | None,
    audit_every: int | None = None,
) -> tuple[KVConfig, SparseConfig] | tuple[None, None]:
    """Both configs, if an option says something about either; else the LLM's own choice: None.

    audit_every is only checked: it goes with each call, whatever the configs.

    Raises: ValueError as the configs do; for attn_top_p and attn_top_k together.
    """
    SparseConfig(audit_every=audit_every)
    attention = (policy, attn_top_p, attn_top_k, index_top_p, selector, fetch)
    if all(option is None for option in (*attention, page_size, dense_layers)):
        return None, None
    if attn_top_p is not None and attn_top_k is not None:
        raise ValueError("--attn-top-p and --attn-top-k are two ways to budget; give one of them")
    named: dict[str, Any] = {
        "policy": policy,
        "fetch": fetch,
        "attn_top_k": attn_top_k,
        "attn_top_p": attn_top_p,
        "selector": selector,
    }
    changes = {name: value for name, value in named.items() if value is not None}
    if index_top_p is not None:
        changes["index_top_p"] = parse_mass("--index-top-p", index_top_p)
    sparse = SparseConfig.preset(DEFAULT_PRESET if preset is None else preset, **changes)
    kv = kv_config(preset, page_size=page_size, dense_layers=dense_layers, selector=selector)
    return kv, sparse


def kv_config(
    preset: str | None,
    *,
    page_size: int | None,
    dense_layers: str | None,
    selector: str | None = None,
) -> KVConfig:
    """The cache config of these options; the recent window grows with the page.

    The selector `lsh` gets the signatures it needs.
    """
    changes: dict[str, Any] = {}
    if page_size is not None:
        recent = max(KVConfig.num_recent, page_size)
        changes |= {"page_size": page_size, "num_recent": recent}
    if dense_layers is not None:
        changes["dense_layers"] = parse_layers(dense_layers)
    if selector == "lsh":
        changes["lsh"] = MAGICPIG_LSH
    return KVConfig.preset(DEFAULT_PRESET if preset is None else preset, **changes)


def calibration_choice(option: str) -> str | None:
    """--calibration as LLM has it: 'none' is None."""
    return None if option == "none" else option


def parse_layers(text: str) -> tuple[int, ...] | Literal["all"]:
    """'0,1', 'all' or 'none' -> KVConfig.dense_layers."""
    if text == "all":
        return "all"
    if text == "none":
        return ()
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ValueError(
            f"--dense-layers is {text!r}; it must be layer numbers with commas, 'all' or 'none'"
        )
    return tuple(int(part) for part in text.split(","))


def parse_mass(option: str, text: str) -> float | None:
    """A number, or 'none'."""
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{option} is {text!r}; it must be a number in (0, 1] or 'none'") from None


def parse_shares(option: str, words: Sequence[str]) -> tuple[float, ...]:
    """'0.8,0.9' and '0.95' -> numbers, each once, ascending.

    Raises: ValueError for what is no number in (0, 1].
    """
    found = set()
    for part in (part.strip() for word in words for part in word.split(",")):
        try:
            share = float(part)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise ValueError(f"{option} is {part!r}; it must be a number in (0, 1]")
        found.add(share)
    return tuple(sorted(found))
