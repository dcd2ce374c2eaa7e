"""Passages: slices of the texts in turn, each with targets at its end."""

from __future__ import annotations

import pytest

from tests.eval.tasks.conftest import Case
from tests.runtime.tiny import byte_tokenizer
from twilight_engine.eval.tasks.ppl import passages


def test_passages_are_the_text(case: Case) -> None:
    found = passages(case.tokenizer, case.texts, length=case.length, targets=50, count=4)
    texts = dict(case.texts)
    assert [p.item_id.split("/")[0] for p in found] == ["text 1", "text 2"] * 2
    assert len({p.item_id for p in found}) == 4
    for passage in found:
        assert len(passage.target_ids) == 50
        assert len(passage.context_ids) == case.length - 50
        whole = case.text(passage.context_ids + passage.target_ids)
        assert whole in texts[passage.item_id.split("/")[0]]


def test_passages_do_not_overlap() -> None:
    texts = [("a", "x" * 1000), ("b", "y" * 1200)]
    found = passages(byte_tokenizer(), texts, length=100, targets=10, count=4)
    starts = [int(p.item_id.split("/")[1]) for p in found]
    assert starts[2] - starts[0] >= 100 and starts[3] - starts[1] >= 100


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"texts": [("a", "x" * 50)]},
            "the text a has 50 tokens; 1 passages of 100 tokens need 10",
        ),
        ({"targets": 100}, r"targets is 100; it must lie in \[1, 99\]"),
        ({"texts": []}, "texts is empty"),
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, object], message: str) -> None:
    right = {"texts": [("a", "x" * 500)], "length": 100, "targets": 10, "count": 1}
    with pytest.raises(ValueError, match=message):
        passages(byte_tokenizer(), **{**right, **wrong})
