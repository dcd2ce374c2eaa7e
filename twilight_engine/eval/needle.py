"""Needle in a haystack: a long prompt with one passcode in it, and whether an answer holds it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from twilight_engine.eval.haystack import paragraphs

INSTRUCTION = "Read the following text. A passcode is mentioned in it once. Remember the passcode."
NEEDLE = "The secret passcode is {answer}. Remember that the secret passcode is {answer}."
QUESTION = "What is the secret passcode mentioned in the text? Answer with the number only."


@dataclass(frozen=True)
class NeedlePrompt:
    """A user message with a needle in it, and what a right answer contains."""

    message: str
    answer: str
    depth: float

    def found_in(self, text: str) -> bool:
        return self.answer in text


def needle_prompt(
    count_tokens: Callable[[str], int], *, num_tokens: int, depth: float = 0.3, seed: int = 0
) -> NeedlePrompt:
    """Build a message of at least num_tokens tokens, with the passcode at a share of its depth.

    Args:
        count_tokens: tokens of a text, by the model's tokenizer.
        num_tokens: the message has at least this many, and at most a paragraph more.
        depth: where the needle lies, from 0 (start) to 1 (end).
        seed: fixes the text and the passcode.
    Raises: ValueError for a depth outside [0, 1] or num_tokens < 1.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}; it must lie in [0, 1]")
    if num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}; it must be >= 1")
    answer = str(random.Random(seed).randint(10_000, 99_999))
    needle = NEEDLE.format(answer=answer)
    hay: list[str] = []
    total = sum(count_tokens(part) for part in (INSTRUCTION, needle, QUESTION))
    source = paragraphs(seed)
    while total < num_tokens:
        hay.append(next(source))
        total += count_tokens(hay[-1])
    hay.insert(round(depth * len(hay)), needle)
    message = "\n\n".join([INSTRUCTION, *hay, QUESTION])
    return NeedlePrompt(message, answer, depth)
