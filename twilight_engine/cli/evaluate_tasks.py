"""`twilight eval niah | ruler | ppl`: methods side by side on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twilight_engine.cli import options
from twilight_engine.cli.evaluate_run import TaskRun, Texts, run_task

if TYPE_CHECKING:
    from twilight_engine.eval.items import Item, Passage
    from twilight_engine.loaders.tokenizer import Tokenizer

TASK = "Task"
Methods = Annotated[
    str,
    typer.Option(
        rich_help_panel=TASK,
        help="With commas: dense, dense-int4, balanced, lean, paper, balanced@0.9; a selector "
        "alone ([b]quest:1024[/b], double_sparsity:1024, double_sparsity_online:1024, "
        "streaming:1024, lsh, lsh:8x75) or under a preset ([b]quest+paper@0.85[/b]); [b]table[/b]: "
        "those of docs/accuracy.md.",
    ),
]
Length = Annotated[
    list[str],
    typer.Option(rich_help_panel=TASK, help="Tokens of a context; several times or with commas."),
]
Items = Annotated[int, typer.Option(rich_help_panel=TASK, help="Items of each length.")]
ItemsAGroup = Annotated[
    int, typer.Option(rich_help_panel=TASK, help="Items of each length and subtask.")
]
Targets = Annotated[
    int, typer.Option(rich_help_panel=TASK, help="Last tokens of a passage to predict.")
]
Text = Annotated[
    list[Path],
    typer.Option(
        metavar="FILE",
        rich_help_panel=TASK,
        help="A long UTF-8 text; give several times for more.",
        show_default=False,
    ),
]
Question = Annotated[
    str,
    typer.Option(
        rich_help_panel=TASK,
        help="[b]prefill[/b]: the question is read densely, with the context. [b]decode[/b]: "
        "through the method's steps, as the paper does.",
    ),
]
Seed = Annotated[int, typer.Option(rich_help_panel=TASK, help="Of the items.")]
Batch = Annotated[
    int,
    typer.Option(rich_help_panel=options.MEMORY, help="Most sequences that decode together."),
]
HotBytes = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=options.MEMORY,
        help="Device bytes of hot rows a sequence, the same for every method.",
        show_default="the default preset's share",
    ),
]
DeviceMemory = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=options.MEMORY,
        help="GiB of device memory for the caches of all methods together.",
        show_default="what is free",
    ),
]
HostMemory = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=options.MEMORY,
        help="GiB of host memory for them.",
        show_default="what is free",
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        metavar="DIR",
        rich_help_panel=options.OUTPUT,
        help="Results, summary.json and plots; a run that was cut short goes on there.",
    ),
]
METHODS = "dense,balanced,lean,paper"
DEFAULT_LENGTH = ["4096"]


def niah(
    context: typer.Context,
    model: options.Model,
    text: Text,
    methods: Methods = METHODS,
    length: Length = DEFAULT_LENGTH,
    items: Items = 50,
    question: Question = "prefill",
    seed: Seed = 0,
    batch: Batch = 32,
    hot_bytes: HotBytes = None,
    device_memory: DeviceMemory = None,
    host_memory: HostMemory = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    out: Out = Path("twilight-niah"),
) -> None:
    """Needles in a haystack: a passcode at every depth of texts of every length."""
    from twilight_engine.eval.tasks.niah import niah_items

    def make(tokenizer: Tokenizer, texts: Texts, tokens: int) -> Sequence[Item]:
        return niah_items(tokenizer, texts, length=tokens, count=items, seed=seed)

    run_task(TaskRun.of("niah", context.params), make)


def ruler(
    context: typer.Context,
    model: options.Model,
    text: Text,
    methods: Methods = METHODS,
    length: Length = DEFAULT_LENGTH,
    items: ItemsAGroup = 50,
    question: Question = "prefill",
    seed: Seed = 0,
    batch: Batch = 32,
    hot_bytes: HotBytes = None,
    device_memory: DeviceMemory = None,
    host_memory: HostMemory = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    out: Out = Path("twilight-ruler"),
) -> None:
    """Retrieval in RULER's kinds: needles among needles, variables to trace, words to count."""
    from twilight_engine.eval.tasks.ruler import ruler_items

    def make(tokenizer: Tokenizer, texts: Texts, tokens: int) -> Sequence[Item]:
        return ruler_items(tokenizer, texts, length=tokens, per_group=items, seed=seed)

    run_task(TaskRun.of("ruler", context.params), make)


def ppl(
    context: typer.Context,
    model: options.Model,
    text: Text,
    methods: Methods = METHODS,
    length: Length = DEFAULT_LENGTH,
    items: Items = 16,
    targets: Targets = 64,
    batch: Batch = 32,
    hot_bytes: HotBytes = None,
    device_memory: DeviceMemory = None,
    host_memory: HostMemory = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    out: Out = Path("twilight-ppl"),
) -> None:
    """Perplexity of the last tokens of long texts, and how far each method is from dense."""
    from twilight_engine.eval.tasks.ppl import passages

    def make(tokenizer: Tokenizer, texts: Texts, tokens: int) -> Sequence[Passage]:
        return passages(tokenizer, texts, length=tokens, targets=targets, count=items)

    run_task(TaskRun.of("ppl", context.params), make)
