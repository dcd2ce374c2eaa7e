"""Made-up names and words, numbers, and the words of a text, all drawn by seed."""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache

ONSETS = "bdfgklmnprstvz"
VOWELS = "aeiou"
ENDINGS = ("ra", "dor", "mund", "vale", "nis", "ton", "lia", "wick", "mar", "sett")


def syllable(rng: random.Random) -> str:
    return rng.choice(ONSETS) + rng.choice(VOWELS)


def name(rng: random.Random) -> str:
    """A made-up proper name of three syllables."""
    return (syllable(rng) + syllable(rng) + rng.choice(ENDINGS)).capitalize()


def coded_word(rng: random.Random) -> str:
    """A made-up word of six letters."""
    return syllable(rng) + syllable(rng) + syllable(rng)


def variable(rng: random.Random, letters: int) -> str:
    """A name of capital letters."""
    return "".join(rng.choices(string.ascii_uppercase, k=letters))


def number(rng: random.Random, digits: int) -> str:
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def distinct(
    draw: Callable[[], str], allowed: Callable[[str], bool] | None = None
) -> Iterator[str]:
    """Draws without end, none twice and all allowed."""
    seen: set[str] = set()
    while True:
        drawn = draw()
        if drawn not in seen and (allowed is None or allowed(drawn)):
            seen.add(drawn)
            yield drawn


@lru_cache(maxsize=32)
def words_of(text: str) -> tuple[str, ...]:
    """A text's words of 4 to 9 small letters, the most frequent first."""
    counted = Counter(re.findall(r"\b[a-z]{4,9}\b", text))
    return tuple(sorted(counted, key=lambda word: (-counted[word], word)))
