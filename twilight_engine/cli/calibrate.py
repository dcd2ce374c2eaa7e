"""`twilight calibrate`: settings for a model from a text of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twilight_engine.cli import options

WITH_V_INDEX = "0.5,0.6,0.7,0.75,0.8,0.9"
WITHOUT_V_INDEX = "0.8,0.85,0.9,0.95,0.98"
INDEX_MASSES = "0.98,0.99,0.995"
SAMPLE, TOLERANCES = "Sample", "Tolerances and budget"


def calibrate(
    model: options.Model,
    text: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE",
            rich_help_panel=SAMPLE,
            help="A long text like those the model will read; several times for more.",
        ),
    ],
    length: Annotated[int, typer.Option(rich_help_panel=SAMPLE, help="Tokens a passage.")] = 4096,
    targets: Annotated[
        int, typer.Option(rich_help_panel=SAMPLE, help="Last tokens of a passage to predict.")
    ] = 128,
    passages: Annotated[
        int,
        typer.Option(
            rich_help_panel=SAMPLE, help="Half of them choose, the other half checks the choice."
        ),
    ] = 8,
    ppl_tolerance: Annotated[
        float,
        typer.Option(rich_help_panel=TOLERANCES, help="Perplexity above dense, as a share of it."),
    ] = 0.005,
    kl_tolerance: Annotated[
        float,
        typer.Option(rich_help_panel=TOLERANCES, help="KL to dense attention, nats a token."),
    ] = 1e-3,
    device_budget: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE|GiB",
            rich_help_panel=TOLERANCES,
            help="What the device may keep of a context: a share of its KV like [b]0.35[/b] or "
            "[b]35%[/b], or [b]6GiB[/b].",
            show_default="what the preset takes",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=TOLERANCES,
            help="Tokens of the context that the budget is for.",
            show_default="the model's",
        ),
    ] = None,
    preset: options.Preset = "balanced",
    attn_top_p: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=options.ATTENTION,
            help="Masses to try, with commas.",
            show_default=f"{WITH_V_INDEX}; {WITHOUT_V_INDEX} without an index grade",
        ),
    ] = None,
    index_top_p: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=options.ATTENTION,
            help="Masses to try, with commas.",
            show_default=f"{INDEX_MASSES}; none without an index grade",
        ),
    ] = None,
    by_layer: Annotated[
        bool,
        typer.Option(
            "--by-layer",
            rich_help_panel=options.ATTENTION,
            help="Also lower attn_top_p in single layers, as many as the tolerances allow.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=options.OUTPUT,
            help="The JSON; its plot goes beside it.",
            show_default="beside the model, where LLM finds it",
        ),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
) -> None:
    """Choose attention masses, dense layers and hot rows for a model from a text.

    Takes the setting with the least link bytes whose KL and perplexity stay within the tolerances
    on one half of the passages, and checks it on the other. The file is picked up by LLM,
    [b]generate[/b], [b]chat[/b] and [b]doctor[/b].

    [b]twilight calibrate[/b] model/ --text book.txt --by-layer
    """
    from twilight_engine.cli.calibrate_run import CalibrateRun, run_calibration

    run_calibration(
        CalibrateRun(
            model=model,
            text=text,
            length=length,
            targets=targets,
            passages=passages,
            ppl_tolerance=ppl_tolerance,
            kl_tolerance=kl_tolerance,
            device_budget=device_budget,
            context=context,
            preset=preset,
            attn_top_p=attn_top_p,
            index_top_p=index_top_p,
            by_layer=by_layer,
            out=out,
            device=device,
            dtype=dtype,
        )
    )
