"""The offload report: what a run moved over the link, beside what a dense offload would have.

docs/offload_report.md defines every figure and the JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from twilight_engine.attention.audit_record import Audits, join_audits
from twilight_engine.runtime.metrics import step_bytes
from twilight_engine.runtime.outputs import RequestOutput
from twilight_engine.telemetry import Array, Steps

if TYPE_CHECKING:
    from twilight_engine.runtime.llm import LLM

SCHEMA = "twilight-engine/offload-report/1"
GRADES = ("exact", "index", "tail", "resident")
LINK_KINDS = ("fetched_bytes", "direct_bytes", "streamed_bytes")  # host -> device
PERCENTILE = 95


@dataclass(frozen=True)
class RunShape:
    """What a report needs to know of the engine that ran.

    Args:
        row_bytes: one token's K and V of one layer and KV head.
        dense_layers: layers whose KV stays on the device.
        calibration: the file that the engine's settings come from.
    """

    model: str
    device: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    page_size: int
    row_bytes: int
    dense_layers: tuple[int, ...]
    calibration: str | None = None

    @classmethod
    def of(cls, llm: LLM, model: str) -> RunShape:
        """The shape of an LLM; `model` is what to call it."""
        config = llm.model_config
        return cls(
            model=model,
            device=str(llm.device),
            dtype=str(llm.dtype).removeprefix("torch."),
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            page_size=llm.kv_config.page_size,
            row_bytes=2 * config.head_dim * llm.dtype.itemsize,
            dense_layers=llm.cache.plan.dense_layers,
            calibration=None if llm.calibration is None else str(llm.calibration.path),
        )

    @property
    def offloaded_layers(self) -> list[int]:
        return [i for i in range(self.num_layers) if i not in self.dense_layers]


@dataclass(frozen=True)
class GradeRows:
    """Rows of one grade a decode step, in the layers whose KV is offloaded.

    Attributes:
        mean, p95: over steps, layers and KV heads.
        mean_by_head, p95_by_head: [offloaded layers, Hkv], over steps.
    """

    mean: float
    p95: float
    mean_by_head: NDArray[np.float64]
    p95_by_head: NDArray[np.float64]


@dataclass(frozen=True)
class OffloadReport:
    """Figures of a run's requests together; bytes are of decode unless they say prefill.

    Attributes:
        dense_bytes: what a dense offload would have moved host to device.
        dense_layer_bytes: what it would have moved besides, were the dense layers offloaded too.
        moved_bytes: by kind, what was moved host to device.
        written_bytes, prefill_written_bytes: device to host.
        rows: by grade.
        mass_by_layer: [L] mean estimated attention mass of the exact grade.
        by_step: name -> [steps]: context, rows of each grade a layer and KV head, dense and moved
            bytes; requests one after the other.
        audits: the requests' triples that were checked exactly, or None.
    """

    shape: RunShape
    num_requests: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_decode_steps: int
    prefill_s: float
    decode_s: float
    link_s: float
    dense_bytes: int
    dense_layer_bytes: int
    moved_bytes: dict[str, int]
    written_bytes: int
    prefill_written_bytes: int
    hit_rate: float
    rows: dict[str, GradeRows]
    mass_by_layer: NDArray[np.float64]
    by_step: dict[str, NDArray[np.float64]]
    audits: Audits | None

    @property
    def host_to_device_bytes(self) -> int:
        return sum(self.moved_bytes.values())

    @property
    def ratio(self) -> float | None:
        """dense_bytes / host_to_device_bytes; None where nothing was moved."""
        moved = self.host_to_device_bytes
        return self.dense_bytes / moved if moved else None

    @property
    def link_gbps(self) -> float | None:
        """GB/s of the fetches and streams while they ran; None where there were none."""
        timed = self.moved_bytes["fetched_bytes"] + self.moved_bytes["streamed_bytes"]
        return timed / self.link_s / 1e9 if timed and self.link_s > 0 else None

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values, after docs/offload_report.md."""
        shape = self.shape
        return {
            "schema": SCHEMA,
            "shape": {**vars(shape), "dense_layers": list(shape.dense_layers)},
            "run": {
                name: getattr(self, name)
                for name in (
                    "num_requests",
                    "num_prompt_tokens",
                    "num_generated_tokens",
                    "num_decode_steps",
                    "prefill_s",
                    "decode_s",
                )
            },
            "bytes": {
                "dense": self.dense_bytes,
                "dense_layers": self.dense_layer_bytes,
                "host_to_device": self.host_to_device_bytes,
                **{kind.removesuffix("_bytes"): n for kind, n in self.moved_bytes.items()},
                "device_to_host": self.written_bytes,
                "prefill_device_to_host": self.prefill_written_bytes,
            },
            "ratio": self.ratio,
            "hit_rate": self.hit_rate,
            "link": {"busy_s": self.link_s, "gbps": self.link_gbps},
            "layers": shape.offloaded_layers,
            "rows": {
                grade: {
                    "mean": rows.mean,
                    "p95": rows.p95,
                    "mean_by_layer_and_head": rows.mean_by_head.round(3).tolist(),
                    "p95_by_layer_and_head": rows.p95_by_head.round(3).tolist(),
                }
                for grade, rows in self.rows.items()
            },
            "mass_by_layer": self.mass_by_layer.round(6).tolist(),
            "steps": {name: values.round(3).tolist() for name, values in self.by_step.items()},
            **({} if self.audits is None else {"audit": self.audits.to_json()}),
        }


