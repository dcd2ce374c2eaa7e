"""LongBench's items: records read and refused, prompts cut in the middle, every metric reached."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.tiny import byte_tokenizer
from twilight_engine.eval.items import Item
from twilight_engine.eval.metrics import METRICS
from twilight_engine.eval.tasks.longbench import (
    default_max_length,
    longbench_items,
    read_longbench,
)
from twilight_engine.eval.tasks.longbench_sets import SETS

TOKENIZER = byte_tokenizer()
BASE: dict[str, Any] = {
    "input": "Who keeps the lighthouse?",
    "context": "The lighthouse stands on a rock. Mr Abel keeps it. He is old.",
    "answers": ["Abel", "Mr Abel"],
    "length": 12,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "b1",
}


def write(path: Path, *records: dict[str, Any] | str) -> Path:
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def items(path: Path, max_length: int = 4000, **options: Any) -> list[Item]:
    return longbench_items(TOKENIZER, read_longbench([path]), max_length=max_length, **options)


def text(ids: tuple[int, ...]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=False)


def test_a_record_becomes_an_item(tmp_path: Path) -> None:
    (item,) = items(write(tmp_path / "any.jsonl", BASE))
    assert item.item_id == "longbench/any/b1" and item.task == "longbench"
    assert (item.group, item.metric, item.max_new_tokens) == ("hotpotqa", "f1", 32)
    assert item.answers == ("Abel", "Mr Abel") and item.details["words"] == 12
    assert text(item.context_ids).startswith("[user]") and item.details["cut"] == 0
    assert text(item.context_ids).endswith(BASE["context"])
    question = text(item.question_ids)
    assert question.startswith("\n\nWho keeps the lighthouse?\n")
    assert question.endswith("[assistant]")


def test_a_completion_has_no_frame_and_no_blank_at_its_end(tmp_path: Path) -> None:
    record = {**BASE, "dataset": "samsum", "input": "Dialogue: hi\nSummary: "}
    (item,) = items(write(tmp_path / "a.jsonl", record))
    assert "[user]" not in text(item.prompt_ids)
    assert text(item.question_ids) == "\n\nDialogue: hi\nSummary:"


def test_the_name_may_come_from_the_file(tmp_path: Path) -> None:
    record = {k: v for k, v in BASE.items() if k not in ("dataset", "_id")}
    (item, other) = items(write(tmp_path / "qasper_e.jsonl", record, record))
    assert item.group == other.group == "qasper"
    assert [item.item_id, other.item_id] == ["longbench/qasper_e/1", "longbench/qasper_e/2"]


def test_datasets_come_together_and_may_be_shortened(tmp_path: Path) -> None:
    names = ["lcc", "qasper", "lcc", "qasper", "lcc"]
    records = [{**BASE, "dataset": name, "_id": str(i)} for i, name in enumerate(names)]
    path = write(tmp_path / "a.jsonl", *records)
    assert [i.item_id[-1] for i in items(path)] == ["1", "3", "0", "2", "4"]
    assert [i.item_id[-1] for i in items(path, per_set=1)] == ["1", "0"]


@pytest.mark.parametrize("limit", [300, 301, 400])
def test_the_middle_is_cut_out_exactly(tmp_path: Path, limit: int) -> None:
    context = "".join(chr(ord("a") + i % 26) for i in range(1000))
    path = write(tmp_path / "a.jsonl", {**BASE, "context": context, "input": "Which letter? {x}"})
    (whole,) = items(path)
    (cut,) = items(path, limit)
    ids = whole.prompt_ids
    assert cut.prompt_ids == ids[: limit // 2] + ids[len(ids) - (limit - limit // 2) :]
    assert len(cut.prompt_ids) == limit and cut.details["cut"] == len(ids) - limit
    assert cut.question_ids == whole.question_ids and "{x}" in text(cut.question_ids)
    (same,) = items(path, len(ids))
    assert same.prompt_ids == ids


def test_a_long_question_takes_room_from_the_front(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {**BASE, "context": "abc" * 200, "input": "why? " * 50})
    (whole,) = items(path)
    limit = len(whole.question_ids) + 120
    (cut,) = items(path, limit)
    assert len(cut.prompt_ids) == limit and cut.question_ids == whole.question_ids
    assert cut.context_ids == whole.context_ids[: len(cut.context_ids)]


# A right answer of each dataset, what a model might say, and the score.
RIGHT: dict[str, tuple[str, str, float]] = {
    "narrativeqa": ("the old keeper", "An old keeper.", 1.0),
    "qasper": ("unanswerable", "unanswerable", 1.0),
    "multifieldqa_en": ("blue whale", "the blue fish", 0.5),
    "multifieldqa_zh": ("北京", "北京。", 1.0),
    "hotpotqa": ("yes", "yes", 1.0),
    "2wikimqa": ("Ada", "ada", 1.0),
    "musique": ("1912", "in 1912", 2 / 3),
    "dureader": ("红色", "红", 2 / 3),
    "gov_report": ("a b c d", "a c", 2 / 3),
    "qmsum": ("a b", "b a", 0.5),
    "multi_news": ("a b", "a b", 1.0),
    "vcsum": ("一二三", "一二三", 1.0),
    "trec": ("city", "city\nQuestion: state", 1.0),
    "triviaqa": ("Rome", "Rome\nPassage: Paris", 1.0),
    "samsum": ("Ann is late", "Ann is late\nDialogue: x", 1.0),
    "lsht": ("体育", "体育\n财经", 1.0),
    "passage_count": ("7", "7", 1.0),
    "passage_retrieval_en": ("Paragraph 12", "Paragraph 12", 1.0),
    "passage_retrieval_zh": ("段落3", "段落4", 0.0),
    "lcc": ("return x", "return x\nprint()", 1.0),
    "repobench-p": ("return x", "# note\nreturn x", 1.0),
}
CLASSES = {"trec": ["city", "state"], "lsht": ["体育", "财经"]}


@pytest.mark.parametrize("name", SETS)
def test_every_dataset_is_judged_by_its_metric(tmp_path: Path, name: str) -> None:
    answer, said, score = RIGHT[name]
    record = {**BASE, "dataset": name, "answers": [answer], "all_classes": CLASSES.get(name)}
    (item,) = items(write(tmp_path / "a.jsonl", record))
    assert item.metric is not None
    assert METRICS[item.metric](said, item.answers, **item.details) == pytest.approx(score)
    assert item.max_new_tokens in (32, 64, 128, 512)
    # What is asked of the record stands in the prompt, and no placeholder is left.
    assert BASE["context"] in text(item.prompt_ids) and "{input}" not in text(item.prompt_ids)
    asks_nothing = ("gov_report", "multi_news", "vcsum", "passage_count")
    assert (BASE["input"] in text(item.prompt_ids)) == (name not in asks_nothing)


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in BASE.items() if key != name}


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([BASE, without("answers")], "line 2 has no 'answers'; it has input, context, length"),
        ([without("context")], "line 1 has no 'context'"),
        ([{**BASE, "input": 3}], "line 1: input is 3; it must be a string"),
        ([{**BASE, "answers": []}], "answers is []; it must be a list of strings"),
        ([{**BASE, "answers": "Abel"}], "answers is 'Abel'"),
        ([{**BASE, "dataset": "trec"}], "all_classes is None; it must be a list of strings"),
        ([{**BASE, "dataset": "squad"}], "dataset is 'squad'; known: narrativeqa, qasper"),
        ([without("dataset")], "dataset is 'some'; known: narrativeqa"),
        ([BASE, "{not json"], "line 2 is not JSON"),
        (["", "[1, 2]"], "line 2 is '[1, 2]'; it must be a JSON object"),
        ([""], "is empty; it must have a JSON object a line"),
        ([BASE, BASE], "line 2: the record some/b1 was there before"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, records: list[Any], words: str) -> None:
    path = write(tmp_path / "some.jsonl", *records)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        read_longbench([path])
    assert str(path) in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--data .*none.jsonl: No such file"):
        read_longbench([tmp_path / "none.jsonl"])
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_longbench([tmp_path / "bytes.jsonl"])


def test_lengths(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", BASE, {**BASE, "dataset": "vcsum", "_id": "2"})
    records = read_longbench([path])
    assert default_max_length(records[:1], 1024) == 1024 - 32
    assert default_max_length(records, 1024) == 1024 - 512
    with pytest.raises(ValueError, match=r"context of 512 tokens has no room .* answer of 512"):
        default_max_length(records, 512)
    with pytest.raises(ValueError, match=r"--max-length is 50; a/b1 of hotpotqa needs more than"):
        items(path, 50)
