"""What each of RULER's generators makes."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from twilight_engine.eval.tasks.hay import Hay
from twilight_engine.eval.tasks.prompter import Prompter


@dataclass(frozen=True)
class RulerPrompt:
    """An item without its group and id; the fields are Item's."""

    context_ids: Sequence[int]
    question_ids: Sequence[int]
    answers: tuple[str, ...]
    max_new_tokens: int
    details: Mapping[str, Any] = field(default_factory=dict)


# (prompter, hay, length, rng): a prompt whose tokens and max_new_tokens come to at most `length`.
Generator = Callable[[Prompter, Hay, int, random.Random], RulerPrompt]
