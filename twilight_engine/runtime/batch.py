"""One static batch from its prompts to its last token; whatever happens, its pages come back."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator

import torch

from twilight_engine.kv.cache import SequenceKV
from twilight_engine.layout import COUNTER_WRITTEN_BYTES
from twilight_engine.loaders.tokenizer import Tokenizer
from twilight_engine.runtime.outputs import Logprob
from twilight_engine.runtime.progress import RunProgress
from twilight_engine.runtime.request import Request, Sequence
from twilight_engine.runtime.runner import Runner
from twilight_engine.runtime.sampler import BatchSampler, TopLogprobs
from twilight_engine.runtime.scheduler import StaticScheduler


class BatchRun:
    """Prefills each sequence of a batch in turn, then decodes them together.

    Sequences leave as they finish. However the run ends, by itself, by an error or by Ctrl-C, every
    sequence is closed and the living engine can run again.

    Args:
        tokenizer: for the texts of logprobs; None leaves them out.
    """

    def __init__(
        self,
        runner: Runner,
        batch: list[Sequence],
        progress: RunProgress,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._runner, self._batch = runner, batch
        self._progress, self._tokenizer = progress, tokenizer
        self._open: list[tuple[Sequence, SequenceKV]] = []

    def run(self) -> Generator[None, None, None]:
        """Generate; yields after every step, when sequences have new tokens."""
        try:
            for sequence in self._batch:
                self._prefill(sequence)
                yield
            while self._open:
                yield from self._decode_until_one_ends()
        finally:
            self.close()

    def close(self) -> None:
        """Give back every page. Idempotent."""
        while self._open:
            self._runner.cache.close_sequence(self._open[-1][1])
            self._open.pop()
        self._runner.cache.log.clear()
        self._runner.clear_audits()

    def _prefill(self, sequence: Sequence) -> None:
        cache, request = self._runner.cache, sequence.request
        start = time.perf_counter()
        if request.started_time is None:
            request.started_time = time.time()
        written = cache.log.counters[:, COUNTER_WRITTEN_BYTES].sum()
        self._open.append((sequence, cache.open_sequence(len(sequence.prompt_ids))))
        kv = self._open[-1][1]
        logits = self._runner.prefill(kv, sequence.prompt_ids, self._progress.prefilled)
        self._take_tokens([sequence], BatchSampler([sequence.sampler], cache.device), logits)
        if request.first_token_time is None:
            request.first_token_time = time.time()
        sequence.prefill_s = time.perf_counter() - start
        now = cache.log.counters[:, COUNTER_WRITTEN_BYTES].sum()
        sequence.prefill_written_bytes = int((now - written).item())
        self._leave_finished()

    def _decode_until_one_ends(self) -> Iterator[None]:
        """Steps of the batch as it is now."""
        sequences = [sequence for sequence, _ in self._open]
        device = self._runner.cache.device
        decode = self._runner.start_decode(
            [kv for _, kv in self._open],
            [s.request.sparse for s in sequences],
            [len(s.prompt_ids) for s in sequences],
        )
        sampler = BatchSampler([s.sampler for s in sequences], device)
        tokens = torch.tensor([s.token_ids[-1] for s in sequences], device=device)
        while not any(s.finished for s in sequences):
            start = time.perf_counter()
            tokens = self._take_tokens(sequences, sampler, decode.step(tokens))
            seconds = time.perf_counter() - start
            for sequence in sequences:
                sequence.decode_s += seconds
            self._leave_finished()
            yield

    @torch.inference_mode()
    def _take_tokens(
        self, sequences: list[Sequence], sampler: BatchSampler, logits: torch.Tensor
    ) -> torch.Tensor:
        """Sample, and give each sequence its token; the one place where decode waits."""
        tokens, top = sampler.sample(logits, [s.token_ids for s in sequences])
        logprobs = self._logprobs(sequences, tokens, top) if top is not None else None
        for i, (sequence, token) in enumerate(zip(sequences, tokens.tolist(), strict=True)):
            wanted = sequence.request.params.logprobs is not None and logprobs is not None
            sequence.add_token(token, logprobs[i] if wanted and logprobs is not None else None)
        self._progress.decoded(len(sequences))
        return tokens

    def _logprobs(
        self, sequences: list[Sequence], tokens: torch.Tensor, top: TopLogprobs
    ) -> list[dict[int, Logprob]]:
        """token id -> Logprob for each sequence: the sampled token, then the most probable."""
        rows = zip(
            sequences,
            tokens.tolist(),
            top.sampled.tolist(),
            top.rank.tolist(),
            top.top_ids.tolist(),
            top.top_logprobs.tolist(),
            strict=True,
        )
        out = []
        for sequence, token, logprob, rank, ids, values in rows:
            wanted = sequence.request.params.logprobs or 0
            found = {token: self._logprob(token, logprob, rank)}
            for i in range(wanted):
                found.setdefault(ids[i], self._logprob(ids[i], values[i], i + 1))
            out.append(found)
        return out

    def _logprob(self, token: int, logprob: float, rank: int) -> Logprob:
        decoded = None
        if self._tokenizer is not None:
            decoded = self._tokenizer.decode([token], skip_special_tokens=False)
        return Logprob(logprob, rank, decoded)

    def _leave_finished(self) -> None:
        """Close the sequences that ended in this step, and keep what their steps cost."""
        cache = self._runner.cache
        for sequence, kv in [pair for pair in self._open if pair[0].finished]:
            sequence.steps = cache.log.request(kv.sequence_id)
            sequence.audits = self._runner.take_audits(kv)
            cache.close_sequence(kv)
            self._open.remove((sequence, kv))
            request = sequence.request
            if request.finished:
                request.finished_time = time.time()


def run_requests(
    runner: Runner, requests: list[Request], progress: RunProgress, tokenizer: Tokenizer | None
) -> Generator[None, None, None]:
    """Run requests to their ends, batch after batch; yields when some have new tokens."""
    cache = runner.cache
    scheduler = StaticScheduler(
        [sequence for request in requests for sequence in request.sequences],
        max_num_seqs=cache.max_num_seqs,
        page_size=cache.config.page_size,
    )
    while scheduler:
        batch = scheduler.next_batch(cache.free_tokens)
        yield from BatchRun(runner, batch, progress, tokenizer).run()
