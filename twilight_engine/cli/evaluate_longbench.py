"""`twilight eval longbench`: LongBench's files, which the user has, by every method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twilight_engine.cli import evaluate_tasks as tasks
from twilight_engine.cli import options
from twilight_engine.cli.evaluate_run import TaskRun, run_workloads

if TYPE_CHECKING:
    from twilight_engine.eval.run import Workload
    from twilight_engine.models.load import LoadedModel

Data = Annotated[
    list[Path],
    typer.Option(
        metavar="FILE",
        rich_help_panel=tasks.TASK,
        help="A LongBench file of JSON lines; several times for more.",
        show_default=False,
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=tasks.TASK,
        help="Most tokens of a prompt; a longer one loses its middle.",
        show_default="the model's context, less the longest answer",
    ),
]
ItemsASet = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=tasks.TASK,
        help="Only the first items of each dataset.",
        show_default="all",
    ),
]


def longbench(
    context: typer.Context,
    model: options.Model,
    data: Data,
    methods: tasks.Methods = tasks.METHODS,
    max_length: MaxLength = None,
    items: ItemsASet = None,
    question: tasks.Question = "prefill",
    batch: tasks.Batch = 32,
    hot_bytes: tasks.HotBytes = None,
    device_memory: tasks.DeviceMemory = None,
    host_memory: tasks.HostMemory = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    out: tasks.Out = Path("twilight-longbench"),
) -> None:
    """LongBench from files of your own, by its metrics; the wording of the prompts is ours."""
    from twilight_engine.eval.metrics import check_installed
    from twilight_engine.eval.run import Workload
    from twilight_engine.eval.tasks.longbench import (
        default_max_length,
        longbench_items,
        read_longbench,
    )
    from twilight_engine.eval.tasks.longbench_sets import SETS
    from twilight_engine.runtime.arguments import check_at_least_one

    run = TaskRun.of("longbench", context.params)
    check_at_least_one(max_length=max_length)
    records = read_longbench([Path(path) for path in data])
    check_installed({SETS[record.dataset].metric for record in records})

    def make(loaded: LoadedModel) -> Sequence[Workload]:
        assert loaded.tokenizer is not None
        limit = max_length
        if limit is None:
            limit = default_max_length(records, loaded.config.max_position_embeddings)
        found = longbench_items(loaded.tokenizer, records, max_length=limit, per_set=items)
        return [Workload(limit, found)]

    run_workloads(run, make)
