"""The offload report on made-up runs: every figure against plain sums over the arrays."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.runtime.runs import made_up_audits, made_up_output, made_up_shape, made_up_steps
from twilight_engine.runtime.outputs import RequestOutput
from twilight_engine.runtime.report import GRADES, SCHEMA, OffloadReport, build_report

SHAPE = made_up_shape()
STEPS = made_up_steps(SHAPE)


@pytest.fixture(scope="module")
def report() -> OffloadReport:
    return build_report([made_up_output(STEPS, audits=made_up_audits(SHAPE, STEPS))], SHAPE)


def test_dense_bytes_are_every_visible_row_of_the_offloaded_layers(report: OffloadReport) -> None:
    rows = sum(int(c) * 4 * SHAPE.num_kv_heads for c in STEPS.context)  # 4 of 6 layers
    assert report.dense_bytes == rows * SHAPE.row_bytes
    assert report.dense_layer_bytes == rows * SHAPE.row_bytes // 2  # 2 of 6


def test_moved_bytes_are_the_rows_that_crossed(report: OffloadReport) -> None:
    assert report.moved_bytes == {
        "fetched_bytes": int(STEPS.missed.sum()) * SHAPE.row_bytes,
        "direct_bytes": int(STEPS.direct.sum()) * SHAPE.row_bytes,
        "streamed_bytes": 0,
    }
    assert report.ratio == report.dense_bytes / sum(report.moved_bytes.values())


def test_hit_rate_and_link_speed(report: OffloadReport) -> None:
    crossed = STEPS.missed.sum() + STEPS.direct.sum()
    assert report.hit_rate == pytest.approx(1 - crossed / STEPS.exact.sum())
    assert report.link_gbps == pytest.approx(10.0)


def test_rows_by_grade_leave_dense_layers_out(report: OffloadReport) -> None:
    for grade in GRADES:
        rows = getattr(STEPS, grade)[:, 2:]
        assert report.rows[grade].mean == pytest.approx(rows.mean())
        assert report.rows[grade].p95 == pytest.approx(np.percentile(rows, 95))
        assert report.rows[grade].p95_by_head.shape == (4, SHAPE.num_kv_heads)
    assert sum(r.mean for r in report.rows.values()) == pytest.approx(STEPS.context.mean())


def test_steps_add_up_to_the_totals(report: OffloadReport) -> None:
    assert report.by_step["moved_bytes"].sum() == report.host_to_device_bytes
    assert report.by_step["dense_bytes"].sum() == report.dense_bytes


def test_requests_and_sequences_add_up() -> None:
    other = made_up_steps(SHAPE, steps=3, context=900, seed=1)
    apart = [build_report([made_up_output(s)], SHAPE) for s in (STEPS, other)]
    for together in (
        build_report([made_up_output(STEPS, other)], SHAPE),
        build_report([made_up_output(STEPS), made_up_output(other)], SHAPE),
    ):
        assert together.dense_bytes == sum(r.dense_bytes for r in apart)
        assert together.moved_bytes["fetched_bytes"] == sum(
            r.moved_bytes["fetched_bytes"] for r in apart
        )
        assert together.num_decode_steps == 11


@pytest.mark.parametrize("shape", [SHAPE, made_up_shape(dense=(0, 1, 2, 3, 4, 5))])
def test_a_run_without_decode_steps_or_offloaded_layers_still_reports(shape) -> None:
    report = build_report([made_up_output(made_up_steps(shape, steps=0))], shape)
    assert (report.dense_bytes, report.ratio, report.link_gbps) == (0, None, None)
    assert report.hit_rate == 1.0
    json.dumps(report.to_json(), allow_nan=False)


def test_json_is_what_the_documentation_says(report: OffloadReport) -> None:
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["schema"] == SCHEMA
    text = (Path(__file__).parents[2] / "docs" / "offload_report.md").read_text()
    documented = set(re.findall(r"^\| `([\w.]+)`", text, flags=re.MULTILINE))

    def names(value: object, path: str = "") -> set[str]:
        if not isinstance(value, dict):
            return {path}
        return {n for k, v in value.items() for n in names(v, f"{path}.{k}" if path else k)}

    found = {re.sub(r"^rows\.(exact|index|tail|resident)", "rows.GRADE", n) for n in names(data)}
    assert found == documented


def test_audits_of_all_requests_are_reported_together() -> None:
    other = made_up_steps(SHAPE, steps=4, context=900)
    audits = [made_up_audits(SHAPE, STEPS), made_up_audits(SHAPE, other, p=float("nan"))]
    outputs = [made_up_output(s, audits=a) for s, a in zip((STEPS, other), audits, strict=True)]
    data = build_report([*outputs, made_up_output(other)], SHAPE).to_json()
    found = json.loads(json.dumps(data["audit"].pop("triples")))
    assert found["step"] == [*STEPS.context, *other.context]
    assert found["p"] == [0.8] * 8 + [None] * 4
    assert data["audit"]["count"] == 12 and data["audit"]["share_kept"] == 0.75
    assert data["audit"]["bytes"] == sum(found["step"]) * SHAPE.row_bytes
    assert data["bytes"]["host_to_device"] == sum(
        o.metrics.host_to_device_bytes for o in (*outputs, outputs[1])
    )


def test_no_audits_no_key() -> None:
    assert "audit" not in build_report([made_up_output(STEPS)], SHAPE).to_json()


def test_unfinished_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="1 requests, 0 of them finished"):
        build_report([RequestOutput("0", None, [1])], SHAPE)
    with pytest.raises(ValueError, match="at least one"):
        build_report([], SHAPE)
