"""What a search found: as the file LLM reads, and as a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from twilight_engine.eval.calibration.budget import DeviceBudget
from twilight_engine.eval.calibration.search import Candidate, Checked, Result, Tolerance
from twilight_engine.eval.summary import Estimate
from twilight_engine.loaders.calibration_file import Calibration, Fingerprint


def to_calibration(
    result: Result,
    fingerprint: Fingerprint,
    preset: str,
    tolerance: Tolerance,
    budget: DeviceBudget,
    sample: dict[str, Any],
) -> Calibration:
    """The chosen setting, with what was measured of it and of all others.

    Args:
        sample: what the texts were, as JSON values.
    """
    assert result.chosen is not None
    chosen = result.chosen.candidate
    setting = chosen.setting
    return Calibration(
        fingerprint=fingerprint,
        preset=preset,
        attn_top_p=setting.attn_top_p,
        index_top_p=setting.index_top_p,
        by_layer={layer: (p, setting.index_top_p) for layer, p in setting.by_layer},
        dense_layers=setting.dense_layers,
        hot_kv_share=chosen.hot_kv_share,
        hot_shares=chosen.hot_shares,
        measured={
            "tolerance": vars(tolerance),
            "device_budget": {
                "bytes": budget.total_bytes,
                "kv_share": round(budget.kv_share, 6),
                "context": budget.context,
            },
            "sample": sample,
            "chosen": _figures(chosen),
            "held_out": _figures(result.chosen.held_out),
            "preset_held_out": result.preset and _figures(result.preset.held_out),
        },
        sweep=tuple(
            {"stage": c.stage, "setting": setting_name(c), **_figures(c)} for c in result.candidates
        ),
    )


def _figures(candidate: Candidate) -> dict[str, Any]:
    return {
        "kl": candidate.kl.value,
        "kl_high": candidate.kl.high,
        "ppl_ratio": candidate.ppl_ratio.value,
        "ppl_ratio_low": candidate.ppl_ratio.low,
        "ppl_ratio_high": candidate.ppl_ratio.high,
        "link_bytes": candidate.link_bytes,
        "exact_rows": candidate.exact_rows,
        "index_rows": candidate.index_rows,
        "hot_kv_share": candidate.hot_kv_share,
        "within": candidate.within,
    }


def setting_name(candidate: Candidate) -> str:
    """'0.7 (12 lower) / 0.99, dense 0,1'."""
    setting = candidate.setting
    lower = f" ({len(setting.by_layer)} lower)" if setting.by_layer else ""
    index = "" if setting.index_top_p is None else f" / {setting.index_top_p:g}"
    return f"{setting.attn_top_p:g}{lower}{index}, dense {_layers(setting.dense_layers)}"


def _layers(layers: tuple[int, ...]) -> str:
    if len(layers) > 6:
        return f"{len(layers)} layers"
    return ",".join(map(str, layers)) or "none"


def sweep_table(result: Result, title: str) -> Table:
    """Every setting in the order tried, then the held-out half; bold: chosen."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("stage")
    table.add_column("attn / index, dense layers", no_wrap=True)
    for name in ("KL", "ppl above dense", "exact", "index", "hot", "link", "within"):
        table.add_column(name, justify="right")
    chosen = result.chosen.candidate if result.chosen is not None else None
    for before, candidate in _with_previous(result):
        if before is not None and before.stage != candidate.stage:
            table.add_section()
        stage = "" if before is not None and before.stage == candidate.stage else candidate.stage
        table.add_row(stage, *_cells(candidate), style="bold" if candidate is chosen else "")
    table.add_section()
    for checked in _held_out(result):
        bold = checked.candidate is chosen
        stage = "held out" if checked.candidate.stage != "preset" else "held out: preset"
        table.add_row(stage, *_cells(checked.held_out), style="bold" if bold else "")
    table.caption = (
        "95 % intervals over targets, paired for perplexity; within: both upper ends stay within "
        "the tolerances (held out: both means); exact and index rows of a KV head and graded "
        "layer; hot rows of all KV; link: a step of one sequence, 16-bit rows"
    )
    return table


def _with_previous(result: Result) -> Iterator[tuple[Candidate | None, Candidate]]:
    before = None
    rows = [*([result.preset.candidate] if result.preset else []), *result.candidates]
    for candidate in rows:
        yield before, candidate
        before = candidate


def _held_out(result: Result) -> list[Checked]:
    return [*([result.preset] if result.preset else []), *result.checked]


def _cells(candidate: Candidate) -> list[str]:
    return [
        setting_name(candidate),
        f"{candidate.kl.value:.1e} ±{_half(candidate.kl):.0e}",
        f"{candidate.ppl_ratio.value - 1:+.2%} ±{_half(candidate.ppl_ratio):.2%}",
        f"{candidate.exact_rows:,.0f}",
        f"{candidate.index_rows:,.0f}",
        f"{candidate.hot_kv_share:.1%}",
        f"{candidate.link_bytes / 1e6:.3f} MB",
        "yes" if candidate.within else "no",
    ]


def _half(estimate: Estimate) -> float:
    """Half the width of the interval."""
    assert estimate.low is not None and estimate.high is not None
    return (estimate.high - estimate.low) / 2
