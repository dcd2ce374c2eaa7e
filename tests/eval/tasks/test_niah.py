"""Needles: one a prompt, at its depth, the prompt as long as asked for."""

from __future__ import annotations

import re

import pytest

from tests.eval.tasks.conftest import Case
from tests.runtime.tiny import byte_tokenizer
from twilight_engine.eval.items import Item
from twilight_engine.eval.metrics import METRICS
from twilight_engine.eval.tasks.niah import niah_items

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@pytest.fixture(scope="module")
def items(case: Case) -> list[Item]:
    return niah_items(case.tokenizer, case.texts, length=case.length, count=5)


def test_prompts_have_the_length_asked_for(case: Case, items: list[Item]) -> None:
    assert {len(item.prompt_ids) + item.max_new_tokens for item in items} == {case.length}


def test_each_needle_lies_once_at_its_depth(case: Case, items: list[Item]) -> None:
    assert [item.details["depth"] for item in items] == list(DEPTHS)
    for item in items:
        context, (answer,) = case.text(item.context_ids), item.answers
        body = context[context.index("in mind.\n\n") + 10 :]
        assert case.prompt(item).count(answer) == 1 and 5 <= len(answer) <= 7
        at = body.index(f" is {answer}.") / len(body)
        assert at == pytest.approx(item.details["depth"], abs=0.08)


def test_needles_stand_between_sentences(case: Case, items: list[Item]) -> None:
    for item in items[1:4]:
        context = case.text(item.context_ids)
        before = context[: context.index(item.answers[0])].rpartition(" The ")[0]
        assert before.rstrip()[-1] in '.?!"'
        assert re.match(r"\.(\s+[^\sa-z])", context.partition(item.answers[0])[2])


def test_the_answer_goes_on_from_the_question(case: Case, items: list[Item]) -> None:
    for item in items:
        question = case.text(item.question_ids)
        fact = question.partition("what is ")[2].partition("?")[0]
        assert fact.startswith("the ") and question.endswith(f"T{fact[1:]} is")
        assert f"T{fact[1:]} is {item.answers[0]}." in case.text(item.context_ids)
        assert METRICS[item.metric](f" {item.answers[0]}.", item.answers, **item.details) == 1
        assert METRICS[item.metric](" 0", item.answers, **item.details) == 0


def test_items_differ(items: list[Item]) -> None:
    for values in (
        [item.item_id for item in items],
        [item.answers for item in items],
        [item.context_ids[-400:] for item in items],
        [item.question_ids for item in items],
    ):
        assert len(set(values)) == len(items)
    assert {item.details["text"] for item in items} == {"text 1", "text 2"}


def test_a_seed_fixes_the_items(case: Case, items: list[Item]) -> None:
    def again(seed: int) -> list[Item]:
        return niah_items(case.tokenizer, case.texts, length=case.length, count=5, seed=seed)

    assert again(0) == items
    assert not {item.answers for item in again(1)} & {item.answers for item in items}


def test_given_depths_take_turns() -> None:
    texts = [("a", "It was so. " * 300)]
    items = niah_items(byte_tokenizer(), texts, length=1500, count=5, depths=[0.1, 0.9])
    assert [item.details["depth"] for item in items] == [0.1, 0.9, 0.1, 0.9, 0.1]


def test_a_text_without_sentences_gets_the_needle_at_its_depth() -> None:
    items = niah_items(byte_tokenizer(), [("a", "x" * 3000)], length=1500, count=1, depths=[0.5])
    context = byte_tokenizer().decode(items[0].context_ids)
    left, right = context.count("x", 0, context.index(items[0].answers[0])), context.count("x")
    assert left / right == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"texts": [("short", "It was so. " * 20)]}, "the text short has 220 tokens; a context of"),
        ({"length": 300}, "length is 300; this task needs at least"),
        ({"depths": [0.5, 1.5]}, r"depths are \[0.5, 1.5\]; each must lie in \[0, 1\]"),
        ({"depths": []}, r"depths are \[\]"),
        ({"texts": []}, "texts is empty"),
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, object], message: str) -> None:
    right = {"texts": [("long", "It was so. " * 400)], "length": 2000, "count": 2}
    with pytest.raises(ValueError, match=message):
        niah_items(byte_tokenizer(), **{**right, **wrong})
