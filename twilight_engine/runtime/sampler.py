"""Sampling on the device: logits in, token ids out; the host reads only the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twilight_engine.runtime.sampling_params import SamplingParams

_SEED_MASK = 2**64 - 1


@dataclass(frozen=True)
class TopLogprobs:
    """The sampled token's log probability and the most probable tokens, of each row; device."""

    sampled: Tensor  # [B] float32
    rank: Tensor  # [B] int64, 1 is the most probable
    top_logprobs: Tensor  # [B, k] float32, descending
    top_ids: Tensor  # [B, k] int64


class SequenceSampler:
    """What sampling keeps for one sequence: its generator, logit bias and token counts, on device.

    Args:
        params: the request's parameters.
        seed: of this sequence's own generator, so that samples do not depend on the batch.
        prompt_ids: tokens of the prompt, for the repetition penalty.
        stop_ids: tokens that end the sequence, withheld before min_tokens.
        banned_words: token sequences whose last token is withheld after the others.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        seed: int,
        prompt_ids: Sequence[int],
        stop_ids: Sequence[int],
        banned_words: Sequence[Sequence[int]],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.params = params
        self._banned_words = [tuple(word) for word in banned_words]
        self._stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
        self.generator: torch.Generator | None = None
        if not params.greedy:
            self.generator = torch.Generator(device=device)
            self.generator.manual_seed(seed & _SEED_MASK)
        self._bias = self._make_bias(vocab_size, device)
        self._in_prompt: Tensor | None = None
        self._counts: Tensor | None = None
        if params.penalised:
            self._in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._in_prompt[torch.tensor(sorted(set(prompt_ids)), device=device)] = True
            self._counts = torch.zeros(vocab_size, dtype=torch.float32, device=device)

    def _make_bias(self, vocab_size: int, device: torch.device) -> Tensor | None:
        allowed, biases = self.params.allowed_token_ids, self.params.logit_bias
        if allowed is None and not biases:
            return None
        bias = torch.zeros(vocab_size)
        if allowed is not None:
            bias.fill_(-torch.inf)
            bias[list(allowed)] = 0.0
        for token, value in (biases or {}).items():
            bias[token] += value
        return bias.to(device)

    def adjust(self, logits: Tensor, output_ids: Sequence[int]) -> None:
        """Apply masks, biases and penalties to one row of logits, [V] float32, in place."""
        if self._bias is not None:
            logits += self._bias
        if len(output_ids) < self.params.min_tokens:
            logits.index_fill_(0, self._stop_ids, -torch.inf)
        for word in self._banned_words:
            before = word[:-1]
            if not before or tuple(output_ids[-len(before) :]) == before:
                logits[word[-1]] = -torch.inf
        if self._counts is None or self._in_prompt is None:
            return
        penalty = self.params.repetition_penalty
        if penalty != 1:
            penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits.copy_(torch.where(self._in_prompt | (self._counts > 0), penalised, logits))
        logits -= self.params.frequency_penalty * self._counts
        logits -= self.params.presence_penalty * (self._counts > 0)

    @property
    def adjusts(self) -> bool:
        """Whether adjust() can ever change a row."""
        return bool(
            self._bias is not None
            or self._banned_words
            or self.params.min_tokens
            or self.params.penalised
        )

    def count(self, token: Tensor) -> None:
        """Note a sampled token, [1] int64 on the device, for the penalties."""
        if self._counts is not None:
            self._counts.index_add_(0, token, torch.ones_like(self._counts[:1]))


class BatchSampler:
    """Samples a token for each sequence of a batch; build one for each batch composition."""

    def __init__(self, sequences: Sequence[SequenceSampler], device: torch.device) -> None:
        self._sequences = list(sequences)
        params = [s.params for s in sequences]

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        self._all_greedy = all(p.greedy for p in params)
        self._greedy = torch.tensor([p.greedy for p in params], device=device)
        self._temperature = column([1.0 if p.greedy else p.temperature for p in params])
        self._min_p = column([p.min_p for p in params]) if any(p.min_p for p in params) else None
        self._top_p = (
            column([p.top_p for p in params]) if any(p.top_p < 1 for p in params) else None
        )
        self._top_k: Tensor | None = None
        if any(p.top_k > 0 for p in params):
            ks = [p.top_k if p.top_k > 0 else 2**31 for p in params]
            self._top_k = torch.tensor(ks, dtype=torch.int64, device=device)[:, None]
        asked = [p.logprobs for p in params if p.logprobs is not None]
        self._num_logprobs = max(asked) if asked else None

    def sample(
        self, logits: Tensor, output_ids: Sequence[Sequence[int]]
    ) -> tuple[Tensor, TopLogprobs | None]:
        """Sample from logits [B, V] float32 -> token ids [B] int64, and logprobs if asked for.

        Args:
            output_ids: tokens each sequence has generated so far.
        """
        original = logits
        if any(s.adjusts for s in self._sequences):
            logits = logits.clone()
            for row, sequence, ids in zip(logits, self._sequences, output_ids, strict=True):
                sequence.adjust(row, ids)
        tokens = logits.argmax(dim=-1)
        if not self._all_greedy:
            tokens = torch.where(self._greedy, tokens, self._draw(logits))
        for i, sequence in enumerate(self._sequences):
            sequence.count(tokens[i : i + 1])
        if self._num_logprobs is None:
            return tokens, None
        return tokens, _top_logprobs(original, tokens, self._num_logprobs)

    def _draw(self, logits: Tensor) -> Tensor:
        """One draw a row after temperature, min_p, top_k and top_p; greedy rows draw too, unused.

        argmax(p / e) with e ~ Exp(1) is distributed as p, and needs no sum and no host.
        """
        logits = logits / self._temperature
        if self._min_p is not None:
            probs = logits.softmax(dim=-1)
            floor = self._min_p * probs.amax(dim=-1, keepdim=True)
            logits = logits.masked_fill(probs < floor, -torch.inf)
        if self._top_k is not None or self._top_p is not None:
            logits = _keep_top(logits, self._top_k, self._top_p)
        noise = torch.ones_like(logits)
        for row, sequence in zip(noise, self._sequences, strict=True):
            if sequence.generator is not None:
                row.exponential_(generator=sequence.generator)
        return (logits.softmax(dim=-1) / noise).argmax(dim=-1)


def _keep_top(logits: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """-inf outside the top_k most probable tokens and the smallest set of mass top_p of those.

    logits [B, V]; top_k and top_p [B, 1]. The most probable token always stays.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ranks = torch.arange(logits.shape[-1], device=logits.device)
        ordered = ordered.masked_fill(ranks >= top_k, -torch.inf)
    if top_p is not None:
        probs = ordered.softmax(dim=-1)
        before = probs.cumsum(dim=-1) - probs
        before[:, 0] = -1.0
        ordered = ordered.masked_fill((before >= top_p) & (top_p < 1), -torch.inf)
    return torch.empty_like(ordered).scatter_(-1, order, ordered)


def _top_logprobs(logits: Tensor, tokens: Tensor, k: int) -> TopLogprobs:
    logprobs = logits.log_softmax(dim=-1)
    sampled = logprobs.gather(1, tokens[:, None])
    top, ids = logprobs.topk(k, dim=-1)
    rank = (logprobs > sampled).sum(dim=-1) + 1
    return TopLogprobs(sampled[:, 0], rank, top, ids)
