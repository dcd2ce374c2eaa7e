"""What the tasks of `twilight eval` share: from options to a table, summary.json and plots."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch

from twilight_engine import _C
from twilight_engine.cli.machine import ran_on

if TYPE_CHECKING:
    from twilight_engine.eval.engine import EvalEngine
    from twilight_engine.eval.items import Item, Passage
    from twilight_engine.eval.memory import MemoryBudget
    from twilight_engine.eval.methods import Method
    from twilight_engine.eval.records import RunFolder
    from twilight_engine.eval.run import Workload
    from twilight_engine.loaders.tokenizer import Tokenizer
    from twilight_engine.models.load import LoadedModel

GIB = 1 << 30
DEVICE_RESERVE_BYTES = 4 * GIB  # activations of a prefill chunk, workspaces, torch's caching
PLAIN_WIDTH = 240  # of a table that goes to a file

Texts = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class TaskRun:
    """The options that every task has; see cli.evaluate_tasks."""

    task: str
    model: str
    methods: str
    lengths: tuple[int, ...]
    text: tuple[Path, ...]
    question: Literal["prefill", "decode"]
    seed: int
    batch: int
    hot_bytes: int | None
    device_memory: float | None
    host_memory: float | None
    dtype: str
    device: str
    out: Path

    @classmethod
    def of(cls, task: str, params: Mapping[str, Any]) -> TaskRun:
        """From a command's parameters. Raises: ValueError for those that no check below sees."""
        from twilight_engine.runtime.arguments import check_at_least_one

        known = {field.name for field in dataclasses.fields(cls)} & set(params)
        given = {name: params[name] for name in known}
        question = given.setdefault("question", "prefill")
        if question not in ("prefill", "decode"):
            raise ValueError(f"--question is {question!r}; allowed: 'prefill', 'decode'")
        check_at_least_one(batch=given["batch"], items=params["items"])
        # Some versions of typer keep paths as strings in the context and convert them later.
        given["text"] = tuple(Path(path) for path in given.get("text", ()))
        given["out"] = Path(given["out"])
        given.setdefault("seed", 0)
        return cls(task=task, lengths=parse_lengths(params.get("length", ())), **given)


def run_task(
    options: TaskRun,
    make_items: Callable[[Tokenizer, Texts, int], Sequence[Item] | Sequence[Passage]],
) -> None:
    """Make the items, run every method on them and show the table."""
    from twilight_engine.eval.run import Workload

    texts = read_texts(options.text)

    def make(loaded: LoadedModel) -> Sequence[Workload]:
        assert loaded.tokenizer is not None
        return [
            Workload(length, make_items(loaded.tokenizer, texts, length))
            for length in options.lengths
        ]

    run_workloads(options, make)


def run_workloads(options: TaskRun, make: Callable[[LoadedModel], Sequence[Workload]]) -> None:
    """Load the model, which has a tokenizer, make its workloads, run every method on them."""
    from twilight_engine.eval.channels import with_channels
    from twilight_engine.eval.methods import parse_methods
    from twilight_engine.eval.records import RunFolder
    from twilight_engine.models.load import load_model
    from twilight_engine.runtime.arguments import pick_device

    methods = parse_methods(options.methods)
    loaded = load_model(options.model, dtype=options.dtype, device=pick_device(options.device))
    if loaded.tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer; eval needs one to read texts")
    workloads = make(loaded)
    methods = with_channels(methods, loaded.model, workloads[0].items[0].context_ids)
    folder = RunFolder(options.out, settings_of(options, loaded, workloads))
    fill(options, loaded, methods, workloads, folder)
    show(options, [method.name for method in methods], folder)


def fill(
    options: TaskRun,
    loaded: LoadedModel,
    methods: Sequence[Method],
    workloads: Sequence[Workload],
    folder: RunFolder,
) -> None:
    """Run what the folder lacks, under a progress bar where there is a terminal."""
    from twilight_engine.eval.engine import EvalEngine
    from twilight_engine.eval.items import Passage
    from twilight_engine.eval.memory import room_for, tokens_of
    from twilight_engine.eval.progress import EvalProgress
    from twilight_engine.eval.run import run
    from twilight_engine.runtime.arguments import context_length

    budget = memory_budget(loaded.model.device, options.device_memory, options.host_memory)
    for workload in workloads:
        context_length(max(map(tokens_of, workload.items)), loaded.config)  # warns of too long ones

    def make_engine(workload: Workload) -> EvalEngine:
        first = workload.items[0]
        return EvalEngine(
            loaded,
            methods,
            max_len=room_for(workload.items, options.question),
            batch=min(options.batch, len(workload.items)),
            hot_bytes=options.hot_bytes,
            budget=budget,
            kept_targets=len(first.target_ids) if isinstance(first, Passage) else 0,
        )

    pairs = sum(len(workload.items) for workload in workloads) * len(methods)
    with EvalProgress(pairs, show=sys.stderr.isatty()) as progress:
        run(make_engine, workloads, methods, folder, progress, question=options.question)


