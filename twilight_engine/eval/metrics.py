"""Scores of answers, each in [0, 1], and how far a mean of them can be trusted.

A metric is called as metric(prediction, answers, **item.details). It reads these details:

    first_line: only the prediction's first line counts (few-shot tasks run on after the answer)
    language: "zh" is compared by character, since words aren't separated
    all_classes: the labels among which a classification chooses
"""

from __future__ import annotations

import math
import re
import statistics
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

Z_95 = 1.96
ARTICLES = {"a", "an", "the"}
# What a line of code around the wanted one begins with: a fence or a comment.
NOT_CODE = ("`", "#", "//")


class Metric(Protocol):
    def __call__(self, prediction: str, answers: Sequence[str], **details: Any) -> float: ...


def contains_all(prediction: str, answers: Sequence[str], **details: Any) -> float:
    """The share of the answers that occur in the prediction, whatever their case (RULER's)."""
    text = _shown(prediction, details).lower()
    return statistics.fmean(answer.lower() in text for answer in answers)


def contains_any(prediction: str, answers: Sequence[str], **details: Any) -> float:
    """1 if one of the answers occurs in the prediction, whatever its case."""
    text = _shown(prediction, details).lower()
    return float(any(answer.lower() in text for answer in answers))


def f1(prediction: str, answers: Sequence[str], **details: Any) -> float:
    """F1 of the words shared with the best answer; case, punctuation and articles don't count."""
    predicted = _words(_shown(prediction, details), details)
    return max(_f1(predicted, _words(answer, details)) for answer in answers)


def rouge_l(prediction: str, answers: Sequence[str], **details: Any) -> float:
    """F1 of the longest common subsequence of words with the best answer's.

    Over the whole text as one sequence, precision and recall weighted equally.
    """
    from rapidfuzz.distance import LCSseq

    predicted = _pieces(_shown(prediction, details).lower(), details)
    best = 0.0
    for answer in answers:
        wanted = _pieces(answer.lower(), details)
        best = max(best, _balance(LCSseq.similarity(predicted, wanted), predicted, wanted))
    return best


def edit_similarity(prediction: str, answers: Sequence[str], **details: Any) -> float:
    """Similarity of the first line of code: 1 - (insertions + deletions) / both lengths."""
    from rapidfuzz import fuzz

    lines = prediction.strip("\n").splitlines()
    code = next((line for line in lines if not line.lstrip().startswith(NOT_CODE)), "")
    return max(fuzz.ratio(code, answer) / 100 for answer in answers)


def classification(prediction: str, answers: Sequence[str], **details: Any) -> float:
    """1 / the number of labels the prediction names, if the right one is among them.

    A label that is only part of the right one ("city" in "capital city") isn't counted as named.
    """
    text = _shown(prediction, details)
    named = [label for label in details["all_classes"] if label in text]
    return max(_classified(named, answer) for answer in answers)


def retrieval(prediction: str, answers: Sequence[str], **details: Any) -> float:
    """The share of the numbers in the prediction that are the number in the answer."""
    return max(_share(prediction, _numbers(answer)[-1:]) for answer in answers)


def count(prediction: str, answers: Sequence[str], **details: Any) -> float:
    """The share of the numbers in the prediction that are the right count."""
    return max(_share(prediction, [answer.strip()]) for answer in answers)


METRICS: dict[str, Metric] = {
    "contains_all": contains_all,
    "contains_any": contains_any,
    "f1": f1,
    "rouge_l": rouge_l,
    "edit_similarity": edit_similarity,
    "classification": classification,
    "retrieval": retrieval,
    "count": count,
}


NEEDS_RAPIDFUZZ = {"rouge_l", "edit_similarity"}


def check_installed(metrics: Iterable[str]) -> None:
    """Raise ValueError, naming what to install, if one of these metrics cannot run here."""
    wanting = sorted(NEEDS_RAPIDFUZZ & set(metrics))
    if not wanting:
        return
    try:
        import rapidfuzz  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            f"rapidfuzz is not installed (for {' and '.join(wanting)}): pip install "
            "'twilight-engine[eval]'"
        ) from error


def confidence_interval(scores: Sequence[float]) -> float:
    """Half-width of the 95 % interval of the mean, by normal approximation.

    Scores that are all equal have no spread to go by: 3 / n then (the rule of three), at most 1.
    Raises: ValueError without scores.
    """
    if not scores:
        raise ValueError("scores is empty; an interval needs at least one score")
    if len(set(scores)) == 1:
        return min(1.0, 3 / len(scores))
    return Z_95 * statistics.stdev(scores) / math.sqrt(len(scores))


def _shown(prediction: str, details: dict[str, Any]) -> str:
    if details.get("first_line"):
        return next(iter(prediction.strip().splitlines()), "")
    return prediction


def _pieces(text: str, details: dict[str, Any]) -> list[str]:
    return list("".join(text.split())) if details.get("language") == "zh" else text.split()


def _words(text: str, details: dict[str, Any]) -> list[str]:
    kept = "".join(c for c in text.lower() if not _is_punctuation(c))
    return [word for word in _pieces(kept, details) if word not in ARTICLES]


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def _f1(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    shared = (Counter(predicted) & Counter(wanted)).total()
    return _balance(shared, predicted, wanted)


def _balance(shared: int, predicted: Sequence[str], wanted: Sequence[str]) -> float:
    """The harmonic mean of shared / predicted and shared / wanted."""
    if not predicted or not wanted:
        return float(not predicted and not wanted)
    return 2 * shared / (len(predicted) + len(wanted))


def _classified(named: Sequence[str], answer: str) -> float:
    distinct = [label for label in named if label == answer or label not in answer]
    return 1 / len(distinct) if answer in distinct else 0.0


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d+", text)


def _share(prediction: str, wanted: Sequence[str]) -> float:
    numbers = _numbers(prediction)
    return sum(number in wanted for number in numbers) / len(numbers) if numbers else 0.0
