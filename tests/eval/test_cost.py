"""Device reads of each selector's steps: what its kernels read of the index, by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.eval.harness import ITEMS, SMALL, engine, tiny_loaded
from twilight_engine.attention.selectors import DoubleSparsitySelector
from twilight_engine.eval.cost import Cost
from twilight_engine.eval.methods import Method, parse_method

ROW = 2 * 64 * 4  # K and V of one token and head, float32
K_CHANNEL = (16 * 32 + 2 * 64 * 2) / 16  # codes, scale and min by channel, of a page of 16 tokens
K_TOKEN = (16 * 32 + 16 * 2 * 2) / 16  # codes, scale and min by token
BOUNDS = 2 * 64 * 2 / 16  # min and max over a run of 16 tokens
MEAN = 64 * 2 / 16
V = 32 + 4


def small(word: str) -> Method:
    """The method of a word in a small cache; double_sparsity by the first channels."""
    method = parse_method(word)
    sparse = method.sparse
    if sparse.selector == "double_sparsity":
        ranking = torch.arange(64).expand(3, 2, -1)
        sparse = sparse.replace(selector=DoubleSparsitySelector.from_ranking(ranking))
    return Method(word, dataclasses.replace(method.kv, **SMALL), sparse)


def cost(word: str) -> Cost:
    with engine(tiny_loaded(), methods=[small(word)], batch=1) as made:
        ((answer,),) = made.answer(ITEMS[:1], made.methods)
    return answer.cost


@pytest.mark.parametrize(
    ("word", "a_listed", "an_exact"),
    [
        ("lean", K_CHANNEL + MEAN, 0),
        ("top_k:60", K_CHANNEL, 0),
        ("quest:40", BOUNDS, K_TOKEN),
        ("streaming:80", 0, K_CHANNEL),
        ("double_sparsity:40", 2 * K_CHANNEL, 0),
        ("double_sparsity+paper", 2 * K_TOKEN, 0),
        ("double_sparsity+lean", 2 * K_CHANNEL + MEAN, 0),
        ("double_sparsity_online:40", 2 * K_CHANNEL + BOUNDS / 2, 0),
        ("double_sparsity_online+paper", 2 * K_TOKEN + BOUNDS, 0),
        ("lsh:4x30", K_CHANNEL + 2 * 30, 0),
        ("lsh+paper:4x30", K_TOKEN + 2 * 30, 0),
    ],
)
def test_reads_by_hand(word: str, a_listed: float, an_exact: float) -> None:
    found = cost(word)
    listed = found.exact_rows + found.tail_rows
    assert found.exact_rows > 0 and found.index_rows == 0
    graded = (found.exact_rows + found.resident_rows) * ROW
    graded += listed * a_listed + found.exact_rows * an_exact
    dense = (listed + found.resident_rows) * ROW  # layer 0
    assert found.device_read_bytes == pytest.approx(2 * (2 * graded + dense))  # heads, layers


def test_an_index_grade_reads_v_codes() -> None:
    found = cost("balanced")
    listed = found.exact_rows + found.index_rows + found.tail_rows
    graded = (found.exact_rows + found.resident_rows) * ROW
    graded += listed * (K_CHANNEL + MEAN) + found.index_rows * V
    dense = (listed + found.resident_rows) * ROW
    assert found.index_rows > 0
    assert found.device_read_bytes == pytest.approx(2 * (2 * graded + dense))


@pytest.mark.parametrize("word", ["paper", "quest+balanced", "streaming+lean"])
def test_candidates_that_are_pruned_are_not_counted(word: str) -> None:
    assert cost(word).device_read_bytes is None
