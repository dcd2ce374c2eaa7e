"""EvalEngine: items and passages through every method, each prefilled once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from twilight_engine.eval.caches import MethodCaches
from twilight_engine.eval.cost import Cost, cost_of
from twilight_engine.eval.decode import Forced, Turn, answer_greedily, forced_steps, predict
from twilight_engine.eval.items import Item, Passage, Question
from twilight_engine.eval.memory import (
    CacheShape,
    MemoryBudget,
    choose_batch,
    default_hot_bytes,
    even_batches,
)
from twilight_engine.eval.methods import Method
from twilight_engine.models.load import LoadedModel
from twilight_engine.runtime.sampling_params import SamplingParams
from twilight_engine.runtime.text import OutputText

Done = Callable[[float], None]


@dataclass(frozen=True)
class Answer:
    """One item answered by one method.

    Attributes:
        text: the answer, special tokens left out.
        token_ids: its tokens, a final end-of-sequence included.
        step_s: seconds a step of the batch, which is the time per output token of each sequence.
        batch: sequences in the batch.
    """

    item: Item
    method: Method
    text: str
    token_ids: list[int]
    cost: Cost
    step_s: float
    batch: int


@dataclass(frozen=True)
class Prediction:
    """One passage predicted by one method; lists have an entry for each target.

    Attributes:
        nll: -log p(target), natural log.
        is_top: whether the target is the method's most probable token.
        kl: KL(dense || method) of the next-token distributions, in nats; None without dense.
        same_top: whether dense has the same most probable token; None without dense.
    """

    passage: Passage
    method: Method
    nll: list[float]
    is_top: list[bool]
    kl: list[float] | None
    same_top: list[bool] | None
    cost: Cost
    step_s: float
    batch: int


class EvalEngine:
    """Runs methods over the same items from the same prefilled caches.

    Args:
        loaded: the model.
        methods: every method that will be asked for; the dense one, if any, is run first.
        max_len: tokens a sequence may come to have; see memory.room_for.
        batch: most sequences that decode together; fewer where the budget binds (`self.batch`).
        hot_bytes: device bytes of hot rows a sequence, the same for every method whose KVConfig
            leaves it open; None: the default preset's share of max_len tokens.
        budget: what all caches together may take.
        kept_targets: predictions of a passage that are kept of the dense method, for KL; 0: no
            method is compared with it.
        prefill_chunk_size: tokens of a prompt that go through a layer at once.
    Raises:
        ValueError: for a budget that holds no sequence.
        HostMemoryError: if the host cannot hold the caches.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        methods: Sequence[Method],
        *,
        max_len: int,
        batch: int,
        hot_bytes: int | None = None,
        budget: MemoryBudget | None = None,
        kept_targets: int = 0,
        prefill_chunk_size: int = 8192,
    ) -> None:
        self.loaded, self.model = loaded, loaded.model
        self.methods = sorted(methods, key=lambda method: not method.is_dense)
        self.kept_targets = kept_targets
        dtype = self.model.dtype
        if hot_bytes is None:
            hot_bytes = default_hot_bytes(loaded.config, dtype, max_len)
        self.shape = CacheShape(loaded.config, dtype, max_len, hot_bytes)
        logits = loaded.config.vocab_size * 4
        self.batch = choose_batch(
            self.shape,
            self.methods,
            batch=batch,
            budget=budget or MemoryBudget(),
            step_bytes=logits * (3 + kept_targets),  # logits, log p and p of a step
        )
        self.caches = MethodCaches(
            self.model,
            self.methods,
            self.shape,
            batch=self.batch,
            prefill_chunk_size=prefill_chunk_size,
        )

    def batches(self, count: int) -> list[range]:
        """Which of `count` items run together."""
        return even_batches(count, self.batch)

    def answer(
        self,
        items: Sequence[Item],
        methods: Sequence[Method],
        *,
        question: Question = "prefill",
        on_tokens: Done = lambda tokens: None,
    ) -> Iterator[list[Answer]]:
        """Prefill a batch of items, then decode it with each method; yields a method's answers.

        Args:
            items: at most `self.batch`.
            methods: some of the engine's, in the order to run.
            question: where the question's tokens go: "prefill" with the context, dense for every
                method, or "decode", token by token through the method's steps before its answer.
            on_tokens: called with prompt tokens done since the last call.
        """
        sparsely = [question == "decode" and bool(item.question_ids) for item in items]
        prompts = [
            item.context_ids if sparse else item.prompt_ids
            for item, sparse in zip(items, sparsely, strict=True)
        ]
        first = self.caches.prefill(prompts, on_tokens).argmax(-1).tolist()
        eos_ids = frozenset(self.loaded.config.eos_token_ids)
        for method in methods:
            turns = []
            for item, sparse, token in zip(items, sparsely, first, strict=True):
                inputs = item.question_ids if sparse else [token]
                turns.append(Turn(inputs, item.max_new_tokens, self._stops(item)))
                if not sparse:
                    turns[-1].push(token)
            steps = self.caches.start(method)
            timing = answer_greedily(steps, turns, eos_ids, self.model.device)
            cache, logged = self.caches.cache(method), self.caches.steps(method)
            yield [
                Answer(
                    item=item,
                    method=method,
                    text=self._text(item, turn.answer, eos_ids),
                    token_ids=turn.answer,
                    cost=cost_of(log, cache, method.sparse, turn.steps),
                    step_s=timing.step_s,
                    batch=len(items),
                )
                for item, turn, log in zip(items, turns, logged, strict=True)
            ]

    def predict(
        self,
        passages: Sequence[Passage],
        methods: Sequence[Method],
        *,
        on_tokens: Done = lambda tokens: None,
    ) -> Iterator[list[Prediction]]:
        """Teacher-force a batch of passages through each method; yields a method's predictions.

        Every target is predicted by a step of the method: the context's last token is its first
        input. Only behind a context of one token, where no method leaves anything out, the prefill
        predicts the first. If the first method is dense, the others are compared with it.

        Args:
            passages: at most `self.batch`; compared ones (`kept_targets`) have at most as many
                targets.
        """
        texts = [p.context_ids + p.target_ids for p in passages]
        done = [max(1, len(p.context_ids) - 1) for p in passages]
        inputs, targets = forced_steps(texts, done, self.model.device)
        prompts = [text[:n] for text, n in zip(texts, done, strict=True)]
        first = self.caches.prefill(prompts, on_tokens).log_softmax(-1)
        dense = None
        for method in methods:
            keep = None
            if method.is_dense and len(methods) > 1 and self.kept_targets:
                shape = (*inputs.shape, self.loaded.config.vocab_size)
                keep = torch.empty(shape, dtype=torch.float32, device=self.model.device)
            steps = self.caches.start(method)
            result = predict(steps, inputs, targets, dense=dense, keep=keep)
            dense = keep if keep is not None else dense
            cache, logged = self.caches.cache(method), self.caches.steps(method)
            yield [
                Prediction(
                    **_predicted(passage, result, i, first[i]),
                    passage=passage,
                    method=method,
                    cost=cost_of(log, cache, method.sparse, len(texts[i]) - done[i] - 1),
                    step_s=result.timing.step_s,
                    batch=len(passages),
                )
                for i, (passage, log) in enumerate(zip(passages, logged, strict=True))
            ]

    def close(self) -> None:
        """Free every cache. Idempotent."""
        self.caches.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _output(self, item: Item) -> OutputText:
        params = SamplingParams(stop=item.stop)
        return OutputText(params, self.loaded.tokenizer, item.prompt_ids)

    def _stops(self, item: Item) -> Callable[[int], bool] | None:
        """What tells, token by token, whether one of the item's stop texts has come."""
        tokenizer = self.loaded.tokenizer
        if not item.stop or tokenizer is None:
            return None
        output = self._output(item)
        ids = {tokenizer.token_id(text) for text in item.stop}  # special tokens have no text
        return lambda token: token in ids or output.push(token) is not None

    def _text(self, item: Item, answer: Sequence[int], eos_ids: frozenset[int]) -> str:
        output = self._output(item)
        if any(token not in eos_ids and output.push(token) for token in answer):
            return output.text
        output.finish()
        return output.text


def _predicted(passage: Passage, result: Forced, number: int, first: Tensor) -> dict[str, Any]:
    """A passage's part of its batch's predictions.

    Args:
        first: [V] log-probabilities after its prefill.
    """
    count = len(passage.target_ids)
    nll, is_top = result.nll[:, number].tolist(), result.is_top[:, number].tolist()
    kl = None if result.kl is None else result.kl[:, number].tolist()
    same_top = None if result.same_top is None else result.same_top[:, number].tolist()
    if len(passage.context_ids) == 1:  # the prefill, the same for every method, comes before
        target = passage.target_ids[0]
        nll, is_top = [-float(first[target]), *nll], [int(first.argmax()) == target, *is_top]
        kl = None if kl is None else [0.0, *kl]
        same_top = None if same_top is None else [True, *same_top]
    lists = {"nll": nll, "is_top": is_top, "kl": kl, "same_top": same_top}
    return {name: None if x is None else x[:count] for name, x in lists.items()}
