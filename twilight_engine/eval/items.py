"""What an evaluation asks: items with answers, and texts to predict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Question = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Item:
    """A question about a long context, with its right answers.

    Attributes:
        item_id: unique in a run and the same in every run of the same settings.
        task: niah, ruler, longbench.
        group: subtask, a column of the table.
        context_ids: tokens that are always prefilled densely: template, instruction and text.
        question_ids: what follows up to where the answer begins; decoded sparsely on demand.
        answers: the accepted answers; a metric says whether one or all are wanted.
        metric: a name of eval.metrics.METRICS; None: the answer is judged elsewhere.
        max_new_tokens: most tokens of the answer.
        details: what the metric reads; depth, length and the like, for plots.
        stop: texts that end the answer, which is cut before the first of them.
    """

    item_id: str
    task: str
    group: str
    context_ids: tuple[int, ...]
    question_ids: tuple[int, ...]
    answers: tuple[str, ...]
    metric: str | None
    max_new_tokens: int
    details: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.context_ids + self.question_ids


@dataclass(frozen=True)
class Passage:
    """A text whose last tokens are predicted one by one, each from all tokens before it.

    Attributes:
        context_ids: prefilled densely; at least one token.
        target_ids: predicted under teacher forcing, each decoded by the method.
    """

    item_id: str
    context_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    group: str = "ppl"
