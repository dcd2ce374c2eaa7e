"""`twilight eval lm-eval`: lm-evaluation-harness's tasks by every method."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twilight_engine.cli import evaluate_tasks as tasks_of_eval
from twilight_engine.cli import options
from twilight_engine.cli.evaluate_run import PLAIN_WIDTH, memory_budget, model_settings

if TYPE_CHECKING:
    from twilight_engine.eval.lm_eval_lines import TaskLine
    from twilight_engine.eval.records import RunFolder

TASK = tasks_of_eval.TASK
Tasks = Annotated[
    str,
    typer.Option(
        rich_help_panel=TASK,
        help="Names of its tasks and groups, with commas; * matches any letters.",
        show_default=False,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(rich_help_panel=TASK, help="Items of each task.", show_default="all"),
]
NumFewshot = Annotated[
    int | None,
    typer.Option(rich_help_panel=TASK, help="Solved examples.", show_default="the task's"),
]
IncludePath = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        rich_help_panel=TASK,
        help="Task files (YAML) of your own.",
        show_default=False,
    ),
]
ApplyChatTemplate = Annotated[
    bool,
    typer.Option("--apply-chat-template", rich_help_panel=TASK, help="Ask as a chat."),
]
Metadata = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        rich_help_panel=TASK,
        help="For tasks that make their data, as ruler's: "
        """'{"tokenizer": "DIR", "max_seq_lengths": [8192]}'.""",
        show_default="MODEL as tokenizer",
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=TASK,
        help="Most tokens of prompt and answer; a longer prompt loses its beginning.",
        show_default="the model's context",
    ),
]


def lm_eval(
    model: options.Model,
    tasks: Tasks,
    methods: tasks_of_eval.Methods = tasks_of_eval.METHODS,
    limit: Limit = None,
    num_fewshot: NumFewshot = None,
    include_path: IncludePath = None,
    apply_chat_template: ApplyChatTemplate = False,
    metadata: Metadata = None,
    max_length: MaxLength = None,
    batch: tasks_of_eval.Batch = 32,
    hot_bytes: tasks_of_eval.HotBytes = None,
    device_memory: tasks_of_eval.DeviceMemory = None,
    host_memory: tasks_of_eval.HostMemory = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    out: tasks_of_eval.Out = Path("twilight-lm-eval"),
) -> None:
    """Tasks of lm-evaluation-harness, such as gsm8k, coqa and ruler's, by its own metrics."""
    check_installed()
    from twilight_engine.eval.lm_eval_run import load_tasks, run_lm_eval
    from twilight_engine.eval.methods import parse_methods
    from twilight_engine.eval.records import RunFolder
    from twilight_engine.eval.respond import Responder
    from twilight_engine.models.load import load_model
    from twilight_engine.runtime.arguments import check_at_least_one, pick_device

    check_at_least_one(batch=batch, limit=limit, max_length=max_length)
    chosen = parse_methods(methods)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"--include-path {include_path} is no folder")
    wanted = {"pretrained": model, **read_metadata(metadata)}
    found = load_tasks(names, include_path, wanted)
    loaded = load_model(model, dtype=dtype, device=pick_device(device))
    settings = model_settings("lm-eval", model, loaded) | {"batch": batch, "hot_bytes": hot_bytes}
    folder = RunFolder(out, settings)
    responder = Responder(
        loaded,
        chosen,
        folder,
        batch=batch,
        hot_bytes=hot_bytes,
        budget=memory_budget(loaded.model.device, device_memory, host_memory),
        show=sys.stderr.isatty(),
    )
    asked: dict[str, Any] = {
        "tasks": names,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "apply_chat_template": apply_chat_template,
        "max_length": max_length,
    }
    given = {name: value for name, value in asked.items() if name != "tasks"}
    lines, raw = run_lm_eval(responder, found, name=Path(model).name, **given)
    show(folder, asked, lines, raw)


def show(
    folder: RunFolder, asked: dict[str, Any], lines: Sequence[TaskLine], raw: dict[str, Any]
) -> None:
    """The table on stdout; summary.json and lm-eval's own results in the folder."""
    from rich.console import Console

    from twilight_engine.eval.lm_eval_table import tasks_table

    summary = {"settings": folder.settings | asked, "lines": [line.as_json() for line in lines]}
    written = [folder.path / name for name in ("results.jsonl", "summary.json", "lm-eval.json")]
    for path, value in zip(written[1:], (summary, raw), strict=True):
        path.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    console.print(tasks_table(lines, f"lm-eval, {Path(folder.settings['model']).stem}"))
    console.print(f"written: {', '.join(map(str, written))}", style="dim", soft_wrap=True)


def check_installed() -> None:
    """ValueError, naming the extra, where lm-evaluation-harness is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ValueError(
            "lm-evaluation-harness is not installed: pip install 'twilight-engine[lm-eval]'"
        ) from error


def read_metadata(text: str | None) -> dict[str, Any]:
    """--metadata's JSON object. Raises: ValueError for anything else."""
    try:
        value = json.loads(text) if text is not None else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"--metadata is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"--metadata is {text!r}; it must be a JSON object")
    return value
