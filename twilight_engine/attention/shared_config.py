"""What the sequences of a batch have in common in a layer."""

from __future__ import annotations

from collections.abc import Sequence

from twilight_engine.config import SparseConfig


def shared_config(layer: int, configs: Sequence[SparseConfig]) -> SparseConfig:
    """The config of a batch, whose members may differ in their p, k and audits alone.

    Raises: ValueError if they differ otherwise.
    """
    first = configs[0]
    for other in configs[1:]:
        alike = other.replace(
            attn_top_p=first.attn_top_p,
            attn_top_k=first.attn_top_k,
            index_top_p=first.index_top_p,
            by_layer=first.by_layer,
            audit_every=first.audit_every,
        )
        if (
            alike != first
            or other.keeps_every_row != first.keeps_every_row
            or (other.index_top_p is None) != (first.index_top_p is None)
            or (other.attn_top_k is None) != (first.attn_top_k is None)
        ):
            raise ValueError(
                f"layer {layer}: sequences of one batch may differ in attn_top_p (below 1), "
                f"index_top_p, attn_top_k and audit_every alone; got {first} and {other}"
            )
    return first
