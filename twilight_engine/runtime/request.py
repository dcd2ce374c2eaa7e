"""A request and the sequences it is sampled as, while they run."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from twilight_engine.attention.audit_record import Audits, join_audits
from twilight_engine.config import SparseConfig
from twilight_engine.runtime.metrics import RequestMetrics, step_figures
from twilight_engine.runtime.outputs import CompletionOutput, Logprob, RequestOutput
from twilight_engine.runtime.sampler import SequenceSampler
from twilight_engine.runtime.sampling_params import SamplingParams
from twilight_engine.runtime.text import OutputText
from twilight_engine.telemetry import Steps


@dataclass(eq=False)
class Sequence:
    """One of a request's n sequences: its tokens, its text and why it ended."""

    request: Request
    index: int
    max_tokens: int
    stop_ids: frozenset[int]
    eos_ids: frozenset[int]
    sampler: SequenceSampler
    text: OutputText
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    steps: Steps | None = None
    audits: Audits | None = None
    prefill_written_bytes: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def prompt_ids(self) -> list[int]:
        return self.request.prompt_token_ids

    @property
    def total_tokens(self) -> int:
        """Tokens it may come to have, prompt and output."""
        return len(self.prompt_ids) + self.max_tokens

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def add_token(self, token_id: int, logprobs: dict[int, Logprob] | None) -> None:
        """Take a sampled token and decide whether the sequence ends with it."""
        params = self.request.params
        self.token_ids.append(token_id)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        may_stop = len(self.token_ids) >= params.min_tokens
        ends = may_stop and token_id in (self.eos_ids | self.stop_ids)
        stop = None
        if not ends or params.include_stop_str_in_output:
            stop = self.text.push(token_id, search=may_stop and not ends)
        if ends:
            self.finish_reason = "stop"
            self.stop_reason = None if token_id in self.eos_ids else token_id
        elif stop is not None:
            self.finish_reason, self.stop_reason = "stop", stop
        elif len(self.token_ids) >= self.max_tokens:
            self.finish_reason = "length"
        if self.finished and stop is None:
            late = self.text.finish(search=not ends)
            if late is not None:
                self.finish_reason, self.stop_reason = "stop", late

    def output(self) -> CompletionOutput:
        """What it has come to; text that a stop string may yet take back is left out."""
        wanted = self.request.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=self.text.text if self.finished else self.text.visible(),
            token_ids=list(self.token_ids),
            cumulative_logprob=(
                sum(step[t].logprob for step, t in zip(self.logprobs, self.token_ids, strict=True))
                if wanted
                else None
            ),
            logprobs=list(self.logprobs) if wanted else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


@dataclass(eq=False)
class Request:
    """A prompt, how to sample from it and how to attend to it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    sparse: SparseConfig
    sequences: list[Sequence] = field(default_factory=list)
    arrival_time: float = field(default_factory=time.time)
    started_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None

    @property
    def finished(self) -> bool:
        return all(sequence.finished for sequence in self.sequences)

    def output(self) -> RequestOutput:
        """What it has come to; the metrics come with the end."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(self.prompt_token_ids),
            outputs=[sequence.output() for sequence in self.sequences],
            finished=self.finished,
            metrics=self._metrics() if self.finished else None,
        )

    def _metrics(self) -> RequestMetrics:
        sequences = self.sequences
        return RequestMetrics(
            arrival_time=self.arrival_time,
            started_time=self.started_time or self.arrival_time,
            first_token_time=self.first_token_time or self.arrival_time,
            finished_time=self.finished_time or self.arrival_time,
            prefill_s=sum(s.prefill_s for s in sequences),
            decode_s=sum(s.decode_s for s in sequences),
            num_prompt_tokens=len(self.prompt_token_ids),
            num_generated_tokens=sum(len(s.token_ids) for s in sequences),
            prefill_written_bytes=sum(s.prefill_written_bytes for s in sequences),
            audits=join_audits([s.audits for s in sequences]),
            **step_figures([s.steps for s in sequences if s.steps is not None]),
        )
