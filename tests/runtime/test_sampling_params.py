"""vLLM's defaults, and every message of a bad parameter."""

from __future__ import annotations

from typing import Any

import pytest

from twilight_engine import SamplingParams


def test_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k) == (1, 1.0, 1.0, 0)
    assert (params.max_tokens, params.min_tokens, params.min_p) == (16, 0, 0.0)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (
        0.0,
        0.0,
        1.0,
    )
    assert params.seed is None and params.logprobs is None
    assert not params.ignore_eos and params.skip_special_tokens and params.detokenize
    assert not params.greedy and not params.penalised
    assert SamplingParams(temperature=0).greedy


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n", 0, r"n is 0; it must be a whole number in \[1, 64\]"),
        ("n", 65, r"n is 65"),
        ("presence_penalty", 2.5, r"presence_penalty is 2.5; it must be in \[-2, 2\]"),
        ("frequency_penalty", -3, r"frequency_penalty is -3"),
        ("repetition_penalty", 0, r"repetition_penalty is 0; it must be above 0"),
        ("temperature", -1, r"temperature is -1; it must be >= 0; 0 is greedy"),
        ("temperature", float("nan"), r"temperature is nan"),
        ("temperature", "hot", r"temperature is 'hot'"),
        ("top_p", 0, r"top_p is 0; it must be in \(0, 1\]"),
        ("top_p", 1.5, r"top_p is 1.5"),
        ("top_k", -2, r"top_k is -2; it must be a whole number >= 1, or 0 or -1"),
        ("top_k", 1.5, r"top_k is 1.5"),
        ("min_p", 1.1, r"min_p is 1.1; it must be in \[0, 1\]"),
        ("seed", 1.5, r"seed is 1.5"),
        ("seed", 2**63, r"seed is"),
        ("max_tokens", 0, r"max_tokens is 0; it must be a whole number >= 1, or None"),
        ("max_tokens", True, r"max_tokens is True"),
        ("min_tokens", 17, r"min_tokens is 17; it must be at most max_tokens, 16"),
        ("min_tokens", -1, r"min_tokens is -1"),
        ("logprobs", 21, r"logprobs is 21; it must be a whole number in \[0, 20\], or None"),
        ("stop", ["a", ""], r"stop is \['a', ''\]; it must be a string or a list of strings"),
        ("stop", 3, r"stop is 3"),
        ("bad_words", [1], r"bad_words is \[1\]"),
        ("stop_token_ids", [-1], r"stop_token_ids is \[-1\]; it must be a list of token ids"),
        ("allowed_token_ids", [], r"allowed_token_ids is empty"),
        ("allowed_token_ids", ["a"], r"allowed_token_ids is \['a'\]"),
        ("logit_bias", {1: 101}, r"logit_bias\[1\] is 101; it must be in \[-100, 100\]"),
        ("logit_bias", {-1: 1}, r"logit_bias is \[-1\]"),
        ("logit_bias", [1], r"logit_bias is \[1\]; it must be a dict"),
    ],
)
def test_a_bad_value_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**{field: value})


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="n is 2; it must be 1 with greedy"):
        SamplingParams(n=2, temperature=0)
    with pytest.raises(ValueError, match="stop strings need detokenize=True"):
        SamplingParams(stop="x", detokenize=False)


def test_what_is_not_supported_is_not_accepted() -> None:
    for name in ("prompt_logprobs", "structured_outputs", "best_of", "guided_decoding"):
        with pytest.raises(TypeError, match=name):
            SamplingParams(**{name: 1})


def test_lists_are_normalised() -> None:
    params = SamplingParams(stop="end", stop_token_ids=[3, 4], logit_bias={"7": 1, 8: -2.0})
    assert params.stop == ("end",)
    assert params.stop_token_ids == (3, 4)
    assert params.logit_bias == {7: 1.0, 8: -2.0}
    assert params.replace(max_tokens=3).max_tokens == 3
