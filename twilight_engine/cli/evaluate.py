"""`twilight eval`: what a method loses and what it costs, on a model and texts of your own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from twilight_engine.cli import frontier_report as report
from twilight_engine.cli import options
from twilight_engine.cli.configs import parse_shares
from twilight_engine.cli.errors import OneLineErrors
from twilight_engine.cli.evaluate_budget import budget
from twilight_engine.cli.evaluate_lm_eval import lm_eval
from twilight_engine.cli.evaluate_longbench import longbench
from twilight_engine.cli.evaluate_run import PLAIN_WIDTH, read_texts
from twilight_engine.cli.evaluate_tasks import niah, ppl, ruler

app = typer.Typer(
    cls=OneLineErrors,
    name="eval",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="What a method loses and what it costs, on real texts.",
)


for task in (niah, ruler, ppl, longbench, lm_eval, budget):
    app.command()(task)


@app.callback()
def evaluate() -> None:
    """What a method loses and what it costs, on real texts."""


@app.command()
def frontier(
    model: options.Model,
    text: Annotated[
        list[Path], typer.Option(metavar="FILE", help="A long text; give several times for more.")
    ],
    length: Annotated[int, typer.Option(help="Tokens of a passage.")] = 4096,
    targets: Annotated[int, typer.Option(help="Last tokens of a passage to predict.")] = 64,
    passages: Annotated[int, typer.Option(help="How many passages.")] = 2,
    only: Annotated[
        str | None,
        typer.Option(help="Names with commas: these gradings alone.", show_default="all"),
    ] = None,
    cache_share: Annotated[
        str,
        typer.Option(help="Of a graded layer's rows, what its row cache holds; with commas: each."),
    ] = "0.0625",
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Results, JSON and plot; a run that was cut short goes on there.",
        ),
    ] = Path("twilight-frontier"),
    device: options.Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of weights and KV.")] = "auto",
) -> None:
    """Sweep the knobs of graded attention and mark the Pareto front.

    Each grading predicts the last tokens of the same passages, teacher-forced, in a simulation of
    the decode steps (plain torch, float32 attention). KL to dense attention, exact rows, link
    bytes behind a row cache, and device bytes; which points no other dominates.
    """
    from rich.console import Console

    from twilight_engine.eval.frontier_plot import plot_frontier
    from twilight_engine.eval.frontier_run import frontier as run
    from twilight_engine.eval.progress import EvalProgress
    from twilight_engine.eval.records import RunFolder
    from twilight_engine.eval.simulation.sweep import gradings
    from twilight_engine.eval.tasks.ppl import passages as cut
    from twilight_engine.models.load import load_model
    from twilight_engine.runtime.arguments import check_at_least_one, pick_device

    check_at_least_one(passages=passages)
    shares = parse_shares("--cache-share", [cache_share])
    texts = read_texts(text)
    loaded = load_model(model, dtype=dtype, device=pick_device(device))
    if loaded.tokenizer is None:
        raise ValueError(f"{model} has no tokenizer; frontier needs one to read texts")
    sweep = report.pick(gradings(loaded.config.num_layers), only)
    chosen = cut(loaded.tokenizer, texts, length=length, targets=targets, count=passages)
    settings = report.frontier_settings(model, loaded, chosen, shares)
    folder = RunFolder(out, settings)
    with EvalProgress(len(sweep) * len(chosen), show=sys.stderr.isatty()) as progress:
        progress.doing("gradings")
        points = run(
            loaded.model,
            chosen,
            sweep,
            folder,
            cache_shares=shares,
            progress=progress.done,
        )
    written = out / "frontier.json", out / "frontier.png"
    report.write_json(settings, points, written[0])
    title = f"{Path(model).stem}, {length:,} tokens, {len(chosen)} x {targets} targets"
    plot_frontier(points, title, written[1])
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    console.print(report.frontier_table(points, title))
    console.print(f"written: {', '.join(map(str, written))}", style="dim", soft_wrap=True)
