"""Text as tokens arrive: characters over several tokens, stop strings over several tokens."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runtime.tiny import byte_tokenizer
from twilight_engine.runtime.sampling_params import SamplingParams
from twilight_engine.runtime.text import OutputText

TOKENIZER = byte_tokenizer()


def feed(text: str, **params: Any) -> tuple[OutputText, str | None, list[str]]:
    """Push a text's tokens until a stop string; what was found, and what was visible when."""
    out = OutputText(SamplingParams(**params), TOKENIZER, [])
    seen = []
    for token in TOKENIZER.encode(text):
        stop = out.push(token)
        seen.append(out.visible())
        if stop is not None:
            return out, stop, seen
    return out, out.finish(), seen


@given(st.text(max_size=40))
def test_pieces_make_the_whole(text: str) -> None:
    out, _, seen = feed(text)
    assert out.text == text
    for earlier, later in itertools.pairwise(seen):
        assert later.startswith(earlier)
    assert all(text.startswith(piece) for piece in seen)


def test_half_a_character_shows_at_the_end_only() -> None:
    out = OutputText(SamplingParams(), TOKENIZER, [])
    first = TOKENIZER.encode("€")[0]
    assert out.push(first) is None and out.text == ""
    out.finish()
    assert out.text == "\ufffd"


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_over_many_tokens_cuts_the_text(include: bool) -> None:
    out, stop, seen = feed(
        "one STOP two", stop=["nothing", "STOP"], include_stop_str_in_output=include
    )
    assert stop == "STOP"
    assert out.text == ("one STOP" if include else "one ")
    if not include:
        assert all("one ".startswith(piece) for piece in seen), "a stop string showed in part"


def test_the_first_stop_string_in_the_text_wins() -> None:
    out, stop, _ = feed("a b", stop=["b", " b"])
    assert (out.text, stop) == ("a", " b")


def test_text_before_min_tokens_is_not_searched() -> None:
    out = OutputText(SamplingParams(stop="ab"), TOKENIZER, [])
    tokens = TOKENIZER.encode("abab")
    assert out.push(tokens[0], search=False) is None
    assert out.push(tokens[1], search=False) is None
    assert out.push(tokens[2]) is None
    assert out.push(tokens[3]) == "ab"
    assert out.text == "ab"


def test_special_tokens_are_skipped_or_shown() -> None:
    ids = [*TOKENIZER.encode("hi"), TOKENIZER.eos_token_id or 0, *TOKENIZER.encode("!")]
    for skip, expected in ((True, "hi!"), (False, "hi<end>!")):
        out = OutputText(SamplingParams(skip_special_tokens=skip), TOKENIZER, [])
        for token in ids:
            out.push(token)
        assert out.text == expected


def test_without_detokenize_or_tokenizer_there_is_no_text() -> None:
    for params, tokenizer in (
        (SamplingParams(detokenize=False), TOKENIZER),
        (SamplingParams(), None),
    ):
        out = OutputText(params, tokenizer, [])
        assert out.push(65) is None and out.finish() is None and out.text == ""


def test_the_prompt_is_context() -> None:
    """The half character that a prompt ends with is not part of the output."""
    euro = TOKENIZER.encode("€")
    out = OutputText(SamplingParams(), TOKENIZER, [*TOKENIZER.encode("a"), *euro])
    out.push(TOKENIZER.encode("b")[0])
    assert out.text == "b"
