"""From options to the two configs."""

from __future__ import annotations

import re
from typing import Any, Literal

from twilight_engine.config import KVConfig, SparseConfig

LSH = (10, 150)  # MagicPIG's first setting


def kv_config(
    preset: str, *, page_size: int, dense_layers: str, selector: str | None = None
) -> KVConfig:
    """The cache config of these options; the recent window grows with the page.

    The selector `lsh` gets the signatures it needs.
    """
    recent = max(KVConfig.num_recent, page_size)
    layers = parse_layers(dense_layers)
    return KVConfig.preset(
        preset,
        page_size=page_size,
        num_recent=recent,
        dense_layers=layers,
        lsh=LSH if selector == "lsh" else None,
    )


def sparse_config(
    preset: str,
    *,
    policy: str,
    attn_top_p: float | None,
    attn_top_k: int | None,
    index_top_p: str | None,
    selector: str | None,
    fetch: str,
    audit_every: int | None = None,
) -> SparseConfig:
    """The attention config of these options; what is None stays the preset's.

    Raises: ValueError as the config does; for attn_top_p and attn_top_k together.
    """
    if attn_top_p is not None and attn_top_k is not None:
        raise ValueError("--attn-top-p and --attn-top-k are two ways to budget; give one of them")
    changes: dict[str, Any] = {
        "policy": policy,
        "fetch": fetch,
        "attn_top_k": attn_top_k,
        "audit_every": audit_every,
    }
    if attn_top_p is not None:
        changes["attn_top_p"] = attn_top_p
    if index_top_p is not None:
        changes["index_top_p"] = parse_mass("--index-top-p", index_top_p)
    if selector is not None:
        changes["selector"] = selector
    return SparseConfig.preset(preset, **changes)


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
