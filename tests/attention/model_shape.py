"""A model's shape and a driver of one attention stack, for tests of the cache and the method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twilight_engine.attention.decode import DecodeAttention
from twilight_engine.attention.prefill import PrefillAttention, causal_attention
from twilight_engine.config import KVConfig, SparseConfig
from twilight_engine.kv.cache import KVCache, SequenceKV


@dataclass(frozen=True)
class Shape:
    num_layers: int = 4
    num_q_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 64
    hidden_size: int = 384
    windows: tuple[int | None, ...] | None = None

    @property
    def sliding_windows(self) -> tuple[int | None, ...]:
        return self.windows or (None,) * self.num_layers

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5


def make_cache(
    device: torch.device,
    kv_config: KVConfig,
    *,
    shape: Shape | None = None,
    max_model_len: int = 512,
    max_num_seqs: int = 2,
    dtype: torch.dtype = torch.float32,
) -> KVCache:
    return KVCache(
        shape or Shape(),
        kv_config,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        device=device,
        dtype=dtype,
    )


class Run:
    """Random K, V and Q of a batch, pushed through the cache beside a plain dense computation."""

    def __init__(self, cache: KVCache, lengths: Sequence[int], *, seed: int = 0) -> None:
        self.cache, self.shape = cache, cache.model
        self.generator = torch.Generator().manual_seed(seed)
        self.sequences: list[SequenceKV] = []
        self.rows: list[list[tuple[Tensor, Tensor]]] = []  # [sequence][layer] -> K, V [L, Hkv, D]
        for length in lengths:
            self._prefill(length)

    def random(self, *shape: int) -> Tensor:
        x = torch.randn(*shape, generator=self.generator)
        return x.to(self.cache.device, self.cache.dtype)

    def _prefill(self, length: int) -> None:
        m = self.shape
        sequence = self.cache.open_sequence(length + 1)
        prefill = PrefillAttention(
            self.cache, sequence, num_tokens=length, chunk_size=2 * self.cache.config.page_size
        )
        rows = []
        for layer in range(m.num_layers):
            prefill.begin_layer(layer)
            # A few strong directions, so that attention is peaked as in real models.
            base = self.random(m.num_kv_heads, m.head_dim) * 2
            k = self.random(length, m.num_kv_heads, m.head_dim) + base
            v = self.random(length, m.num_kv_heads, m.head_dim)
            for start in range(0, length, prefill.chunk_size):
                end = min(length, start + prefill.chunk_size)
                q = self.random(end - start, m.num_q_heads, m.head_dim)
                prefill.begin_chunk(start, end - start)
                out = prefill(layer, q, k[start:end], v[start:end])
                expected = causal_attention(
                    q.cpu(),
                    k[:end].cpu(),
                    v[:end].cpu(),
                    softmax_scale=m.softmax_scale,
                    sliding_window=m.sliding_windows[layer],
                )
                torch.testing.assert_close(out.cpu().float(), expected.float(), atol=2e-2, rtol=0)
            rows.append((k, v))
        prefill.finish()
        self.sequences.append(sequence)
        self.rows.append(rows)

    def decoder(self, configs: Sequence[SparseConfig]) -> DecodeAttention:
        return DecodeAttention(self.cache, self.sequences, configs)

    def step(self, decode: DecodeAttention, *, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step of every layer: attention outputs and dense ones, [layers, B, Hq, D] float32.

        kept: [tokens] bool: the dense ones are over these tokens alone.
        """
        m = self.shape
        decode.begin_step()
        decode.advance()
        outs, expected = [], []
        for layer in range(m.num_layers):
            q, k, v = (
                self.random(len(self.sequences), heads, m.head_dim)
                for heads in (m.num_q_heads, m.num_kv_heads, m.num_kv_heads)
            )
            q = q * 2
            outs.append(decode(layer, q, k, v).float())
            dense = []
            for b, rows in enumerate(self.rows):
                keys = torch.cat([rows[layer][0], k[b : b + 1]])
                values = torch.cat([rows[layer][1], v[b : b + 1]])
                rows[layer] = (keys, values)
                if kept is not None:
                    keys, values = keys[kept], values[kept]
                dense.append(self.dense(q[b], keys, values, m.sliding_windows[layer]))
            expected.append(torch.stack(dense))
        decode.end_step()
        return torch.stack(outs), torch.stack(expected)

    def dense(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        if window is not None:
            k, v = k[-window:], v[-window:]
        groups = q.shape[0] // k.shape[1]
        k, v = (x.float().repeat_interleave(groups, dim=1) for x in (k, v))
        scores = torch.einsum("hd,lhd->hl", q.float(), k) * self.shape.softmax_scale
        return torch.einsum("hl,lhd->hd", scores.softmax(-1), v)
