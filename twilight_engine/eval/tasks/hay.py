"""Haystacks: slices of long texts as tokens, with needles put in between their sentences."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from twilight_engine.loaders.tokenizer import Tokenizer

# Where a sentence ends: before the white space behind it, but not behind a title; and blank lines.
# \u201d and \u2019 close quotations; \u3002, \uff01 and \uff1f end Chinese sentences.
SENTENCE_END = re.compile(
    r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)(?<=[.!?])[\"'\u201d\u2019)\]]*(?=\s+[^\sa-z])"
    r"|(?<=[\u3002\uff01\uff1f])|(?=\n\s*\n)"
)
# A needle may lie this share of the slice off its depth, to be between sentences.
MAX_SHIFT = 0.1

Texts = Sequence[tuple[str, str]]


@dataclass(frozen=True, eq=False)
class TokenText:
    """A text as tokens.

    Attributes:
        ids: [N] int32.
        cuts: [C] int64 ascending: tokens before which a sentence has just ended, 0 included.
    """

    name: str
    text: str
    ids: npt.NDArray[np.int32]
    cuts: npt.NDArray[np.int64]


@lru_cache(maxsize=32)
def token_text(tokenizer: Tokenizer, name: str, text: str) -> TokenText:
    """A text tokenised sentence by sentence; kept, since every task and length slices it again."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    bounds = sorted({0, *ends, len(text)})
    pieces = [text[a:b] for a, b in pairwise(bounds)]
    encoded = tokenizer.backend.encode_batch(pieces, add_special_tokens=False)
    lengths = [len(piece.ids) for piece in encoded]
    ids = np.array([token for piece in encoded for token in piece.ids], dtype=np.int32)
    return TokenText(name, text, ids, np.cumsum([0, *lengths[:-1]]))


@dataclass(frozen=True)
class Hay:
    """A place in a text from which an item takes its context.

    Attributes:
        place: where the slice lies among all there are room for, from 0 (first) to 1 (last).
    """

    source: TokenText
    place: float

    def take(
        self, num_tokens: int, needles: Sequence[tuple[float, Sequence[int]]] = ()
    ) -> list[int]:
        """Exactly `num_tokens` tokens of the text, in one run from a sentence's start.

        Args:
            needles: (depth, tokens), by ascending depth; each goes to the nearest end of a
                sentence, and takes room from the text.
        Raises: ValueError for a text with fewer tokens.
        """
        room = num_tokens - sum(len(ids) for _, ids in needles)
        text, cuts = self.source, self.source.cuts
        if len(text.ids) < room:
            raise ValueError(
                f"the text {text.name} has {len(text.ids)} tokens; a context of {num_tokens} needs "
                f"{room}: give a longer text or a shorter length"
            )
        wanted = round(self.place * (len(text.ids) - room))
        start = int(cuts[np.searchsorted(cuts, wanted, side="right") - 1])
        found: list[int] = []
        done = start
        for depth, ids in needles:
            cut = self._cut(start, room, depth)
            found += [*text.ids[done:cut].tolist(), *ids]
            done = cut
        found += text.ids[done : start + room].tolist()
        return found

    def _cut(self, start: int, room: int, depth: float) -> int:
        """The end of a sentence next to this depth; the very depth if none is near."""
        wanted = start + round(depth * room)
        cuts = self.source.cuts
        inside = cuts[np.searchsorted(cuts, start) : np.searchsorted(cuts, start + room, "right")]
        nearest = int(inside[np.abs(inside - wanted).argmin()])
        return nearest if abs(nearest - wanted) <= MAX_SHIFT * room else wanted

    def lacks(self, word: str) -> bool:
        """Whether the text does not hold this string anywhere."""
        return word not in self.source.text


def hays(tokenizer: Tokenizer, texts: Texts, count: int, rng: random.Random) -> list[Hay]:
    """Places for `count` items, from the texts in turn, spread evenly over each, shuffled.

    Raises: ValueError without texts.
    """
    if not texts:
        raise ValueError("texts is empty; give at least one (name, text)")
    found = []
    for i, (name, text) in enumerate(texts[:count]):
        source = token_text(tokenizer, name, text)
        each = len(range(i, count, len(texts)))
        found += [Hay(source, (j + 0.5) / each) for j in range(each)]
    rng.shuffle(found)
    return found
