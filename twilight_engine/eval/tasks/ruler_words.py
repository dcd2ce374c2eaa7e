"""RULER's word counting: the most common words of a list, the most frequent of a coded text."""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import chain, islice

from twilight_engine.eval.tasks import words
from twilight_engine.eval.tasks.hay import Hay
from twilight_engine.eval.tasks.prompter import Prompter
from twilight_engine.eval.tasks.ruler_prompt import RulerPrompt

COMMON_INSTRUCTION = (
    "A numbered list of words follows, in which some words come often and others seldom. Keep in "
    "mind which come most often.\n\nExample list:\n{example}\n{question}\n{answer}.\n\nList:\n"
)
COMMON_QUESTION = "Which {count} words are the most common in the list?"
COMMON_PREFIX = "The {count} most common words are"
NUM_COMMON = 10
# A common word comes at most 30 times, and 10 times as often as another, as RULER's.
MAX_REPEATS, REPEATS_RATIO = 30, 10
MIN_REPEATS = 3
COMMON_SHARE = 0.5  # of the list, at most
EXAMPLE_COMMON, EXAMPLE_RARE, EXAMPLE_REPEATS = 3, 4, 3
POOL = 4000  # most frequent words of a text, from which lists are drawn first
COMMON_NEW_TOKENS = 60

FREQUENT_INSTRUCTION = (
    "The following text is in code: each of its words stands for another. Keep in mind which coded "
    "words come most often.\n\n"
)
FREQUENT_QUESTION = "\n\nWhich {count} coded words are the most frequent in the text?"
FREQUENT_PREFIX = "The {count} most frequent coded words are"
NUM_FREQUENT = 3
ZIPF_EXPONENT = 1.5  # the first four words are 38 %, 14 %, 7 % and 5 % of a long text
NUM_CODED = 1000
MIN_CODED_WORDS = 80  # fewer do not tell the third from the fourth
FREQUENT_NEW_TOKENS = 40


def common_words(prompter: Prompter, hay: Hay, length: int, rng: random.Random) -> RulerPrompt:
    """A shuffled list of NUM_COMMON words many times each and others a few times each."""
    common, others = _draw_words(hay.source.text, rng)
    example = list(islice(others, EXAMPLE_COMMON + EXAMPLE_RARE))
    opening = prompter.opening(_common_instruction(example, rng))
    question = prompter.question(
        "\n" + COMMON_QUESTION.format(count=NUM_COMMON), COMMON_PREFIX.format(count=NUM_COMMON)
    )
    entries = prompter.encode_each([_entry(word) for word in common])
    each = sum(map(len, entries)) / NUM_COMMON + len(prompter.encode("100."))
    least = math.ceil(MIN_REPEATS * NUM_COMMON * each / COMMON_SHARE)
    room = prompter.room(length, opening, question, COMMON_NEW_TOKENS, least=least)
    repeats = int(COMMON_SHARE * room / each / NUM_COMMON)
    repeats = min(max(repeats, MIN_REPEATS), MAX_REPEATS)
    listed = _fill(prompter, entries, others, repeats, room)
    rng.shuffle(listed)
    numbers = prompter.encode_each([f"{i + 1}." for i in range(len(listed))])
    for number, entry in zip(numbers, listed, strict=True):
        opening += number + entry
    return RulerPrompt(opening, question, tuple(common), COMMON_NEW_TOKENS)


def _draw_words(text: str, rng: random.Random) -> tuple[list[str], Iterator[str]]:
    """The common words, and others without end: the text's own first, then made-up ones.

    No other word has a common one in it, so naming it is never right.
    """
    known = words.words_of(text)
    frequent, rest = list(known[:POOL]), list(known[POOL:])
    rng.shuffle(frequent)
    rng.shuffle(rest)
    common: list[str] = []

    def apart(word: str) -> bool:
        return not any(other in word or word in other for other in common)

    drawn = filter(apart, chain(frequent, rest, words.distinct(lambda: words.coded_word(rng))))
    for _ in range(NUM_COMMON):
        common.append(next(drawn))
    return common, drawn


def _entry(word: str) -> str:
    return f" {word}\n"


def _fill(
    prompter: Prompter,
    common: Sequence[list[int]],
    others: Iterator[str],
    repeats: int,
    room: int,
) -> list[list[int]]:
    """Entries that fit with their numbers: each common one `repeats` times, then others."""
    rarely = max(1, repeats // REPEATS_RATIO)
    rare = [_entry(word) for word in islice(others, room // (2 * rarely))]
    wanted = chain(
        chain.from_iterable([entry] * repeats for entry in common),
        chain.from_iterable([entry] * rarely for entry in prompter.encode_each(rare)),
    )
    numbers = prompter.encode_each([f"{i + 1}." for i in range(room // 2)])
    listed: list[list[int]] = []
    for number, entry in zip(numbers, wanted, strict=False):
        room -= len(number) + len(entry)
        if room < 0:
            break
        listed.append(entry)
    return listed


def _common_instruction(shown: Sequence[str], rng: random.Random) -> str:
    """The instruction with a solved example of other words."""
    common = shown[:EXAMPLE_COMMON]
    listed = [*(list(common) * EXAMPLE_REPEATS), *shown[EXAMPLE_COMMON:]]
    rng.shuffle(listed)
    return COMMON_INSTRUCTION.format(
        example="".join(f"{i + 1}.{_entry(word)}" for i, word in enumerate(listed)),
        question=COMMON_QUESTION.format(count=EXAMPLE_COMMON),
        answer=f"{COMMON_PREFIX.format(count=EXAMPLE_COMMON)} {', '.join(common)}",
    )


def frequent_words(prompter: Prompter, hay: Hay, length: int, rng: random.Random) -> RulerPrompt:
    """Made-up words by Zipf's law in a random order; the text is not used."""
    coded = list(islice(words.distinct(lambda: words.coded_word(rng)), NUM_CODED))
    pieces = prompter.encode_each([" " + word for word in coded])
    opening = prompter.opening(FREQUENT_INSTRUCTION)
    question = prompter.question(
        FREQUENT_QUESTION.format(count=NUM_FREQUENT), FREQUENT_PREFIX.format(count=NUM_FREQUENT)
    )
    least = MIN_CODED_WORDS * max(map(len, pieces))
    room = prompter.room(length, opening, question, FREQUENT_NEW_TOKENS, least=least)
    shares = [(rank + 1) ** -ZIPF_EXPONENT for rank in range(NUM_CODED)]

    def counts(scale: int) -> list[int]:
        return [int(scale * share) for share in shares]

    def tokens(scale: int) -> int:
        return sum(n * len(piece) for n, piece in zip(counts(scale), pieces, strict=True))

    scale = bisect_right(range(room + 1), room, key=tokens) - 1  # the first word comes that often
    body = [piece for n, piece in zip(counts(scale), pieces, strict=True) for _ in range(n)]
    rng.shuffle(body)
    context = opening + list(chain.from_iterable(body))
    return RulerPrompt(context, question, tuple(coded[:NUM_FREQUENT]), FREQUENT_NEW_TOKENS)
