"""RULER's needles: one or several keys with one or several values each, all in one text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice

from twilight_engine.eval.tasks import words
from twilight_engine.eval.tasks.hay import Hay
from twilight_engine.eval.tasks.prompter import Prompter
from twilight_engine.eval.tasks.ruler_prompt import RulerPrompt

INSTRUCTION = (
    "The following text has notes about locker codes in between its sentences. Keep the notes in "
    "mind; you are asked about them at the end.\n\n"
)
NUM_KEYS = 4  # of multikey (one is asked for) and multiquery (all are)
NUM_VALUES = 4  # of multivalue
DIGITS = 5
MAX_NEW_TOKENS = {1: 24, 4: 40}  # by the number of values asked for


def single(prompter: Prompter, hay: Hay, length: int, rng: random.Random) -> RulerPrompt:
    """One note, one answer; details has its depth."""
    return _needles(prompter, hay, length, rng, num_keys=1)


def multikey(prompter: Prompter, hay: Hay, length: int, rng: random.Random) -> RulerPrompt:
    """Notes of several keys, one of them asked for."""
    return _needles(prompter, hay, length, rng, num_keys=NUM_KEYS)


def multivalue(prompter: Prompter, hay: Hay, length: int, rng: random.Random) -> RulerPrompt:
    """Several notes of one key, all values asked for."""
    return _needles(prompter, hay, length, rng, num_keys=1, num_values=NUM_VALUES)


def multiquery(prompter: Prompter, hay: Hay, length: int, rng: random.Random) -> RulerPrompt:
    """Notes of several keys, all asked for."""
    return _needles(prompter, hay, length, rng, num_keys=NUM_KEYS, num_asked=NUM_KEYS)


def _needles(
    prompter: Prompter,
    hay: Hay,
    length: int,
    rng: random.Random,
    *,
    num_keys: int,
    num_values: int = 1,
    num_asked: int = 1,
) -> RulerPrompt:
    """num_values notes of each of num_keys keys, at random depths; the first num_asked asked."""
    keys = list(islice(words.distinct(lambda: words.name(rng), hay.lacks), num_keys))
    values = words.distinct(lambda: words.number(rng, DIGITS), hay.lacks)
    notes = [(key, next(values)) for key in keys for _ in range(num_values)]
    asked = keys[:num_asked]
    answers = tuple(value for key, value in notes if key in asked)
    rng.shuffle(notes)
    pieces = prompter.encode_each(
        [f" Note: the locker code of {key} is {value}." for key, value in notes]
    )
    depths = sorted(rng.random() for _ in notes)
    opening = prompter.opening(INSTRUCTION)
    question, prefix = _question(asked, num_values)
    question_ids = prompter.question(question, prefix)
    new = MAX_NEW_TOKENS[len(answers)]
    least = 2 * sum(map(len, pieces))
    room = prompter.room(length, opening, question_ids, new, least=least)
    context = opening + hay.take(room, list(zip(depths, pieces, strict=True)))
    details = {"depth": depths[0]} if len(notes) == 1 else {}
    return RulerPrompt(context, question_ids, answers, new, details)


def _question(keys: Sequence[str], num_values: int) -> tuple[str, str]:
    """The question and the first words of its answer."""
    if num_values > 1:
        what = f"the {num_values} locker codes of {keys[0]}"
        return f"\n\nWhat are {what} in the notes? List them all.", f"T{what[1:]} are"
    if len(keys) > 1:
        listed = f"{', '.join(keys[:-1])} and {keys[-1]}"
        what = f"the locker codes of {listed}"
        return f"\n\nWhat are {what} in the notes?", f"T{what[1:]}, in this order, are"
    what = f"the locker code of {keys[0]}"
    return f"\n\nWhat is {what} in the notes?", f"T{what[1:]} is"
