from __future__ import annotations

import pytest

from twilight_engine.config import EVERY_CANDIDATE
from twilight_engine.eval.methods import TABLE_METHODS, parse_method, parse_methods


def test_table_methods_parse_to_distinct_configs():
    methods = parse_methods("table,dense")
    assert [m.name for m in methods] == list(TABLE_METHODS)
    assert len({(m.kv, repr(m.sparse)) for m in methods}) == len(methods)
    assert [m.name for m in methods if m.is_dense] == ["dense"]


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("balanced@0.995", {"attn_top_p": 0.995, "index_top_p": 0.995, "selector": "all"}),
        ("lean@0.9", {"attn_top_p": 0.9, "index_top_p": None}),
        ("top_k:64", {"attn_top_k": 64, "tail": "renormalise"}),
        ("quest:512", {"attn_top_k": EVERY_CANDIDATE, "selector_budget": 512}),
        ("quest+balanced:2048", {"selector": "quest", "selector_budget": 2048, "tail": "mean"}),
        ("quest+paper@0.85", {"attn_top_p": 0.85, "selector_budget": 0.25, "mass_margin": 0.0}),
    ],
)
def test_words(word, wanted):
    sparse = parse_method(word).sparse
    assert {name: getattr(sparse, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    "word", ["", "fast", "dense:5", "quest", "quest@0.9", "balanced:7", "top_k", "quest+fast"]
)
def test_unknown_words_say_what_is_allowed(word):
    with pytest.raises(ValueError, match=r"unknown method .*allowed: dense, dense-int4, balanced"):
        parse_method(word)