def show(options: TaskRun, methods: Sequence[str], folder: RunFolder) -> None:
    """The table on stdout; summary.json and, where matplotlib is installed, plots in the folder."""
    from rich.console import Console

    from twilight_engine.eval.plots import plot_run
    from twilight_engine.eval.summary import summarise
    from twilight_engine.eval.table import groups_table, results_table

    records = folder.of(methods)
    lines = summarise(records, methods)
    title = f"{options.task}, {Path(options.model).stem}"
    if options.question == "decode":
        title += ", question decoded"
    summary = {
        "settings": folder.settings,
        "machine": ran_on(folder.settings["device"]),
        "lines": [line.as_json() for line in lines],
    }
    path = folder.path / "summary.json"
    path.write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    written = [folder.path / "results.jsonl", path]
    try:
        written += plot_run(lines, records, title, folder.path)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    groups = groups_table(lines)
    if groups is not None:
        console.print(groups)
    console.print(results_table(lines, title))
    console.print(f"written: {', '.join(map(str, written))}", style="dim", soft_wrap=True)


def settings_of(
    options: TaskRun, loaded: LoadedModel, workloads: Sequence[Workload]
) -> dict[str, Any]:
    """What decides about results besides the methods."""
    return {
        **model_settings(options.task, options.model, loaded),
        "items": {str(w.length): f"{len(w.items)}, {w.digest}" for w in workloads},
        "question": options.question,
        "seed": options.seed,
        "batch": options.batch,
        "hot_bytes": options.hot_bytes,
    }


def model_settings(task: str, model: str, loaded: LoadedModel) -> dict[str, Any]:
    """The part of a run's settings that every task has."""
    config = loaded.config
    return {
        "task": task,
        "model": Path(model).name,
        "shape": f"{config.num_layers} layers, hidden {config.hidden_size}",
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": loaded.model.device.type,
    }


def parse_lengths(words: Sequence[str]) -> tuple[int, ...]:
    """'4096,8192' and '16384' -> numbers, each once, ascending.

    Raises: ValueError for what is no whole number >= 1.
    """
    parts = [part.strip() for word in words for part in word.split(",")]
    for part in parts:
        if not part.isdecimal() or int(part) < 1:
            raise ValueError(f"--length is {part!r}; it must be a whole number of tokens >= 1")
    return tuple(sorted({int(part) for part in parts}))


def read_texts(paths: Sequence[Path]) -> list[tuple[str, str]]:
    """(name, text) of each file, named by its stem.

    Raises: ValueError for one that cannot be read as text, or two of one name: items are told apart
        by it.
    """
    texts: list[tuple[str, str]] = []
    for path in paths:
        try:
            texts.append((path.stem, path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ValueError(f"--text {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"--text {path} is not UTF-8: {error}") from error
    names = [name for name, _ in texts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"--text has two files named {twice[0]!r}; results tell them by name")
    return texts


def memory_budget(
    device: torch.device, device_gib: float | None, host_gib: float | None
) -> MemoryBudget:
    """What all caches may take: as told, else what is free; a CPU's tiers share its memory."""
    from twilight_engine.eval.memory import MemoryBudget

    host_free = max(int(_C.host_limits()["usable_bytes"]), 0)
    if device.type == "cuda":
        device_free = torch.cuda.mem_get_info(device)[0] - DEVICE_RESERVE_BYTES
    else:
        device_free = min(psutil.virtual_memory().available, host_free) // 2
        host_free = device_free
    return MemoryBudget(
        device_bytes=device_free if device_gib is None else int(device_gib * GIB),
        host_bytes=host_free if host_gib is None else int(host_gib * GIB),
    )
