"""What a request cost: times, bytes over the link, rows by grade, budgets and mass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twilight_engine.attention.audit_record import Audits
from twilight_engine.layout import (
    COUNTER_DIRECT_BYTES,
    COUNTER_DIRECT_ROWS,
    COUNTER_FETCHED_BYTES,
    COUNTER_MISSED_ROWS,
    COUNTER_STREAMED_BYTES,
    COUNTER_WRITTEN_BYTES,
)
from twilight_engine.telemetry import Array, Steps


@dataclass(frozen=True)
class RequestMetrics:
    """A finished request's figures, summed over its n sequences.

    Bytes and rows count decode steps, unless their name says prefill. In a batch of several
    sequences the counters see the batch: fetched and direct bytes are split by each sequence's
    rows, streamed bytes by its context, written bytes evenly.

    Attributes:
        arrival_time, started_time, first_token_time, finished_time: seconds since the epoch.
        prefill_s: time in prefill, the first token's sampling included.
        decode_s: time in the decode steps it took part in.
        fetched_bytes: host to device, missed rows gathered into hot slots.
        direct_bytes: host to device, rows that attention read in place for want of a slot.
        streamed_bytes: host to device, the dense policy's whole contexts.
        written_bytes: device to host, the rows of new tokens.
        prefill_written_bytes: device to host, the rows of the prompt.
        exact_rows, index_rows, tail_rows, resident_rows: rows attended by grade, over steps,
            layers and KV heads; resident ones are exact too, but never leave the device.
        missed_rows, direct_rows: exact rows that crossed the link, by way.
        link_s: time the link was busy with fetches and streams, whole batch.
        budget_by_layer: [L, Hkv] mean exact rows a step, resident ones left out.
        mass_by_layer: [L] mean estimated attention mass of the exact grade, resident included.
        steps: the per-step arrays of each sequence, for reports.
        audits: triples of its steps that were checked exactly (SparseConfig.audit_every); None if
            there are none. On a CPU their time is part of decode_s.
    """

    arrival_time: float
    started_time: float
    first_token_time: float
    finished_time: float
    prefill_s: float
    decode_s: float
    num_prompt_tokens: int
    num_generated_tokens: int
    num_decode_steps: int
    fetched_bytes: int
    direct_bytes: int
    streamed_bytes: int
    written_bytes: int
    prefill_written_bytes: int
    exact_rows: int
    index_rows: int
    tail_rows: int
    resident_rows: int
    missed_rows: int
    direct_rows: int
    link_s: float
    budget_by_layer: NDArray[np.float64] = field(repr=False)
    mass_by_layer: NDArray[np.float64] = field(repr=False)
    steps: tuple[Steps, ...] = field(repr=False)
    audits: Audits | None = field(repr=False)

    @property
    def audit_bytes(self) -> int:
        """Host to device, read by audits: no part of host_to_device_bytes."""
        return 0 if self.audits is None else int(self.audits.bytes.sum())

    @property
    def queue_s(self) -> float:
        """From arrival to the start of prefill."""
        return self.started_time - self.arrival_time

    @property
    def time_to_first_token_s(self) -> float:
        return self.first_token_time - self.arrival_time

    @property
    def host_to_device_bytes(self) -> int:
        """Every KV byte that decode moved from the host."""
        return self.fetched_bytes + self.direct_bytes + self.streamed_bytes

    @property
    def device_to_host_bytes(self) -> int:
        """Every KV byte written through, prefill included."""
        return self.written_bytes + self.prefill_written_bytes

    @property
    def hit_rate(self) -> float:
        """Share of the exact, not resident rows that were on the device already; 1 if none."""
        if self.exact_rows == 0:
            return 1.0
        return 1.0 - (self.missed_rows + self.direct_rows) / self.exact_rows

    @property
    def time_per_output_token_s(self) -> float:
        """Mean over the decode steps; 0 if there were none."""
        return self.decode_s / self.num_decode_steps if self.num_decode_steps else 0.0


def step_bytes(steps: Steps) -> dict[str, Array]:
    """One sequence's bytes of each step, [T], by RequestMetrics' names."""
    counters = steps.counters  # [T, L, NUM_COUNTERS]
    alone = (steps.batch == 1)[:, None]

    def share(column: int, part: Array, whole: Array) -> Array:
        total = counters[..., column]
        split = np.rint(total * (part / np.maximum(whole, 1))).astype(np.int64)
        bytes_: Array = np.where(alone, total, split).sum(axis=1)
        return bytes_

    missed, direct = steps.missed.sum(-1), steps.direct.sum(-1)
    context, contexts = steps.context[:, None], steps.batch_context[:, None]
    one, batch = np.ones_like(context), steps.batch[:, None]
    return {
        "fetched_bytes": share(COUNTER_FETCHED_BYTES, missed, counters[..., COUNTER_MISSED_ROWS]),
        "direct_bytes": share(COUNTER_DIRECT_BYTES, direct, counters[..., COUNTER_DIRECT_ROWS]),
        "streamed_bytes": share(COUNTER_STREAMED_BYTES, context, contexts),
        "written_bytes": share(COUNTER_WRITTEN_BYTES, one, batch),
    }


def step_figures(sequences: Sequence[Steps]) -> dict[str, Any]:
    """What the steps of a request's sequences say, by RequestMetrics' names."""
    parts = [step_bytes(steps) for steps in sequences]
    figures: dict[str, Any] = {name: sum(int(p[name].sum()) for p in parts) for name in parts[0]}
    for grade in ("exact", "index", "tail", "resident", "missed", "direct"):
        figures[f"{grade}_rows"] = sum(int(getattr(steps, grade).sum()) for steps in sequences)
    figures["num_decode_steps"] = sum(len(steps.context) for steps in sequences)
    figures["link_s"] = float(sum(steps.link_seconds.sum() for steps in sequences))
    exact = np.concatenate([steps.exact for steps in sequences])
    mass = np.concatenate([steps.mass for steps in sequences])
    empty = len(exact) == 0
    figures["budget_by_layer"] = np.zeros(exact.shape[1:]) if empty else exact.mean(axis=0)
    figures["mass_by_layer"] = np.ones(mass.shape[1]) if empty else mass.mean(axis=(0, 2))
    figures["steps"] = tuple(sequences)
    return figures
