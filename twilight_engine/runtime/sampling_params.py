"""How a request's tokens are sampled and when it stops: vLLM's names, defaults and checks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_SEQUENCES_PER_REQUEST = 64  # n; each is a sequence with its own prefill and KV
MAX_LOGPROBS = 20  # vLLM's default max_logprobs
GREEDY_TEMPERATURE = 1e-5  # below it vLLM samples greedily


def _number(name: str, value: object, low: float, high: float, allowed: str) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not ok or not low <= value <= high:  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")


def _whole(name: str, value: object, low: int, high: int | None, allowed: str) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= low
    if not ok or (high is not None and value > high):  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")


def _strings(name: str, value: object) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, str) and v for v in values):
        raise ValueError(
            f"{name} is {value!r}; it must be a string or a list of strings, not empty"
        )
    return tuple(values)


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(
        isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value
    ):
        raise ValueError(f"{name} is {value!r}; it must be a list of token ids, whole numbers >= 0")
    return tuple(value)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request.

    Args:
        n: sequences to sample from the prompt.
        presence_penalty: taken from the logits of tokens that were generated, in [-2, 2].
        frequency_penalty: the same, times how often they were generated, in [-2, 2].
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in the
            prompt or the output; 1 is off.
        temperature: divides the logits; 0 is greedy.
        top_p: mass of the most probable tokens to sample from, in (0, 1].
        top_k: number of the most probable tokens to sample from; 0 or -1 is all.
        min_p: smallest probability to sample from, as a share of the largest, in [0, 1].
        seed: makes the request's samples reproducible whatever runs beside it; sequence i of n
            uses seed + i.
        stop: strings that end a sequence; left out of the text unless include_stop_str_in_output.
        stop_token_ids: tokens that end a sequence.
        bad_words: words that are not generated.
        ignore_eos: goes on after the model's end-of-sequence tokens.
        max_tokens: most tokens to generate; None: what the context has room for.
        min_tokens: no end-of-sequence, stop token or stop string before this many tokens.
        logprobs: report this many of the most probable tokens, and the sampled one, at each step,
            by the model's own distribution (before penalties, temperature and masks).
        logit_bias: added to the logits of these token ids, each in [-100, 100].
        allowed_token_ids: the only tokens that may be sampled.
        detokenize: whether to produce text.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: whether the text contains the stop string or token it ended at.

    Raises: ValueError with the field's name, what came and what is allowed.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_lists()
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need detokenize=True; use stop_token_ids without it")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}; it must be at most max_tokens, {self.max_tokens}"
            )
        if self.greedy and self.n > 1:
            raise ValueError(f"n is {self.n}; it must be 1 with greedy sampling (temperature 0)")

    def _check_numbers(self) -> None:
        limit = MAX_SEQUENCES_PER_REQUEST
        _whole("n", self.n, 1, limit, f"a whole number in [1, {limit}]")
        _number("presence_penalty", self.presence_penalty, -2, 2, "in [-2, 2]")
        _number("frequency_penalty", self.frequency_penalty, -2, 2, "in [-2, 2]")
        tiny = math.ulp(0.0)
        _number("repetition_penalty", self.repetition_penalty, tiny, 1e6, "above 0")
        _number("temperature", self.temperature, 0, 1e6, ">= 0; 0 is greedy")
        _number("top_p", self.top_p, tiny, 1, "in (0, 1]")
        _whole("top_k", self.top_k, -1, None, "a whole number >= 1, or 0 or -1 for all tokens")
        _number("min_p", self.min_p, 0, 1, "in [0, 1]")
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**63 - 1, "a whole number of 64 bits, or None")
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, None, "a whole number >= 1, or None")
        _whole("min_tokens", self.min_tokens, 0, None, "a whole number >= 0")
        if self.logprobs is not None:
            allowed = f"a whole number in [0, {MAX_LOGPROBS}], or None"
            _whole("logprobs", self.logprobs, 0, MAX_LOGPROBS, allowed)

    def _check_lists(self) -> None:
        object.__setattr__(self, "stop", _strings("stop", self.stop or ()))
        object.__setattr__(self, "bad_words", _strings("bad_words", self.bad_words or ()))
        ids = _token_ids("stop_token_ids", self.stop_token_ids or ())
        object.__setattr__(self, "stop_token_ids", ids)
        if self.allowed_token_ids is not None:
            ids = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not ids:
                raise ValueError("allowed_token_ids is empty; it must name a token, or be None")
            object.__setattr__(self, "allowed_token_ids", ids)
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, dict):
                raise ValueError(f"logit_bias is {self.logit_bias!r}; it must be a dict, or None")
            bias = {}
            for key, value in self.logit_bias.items():
                token = int(key) if isinstance(key, str) and key.isdecimal() else key
                _token_ids("logit_bias", [token])
                _number(f"logit_bias[{token}]", value, -100, 100, "in [-100, 100]")
                bias[token] = float(value)
            object.__setattr__(self, "logit_bias", bias)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken, with no randomness."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def penalised(self) -> bool:
        """Whether the logits depend on the tokens seen so far."""
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)
