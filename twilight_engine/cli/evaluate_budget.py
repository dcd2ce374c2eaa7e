"""`twilight eval budget`: how many rows attention needs, and by what that varies."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twilight_engine.cli import options
from twilight_engine.cli.configs import parse_shares
from twilight_engine.cli.evaluate_run import PLAIN_WIDTH, model_settings, read_texts
from twilight_engine.cli.evaluate_tasks import TASK, Targets, Text
from twilight_engine.cli.machine import ran_on

if TYPE_CHECKING:
    from twilight_engine.eval.items import Passage
    from twilight_engine.eval.records import RunFolder
    from twilight_engine.models.load import LoadedModel

PAPER_MASSES = ["0.65,0.7,0.75,0.8,0.85,0.9,0.95"]
SHOWN_MASS = 0.85  # the paper's own, of the tables and figures that show one p


def budget(
    model: options.Model,
    text: Text,
    length: Annotated[int, typer.Option(rich_help_panel=TASK, help="Tokens of a passage.")] = 4096,
    targets: Targets = 64,
    passages: Annotated[int, typer.Option(rich_help_panel=TASK, help="How many passages.")] = 4,
    p: Annotated[
        list[str],
        typer.Option(
            "--p", rich_help_panel=TASK, help="Masses in (0, 1]; several times or with commas."
        ),
    ] = PAPER_MASSES,
    at: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=TASK,
            help="Which p the table of budgets and the captured mass are shown for.",
            show_default="0.85, or the largest",
        ),
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            rich_help_panel=options.OUTPUT,
            help="Results, budget.json and plots; a run that was cut short goes on there.",
        ),
    ] = Path("twilight-budget"),
) -> None:
    """How many rows attention needs, by prompt, query, layer and head.

    Also the mass that top-p captures by INT2, INT4 and INT8 keys, and perplexity
    and rows against p: of the default preset, of the paper's method, and of the
    paper's rule over our index. Steps are simulated, teacher-forced.
    """
    from twilight_engine.eval.budget.run import check_context
    from twilight_engine.eval.records import RunFolder
    from twilight_engine.eval.tasks.ppl import passages as cut
    from twilight_engine.models.load import load_model
    from twilight_engine.runtime.arguments import check_at_least_one, context_length, pick_device

    check_at_least_one(length=length, targets=targets, passages=passages)
    masses = parse_shares("--p", p)
    shown = pick_shown(masses, at)
    check_context(length, targets)
    texts = read_texts(text)
    loaded = load_model(model, dtype=dtype, device=pick_device(device))
    if loaded.tokenizer is None:
        raise ValueError(f"{model} has no tokenizer; eval needs one to read texts")
    context_length(length, loaded.config)  # warns of one too long
    chosen = cut(loaded.tokenizer, texts, length=length, targets=targets, count=passages)
    folder = RunFolder(out, budget_settings(model, loaded, chosen))
    fill(loaded, chosen, masses, folder)
    title = f"{Path(model).stem}, {length:,} tokens, {len(chosen)} passages x {targets} targets"
    show(folder, chosen, masses, shown, title)


def fill(
    loaded: LoadedModel, passages: Sequence[Passage], masses: Sequence[float], folder: RunFolder
) -> None:
    """Measure what the folder lacks, under a progress bar where there is a terminal."""
    from twilight_engine.eval.budget.run import RULES, run_budget
    from twilight_engine.eval.progress import EvalProgress

    total = len(passages) * len(masses) * (1 + len(RULES))
    with EvalProgress(total, show=sys.stderr.isatty()) as progress:
        run_budget(loaded.model, passages, masses, folder, done=progress.done, doing=progress.doing)


def show(
    folder: RunFolder,
    passages: Sequence[Passage],
    masses: Sequence[float],
    shown: float,
    title: str,
) -> None:
    """Tables on stdout; budget.json and, where matplotlib is installed, plots in the folder."""
    from rich.console import Console

    from twilight_engine.eval.budget.plots import plot_budget
    from twilight_engine.eval.budget.run import resident_rows
    from twilight_engine.eval.budget.summary import summarise_budget
    from twilight_engine.eval.budget.table import loss_table, mass_table, spread_table

    summary = summarise_budget(folder.records, [item.item_id for item in passages], masses)
    resident = resident_rows(summary.length, len(passages[0].target_ids))
    found = {
        "settings": folder.settings,
        "machine": ran_on(folder.settings["device"]),
        "resident_rows": resident,
        **summary.as_json(),
    }
    path = folder.path / "budget.json"
    path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    written = [folder.path / "results.jsonl", path]
    try:
        written += plot_budget(summary, shown, title, folder.path)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    console.print(title, style="bold")
    console.print(spread_table(summary, shown, resident))
    console.print(mass_table(summary, shown))
    console.print(loss_table(summary))
    console.print(f"written: {', '.join(map(str, written))}", style="dim", soft_wrap=True)


def budget_settings(model: str, loaded: LoadedModel, passages: Sequence[Passage]) -> dict[str, Any]:
    """What decides about results besides the masses."""
    from twilight_engine.eval.run import Workload

    first = passages[0]
    length = len(first.context_ids) + len(first.target_ids)
    return {
        **model_settings("budget", model, loaded),
        "tokens": length,
        "targets": len(first.target_ids),
        "passages": f"{len(passages)}, {Workload(length, passages).digest}",
    }


def pick_shown(masses: Sequence[float], at: float | None) -> float:
    """Of these p, the one to show. Raises: ValueError for one that is not among them."""
    if at is None:
        return SHOWN_MASS if SHOWN_MASS in masses else masses[-1]
    if at not in masses:
        raise ValueError(f"--at is {at}; it must be one of --p: {', '.join(map(str, masses))}")
    return at
