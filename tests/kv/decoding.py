"""A tiny model decoding forced tokens, for tests that compare the states of caches bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tests.runtime.tiny import CONFIG, prompt_ids
from twilight_engine.config import KVConfig, SparseConfig
from twilight_engine.kv.cache import KVCache, SequenceKV
from twilight_engine.models.decoder import DecoderModel
from twilight_engine.models.load import load_model
from twilight_engine.runtime.runner import Runner
from twilight_engine.telemetry import Steps


def tiny_model(device: torch.device) -> DecoderModel:
    """The runtime tests' model with random weights: 3 layers, 2 KV heads."""
    return load_model(CONFIG, load_format="dummy", device=device).model


@contextmanager
def open_cache(model: DecoderModel, kv_config: KVConfig, *, slots: int = 3) -> Iterator[KVCache]:
    with KVCache(
        model.config,
        kv_config,
        max_model_len=320,
        max_num_seqs=slots,
        device=model.device,
        dtype=model.dtype,
    ) as cache:
        yield cache


def prefilled(model: DecoderModel, cache: KVCache, lengths: Sequence[int]) -> list[SequenceKV]:
    runner = Runner(model, cache, prefill_chunk_size=64)
    sequences = []
    for i, length in enumerate(lengths):
        sequences.append(cache.open_sequence(length))
        runner.prefill(sequences[-1], prompt_ids(length, i))
    return sequences


@dataclass
class Decoded:
    """Logits [T, B, V] of forced steps and what the log says of each sequence."""

    logits: Tensor
    steps: list[Steps]

    def assert_same(self, other: Decoded) -> None:
        """Bit by bit, bytes counted and rows by grade included."""
        assert torch.equal(self.logits, other.logits)
        for mine, theirs in zip(self.steps, other.steps, strict=True):
            for name in ("context", "exact", "index", "tail", "resident", "missed", "direct"):
                assert np.array_equal(getattr(mine, name), getattr(theirs, name)), name
            assert np.array_equal(mine.counters, theirs.counters)
            assert np.array_equal(mine.mass, theirs.mass)


def decode(
    model: DecoderModel,
    cache: KVCache,
    sequences: Sequence[SequenceKV],
    sparse: SparseConfig,
    *,
    steps: int,
    first: int = 0,
) -> Decoded:
    """Forced steps `first` .. `first + steps - 1` of a fixed sequence of tokens."""
    cache.log.clear()
    runner = Runner(model, cache, prefill_chunk_size=64)
    batch = runner.start_decode(sequences, [sparse] * len(sequences), [1] * len(sequences))
    logits = []
    for step in range(first, first + steps):
        tokens = [(13 * step + 5 * b) % 256 for b in range(len(sequences))]
        logits.append(batch.step(torch.tensor(tokens, device=model.device)))
    return Decoded(torch.stack(logits), [cache.log.request(s.sequence_id) for s in sequences])
