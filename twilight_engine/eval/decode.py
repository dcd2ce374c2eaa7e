"""Decode steps of a batch: greedy answers behind forced tokens, and predictions of given texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from twilight_engine.runtime.runner import DecodeBatch


@dataclass
class Turn:
    """One sequence's part in a greedy run: what is fed, and the answer that comes of it.

    Attributes:
        inputs: tokens to feed, one a step, before its own; at least one.
        max_new_tokens: most tokens of the answer.
        stops: told each token of the answer, whether it ends it; None: only its end of sequence.
        answer: tokens of the answer.
        steps: steps it took part in before its answer ended.
    """

    inputs: Sequence[int]
    max_new_tokens: int
    stops: Callable[[int], bool] | None = None
    answer: list[int] = field(default_factory=list)
    steps: int = 0
    stopped: bool = False

    def push(self, token: int, step: int = 0) -> None:
        """Add a token of the answer, which this step gave; 0 is the prefill."""
        self.answer.append(token)
        self.steps = step
        self.stopped = self.stops is not None and self.stops(token)

    def ended(self, eos_ids: frozenset[int]) -> bool:
        full = len(self.answer) >= self.max_new_tokens
        return full or self.stopped or (bool(self.answer) and self.answer[-1] in eos_ids)


@dataclass(frozen=True)
class Timing:
    """How long a batch's steps took together."""

    seconds: float
    steps: int

    @property
    def step_s(self) -> float:
        """Seconds a step: the time per output token of each sequence of the batch."""
        return self.seconds / self.steps if self.steps else 0.0


def answer_greedily(
    batch: DecodeBatch, turns: Sequence[Turn], eos_ids: frozenset[int], device: torch.device
) -> Timing:
    """Run steps until every answer has ended; sequences that have keep their place till then.

    The only wait in a step is the read of the tokens, which tells when to stop.
    """
    longest = max(len(turn.inputs) for turn in turns)
    padded = [[*turn.inputs, *[-1] * (longest - len(turn.inputs))] for turn in turns]
    forced = torch.tensor(padded, device=device).T.contiguous()  # [T, B], -1: its own token
    picked = torch.zeros(len(turns), dtype=torch.int64, device=device)
    step, start = 0, now(device)
    while not all(turn.ended(eos_ids) for turn in turns):
        tokens = picked
        if step < longest:
            tokens = torch.where(forced[step] >= 0, forced[step], picked)
        picked = batch.step(tokens).argmax(-1)
        step += 1
        if any(step >= len(turn.inputs) for turn in turns):
            _take(turns, picked.tolist(), step, eos_ids)
    return Timing(now(device) - start, step)


def _take(turns: Sequence[Turn], tokens: list[int], step: int, eos_ids: frozenset[int]) -> None:
    """Give each sequence whose own tokens have begun the one of this step."""
    for turn, token in zip(turns, tokens, strict=True):
        if step >= len(turn.inputs) and not turn.ended(eos_ids):
            turn.push(token, step)


@dataclass(frozen=True)
class Forced:
    """Predictions of T targets of B texts, [T, B] each, on the CPU.

    Attributes:
        nll: -log p(target), natural log.
        is_top: whether the target is the most probable token.
        kl: KL(dense || method) of the next-token distribution, in nats; None without dense.
        same_top: whether dense has the same most probable token; None without dense.
    """

    nll: Tensor
    is_top: Tensor
    kl: Tensor | None
    same_top: Tensor | None
    timing: Timing


def forced_steps(
    texts: Sequence[Sequence[int]], done: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """What steps feed behind the first `done` tokens of each text, and what they are to predict.

    Returns: inputs and targets [T, B] int64, device: token i and token i + 1 of each text; T is at
        least 1, and a text that ends earlier is filled up with its last token.
    """
    fed = [[*text[n:-1]] for text, n in zip(texts, done, strict=True)]
    wanted = [[*text[n + 1 :]] for text, n in zip(texts, done, strict=True)]
    longest = max(1, *map(len, fed))

    def fill(rows: list[list[int]]) -> Tensor:
        filled = [
            [*row, *[text[-1]] * (longest - len(row))]
            for row, text in zip(rows, texts, strict=True)
        ]
        return torch.tensor(filled, device=device).T.contiguous()

    return fill(fed), fill(wanted)


@torch.inference_mode()
def predict(
    batch: DecodeBatch,
    inputs: Tensor,
    targets: Tensor,
    *,
    dense: Tensor | None = None,
    keep: Tensor | None = None,
) -> Forced:
    """Feed given tokens and see how probable the ones that follow them are.

    Args:
        inputs, targets: [T, B] int64, device.
        dense: [T, B, V] float32 log-probabilities of the dense method, to compare with.
        keep: the same shape, to write these predictions to.
    """
    nll, is_top, kl, same = [], [], [], []
    start = now(inputs.device)
    for step in range(inputs.shape[0]):
        log_p = batch.step(inputs[step]).log_softmax(-1)  # [B, V]
        top = log_p.argmax(-1)
        nll.append(-log_p.gather(1, targets[step][:, None])[:, 0])
        is_top.append(top == targets[step])
        if keep is not None:
            keep[step].copy_(log_p)
        if dense is not None:
            d = dense[step]
            kl.append((d.exp() * (d - log_p)).sum(-1))
            same.append(d.argmax(-1) == top)
    seconds = now(inputs.device) - start
    return Forced(
        nll=torch.stack(nll).cpu(),
        is_top=torch.stack(is_top).cpu(),
        kl=torch.stack(kl).cpu() if kl else None,
        same_top=torch.stack(same).cpu() if same else None,
        timing=Timing(seconds, inputs.shape[0]),
    )


def now(device: torch.device) -> float:
    """The clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
