"""The options that several commands share, named after vLLM's and the two configs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SAMPLING, ATTENTION, MEMORY, OUTPUT = "Sampling", "Attention", "Memory", "Output"
PROMPT = "Prompt"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A Hugging Face directory or a .gguf file.", show_default=False
    ),
]

MaxTokens = Annotated[int, typer.Option(rich_help_panel=SAMPLING, help="Most tokens to generate.")]
Temperature = Annotated[
    float, typer.Option(rich_help_panel=SAMPLING, help="0 takes the most probable token.")
]
TopP = Annotated[
    float,
    typer.Option(rich_help_panel=SAMPLING, help="Mass of the tokens to sample from, in (0, 1]."),
]
Seed = Annotated[int, typer.Option(rich_help_panel=SAMPLING, help="Of the sampling.")]

PRESETS = (
    "[b]balanced[/b]: INT4 K and V index. [b]lean[/b]: smaller index, more rows. "
    "[b]paper[/b]: Twilight as published."
)
Preset = Annotated[str, typer.Option(rich_help_panel=ATTENTION, help=PRESETS)]
# None, here and below: not given, so that a calibration beside the model decides.
OpenPreset = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=ATTENTION, help=PRESETS, show_default="the calibration's, or balanced"
    ),
]
Calibration = Annotated[
    str,
    typer.Option(
        metavar="auto|none|PATH",
        rich_help_panel=ATTENTION,
        help="What [b]twilight calibrate[/b] chose; [b]auto[/b]: the file beside the model, where "
        "no option below and no other preset is given.",
    ),
]
Policy = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=ATTENTION,
        help="[b]graded[/b]: fetch the rows that matter. [b]dense[/b]: every row, every step.",
        show_default="graded",
    ),
]
AttnTopP = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=ATTENTION,
        help="Attention mass that exact rows must reach, in (0, 1]; 1 keeps every row.",
        show_default="the calibration's or preset's",
    ),
]
AttnTopK = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=ATTENTION,
        help="A fixed number of exact rows a KV head instead.",
        show_default="off",
    ),
]
IndexTopP = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=ATTENTION,
        help="Mass up to which further rows keep an INT4 V, or [b]none[/b].",
        show_default="the calibration's or preset's",
    ),
]
Selector = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=ATTENTION,
        help="Which tokens are scored: [b]all[/b], [b]quest[/b], [b]double_sparsity_online[/b], "
        "[b]lsh[/b] (300 bytes more a token and KV head) or [b]streaming[/b].",
        show_default="the preset's",
    ),
]
Fetch = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=ATTENTION,
        help="What crosses the link: [b]row[/b] or whole [b]page[/b].",
        show_default="row",
    ),
]
AuditEvery = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=ATTENTION,
        help="Of every so many steps, check one (layer, KV head) exactly against the host's rows.",
        show_default="off",
    ),
]

MaxModelLen = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=MEMORY,
        help="Most tokens of a sequence, prompt and output.",
        show_default="the model's",
    ),
]
PageSize = Annotated[
    int | None,
    typer.Option(rich_help_panel=MEMORY, help="Tokens of a KV page.", show_default="64"),
]
DenseLayers = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=MEMORY,
        help="Layers whose KV stays on the device: numbers with commas, [b]all[/b] or [b]none[/b].",
        show_default="the calibration's, or 0,1",
    ),
]
KVOffloadingSize = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=MEMORY,
        help="GiB of host memory for KV.",
        show_default="what the context needs",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        rich_help_panel=MEMORY,
        help="auto, float32, float16 or bfloat16. A CPU runs float32.",
    ),
]
Device = Annotated[str, typer.Option(rich_help_panel=MEMORY, help="auto, cpu, cuda or cuda:N.")]

Report = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        rich_help_panel=OUTPUT,
        help="Write the offload report there: report.json and plots.",
        show_default=False,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", rich_help_panel=OUTPUT, help="Print one JSON object instead.")
]
