"""Needle in a haystack: one made-up fact at a known depth of a long text, and a question for it."""

from __future__ import annotations

import random
from collections.abc import Sequence

from twilight_engine.eval.items import Item
from twilight_engine.eval.tasks import words
from twilight_engine.eval.tasks.hay import Hay, Texts, hays
from twilight_engine.eval.tasks.prompter import Prompter
from twilight_engine.loaders.tokenizer import Tokenizer

INSTRUCTION = (
    "Somewhere in the following text there is a sentence that does not belong to it and states a "
    "number. Read the text and keep that number in mind.\n\n"
)
FACTS = (
    "the archive number of the {name} lighthouse",
    "the serial number of the {name} telescope",
    "the licence number of the ship {name}",
    "the inventory number of the {name} portrait",
    "the safe combination of the {name} bank",
    "the catalogue number of the {name} meteorite",
    "the membership number of Doctor {name}",
    "the postal code of the town of {name}",
)
MAX_NEW_TOKENS = 24


def niah_items(
    tokenizer: Tokenizer,
    texts: Texts,
    *,
    length: int,
    count: int,
    depths: Sequence[float] | None = None,
    seed: int = 0,
) -> list[Item]:
    """Items whose prompt and answer take `length` tokens, each with its own slice and fact.

    Args:
        texts: (name, text) pairs, taken in turn.
        length: tokens of the prompt and of max_new_tokens.
        depths: where needles lie, from 0 (start) to 1 (end of the text), taken in turn; None:
            spread evenly, one an item.
    Raises: ValueError for a text with too few tokens, naming both numbers; for a length that holds
        no text; for a depth outside [0, 1].
    """
    if depths is None:
        depths = [i / (count - 1) for i in range(count)] if count > 1 else [0.5]
    outside = [depth for depth in depths if not 0 <= depth <= 1]
    if outside or not depths:
        raise ValueError(f"depths are {list(depths)}; each must lie in [0, 1]")
    prompter = Prompter(tokenizer)
    places = hays(tokenizer, texts, count, random.Random(f"niah/{seed}"))
    return [
        _item(prompter, hay, number, length, depths[number % len(depths)], seed)
        for number, hay in enumerate(places)
    ]


def _item(prompter: Prompter, hay: Hay, number: int, length: int, depth: float, seed: int) -> Item:
    rng = random.Random(f"niah/{seed}/{number}")
    named = next(words.distinct(lambda: words.name(rng), hay.lacks))
    fact = FACTS[number % len(FACTS)].format(name=named)
    answer = next(words.distinct(lambda: words.number(rng, rng.randint(5, 7)), hay.lacks))
    sentence = fact[0].upper() + fact[1:] + " is"
    opening = prompter.opening(INSTRUCTION)
    question = prompter.question(f"\n\nAccording to the text, what is {fact}?", sentence)
    needle = prompter.encode(f" {sentence} {answer}.")
    room = prompter.room(length, opening, question, MAX_NEW_TOKENS, least=2 * len(needle))
    context = opening + hay.take(room, [(depth, needle)])
    return Item(
        item_id=f"niah/{length}/{number}",
        task="niah",
        group="single",
        context_ids=tuple(context),
        question_ids=question,
        answers=(answer,),
        metric="contains_all",
        max_new_tokens=MAX_NEW_TOKENS,
        details={"length": length, "depth": depth, "text": hay.source.name},
    )
