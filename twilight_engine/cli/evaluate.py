"""`twilight eval`: what a method loses and what it costs, on a model and texts of your own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twilight_engine.cli import options
from twilight_engine.cli.errors import OneLineErrors
from twilight_engine.cli.evaluate_lm_eval import lm_eval
from twilight_engine.cli.evaluate_longbench import longbench
from twilight_engine.cli.evaluate_tasks import niah, ppl, ruler

if TYPE_CHECKING:
    from rich.table import Table

    from twilight_engine.eval.frontier import FrontierPoint
    from twilight_engine.eval.simulation.grading import Grading

app = typer.Typer(
    cls=OneLineErrors,
    name="eval",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="What a method loses and what it costs, on real texts.",
)


for task in (niah, ruler, ppl, longbench, lm_eval):
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
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where JSON and plot go.")] = Path(
        "twilight-frontier"
    ),
    device: options.Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of weights and KV.")] = "auto",
) -> None:
    """Sweep the knobs of graded attention and mark the Pareto front.

    Each grading predicts the last tokens of the same passages, teacher-forced, in a simulation of
    the decode steps (plain torch, float32 attention). KL to dense attention, exact rows, link
    bytes behind a row cache, and device bytes; which points no other dominates.
    """
    from rich.console import Console
    from rich.progress import Progress

    from twilight_engine.eval.frontier import frontier as run
    from twilight_engine.eval.frontier import gradings
    from twilight_engine.eval.frontier_plot import plot_frontier
    from twilight_engine.eval.tasks.ppl import passages as cut
    from twilight_engine.models.load import load_model
    from twilight_engine.runtime.arguments import pick_device

    named = [(path.name, path.read_text(encoding="utf-8")) for path in text]
    loaded = load_model(model, dtype=dtype, device=pick_device(device))
    if loaded.tokenizer is None:
        raise ValueError(f"{model} has no tokenizer; frontier needs one to read texts")
    sweep = pick(gradings(loaded.config.num_layers), only)
    chosen = cut(loaded.tokenizer, named, length=length, targets=targets, count=passages)
    with Progress(console=Console(stderr=True)) as bars:
        task = bars.add_task("gradings", total=len(sweep) * len(chosen))
        points = run(
            loaded.model, chosen, sweep, progress=lambda name: bars.update(task, advance=1)
        )
    out.mkdir(parents=True, exist_ok=True)
    settings = {"model": Path(model).name, "tokens": length, "targets": targets}
    record = {
        **settings,
        "passages": [passage.item_id for passage in chosen],
        "points": [point.as_dict() for point in points],
    }
    (out / "frontier.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    title = f"{Path(model).stem}, {length:,} tokens, {len(chosen)} passages x {targets} targets"
    plot_frontier(points, title, out / "frontier.png")
    console = Console(highlight=False)
    console.print(frontier_table(points, title))
    console.print(f"written: {out / 'frontier.json'}, {out / 'frontier.png'}", style="dim")


def pick(sweep: dict[str, Grading], only: str | None) -> dict[str, Grading]:
    """The gradings of these names. Raises: ValueError for one that is not there."""
    if only is None:
        return sweep
    names = [name.strip() for name in only.split(",")]
    unknown = [name for name in names if name not in sweep]
    if unknown:
        raise ValueError(f"--only names {unknown}; allowed: {', '.join(sweep)}")
    return {name: sweep[name] for name in names}


def frontier_table(points: list[FrontierPoint], title: str) -> Table:
    """One row a grading, by KL; a star marks the front."""
    from rich.table import Table

    table = Table(title=title)
    for column in ("grading", "KL", "ppl / dense", "top-1", "exact rows", "link a step"):
        table.add_column(column, justify="left" if column == "grading" else "right")
    for column in ("device", "mass", "mass kept", "weakest head", "front"):
        table.add_column(column, justify="right")
    for point in sorted(points, key=lambda p: p.kl):
        table.add_row(
            point.name,
            f"{point.kl:.1e}",
            f"{point.ppl / point.ppl_dense:.4f}",
            f"{point.top1:.1%}",
            f"{point.exact_rows:.0f}",
            f"{point.link_bytes / 1e6:.2f} MB",
            f"{point.device_share:.0%}",
            f"{point.mass:.3f}",
            f"{point.mass_kept_share:.1%}",
            f"{point.weakest_head:.2f}",
            "*" if point.on_front else "",
        )
    return table
