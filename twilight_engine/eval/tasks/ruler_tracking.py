"""RULER's variable tracking: chains of assignments in a text; which variables have a value?"""

from __future__ import annotations

import random
from itertools import chain, islice

from twilight_engine.eval import haystack
from twilight_engine.eval.tasks import words
from twilight_engine.eval.tasks.hay import Hay
from twilight_engine.eval.tasks.prompter import Prompter
from twilight_engine.eval.tasks.ruler_prompt import RulerPrompt

INSTRUCTION = (
    "In between the sentences of a text, variables are set to a number or to what another variable "
    "has. Find all variables that have the number asked for, directly or through others.\n\n"
    "Example text:\n{example}\n\n{question}\n{prefix} {answers}.\n\nText:\n"
)
QUESTION = "Which variables have the value {value}? List all {count}."
PREFIX = "The variables that have the value {value} are"
NUM_CHAINS = 2  # the first is asked for
NUM_HOPS = 4
LETTERS = 5
EXAMPLE_HOPS, EXAMPLE_LETTERS = 2, 3
VALUE_DIGITS = 5
MAX_NEW_TOKENS = 40


def variable_tracking(prompter: Prompter, hay: Hay, length: int, rng: random.Random) -> RulerPrompt:
    """NUM_CHAINS chains whose assignments lie at random depths, each behind what it refers to."""
    names = words.distinct(lambda: words.variable(rng, LETTERS), hay.lacks)
    values = words.distinct(lambda: words.number(rng, VALUE_DIGITS), hay.lacks)
    chains = [list(islice(names, NUM_HOPS + 1)) for _ in range(NUM_CHAINS)]
    given = [next(values) for _ in chains]
    lines = _interleave([_assign(c, v) for c, v in zip(chains, given, strict=True)], rng)
    pieces = prompter.encode_each([" " + line for line in lines])
    depths = sorted(rng.random() for _ in lines)
    opening = prompter.opening(_instruction(next(values), rng))
    question = "\n\n" + QUESTION.format(value=given[0], count=NUM_HOPS + 1)
    question_ids = prompter.question(question, PREFIX.format(value=given[0]))
    least = 2 * sum(map(len, pieces))
    room = prompter.room(length, opening, question_ids, MAX_NEW_TOKENS, least=least)
    context = opening + hay.take(room, list(zip(depths, pieces, strict=True)))
    return RulerPrompt(context, question_ids, tuple(chains[0]), MAX_NEW_TOKENS)


def _assign(names: list[str], value: str) -> list[str]:
    """The assignments of a chain: the first name gets the value, each other the one before it."""
    sources = [value, *names]
    return [f"Let {name} = {source}." for name, source in zip(names, sources, strict=False)]


def _interleave(lists: list[list[str]], rng: random.Random) -> list[str]:
    """All lines in a random order that keeps the order within each list."""
    turns = [i for i, lines in enumerate(lists) for _ in lines]
    rng.shuffle(turns)
    lines = [iter(lines) for lines in lists]
    return [next(lines[i]) for i in turns]


def _instruction(value: str, rng: random.Random) -> str:
    """The instruction with a solved example of one chain, in sentences of our own."""
    names = words.distinct(lambda: words.variable(rng, EXAMPLE_LETTERS))
    chosen = list(islice(names, EXAMPLE_HOPS + 1))
    between = [(haystack.sentence(rng), line) for line in _assign(chosen, value)]
    return INSTRUCTION.format(
        example=" ".join(chain.from_iterable(between)),
        question=QUESTION.format(value=value, count=len(chosen)),
        prefix=PREFIX.format(value=value),
        answers=f"{', '.join(chosen[:-1])} and {chosen[-1]}",
    )
