"""What a run cost, in one line for people and one object for programs."""

from __future__ import annotations

from typing import Any

from twilight_engine.attention.audit_record import MASS_SLACK, Audits
from twilight_engine.cli.units import format_bytes, format_seconds
from twilight_engine.loaders.calibration_file import Calibration
from twilight_engine.runtime.outputs import RequestOutput
from twilight_engine.runtime.report import OffloadReport


def summary_line(report: OffloadReport) -> str:
    """'6,397 tokens read in 60.1 s, 16 written (5.2 tokens/s); moved 14.6 MiB, not 6.2 GiB'."""
    steps, seconds = report.num_decode_steps, report.decode_s
    rate = f" ({steps / seconds:,.1f} tokens/s)" if steps and seconds > 0 else ""
    moved = format_bytes(report.host_to_device_bytes)
    audited = "" if report.audits is None else f"; {audit_line(report.audits)}"
    return (
        f"{report.num_prompt_tokens:,} tokens read in {format_seconds(report.prefill_s)}, "
        f"{report.num_generated_tokens:,} written{rate}; moved {moved}, dense offload "
        f"{format_bytes(report.dense_bytes)}; hit rate {report.hit_rate:.1%}{audited}"
    )


def audit_line(audits: Audits) -> str:
    """'12 triples audited: realised mass 83.1%, 100.0% of them at p - 0.01 or above'."""
    kept = audits.share_kept
    promise = "" if kept is None else f", {kept:.1%} of them at p - {MASS_SLACK} or above"
    mass = audits.mean_realised_mass
    return f"{audits.count:,} triples audited: realised mass {mass:.1%}{promise}"


def calibration_line(calibration: Calibration) -> str:
    """'calibrated by model/twilight_calibration.json: balanced, attn_top_p 0.7, ...'."""
    return f"calibrated by {calibration.path}: {calibration.describe()}"


def output_json(output: RequestOutput, report: OffloadReport) -> dict[str, Any]:
    """A finished request as JSON values: text, tokens, and the report without its step arrays."""
    completion = output.outputs[0]
    figures = report.to_json()
    names = ["run", "bytes", "ratio", "hit_rate", "link"]
    if report.audits is not None:
        names.append("audit")
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "calibration": report.shape.calibration,
        "offload": {name: figures[name] for name in names},
    }
