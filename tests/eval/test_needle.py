"""The needle prompt: long enough, one needle at its depth, the same for the same seed."""

from __future__ import annotations

import itertools

import pytest

from twilight_engine.eval.haystack import TEMPLATES, WORDS, paragraphs
from twilight_engine.eval.needle import needle_prompt


def count_words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_the_needle_lies_at_its_depth(depth: float) -> None:
    prompt = needle_prompt(count_words, num_tokens=3000, depth=depth, seed=4)
    assert 3000 <= count_words(prompt.message) <= 3300
    assert prompt.message.count(f"The secret passcode is {prompt.answer}") == 1
    at = prompt.message.index(prompt.answer) / len(prompt.message)
    assert at == pytest.approx(depth, abs=0.05)


def test_the_haystack_holds_no_other_number() -> None:
    prompt = needle_prompt(count_words, num_tokens=2000, seed=1)
    assert not any(c.isdigit() for c in prompt.message.replace(prompt.answer, ""))


def test_a_seed_fixes_text_and_passcode() -> None:
    one, same, other = (needle_prompt(count_words, num_tokens=500, seed=s) for s in (7, 7, 8))
    assert one == same
    assert one.answer != other.answer and one.message != other.message


def test_sentences_vary() -> None:
    text = " ".join(itertools.islice(paragraphs(0), 60))
    sentences = [s for s in text.split(". ") if s]
    assert len(set(sentences)) > 0.95 * len(sentences)
    assert "{" not in text
    assert all(
        key in WORDS
        for t in TEMPLATES
        for key in t.split("{")[1:]
        for key in [key[: key.index("}")]]
    )


def test_only_the_right_answer_counts() -> None:
    prompt = needle_prompt(count_words, num_tokens=100)
    assert prompt.found_in(f"The passcode is {prompt.answer}.")
    assert not prompt.found_in("The passcode is 1.")


@pytest.mark.parametrize(
    ("wrong", "words"), [({"depth": 1.5}, "depth"), ({"num_tokens": 0}, "num_tokens")]
)
def test_wrong_arguments_are_named(wrong: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=f"{words} is"):
        needle_prompt(count_words, **{"num_tokens": 10, **wrong})