def build_report(outputs: Sequence[RequestOutput], shape: RunShape) -> OffloadReport:
    """Add up the metrics of finished requests of one engine.

    Raises: ValueError for a request that has not finished, or if there is none.
    """
    metrics = [output.metrics for output in outputs if output.metrics is not None]
    if not outputs or len(metrics) < len(outputs):
        raise ValueError(
            f"outputs has {len(outputs)} requests, {len(metrics)} of them finished; a report needs "
            "at least one, and all of them finished"
        )
    sequences = [steps for m in metrics for steps in m.steps]
    layers = shape.offloaded_layers
    visible = np.concatenate([visible_rows(steps) for steps in sequences])  # [T, L]
    wanted = sum(m.exact_rows for m in metrics)
    missed = sum(m.missed_rows + m.direct_rows for m in metrics)
    return OffloadReport(
        shape=shape,
        num_requests=len(metrics),
        num_prompt_tokens=sum(m.num_prompt_tokens for m in metrics),
        num_generated_tokens=sum(m.num_generated_tokens for m in metrics),
        num_decode_steps=sum(m.num_decode_steps for m in metrics),
        prefill_s=sum(m.prefill_s for m in metrics),
        decode_s=sum(m.decode_s for m in metrics),
        link_s=sum(m.link_s for m in metrics),
        dense_bytes=int(visible[:, layers].sum()) * shape.row_bytes,
        dense_layer_bytes=int(visible[:, list(shape.dense_layers)].sum()) * shape.row_bytes,
        moved_bytes={kind: sum(getattr(m, kind) for m in metrics) for kind in LINK_KINDS},
        written_bytes=sum(m.written_bytes for m in metrics),
        prefill_written_bytes=sum(m.prefill_written_bytes for m in metrics),
        hit_rate=1.0 - missed / wanted if wanted else 1.0,
        rows={grade: grade_rows(grade, sequences, layers) for grade in GRADES},
        mass_by_layer=mean_mass(sequences, shape.num_layers),
        by_step=step_series(sequences, shape, visible),
        audits=join_audits([m.audits for m in metrics]),
    )


def visible_rows(steps: Steps) -> Array:
    """[T, L] rows that the attention of a layer covers, over KV heads: what dense would read."""
    rows: Array = (steps.exact + steps.index + steps.tail + steps.resident).sum(-1)
    return rows


def grade_rows(grade: str, sequences: Sequence[Steps], layers: list[int]) -> GradeRows:
    """One grade's rows over the steps of all sequences."""
    rows = np.concatenate([getattr(steps, grade)[:, layers] for steps in sequences])  # [T, l, H]
    if rows.size == 0:
        empty = np.zeros(rows.shape[1:])
        return GradeRows(0.0, 0.0, empty, empty)
    return GradeRows(
        mean=float(rows.mean()),
        p95=float(np.percentile(rows, PERCENTILE)),
        mean_by_head=rows.mean(axis=0),
        p95_by_head=np.percentile(rows, PERCENTILE, axis=0),
    )


def mean_mass(sequences: Sequence[Steps], num_layers: int) -> NDArray[np.float64]:
    """[L] mean mass of the exact grade; 1 where no step ran."""
    mass = np.concatenate([steps.mass for steps in sequences]).astype(np.float64)
    return mass.mean(axis=(0, 2)) if len(mass) else np.ones(num_layers)


def step_series(
    sequences: Sequence[Steps], shape: RunShape, visible: Array
) -> dict[str, NDArray[np.float64]]:
    """What the plots over steps show."""
    layers = shape.offloaded_layers
    moved = [step_bytes(steps) for steps in sequences]
    series = {"context": np.concatenate([steps.context for steps in sequences])}
    for grade in GRADES:
        rows = np.concatenate([getattr(steps, grade)[:, layers] for steps in sequences])
        series[grade] = rows.mean(axis=(1, 2)) if rows.size else np.zeros(len(rows))
    series["dense_bytes"] = visible[:, layers].sum(axis=1) * shape.row_bytes
    series["moved_bytes"] = np.concatenate([sum(part[k] for k in LINK_KINDS) for part in moved])
    return {name: values.astype(np.float64) for name, values in series.items()}
