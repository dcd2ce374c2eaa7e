"""Exact prefill, layer by layer: attend causally, write rows through, index full pages."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from twilight_engine.attention.step import page_table, prefill_meta
from twilight_engine.attention.store import store_rows
from twilight_engine.kv.cache import KVCache, SequenceKV
from twilight_engine.layout import StepMeta


class PrefillAttention:
    """Attention for the prompt of one sequence; callable as a model's `attend`.

    Layers run one after the other over all chunks of the prompt, so the device holds the K and V
    of one layer at a time. Rows go through to the host in final layout, chunk by chunk, on the
    copy stream; full pages are indexed as they complete.

    Args:
        cache: the engine's KV cache.
        sequence: an open sequence with no tokens yet and pages for num_tokens.
        num_tokens: length of the prompt.
        chunk_size: tokens a chunk; a multiple of page_size.
    Raises:
        ValueError: for an empty prompt, a chunk that splits a page, or too few pages.
    """

    def __init__(
        self, cache: KVCache, sequence: SequenceKV, *, num_tokens: int, chunk_size: int
    ) -> None:
        size = cache.config.page_size
        if num_tokens < 1:
            raise ValueError(f"num_tokens is {num_tokens}; a prompt has at least one token")
        if chunk_size < 1 or chunk_size % size:
            raise ValueError(
                f"chunk_size is {chunk_size}; it must be a multiple of page_size ({size})"
            )
        if num_tokens > len(sequence.pages) * size:
            raise ValueError(
                f"the prompt has {num_tokens} tokens; the sequence has pages for "
                f"{len(sequence.pages) * size}"
            )
        self.cache, self.sequence = cache, sequence
        self.num_tokens, self.chunk_size = num_tokens, chunk_size
        model = cache.model
        shape = (num_tokens, model.num_kv_heads, model.head_dim)
        self._keys = torch.empty(shape, dtype=cache.dtype, device=cache.device)
        self._values = torch.empty_like(self._keys)
        self._pages = page_table(cache, [sequence])
        self._metas: dict[tuple[int, int], StepMeta] = {}
        self._start, self._length = 0, 0

    def begin_layer(self, layer: int) -> None:
        """Start a layer: the staging rows of the last one are free once its copies are done."""
        if self.cache.copy_stream is not None:
            torch.cuda.current_stream(self.cache.device).wait_stream(self.cache.copy_stream)

    def begin_chunk(self, start: int, length: int) -> None:
        """The next call attends for tokens [start, start + length)."""
        self._start, self._length = start, length
        if (start, length) not in self._metas:
            self._metas[start, length] = prefill_meta(
                self.cache, self._pages, self.sequence.slot, start, length
            )

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of a chunk; q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq, D]."""
        start, end = self._start, self._start + self._length
        self._keys[start:end] = k
        self._values[start:end] = v
        self._store(layer, start, end)
        return causal_attention(
            q,
            self._keys[:end],
            self._values[:end],
            softmax_scale=self.cache.model.softmax_scale,
            sliding_window=self.cache.model.sliding_windows[layer],
        )

    def finish(self) -> None:
        """All layers are through: the sequence now holds the prompt."""
        if self.cache.copy_stream is not None:
            torch.cuda.current_stream(self.cache.device).wait_stream(self.cache.copy_stream)
        self.sequence.length = self.num_tokens

    def _store(self, layer: int, start: int, end: int) -> None:
        """Write the chunk's rows to every tier, beside the attention where there is a stream."""
        stream = self.cache.copy_stream
        if stream is None:
            self._store_now(layer, start, end)
            return
        stream.wait_stream(torch.cuda.current_stream(self.cache.device))
        with torch.cuda.stream(stream):
            self._store_now(layer, start, end)

    def _store_now(self, layer: int, start: int, end: int) -> None:
        store_rows(
            self.cache,
            layer,
            self._keys[start:end],
            self._values[start:end],
            self._metas[start, end - start],
            first_page=start // self.cache.config.page_size,
        )


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, sliding_window: int | None
) -> Tensor:
    """Causal attention of the last T of L tokens.

    Args:
        q: [T, Hq, D]; token i of q is token L - T + i.
        k, v: [L, Hkv, D].
        sliding_window: how many last tokens a token sees, its own included; None: all.
    Returns: [T, Hq, D].
    """
    length, total, groups = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    first = 0 if sliding_window is None else max(0, total - length + 1 - sliding_window)
    windowed = sliding_window is not None and total > sliding_window
    query = q.transpose(0, 1)[None]
    key, value = (x[first:].transpose(0, 1)[None] for x in (k, v))
    if query.is_cuda and not windowed:
        bias = causal_lower_right(length, total)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, scale=softmax_scale, enable_gqa=groups > 1
        )
        return out[0].transpose(0, 1)
    if groups > 1:  # the masked kernels want as many KV heads as query heads
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    mask = None
    if length < total or windowed:
        rows = torch.arange(total - length, total, device=q.device)[:, None]
        columns = torch.arange(first, total, device=q.device)[None]
        mask = columns <= rows
        if windowed:
            assert sliding_window is not None
            mask &= columns > rows - sliding_window
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=softmax_scale
    )
    return out[0].transpose(0, 1)
