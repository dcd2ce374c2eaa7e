"""The caches of the methods compared: one prefill, then every method from the same state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from twilight_engine.attention.copy import copy_sequence
from twilight_engine.config import KVConfig
from twilight_engine.eval.memory import CacheShape
from twilight_engine.eval.methods import Method
from twilight_engine.kv.cache import KVCache, SequenceKV
from twilight_engine.kv.rewind import rewind
from twilight_engine.models.decoder import DecoderModel
from twilight_engine.runtime.runner import DecodeBatch, Runner
from twilight_engine.telemetry import Steps

Done = Callable[[float], None]


class MethodCaches:
    """A KVCache for each distinct KVConfig of some methods, all open for the run.

    The model runs over a prompt once, in the first cache; another cache gets its sequences by
    copies when a method first wants them. Each method starts at the prompts' ends, hot rows cold.

    Args:
        methods: those that will be asked for.
        batch: most sequences at once.
    Raises: as KVCache does.
    """

    def __init__(
        self,
        model: DecoderModel,
        methods: Sequence[Method],
        shape: CacheShape,
        *,
        batch: int,
        prefill_chunk_size: int,
    ) -> None:
        self.model, self.shape, self.batch = model, shape, batch
        self._chunk = prefill_chunk_size
        self._lengths: list[int] = []
        self._sequences: dict[KVConfig, list[SequenceKV]] = {}
        self._caches: dict[KVConfig, KVCache] = {}
        with ExitStack() as stack:
            for method in methods:
                config = shape.kv_config(method, batch)
                if config not in self._caches:
                    cache = KVCache(
                        shape.model,
                        config,
                        max_model_len=shape.max_len,
                        max_num_seqs=batch,
                        device=model.device,
                        dtype=shape.dtype,
                    )
                    self._caches[config] = stack.enter_context(cache)
            self._stack = stack.pop_all()

    def cache(self, method: Method) -> KVCache:
        """The method's cache."""
        return self._caches[self.shape.kv_config(method, self.batch)]

    def prefill(
        self, prompts: Sequence[Sequence[int]], on_tokens: Done = lambda tokens: None
    ) -> Tensor:
        """Run the prompts, one after the other -> logits [B, V] float32 after each one's end.

        The sequences of an earlier call are closed.
        """
        self.release()
        config, first = next(iter(self._caches.items()))
        runner = Runner(self.model, first, prefill_chunk_size=self._chunk)
        opened = self._sequences[config] = []
        logits = []
        for prompt in prompts:
            opened.append(first.open_sequence(len(prompt)))
            logits.append(runner.prefill(opened[-1], prompt, on_tokens))
        self._lengths = [len(prompt) for prompt in prompts]
        return torch.cat(logits)

    def start(self, method: Method) -> DecodeBatch:
        """Steps of this method from the prompts' ends, for all sequences at once."""
        config = self.shape.kv_config(method, self.batch)
        cache = self._caches[config]
        if config in self._sequences:
            rewind(cache, self._sequences[config], self._lengths)
        else:
            source, originals = next(iter(self._sequences.items()))
            rewind(self._caches[source], originals, self._lengths)
            copies = self._sequences[config] = []
            for sequence in originals:
                copies.append(copy_sequence(self._caches[source], sequence, cache))
        cache.log.clear()
        runner = Runner(self.model, cache, prefill_chunk_size=self._chunk)
        sequences = self._sequences[config]
        return runner.start_decode(sequences, [method.sparse] * len(sequences), self._lengths)

    def steps(self, method: Method) -> list[Steps]:
        """What the steps since `start` counted, for each sequence."""
        cache = self.cache(method)
        sequences = self._sequences[self.shape.kv_config(method, self.batch)]
        return [cache.log.request(sequence.sequence_id) for sequence in sequences]

    def release(self) -> None:
        """Close every sequence; the caches stay. Idempotent."""
        for config, sequences in self._sequences.items():
            for sequence in sequences:
                self._caches[config].close_sequence(sequence)
        self._sequences = {}

    def close(self) -> None:
        """Free every cache. Idempotent."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
