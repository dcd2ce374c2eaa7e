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
        ("double_sparsity:256", {"selector": "double_sparsity", "selector_budget": 256}),
        ("double_sparsity_online+lean", {"selector": "double_sparsity_online", "tail": "mean"}),
        ("lsh", {"selector": "lsh", "attn_top_k": EVERY_CANDIDATE}),
        ("lsh+balanced@0.9", {"selector": "lsh", "attn_top_p": 0.9, "index_top_p": 0.99}),
    ],
)
def test_words(word, wanted):
    sparse = parse_method(word).sparse
    assert {name: getattr(sparse, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("word", "tables"), [("lsh", (10, 150)), ("lsh:8x75", (8, 75)), ("lsh+paper:8x75", (8, 75))]
)
def test_lsh_words_name_their_tables(word, tables):
    method = parse_method(word)
    assert method.kv.lsh == tables
    assert method.kv.k_index == ("int4_token" if "paper" in word else "int4_channel")


@pytest.mark.parametrize(
    "word",
    [
        *("", "fast", "dense:5", "quest", "quest@0.9", "balanced:7", "top_k", "quest+fast"),
        *("lsh:1024", "lsh@0.9", "quest:8x75", "double_sparsity"),
    ],
)
def test_unknown_words_say_what_is_allowed(word):
    with pytest.raises(ValueError, match=r"unknown method .*allowed: dense, dense-int4, balanced"):
        parse_method(word)
