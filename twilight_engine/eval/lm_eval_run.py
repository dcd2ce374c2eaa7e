"""lm-evaluation-harness's tasks by several methods on the same items, side by side.

Needs the extra `lm-eval`.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from twilight_engine.eval.lm_eval import TwilightLM
from twilight_engine.eval.lm_eval_lines import TaskLine, summarise_tasks
from twilight_engine.eval.respond import Responder

BOOTSTRAPS = 1000  # of a metric that is no mean; lm-eval's 100,000 take minutes
NEAREST = 5


def load_tasks(
    names: Sequence[str],
    include_path: Path | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> list[Any]:
    """lm-eval's tasks and groups of these names, their data loaded.

    Args:
        include_path: a folder of task files (YAML) besides lm-eval's own.
        metadata: what tasks that make their own data read, such as ruler's tokenizer and lengths.
    Raises: ValueError for an unknown name, with the nearest known ones, or for a task that lacks a
        package or metadata; ConnectionError for data that cannot be had.
    """
    manager = TaskManager(include_path=include_path, metadata=dict(metadata or {}))
    found: list[Any] = []
    for pattern in names:
        matches = manager.match_tasks([pattern])
        if not matches:
            nearest = difflib.get_close_matches(pattern, manager.all_tasks, NEAREST, 0.5)
            raise ValueError(
                f"unknown task {pattern!r}; nearest: {', '.join(nearest) or 'none'} "
                f"(lm-eval knows {len(manager.all_tasks)} tasks and groups)"
            )
        for name in matches:
            loaded = _load(manager, name)
            groups = loaded["groups"]
            found += [groups[name]] if name in groups else loaded["tasks"].values()
    return found


def _load(manager: TaskManager, name: str) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = manager.load([name])
    except OSError as error:  # datasets' own errors and huggingface_hub's are OSErrors too
        raise ConnectionError(
            f"the data of task {name} cannot be loaded: {error}; download it once where there is a "
            "network (HF_HOME is its cache), or give a task with local files in --include-path"
        ) from error
    except (ImportError, AssertionError) as error:
        raise ValueError(f"the task {name} cannot be loaded: {error}") from error
    return loaded


def run_lm_eval(
    responder: Responder,
    tasks: Sequence[Any],
    *,
    name: str,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    max_length: int | None = None,
) -> tuple[list[TaskLine], dict[str, Any]]:
    """Evaluate every method of the responder on the same items.

    Args:
        tasks: from `load_tasks`.
        name: of the model.
        limit: items of each task.
    Returns: a line for each task, metric and method; lm-eval's own results by method.
    Raises: as TwilightLM's methods do.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = {}
    methods = sorted(responder.methods, key=lambda method: not method.is_dense)
    for method in methods:
        model = TwilightLM(responder, method, name=name, max_length=max_length)
        with contextlib.redirect_stdout(sys.stderr):  # lm-eval prints how its bootstrap goes
            found[method.name] = lm_eval.simple_evaluate(
                model=model,
                tasks=list(tasks),
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=apply_chat_template,
                bootstrap_iters=BOOTSTRAPS,
            )
    lines = summarise_tasks(found, {method.name: method for method in methods}, responder)
    for results in found.values():
        del results["samples"]
    return lines, found
