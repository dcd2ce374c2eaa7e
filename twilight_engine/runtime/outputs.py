"""What a request returns, in vLLM's shapes."""

from __future__ import annotations

from dataclasses import dataclass, field

from twilight_engine.runtime.metrics import RequestMetrics


@dataclass(frozen=True)
class Logprob:
    """One token's log probability at one step.

    Args:
        logprob: natural log of the probability, before penalties, temperature and masks.
        rank: 1 for the most probable token.
        decoded_token: its text, or None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One sampled sequence of a request.

    Args:
        index: its number among the request's n.
        text: what was generated, stop strings left out unless asked for.
        token_ids: the tokens generated, a final stop token included.
        cumulative_logprob: sum of the sampled tokens' logprobs; None unless logprobs were asked.
        logprobs: for each token, token id -> Logprob; None unless asked.
        finish_reason: "stop" or "length"; None while it runs.
        stop_reason: the stop string or stop token that ended it; None for end-of-sequence.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether the sequence has ended."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """A request's prompt, its sequences so far, and, once it has finished, what it cost.

    Args:
        request_id: unique in its engine.
        prompt: the prompt's text, if it came as text.
        prompt_token_ids: the prompt's tokens.
        outputs: one for each of n.
        finished: whether every sequence has ended.
        metrics: times, bytes, rows and budgets; None while the request runs.
        num_cached_tokens: prompt tokens whose KV was reused.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
