"""The offload report on a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from twilight_engine.attention.audit_record import MASS_SLACK, Audits
from twilight_engine.cli.units import format_bytes, format_seconds
from twilight_engine.runtime.report import GRADES, OffloadReport

GRADE_MEANING = {
    "exact": "full precision, from the host",
    "index": "INT4 K and V, on the device",
    "tail": "INT4 K, mean V of the page",
    "resident": "full precision, on the device",
}


def report_tables(report: OffloadReport) -> RenderableType:
    """The report as one renderable: bytes, rows by grade, and the ratio in a line."""
    audits = [] if report.audits is None else [audit_table(report.audits)]
    return Group(bytes_table(report), rows_table(report), *audits, headline(report))


def bytes_table(report: OffloadReport) -> Table:
    table = Table(title="Bytes over the link in decode", title_justify="left")
    table.add_column("what")
    table.add_column("bytes", justify="right")
    table.add_column("a token", justify="right")
    steps = max(report.num_decode_steps, 1)

    def line(name: str, count: int, *, style: str = "", each: bool = True) -> None:
        per_token = format_bytes(count / steps) if each else ""
        table.add_row(name, format_bytes(count), per_token, style=style)

    line("a dense offload would move, host to device", report.dense_bytes)
    line("moved, host to device", report.host_to_device_bytes, style="bold")
    for kind, count in report.moved_bytes.items():
        if count:
            line(f"  {kind.removesuffix('_bytes')}", count, style="dim")
    table.add_section()
    line("written through, device to host", report.written_bytes)
    line("written by prefill, device to host", report.prefill_written_bytes, each=False)
    line("dense layers, kept on the device: spared", report.dense_layer_bytes)
    return table


def rows_table(report: OffloadReport) -> Table:
    layers, heads = len(report.shape.offloaded_layers), report.shape.num_kv_heads
    title = f"Rows a step, over {layers} offloaded layers x {heads} KV heads"
    table = Table(title=title, title_justify="left")
    table.add_column("grade")
    for name in ("mean", "p95", "share"):
        table.add_column(name, justify="right")
    table.add_column("what it is", style="dim")
    total = sum(rows.mean for rows in report.rows.values()) or 1.0
    for grade in GRADES:
        rows = report.rows[grade]
        share = f"{rows.mean / total:.1%}"
        table.add_row(grade, f"{rows.mean:,.1f}", f"{rows.p95:,.1f}", share, GRADE_MEANING[grade])
    return table


def audit_table(audits: Audits) -> Table:
    moved = format_bytes(int(audits.bytes.sum()))
    title = f"Audit of {audits.count:,} triples ({moved} read)"
    table = Table(title=title, title_justify="left")
    for name in ("what", "mean", "worst"):
        table.add_column(name, justify="left" if name == "what" else "right")
    realised, weakest = audits.realised_mass, audits.weakest_head_mass
    estimated, error = audits.estimated_mass, audits.output_error
    table.add_row("estimated mass", f"{estimated.mean():.3f}", f"{estimated.min():.3f}")
    table.add_row("realised mass", f"{realised.mean():.3f}", f"{realised.min():.3f}", style="bold")
    table.add_row("weakest query head", f"{weakest.mean():.3f}", f"{weakest.min():.3f}")
    table.add_row("output error", f"{error.mean():.4f}", f"{audits.worst_head_error.max():.4f}")
    kept = audits.share_kept
    if kept is not None:
        table.add_row(f"triples at p - {MASS_SLACK} or above", f"{kept:.1%}", "")
    return table


def headline(report: OffloadReport) -> Text:
    """Ratio, hit rate, mass and link speed in one line."""
    ratio = "nothing moved" if report.ratio is None else f"{report.ratio:,.1f}x fewer bytes"
    layers = report.shape.offloaded_layers
    mass = float(report.mass_by_layer[layers].mean()) if layers else 1.0
    parts = [f"hit rate {report.hit_rate:.1%}", f"exact rows hold {mass:.1%} of the mass"]
    if report.link_gbps is not None:
        busy = format_seconds(report.link_s)
        parts.append(f"link {report.link_gbps:.2f} GB/s while busy ({busy})")
    return Text.assemble((ratio, "bold green"), "; " + "; ".join(parts))
