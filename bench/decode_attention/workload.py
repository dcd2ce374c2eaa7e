"""Sequences whose attention selects the rows that a trace says, step after step.

Step t of a run looks along channel t of the head: there a chosen token's key is 1 to 1.5, every
other token's -2 to 0.6, the same from step to step four times in five, so that what follows the
chosen rows is stable too. The other channels are noise that no query looks at. calibration.py sets
the query's length for each (step, layer, request, KV head), so that as many rows are exact as the
trace says; which ones follows from the keys. With these ranges about a fifth of the context lies
within the index grade, as in the traces (15 % at .98).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from decode_attention.traces import ScaledTrace
from twilight_engine.attention.step import page_table, prefill_meta
from twilight_engine.attention.store import store_rows
from twilight_engine.config import KVConfig
from twilight_engine.kv.cache import KVCache, SequenceKV
from twilight_engine.kv.rewind import rewind

CHUNK_TOKENS = 8192
CHOSEN = (1.0, 1.5)  # keys along the step's channel
OTHERS = (-2.0, 0.6)
STAYS = 0.8  # of the other tokens keep their key from step to step
NOISE = 0.5  # standard deviation of the channels that nobody looks at
HEAD_SPREAD = 0.1  # query heads of a group differ in length by up to this


@dataclass(frozen=True)
class Shape:
    """Attention layers alone, as the cache sees a model."""

    num_layers: int
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128

    @property
    def hidden_size(self) -> int:
        return self.num_q_heads * self.head_dim

    @property
    def sliding_windows(self) -> tuple[int | None, ...]:
        return (None,) * self.num_layers

    @property
    def softmax_scale(self) -> float:
        return float(self.head_dim**-0.5)


class Workload:
    """Filled sequences in a cache, and the queries of each step.

    Args:
        tokens: of a sequence when the last step has run.
        steps: decode steps; each takes a channel of its own, so at most head_dim / 2.
        make_trace: the wanted rows, of the tokens in [first, last) that it is given.
    Raises: ValueError for more steps than channels.
    """

    def __init__(
        self,
        shape: Shape,
        kv_config: KVConfig,
        *,
        tokens: int,
        batch: int,
        steps: int,
        make_trace: Callable[[int, int], ScaledTrace],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        if not 1 <= steps <= shape.head_dim // 2:
            raise ValueError(
                f"a run has {steps} steps; it must have 1 to {shape.head_dim // 2} (half of "
                f"head_dim {shape.head_dim}), since each looks along a channel of its own"
            )
        self.shape, self.batch, self.steps, self.device = shape, batch, steps, device
        self.tokens, self.prompt = tokens, tokens - steps
        self.cache = KVCache(
            shape,
            kv_config,
            max_model_len=tokens,
            max_num_seqs=batch,
            device=device,
            dtype=dtype,
        )
        self._random = torch.Generator(device).manual_seed(0)
        last = self.prompt - kv_config.num_recent - kv_config.page_size
        trace = make_trace(kv_config.num_sink, last)
        self.wanted = [
            [
                [
                    [trace.rows(layer, b, h, t) for h in range(shape.num_kv_heads)]
                    for b in range(batch)
                ]
                for layer in range(shape.num_layers)
            ]
            for t in range(steps)
        ]  # [T][L][B][Hkv]
        self.sequences = [self._fill(b) for b in range(batch)]
        rows = (shape.num_layers, batch, shape.num_kv_heads, shape.head_dim)
        self.new_k = self._others(rows).to(dtype)
        self.new_v = self._normal(rows).to(dtype)
        heads = (steps, shape.num_layers, batch, shape.num_q_heads, shape.head_dim)
        self.queries = torch.zeros(heads, device=device, dtype=dtype)
        jitter = 1 + HEAD_SPREAD * (2 * self._uniform((shape.num_q_heads,)) - 1)
        self.head_lengths = jitter.view(shape.num_kv_heads, -1)

    def counts(self, step: int, layer: int) -> Tensor:
        """[B, Hkv] int32: rows wanted."""
        sizes = [[len(rows) for rows in heads] for heads in self.wanted[step][layer]]
        return torch.tensor(sizes, dtype=torch.int32, device=self.device)

    def rewind(self) -> None:
        """Back to the prompt, with no row hot and nothing known of the heads' sets."""
        rewind(self.cache, self.sequences, [self.prompt] * self.batch)
        self.cache.log.clear()

    def close(self) -> None:
        self.cache.close()

    def _fill(self, b: int) -> SequenceKV:
        cache, size = self.cache, CHUNK_TOKENS
        sequence = cache.open_sequence(self.tokens)
        table = page_table(cache, [sequence])
        for layer in range(self.shape.num_layers):
            k = self._keys(layer, b).to(cache.dtype)
            v = self._normal(tuple(k.shape)).to(cache.dtype)
            for start in range(0, self.prompt, size):
                end = min(start + size, self.prompt)
                meta = prefill_meta(cache, table, sequence.slot, start, end - start)
                first = start // cache.config.page_size
                store_rows(cache, layer, k[start:end], v[start:end], meta, first_page=first)
        sequence.length = self.prompt
        return sequence

    def _keys(self, layer: int, b: int) -> Tensor:
        """[L, Hkv, D] float32: each step's rows stand out along its channel."""
        heads = self.shape.num_kv_heads
        k = self._others((self.prompt, heads, self.shape.head_dim))
        for t in range(self.steps):
            rows = self.wanted[t][layer][b]
            where = torch.from_numpy(np.concatenate(rows)).to(self.device).long()
            which = torch.arange(heads).repeat_interleave(torch.tensor([len(r) for r in rows]))
            low, high = CHOSEN
            k[where, which.to(self.device), t] = low + (high - low) * self._uniform(where.shape)
        return k

    def _others(self, shape: tuple[int, ...]) -> Tensor:
        """Keys [..., D] of tokens that no step wants."""
        k = self._normal(shape) * NOISE
        low, high = OTHERS
        lasting = self._uniform(shape[:-1])
        for t in range(self.steps):
            stays = self._uniform(shape[:-1]) < STAYS
            k[..., t] = low + (high - low) * torch.where(stays, lasting, self._uniform(shape[:-1]))
        return k

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self._random, device=self.device)

    def _uniform(self, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=self._random, device=self.device)
