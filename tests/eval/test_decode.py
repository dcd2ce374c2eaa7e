"""Decode steps of a batch: where answers end, texts of different lengths, and the room it takes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.eval.harness import (
    BALANCED,
    DENSE,
    ITEMS,
    PASSAGES,
    by_plain_forward,
    engine,
    tiny_loaded,
)
from twilight_engine.eval.items import Passage, Question
from twilight_engine.eval.memory import room_for, tokens_of


def test_passages_may_have_different_numbers_of_targets():
    """And a context of one token, whose first target the prefill predicts."""
    ragged = [
        *(Passage("a", PASSAGES[0].context_ids, PASSAGES[0].target_ids[:4]), PASSAGES[1]),
        Passage("b", PASSAGES[2].context_ids[:1], PASSAGES[2].target_ids[:1]),
        Passage("c", PASSAGES[2].context_ids[:1], PASSAGES[2].target_ids[:7]),
    ]
    loaded = tiny_loaded()
    with engine(loaded, batch=4, max_len=room_for(ragged)) as made:
        found = {p[0].method.name: p for p in made.predict(ragged, made.methods)}
        alone = [next(made.predict([passage], [DENSE]))[0] for passage in ragged]
    for i, passage in enumerate(ragged):
        nll, is_top = by_plain_forward(loaded, passage)
        for dense in (found["dense"][i], alone[i]):
            torch.testing.assert_close(torch.tensor(dense.nll), nll, atol=1e-4, rtol=0)
            assert dense.is_top == is_top
            assert dense.cost.steps == len(passage.target_ids) - (i >= 2)
        lean = found["lean"][i]
        assert lean.kl is not None and lean.same_top is not None
        assert len(lean.kl) == len(lean.same_top) == len(lean.nll) == len(passage.target_ids)
    assert found["lean"][2].nll == found["dense"][2].nll and found["lean"][2].kl == [0.0]


def test_the_most_probable_tokens_are_known_as_such():
    with engine() as made:
        (answer,) = next(made.answer([ITEMS[0]], [DENSE]))
        wanted = answer.token_ids[:6]
        other = [*wanted[:5], (wanted[5] + 1) % 256]
        passages = [Passage("x", ITEMS[0].prompt_ids, tuple(ids)) for ids in (wanted, other)]
        same, differs = next(made.predict(passages, [DENSE]))
    assert same.is_top == [True] * 6 and differs.is_top == [True] * 5 + [False]


@pytest.mark.parametrize("question", ["prefill", "decode"])
def test_an_answer_ends_at_a_stop_text(question: Question):
    with engine() as made:
        free = next(made.answer(ITEMS, [DENSE], question=question))[0]
        stop = free.text[5:7]
        end = free.text.index(stop)
        items = [dataclasses.replace(ITEMS[0], stop=("no such text", stop)), *ITEMS[1:]]
        (cut, *others) = next(made.answer(items, [DENSE], question=question))
    assert cut.text == free.text[:end]
    saved = len(free.token_ids) - len(cut.token_ids)
    assert saved > 0 and cut.token_ids == free.token_ids[:-saved]
    assert cut.cost.steps == free.cost.steps - saved
    assert [len(other.token_ids) for other in others] == [9, 12]


def test_a_stop_text_may_be_a_special_token():
    """It has no text of its own; <end> (256) is not this model's end of sequence."""
    loaded = tiny_loaded()
    with engine(loaded) as made:
        free = next(made.answer(ITEMS, [DENSE]))[0].token_ids
    assert loaded.model.lm_head is not None and 256 not in free
    swap = [256, free[3]]
    with torch.inference_mode():  # the model now says <end> in that token's place
        loaded.model.lm_head.weight[swap] = loaded.model.lm_head.weight[swap[::-1]]
    item = dataclasses.replace(ITEMS[0], stop=("<end>",))
    with engine(loaded) as made:
        (answer,) = next(made.answer([item], [DENSE]))
    assert answer.token_ids == [*free[: free.index(free[3])], 256]


def test_room_is_the_longest_prefill_and_the_most_steps():
    # The prefill gives an answer's first token, and no step feeds its last one.
    assert room_for(ITEMS) == 150 + 12 - 1
    # The question is not prefilled then; ITEMS[1] has the most steps.
    assert room_for(ITEMS, "decode") == 150 - 6 + 11 + 9 - 1
    assert room_for(PASSAGES) == 140 - 1 + 10
    assert [tokens_of(item) for item in ITEMS] == [162, 99, 76]
    with engine(max_len=room_for(ITEMS, "decode")) as made:
        assert len(next(made.answer(ITEMS, [BALANCED], question="decode"))) == 3


@pytest.mark.parametrize("question", ["prefill", "decode"])
def test_room_is_exact(question: Question):
    """A token less, and a page of 16 tokens is missing at the end."""
    room = 16 * 10 + 1
    item = dataclasses.replace(ITEMS[0], max_new_tokens=room - 150 + 1)
    assert room_for([item], question) == room
    with engine(methods=[DENSE], batch=1, max_len=room) as made:
        (answer,) = next(made.answer([item], [DENSE], question=question))
        assert len(answer.token_ids) == item.max_new_tokens
    with (
        engine(methods=[DENSE], batch=1, max_len=room - 1) as made,
        pytest.raises(ValueError, match="max_model_len is 160"),
    ):
        next(made.answer([item], [DENSE], question=question))
