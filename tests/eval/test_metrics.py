"""Metrics against values worked out by hand."""

from __future__ import annotations

import random
import statistics
import sys

import pytest

from twilight_engine.eval.metrics import METRICS, check_installed, confidence_interval


@pytest.mark.parametrize(
    ("metric", "prediction", "answers", "score"),
    [
        ("contains_all", "The codes are 12, 34.", ["12", "34"], 1),
        ("contains_all", "Lantern, oak", ["lantern", "Oak", "elm", "ash"], 0.5),
        ("contains_all", "nothing", ["12"], 0),
        ("contains_any", "it is ELM", ["oak", "elm"], 1),
        ("contains_any", "it is ash", ["oak", "elm"], 0),
        ("f1", "The Red  House!", ["a red house"], 1),
        # 2 of 4 words right, 2 of 3 found: 2 * 2 / 7.
        ("f1", "red house by sea", ["big red house"], 4 / 7),
        ("f1", "red red red", ["red house"], 2 / 5),
        ("f1", "house", ["barn", "house"], 1),
        ("f1", "", ["house"], 0),
        ("f1", "the", ["a"], 1),
        # police ... the gunman in order: 3 of 4 and 3 of 4.
        ("rouge_l", "police kill the gunman", ["Police killed the gunman"], 3 / 4),
        ("rouge_l", "the gunman kill police", ["police killed the gunman"], 1 / 2),
        ("rouge_l", "a b", ["x", "a b c d"], 4 / 6),
        ("rouge_l", "", ["x"], 0),
        ("edit_similarity", "return x\nreturn y", ["return x"], 1),
        ("edit_similarity", "```python\n# comment\nreturn x", ["return x"], 1),
        # abcd to abxd: one letter out, one in, of 8.
        ("edit_similarity", "abcd", ["abxd"], 6 / 8),
        ("edit_similarity", "```", ["abxd"], 0),
        ("retrieval", "Paragraph 12", ["Paragraph 12"], 1),
        ("retrieval", "It is 3 or 12.", ["Paragraph 12"], 1 / 2),
        ("retrieval", "Paragraph 121", ["Paragraph 12"], 0),
        ("retrieval", "no idea", ["Paragraph 12"], 0),
        ("count", "There are 7.", ["7"], 1),
        ("count", "7 of 17, or 7", ["7"], 2 / 3),
        ("count", "seven", ["7"], 0),
    ],
)
def test_by_hand(metric: str, prediction: str, answers: list[str], score: float) -> None:
    assert METRICS[metric](prediction, answers, length=5) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("Type: city", "city", 1),
        ("city or river", "city", 1 / 2),
        ("river", "city", 0),
        ("capital city", "capital city", 1),  # "city" is only a part of it
        ("capital city", "city", 1 / 2),
        ("none of them", "city", 0),
    ],
)
def test_classification(prediction: str, answer: str, score: float) -> None:
    classes = ["city", "capital city", "river"]
    got = METRICS["classification"](prediction, [answer], all_classes=classes)
    assert got == pytest.approx(score)


def test_the_first_line_alone() -> None:
    assert METRICS["f1"]("\nred\nQuestion: green", ["red"], first_line=True) == 1
    assert METRICS["f1"]("\nred\nQuestion: green", ["red"]) == pytest.approx(1 / 2)
    assert METRICS["f1"]("\n", ["red"], first_line=True) == 0


def test_chinese_is_compared_by_character() -> None:
    one, two = "\u5317\u4eac\u5e02\u3002", "\u5317\u4eac"
    assert METRICS["f1"](one, [two], language="zh") == pytest.approx(2 * 2 / 5)
    assert METRICS["f1"](one, [two]) == 0
    assert METRICS["rouge_l"](two + one[2], [two], language="zh") == pytest.approx(4 / 5)


@pytest.mark.parametrize("metric", METRICS)
def test_all_lie_between_right_and_wrong(metric: str) -> None:
    right = {"retrieval": "Paragraph 7", "count": "7", "classification": "city"}.get(metric, "red")
    details = {"all_classes": ["city", "river"]}
    assert METRICS[metric](right, [right], **details) == 1
    assert METRICS[metric]("9 !", [right], **details) == 0


def test_the_interval_is_that_of_the_normal_distribution() -> None:
    scores = [1.0] * 60 + [0.0] * 40
    # sqrt(0.6 * 0.4 / 99) * 1.96
    assert confidence_interval(scores) == pytest.approx(0.0965, abs=1e-4)


def test_the_interval_covers_the_mean_19_times_of_20() -> None:
    rng = random.Random(0)
    draws = [[rng.random() for _ in range(40)] for _ in range(1000)]
    covered = [abs(statistics.fmean(d) - 0.5) <= confidence_interval(d) for d in draws]
    assert 0.93 <= statistics.fmean(covered) <= 0.97


def test_equal_scores_are_not_certain() -> None:
    assert confidence_interval([1.0] * 60) == pytest.approx(0.05)
    assert confidence_interval([0.3]) == 1


def test_wrong_scores_are_named() -> None:
    with pytest.raises(ValueError, match="scores is empty"):
        confidence_interval([])


def test_a_missing_package_is_named_up_front(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed(METRICS)
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)  # as if it were not installed
    check_installed({"f1", "classification"})
    with pytest.raises(
        ValueError, match=r"rapidfuzz is not .* \(for rouge_l\): .* 'twilight-engine\[eval\]'"
    ):
        check_installed(["f1", "rouge_l"])
