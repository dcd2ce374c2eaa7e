"""LongBench's items, from JSON lines that the user has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twilight_engine.eval.items import Item
from twilight_engine.eval.tasks.longbench_sets import SETS, LongBenchSet
from twilight_engine.eval.tasks.prompter import Prompter
from twilight_engine.loaders.tokenizer import Tokenizer

EVEN = "_e"  # ends the names of LongBench-E's files: the same sets, lengths evened out


@dataclass(frozen=True)
class LongBenchRecord:
    """One line of a LongBench file.

    Attributes:
        record_id: unique among all files of a run.
        dataset: a name of SETS.
        all_classes: the labels of a classification, else empty.
        words: LongBench's count of the context's words or characters; None: not told.
    """

    record_id: str
    dataset: str
    input: str
    context: str
    answers: tuple[str, ...]
    all_classes: tuple[str, ...]
    words: int | None


def read_longbench(paths: Sequence[Path]) -> list[LongBenchRecord]:
    """The records of LongBench's files (JSON lines), by dataset in the order of SETS.

    Raises: ValueError with file and line for what is no such record; for an unknown dataset, a
        file without lines, and an `_id` that comes twice in files of one name.
    """
    found: dict[str, LongBenchRecord] = {}
    for path in paths:
        lines = [(n, line) for n, line in enumerate(_lines(path), start=1) if line.strip()]
        if not lines:
            raise ValueError(f"--data {path} is empty; it must have a JSON object a line")
        for number, line in lines:
            where = f"--data {path}, line {number}"
            record = _record(line, path, number, where)
            if record.record_id in found:
                raise ValueError(f"{where}: the record {record.record_id} was there before")
            found[record.record_id] = record
    names = list(SETS)
    return sorted(found.values(), key=lambda record: names.index(record.dataset))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")  # splitlines would split inside strings
    except OSError as error:
        raise ValueError(f"--data {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--data {path} is not UTF-8: {error}") from error


def _record(line: str, path: Path, number: int, where: str) -> LongBenchRecord:
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{where} is {line.strip()!r:.80}; it must be a JSON object")
    dataset = str(raw.get("dataset") or path.stem)
    if dataset not in SETS:
        dataset = dataset.removesuffix(EVEN)
    if dataset not in SETS:
        raise ValueError(f"{where}: dataset is {dataset!r}; known: {', '.join(SETS)}")
    classes: tuple[str, ...] = ()
    if SETS[dataset].metric == "classification":
        classes = _texts(raw, "all_classes", where)
    words = raw.get("length")
    return LongBenchRecord(
        record_id=f"{path.stem}/{raw.get('_id', number)}",
        dataset=dataset,
        input=_text(raw, "input", where),
        context=_text(raw, "context", where),
        answers=_texts(raw, "answers", where),
        all_classes=classes,
        words=words if isinstance(words, int) else None,
    )


def _field(raw: dict[str, Any], name: str, where: str) -> Any:
    if name not in raw:
        raise ValueError(f"{where} has no {name!r}; it has {', '.join(raw) or 'nothing'}")
    return raw[name]


def _text(raw: dict[str, Any], name: str, where: str) -> str:
    value = _field(raw, name, where)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} is {value!r:.80}; it must be a string")
    return value


def _texts(raw: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    value = _field(raw, name, where)
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{where}: {name} is {value!r:.80}; it must be a list of strings")
    return tuple(value)


def default_max_length(records: Sequence[LongBenchRecord], context_length: int) -> int:
    """Tokens of a prompt that leave room for the longest answer these datasets allow.

    Raises: ValueError for a context length that leaves none.
    """
    longest = max(SETS[record.dataset].max_new_tokens for record in records)
    if context_length <= longest:
        raise ValueError(
            f"the model's context of {context_length} tokens has no room for a prompt beside an "
            f"answer of {longest}"
        )
    return context_length - longest


def longbench_items(
    tokenizer: Tokenizer,
    records: Sequence[LongBenchRecord],
    *,
    max_length: int,
    per_set: int | None = None,
) -> list[Item]:
    """An item a record, whose prompt is cut in the middle to at most `max_length` tokens.

    Args:
        per_set: only the first records of each dataset; None: all.
    Raises: ValueError for a `max_length` that a question and its wording fill.
    """
    prompters = {chat: Prompter(tokenizer, chat=chat) for chat in (True, False)}
    taken = dict.fromkeys(SETS, 0)
    items = []
    for record in records:
        taken[record.dataset] += 1
        if per_set is None or taken[record.dataset] <= per_set:
            asked = SETS[record.dataset]
            items.append(_item(prompters[asked.chat], record, asked, max_length))
    return items


def _item(
    prompter: Prompter, record: LongBenchRecord, asked: LongBenchSet, max_length: int
) -> Item:
    opening = prompter.opening(asked.opening)
    # A blank at the end of a completion would have to be a token of its own.
    question = asked.question.format(input=record.input).rstrip(" ")
    ids = prompter.question(question) if asked.chat else tuple(prompter.encode(question))
    context = prompter.encode(record.context)
    room = max_length - len(opening) - len(ids)
    if room < 1:
        raise ValueError(
            f"--max-length is {max_length}; {record.record_id} of {record.dataset} needs more than "
            f"{max_length - room} tokens for its question and our wording"
        )
    kept = cut_middle(context, room, max_length // 2 - len(opening))
    details = {**asked.details, "words": record.words, "cut": len(context) - len(kept)}
    if record.all_classes:
        details["all_classes"] = record.all_classes
    return Item(
        item_id=f"longbench/{record.record_id}",
        task="longbench",
        group=record.dataset,
        context_ids=tuple(opening + kept),
        question_ids=ids,
        answers=record.answers,
        metric=asked.metric,
        max_new_tokens=asked.max_new_tokens,
        details=details,
    )


def cut_middle(ids: list[int], room: int, front: int) -> list[int]:
    """At most `room` of these tokens: the first `front`, as far as they fit, and the last."""
    if len(ids) <= room:
        return ids
    front = min(max(front, 0), room)
    return ids[:front] + ids[len(ids) - (room - front) :]
