"""What a layer's step must at least read and write, and the time that takes at measured rates.

Bytes are those of the ops' interfaces, from the lists that the kernels really produced. Along the
critical path (a batch of 1): estimate, then prune, then the slower of the fetch and attending what
is resident, then the rows that came last. By resource (large batches, where sequences overlap):
the larger of all device bytes and the link.
"""

from __future__ import annotations

from dataclasses import dataclass

from decode_attention.machine import Rates
from twilight_engine.config import KVConfig

LARGE_BATCH = 8  # from here on the floor goes by resource


@dataclass(frozen=True)
class Rows:
    """Rows of one layer's step, all requests and KV heads together."""

    exact: float
    index: float
    tail: float
    resident: float
    missed: float

    @property
    def listed(self) -> float:
        return self.exact + self.index + self.tail

    @property
    def hit_rate(self) -> float:
        return 1 - self.missed / self.exact if self.exact else 1.0


@dataclass(frozen=True)
class StepBytes:
    """Device bytes by op, and what crosses the link, of one layer's step."""

    device: dict[str, float]
    missed: float
    granules: float

    @property
    def total(self) -> float:
        return sum(self.device.values())


FETCH_WRITES = "fetch"  # the only op whose floor is the link's
BEFORE_FETCH = ("estimate", "prune", "resolve")


def step_bytes(
    rows: Rows,
    *,
    group: int,
    batch_heads: int,
    head_dim: int,
    itemsize: int,
    kv: KVConfig,
    balanced: bool,
    margin: bool,
    granules: float,
) -> StepBytes:
    """Bytes of one layer's step.

    Args:
        group: query heads a KV head. batch_heads: sequences times KV heads.
        balanced: whether there are an index grade and a tail of page means.
        margin: whether the estimate gives prune its errors.
        granules: of host memory that the fetch touches.
    """
    d, size, row = head_dim, kv.page_size, 2 * head_dim * itemsize
    visible = rows.listed + rows.resident
    pages = rows.listed / size
    per_page = 4 * d  # scale and min per channel, float16
    if kv.k_index == "int4_token":
        per_page = 4 * size
    errors = 4 * group * pages if margin else 0
    states = batch_heads * group * (4 * d + 4)
    parts = 2 if balanced else 1  # states that are merged
    device = {
        "estimate": rows.listed * d / 2
        + pages * per_page
        + rows.resident * d * itemsize
        + 4 * group * visible
        + errors,
        "prune": (4 * group + 1) * visible + 4 * rows.exact + errors,
        "resolve": 16 * rows.exact,  # token, map entry, stamp, location
        FETCH_WRITES: rows.missed * row,
        "attend_rows": (rows.exact + rows.resident) * row + 8 * rows.exact + states,
        "merge": parts * states + batch_heads * group * d * itemsize,
    }
    if balanced:
        device["attend_lower"] = (
            rows.listed
            + 4 * group * (rows.index + rows.tail)
            + rows.index * (d / 2 + 4)
            + pages * 2 * d
            + states
        )
    return StepBytes(device, rows.missed * row, granules)


def path_floor_us(step: StepBytes, rates: Rates) -> float:
    """Along the critical path of one sequence."""
    before = sum(step.device.get(op, 0.0) for op in BEFORE_FETCH)
    resident = step.total - before - step.device[FETCH_WRITES] - step.missed
    fetch = rates.link_us(step.missed, step.granules)
    last = rates.hbm_us(step.missed)
    return rates.hbm_us(before) + max(fetch, rates.hbm_us(resident)) + last


def resource_floor_us(step: StepBytes, rates: Rates) -> float:
    """By resource, with everything overlapped."""
    return max(rates.hbm_us(step.total), rates.link_us(step.missed, step.granules))


def floor_us(step: StepBytes, rates: Rates, batch: int) -> float:
    """The floor that DESIGN names for this batch."""
    by = resource_floor_us if batch >= LARGE_BATCH else path_floor_us
    return by(step, rates)
