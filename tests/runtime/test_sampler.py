"""The sampler against the definitions, on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compare import compare
from twilight_engine.runtime.sampler import BatchSampler, SequenceSampler
from twilight_engine.runtime.sampling_params import SamplingParams

V = 50


def sampler(
    device: torch.device,
    *,
    seed: int = 0,
    prompt: tuple[int, ...] = (1, 2),
    stop: tuple[int, ...] = (),
    banned: tuple[tuple[int, ...], ...] = (),
    **params: Any,
) -> SequenceSampler:
    return SequenceSampler(
        SamplingParams(**params),
        seed=seed,
        prompt_ids=prompt,
        stop_ids=stop,
        banned_words=banned,
        vocab_size=V,
        device=device,
    )


def draw(sequence: SequenceSampler, logits: Tensor, count: int) -> list[int]:
    batch = BatchSampler([sequence], logits.device)
    return [int(batch.sample(logits, [[]])[0]) for _ in range(count)]


def test_greedy_takes_the_most_probable(device: torch.device) -> None:
    logits = torch.randn(3, V, device=device)
    batch = BatchSampler([sampler(device, temperature=0) for _ in range(3)], device)
    tokens, top = batch.sample(logits, [[], [], []])
    assert torch.equal(tokens, logits.argmax(-1)) and top is None


def test_draws_follow_the_distribution(device: torch.device) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0] + [-torch.inf] * (V - 3)], device=device)
    drawn = torch.tensor(draw(sampler(device, temperature=0.5), logits, 4000))
    expected = (logits[0, :3] / 0.5).softmax(-1).cpu()
    share = torch.bincount(drawn, minlength=V)[:3] / 4000
    assert (share - expected).abs().max() < 0.03
    assert drawn.max() < 3


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.8}, {0, 1}),
        ({"top_p": 1e-6}, {0}),
        ({"min_p": 0.3}, {0, 1}),
        ({"top_k": 3, "top_p": 0.7}, {0, 1}),
        ({"top_k": 1}, {0}),
        ({"allowed_token_ids": [4, 5]}, {4, 5}),
        ({"logit_bias": {9: 100.0}}, {9}),
    ],
)
def test_only_allowed_tokens_are_drawn(
    device: torch.device, params: dict[str, Any], allowed: set[int]
) -> None:
    """Probabilities .5, .3, .1 and the rest spread."""
    probs = torch.full((1, V), 0.1 / (V - 3), device=device)
    probs[0, :3] = torch.tensor([0.55, 0.3, 0.05])
    assert set(draw(sampler(device, **params), probs.log(), 200)) == allowed


def test_samples_depend_on_the_seed_and_not_on_the_batch(device: torch.device) -> None:
    logits = torch.randn(1, V, device=device)
    alone = draw(sampler(device, seed=7), logits, 20)
    assert alone == draw(sampler(device, seed=7), logits, 20)
    assert alone != draw(sampler(device, seed=8), logits, 20)
    others = [sampler(device, seed=1, top_k=3), sampler(device, seed=7), sampler(device, top_p=0.9)]
    batch = BatchSampler(others, device)
    beside = [int(batch.sample(logits.expand(3, V), [[]] * 3)[0][1]) for _ in range(20)]
    assert alone == beside


def test_a_negative_seed_is_a_seed(device: torch.device) -> None:
    assert len(draw(sampler(device, seed=-5), torch.randn(1, V, device=device), 2)) == 2


def test_penalties_follow_their_formulas(device: torch.device) -> None:
    logits = torch.randn(1, V, device=device)
    sequence = sampler(
        device,
        temperature=0,
        prompt=(1, 2, 3),
        repetition_penalty=1.5,
        frequency_penalty=0.5,
        presence_penalty=0.25,
    )
    outputs = [5, 5, 3, 7]
    for token in outputs:
        sequence.count(torch.tensor([token], device=device))
    row = logits[0].clone()
    sequence.adjust(row, outputs)
    expected = logits[0].clone().cpu()
    for token in {1, 2, 3, 5, 7}:
        value = expected[token]
        expected[token] = value / 1.5 if value > 0 else value * 1.5
    for token in {5, 3, 7}:
        expected[token] -= 0.5 * outputs.count(token) + 0.25
    compare(row.cpu(), expected)


def test_penalties_change_what_the_same_logits_give(device: torch.device) -> None:
    logits = torch.zeros(1, V, device=device)
    logits[0, 4], logits[0, 8] = 1.0, 0.9
    assert draw(sampler(device, temperature=0), logits, 3) == [4, 4, 4]
    assert draw(sampler(device, temperature=0, presence_penalty=0.5), logits, 3) == [4, 8, 4]


def test_stop_tokens_wait_for_min_tokens(device: torch.device) -> None:
    logits = torch.zeros(1, V, device=device)
    logits[0, 9] = 5.0
    batch = BatchSampler([sampler(device, temperature=0, min_tokens=2, stop=(9,))], device)
    assert int(batch.sample(logits, [[1]])[0]) != 9
    assert int(batch.sample(logits, [[1, 1]])[0]) == 9


def test_bad_words_lose_their_last_token(device: torch.device) -> None:
    logits = torch.zeros(1, V, device=device)
    logits[0, 9], logits[0, 6] = 5.0, 6.0
    batch = BatchSampler([sampler(device, temperature=0, banned=((3, 9), (6,)))], device)
    assert int(batch.sample(logits, [[1, 2]])[0]) == 9
    assert int(batch.sample(logits, [[1, 3]])[0]) not in (6, 9)


def test_logprobs_are_the_models_own(device: torch.device) -> None:
    """Raw log-softmax, before temperature and bias; the sampled token's rank with them."""
    logits = torch.randn(2, V, device=device)
    asked = sampler(device, logprobs=3, temperature=0, logit_bias={11: 100.0})
    batch = BatchSampler([asked, sampler(device)], device)
    tokens, top = batch.sample(logits, [[], []])
    assert top is not None and int(tokens[0]) == 11
    raw = logits.log_softmax(-1)
    compare(top.sampled, raw.gather(1, tokens[:, None])[:, 0])
    compare(top.top_logprobs, raw.sort(-1, descending=True).values[:, :3])
    assert int(top.rank[0]) == int((raw[0] > raw[0, 11]).sum()) + 1
