"""RULER's categories: answers where they belong and as often as they should, distractors apart."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import pytest

from tests.eval.tasks.conftest import Case
from tests.runtime.tiny import byte_tokenizer
from twilight_engine.eval.items import Item
from twilight_engine.eval.metrics import METRICS
from twilight_engine.eval.tasks.ruler import GROUPS, ruler_items

LONGEST_ENTRY = 40  # tokens: a word three times, with its numbers, in bytes
NOTE = re.compile(r" Note: the locker code of (\w+) is (\d{5})\.")


@pytest.fixture(scope="module")
def items(case: Case) -> dict[str, list[Item]]:
    made = ruler_items(case.tokenizer, case.texts, length=case.length, per_group=2)
    return {group: [item for item in made if item.group == group] for group in GROUPS}


def test_every_group_has_its_items(items: dict[str, list[Item]]) -> None:
    assert [len(items[group]) for group in GROUPS] == [2] * len(GROUPS)
    ids = [item.item_id for group in GROUPS for item in items[group]]
    assert len(set(ids)) == len(ids)
    assert all(item.task == "ruler" for group in GROUPS for item in items[group])


@pytest.mark.parametrize("group", GROUPS)
def test_prompts_fill_the_length(case: Case, items: dict[str, list[Item]], group: str) -> None:
    for item in items[group]:
        spare = case.length - len(item.prompt_ids) - item.max_new_tokens
        counted = group in ("common_words", "frequent_words")
        assert 0 <= spare <= (LONGEST_ENTRY if counted else 0)


@pytest.mark.parametrize("group", GROUPS)
def test_only_the_answers_score(items: dict[str, list[Item]], group: str) -> None:
    for item in items[group]:
        metric = METRICS[item.metric]
        assert metric(" " + ", ".join(item.answers), item.answers, **item.details) == 1
        assert metric(" zzz 00000", item.answers, **item.details) == 0
        part = metric(item.answers[0], item.answers, **item.details)
        assert part == pytest.approx(1 / len(item.answers))


@pytest.mark.parametrize("group", GROUPS)
def test_the_question_holds_no_answer(case: Case, items: dict[str, list[Item]], group: str) -> None:
    for item in items[group]:
        question = case.text(item.question_ids)
        assert not any(answer in question for answer in item.answers)


@pytest.mark.parametrize(
    ("group", "keys", "values", "asked"),
    [
        ("niah_single", 1, 1, 1),
        ("niah_multikey", 4, 1, 1),
        ("niah_multivalue", 1, 4, 1),
        ("niah_multiquery", 4, 1, 4),
    ],
)
def test_notes(
    case: Case, items: dict[str, list[Item]], group: str, keys: int, values: int, asked: int
) -> None:
    for item in items[group]:
        context, question = case.text(item.context_ids), case.text(item.question_ids)
        notes = NOTE.findall(context)
        assert len(notes) == len({value for _, value in notes}) == keys * values
        assert len({key for key, _ in notes}) == keys
        wanted = [key for key in {key for key, _ in notes} if key in question]
        assert len(wanted) == asked
        assert {value for key, value in notes if key in wanted} == set(item.answers)
        assert all(case.prompt(item).count(answer) == 1 for answer in item.answers)


def test_multiquery_answers_follow_the_question(case: Case, items: dict[str, list[Item]]) -> None:
    for item in items["niah_multiquery"]:
        notes = dict(NOTE.findall(case.text(item.context_ids)))
        question = case.text(item.question_ids)
        order = sorted(notes, key=question.index)
        assert [notes[key] for key in order] == list(item.answers)


def test_variables_are_those_a_reader_finds(case: Case, items: dict[str, list[Item]]) -> None:
    for item in items["variable_tracking"]:
        context = case.text(item.context_ids).partition("Text:\n")[2]
        values: dict[str, str] = {}
        for name, source in re.findall(r" Let (\w+) = (\w+)\.", context):
            assert source.isdigit() or source in values, "assigned before it is used"
            values[name] = values.get(source, source)
        assert len(values) == 10 and len(set(values.values())) == 2
        (asked,) = re.findall(r"have the value (\d+)\?", case.text(item.question_ids))
        assert {name for name, value in values.items() if value == asked} == set(item.answers)


def test_the_solved_example_is_of_other_variables(case: Case, items: dict[str, list[Item]]) -> None:
    for item in items["variable_tracking"]:
        example = case.text(item.context_ids).partition("Text:\n")[0]
        assert len(re.findall(r"Let [A-Z]{3} = ", example)) == 3
        assert not any(answer in example for answer in item.answers)


def test_common_words_are_the_most_common(case: Case, items: dict[str, list[Item]]) -> None:
    for item in items["common_words"]:
        example, _, listed = case.text(item.context_ids).rpartition("List:\n")
        entries = re.findall(r"^(\d+)\. (\w+)$", listed, flags=re.MULTILINE)
        assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
        counted = Counter(word for _, word in entries).most_common()
        assert {word for word, _ in counted[:10]} == set(item.answers)
        assert counted[9][1] >= 3 * counted[10][1]
        others = [word for word, _ in counted[10:]]
        assert len(others) >= 10
        assert not any(answer in word for answer in item.answers for word in others)
        solved = re.findall(r"^\d+\. (\w+)$", example, flags=re.MULTILINE)
        assert len(solved) > 10 and not set(solved) & set(item.answers)


def test_frequent_words_are_the_most_frequent(case: Case, items: dict[str, list[Item]]) -> None:
    for item in items["frequent_words"]:
        coded = case.text(item.context_ids).rpartition("\n")[2].split()
        counted = Counter(coded).most_common()
        assert [word for word, _ in counted[:3]] == list(item.answers)
        assert all(more > less for (_, more), (_, less) in pairwise(counted[:4]))
        assert len(counted) > 10


def test_a_seed_fixes_the_items(case: Case, items: dict[str, list[Item]]) -> None:
    again = ruler_items(case.tokenizer, case.texts, length=case.length, per_group=2)
    assert again == [item for group in GROUPS for item in items[group]]
    other = ruler_items(case.tokenizer, case.texts, length=case.length, per_group=2, seed=1)
    assert not {item.answers for item in other} & {item.answers for item in again}


def test_items_of_a_group_differ(items: dict[str, list[Item]]) -> None:
    for group in GROUPS:
        one, two = items[group]
        assert one.answers != two.answers and one.context_ids != two.context_ids


def test_a_longer_list_repeats_its_words_as_ruler_does() -> None:
    text = " ".join(
        f"{a}{b}{c}{d}" for a in "bdf" for b in "aeiou" for c in "klmnp" for d in "aeiou"
    )
    (item,) = ruler_items(
        byte_tokenizer(), [("a", text)], length=12_000, per_group=1, groups=["common_words"]
    )
    listed = byte_tokenizer().decode(item.context_ids).rpartition("List:\n")[2]
    counted = Counter(re.findall(r"\. (\w+)\n", listed))
    assert {counted[answer] for answer in item.answers} == {30}
    # The last of the others may have come to lie beyond the end.
    assert set(counted.values()) <= {30, 3, 2, 1} and list(counted.values()).count(3) > 50


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"groups": ["niah_single", "qa"]}, "groups are .*'qa'.*; allowed: niah_single, "),
        ({"groups": []}, r"groups are \[\]"),
        ({"texts": [("short", "It was so. " * 20)]}, "the text short has 220 tokens"),
        *(
            ({"groups": [group], "length": 100}, "length is 100; this task needs at least")
            for group in GROUPS
        ),
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, object], message: str) -> None:
    right = {"texts": [("long", "It was so. " * 400)], "length": 3000, "per_group": 1}
    with pytest.raises(ValueError, match=message):
        ruler_items(byte_tokenizer(), **{**right, **wrong})
