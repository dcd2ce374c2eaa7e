"""What the audits of a decode found: arrays of triples, and what they say together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MASS_SLACK = 0.01  # a triple keeps p if its realised mass is at most this far below it


@dataclass(frozen=True)
class Audits:
    """Audited (layer, KV head, step) triples of one request, A of them, each array [A].

    Attributes:
        step: tokens visible to the sequence in the step, its own included (telemetry's context).
        layer, kv_head: where.
        p: attn_top_p there; nan where attn_top_k chose the rows.
        estimated_mass: of the exact grade, residents included, as the pruner believed; group mean.
        realised_mass: the same set's share of the true softmax over all visible tokens, mean over
            the group's query heads.
        weakest_head_mass: the same of the query head that has least.
        output_error: |engine's output - exact output| / |exact output| (L2), mean over the heads.
        worst_head_error: the same of the query head that has most.
        bytes: host to device, moved by the audit itself.
    """

    step: Ints
    layer: Ints
    kv_head: Ints
    p: Floats
    estimated_mass: Floats
    realised_mass: Floats
    weakest_head_mass: Floats
    output_error: Floats
    worst_head_error: Floats
    bytes: Ints

    @property
    def count(self) -> int:
        return len(self.step)

    @property
    def mean_realised_mass(self) -> float:
        return float(self.realised_mass.mean())

    @property
    def share_kept(self) -> float | None:
        """Share of triples with realised_mass >= p - 0.01; None where none has a p."""
        promised = ~np.isnan(self.p)
        if not promised.any():
            return None
        return float((self.realised_mass >= self.p - MASS_SLACK)[promised].mean())

    @property
    def weakest_head(self) -> float:
        """The least mass of any query head of any triple."""
        return float(self.weakest_head_mass.min())

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values, after docs/offload_report.md; nan becomes null."""
        return {
            "count": self.count,
            "bytes": int(self.bytes.sum()),
            "mean_realised_mass": self.mean_realised_mass,
            "share_kept": self.share_kept,
            "weakest_head": self.weakest_head,
            "mean_output_error": float(self.output_error.mean()),
            "worst_head_error": float(self.worst_head_error.max()),
            "triples": {
                name: [None if np.isnan(x) else x for x in getattr(self, name).round(6).tolist()]
                for name in TRIPLE_FIELDS
            },
        }


# Of each triple in the JSON.
TRIPLE_FIELDS = (
    *("step", "layer", "kv_head", "p", "estimated_mass", "realised_mass"),
    *("weakest_head_mass", "output_error"),
)


def join_audits(parts: Sequence[Audits | None]) -> Audits | None:
    """All triples of the parts, one after the other; None if there is none."""
    found = [part for part in parts if part is not None and part.count]
    if not found:
        return None
    return Audits(
        **{
            field.name: np.concatenate([getattr(part, field.name) for part in found])
            for field in fields(Audits)
        }
    )
