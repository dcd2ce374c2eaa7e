"""A budget run on a terminal: spread by axis, captured mass by format, loss by p."""

from __future__ import annotations

from rich.table import Table

from twilight_engine.eval.budget.run import RULES, SOFTMAX
from twilight_engine.eval.budget.summary import AXES, BudgetSummary

TITLES = {"passage": "by prompt", "step": "by query", "layer": "by layer", "head": "by head"}


def spread_table(summary: BudgetSummary, p: float, resident: float) -> Table:
    """How the budget at p varies along each axis."""
    table = Table(title=f"Rows that attention needs at p = {p}", title_justify="left")
    table.caption_justify = "left"
    for name in ("rule", "varies"):
        table.add_column(name, no_wrap=True)
    for name in ("values", "mean", "p25", "median", "p75", "p95", "max", "CV"):
        table.add_column(name, justify="right")
    for rule in (SOFTMAX, *RULES):
        found = {s.axis: s for s in summary.spreads if s.rule == rule and s.p == p}
        for i, axis in enumerate(AXES):
            s = found[axis]
            rows = (s.mean, s.p25, s.median, s.p75, s.p95, s.max)
            table.add_row(
                rule if i == 0 else "",
                TITLES.get(axis, "each one"),
                f"{s.count:,}",
                *(f"{value:,.0f}" for value in rows),
                "" if s.cv is None else f"{s.cv:.2f}",
            )
        table.add_section()
    table.caption = (
        f"{SOFTMAX}: all tokens a query head needs of its true weights; rules: exact rows a KV "
        f"head, beyond {resident:.0f} resident ones; each line a mean over what does not vary; "
        f"layers {summary.graded[0]}-{summary.graded[-1]}"
    )
    return table


def mass_table(summary: BudgetSummary, p: float) -> Table:
    """True mass that top-p captures by a K index of each format; layers are in budget.json."""
    table = Table(title=f"Mass that top-p captures at p = {p}", title_justify="left")
    table.add_column("K index", no_wrap=True)
    for name in ("mean", "least layer", "its mass", "its 5 % lowest, below"):
        table.add_column(name, justify="right")
    layers = [row for row in summary.mass if row.p == p]
    for name in layers[0].captured:
        worst = min(layers, key=lambda row: row.captured[name])
        mean = sum(row.captured[name] for row in layers) / len(layers)
        cells = (f"{worst.layer}", f"{worst.captured[name]:.3f}", f"{worst.low[name]:.3f}")
        table.add_row(name.replace("_", " per "), f"{mean:.3f}", *cells)
    return table


def loss_table(summary: BudgetSummary) -> Table:
    """Perplexity and rows of each rule at each p."""
    dense = summary.losses[0].ppl_dense
    table = Table(title=f"Loss against p; dense: perplexity {dense:.3f}", title_justify="left")
    table.add_column("rule", no_wrap=True)
    for name in ("p", "perplexity", "/ dense", "KL", "exact rows", "of context", "index rows"):
        table.add_column(name, justify="right")
    table.add_column("mass", justify="right")
    for rule in RULES:
        for i, loss in enumerate(row for row in summary.losses if row.rule == rule):
            table.add_row(
                rule if i == 0 else "",
                f"{loss.p}",
                f"{loss.ppl:.3f}",
                f"{loss.ppl / loss.ppl_dense:.4f}",
                f"{loss.kl:.1e}",
                f"{loss.exact_rows:,.0f}",
                f"{loss.exact_share:.1%}",
                f"{loss.index_rows:,.0f}",
                f"{loss.mass:.3f}",
            )
        table.add_section()
    return table
