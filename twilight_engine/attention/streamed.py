"""The dense policy of layers that live on the host: stream every row, attend over all of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from twilight_engine.attention.step import window_start
from twilight_engine.kv.cache import KVCache, SequenceKV
from twilight_engine.layout import COUNTER_STREAMED_BYTES, NO_ROW, RowLists, StepMeta
from twilight_engine.ops.attend_pages import attend_pages
from twilight_engine.ops.attend_rows import attend_rows
from twilight_engine.ops.merge_states import merge_states
from twilight_engine.telemetry import EXACT, MISSED

NUM_BUFFERS = 2  # one is attended over while the next layer's rows arrive in the other


@dataclasses.dataclass
class _Staging:
    """Rows of one layer on the device, and when they may be read and overwritten."""

    rows: Tensor  # flat; the first part is this step's [Hkv, P, S, 2 * D]
    layer: int | None = None
    arrived: torch.cuda.Event | None = None
    consumed: torch.cuda.Event | None = None


class StreamedAttention:
    """Dense attention with double-buffered streaming of the host's rows.

    Tokens before a sequence's window lie in full pages that were written through before this step,
    so the next layer's copy can run while this layer attends; the resident rows (sinks, window,
    this step's own) come from the device, and the two states merge.

    Args:
        cache: the engine's KV cache.
        layers: the sparse layers whose policy is dense; none: nothing is allocated.
    """

    def __init__(self, cache: KVCache, layers: Sequence[int]) -> None:
        self.cache = cache
        self.layers = list(layers)
        self._buffers: list[_Staging] = []
        self._pages = torch.empty(0, dtype=torch.int32)
        self._no_list: tuple[RowLists, Tensor] | None = None

    def begin_step(self, sequences: Sequence[SequenceKV], page_table: Tensor) -> None:
        """Lay out the staging of this step: the sequences' full pages, one after another."""
        if not self.layers:
            return
        config, device = self.cache.config, self.cache.device
        size = config.page_size
        table = torch.full_like(page_table, NO_ROW, device="cpu")
        pages: list[int] = []
        for b, sequence in enumerate(sequences):
            full = window_start(sequence.length, config.num_recent, size) // size
            first = len(pages)
            table[b, :full] = torch.arange(first, first + full, dtype=torch.int32)
            pages += sequence.pages[:full]
        self._pages = torch.tensor(pages, dtype=torch.int32)
        self._table = table.to(device, non_blocking=True)
        if not self._buffers or self._buffers[0].rows.numel() < len(pages) * self._page_numel:
            self._allocate(sum(len(sequence.pages) for sequence in sequences))
        for buffer in self._buffers:
            buffer.layer = None
        heads, n = self.cache.model.num_kv_heads, len(sequences)
        if self._no_list is None or self._no_list[1].shape[0] != n:
            empty = RowLists.empty(n, heads, 1, device)
            self._no_list = (empty, torch.full_like(empty.tokens, NO_ROW))

    def __call__(self, layer: int, q: Tensor, meta: StepMeta) -> Tensor:
        """q [N, Hq, D] -> [N, Hq, D]; this step's rows are already appended."""
        staging = self._stream(layer)
        position = self.layers.index(layer)
        if position + 1 < len(self.layers):
            self._stream(self.layers[position + 1])
        if staging.arrived is not None:
            torch.cuda.current_stream(self.cache.device).wait_event(staging.arrived)
        scale = self.cache.model.softmax_scale
        old = dataclasses.replace(
            meta,
            positions=meta.window_starts.index_select(0, meta.query_seq) - 1,
            ctx_starts=meta.ctx_starts.clamp(min=meta.num_sink),
        )
        states = [attend_pages(q, self._view(staging), self._table, old, softmax_scale=scale)]
        listed = (old.positions + 1 - old.ctx_starts).clamp(min=0).int()
        rows = listed[:, None].expand(-1, self.cache.model.num_kv_heads)
        self.cache.log.record_layer(layer, {EXACT: rows, MISSED: rows})
        tiers = self.cache.layers[layer]
        assert tiers.windows is not None and self._no_list is not None
        exact, locations = self._no_list
        states.append(
            attend_rows(q, tiers.windows, tiers.host, exact, locations, meta, softmax_scale=scale)
        )
        out, _ = merge_states(states, q.dtype)
        if self.cache.on_gpu:
            staging.consumed = torch.cuda.Event()
            staging.consumed.record()
        return out

    def _allocate(self, num_pages: int) -> None:
        if self.cache.copy_stream is not None:
            self.cache.copy_stream.wait_stream(torch.cuda.current_stream(self.cache.device))
        numel = num_pages * self._page_numel
        self._buffers = [
            _Staging(torch.empty(numel, dtype=self.cache.dtype, device=self.cache.device))
            for _ in range(NUM_BUFFERS)
        ]

    @property
    def _page_numel(self) -> int:
        """Elements of one page in one layer, all heads."""
        model = self.cache.model
        return model.num_kv_heads * self.cache.config.page_size * 2 * model.head_dim

    def _view(self, staging: _Staging) -> Tensor:
        """[Hkv, P, S, 2 * D] with the P pages of this step."""
        model, count = self.cache.model, self._pages.shape[0]
        shape = (model.num_kv_heads, count, self.cache.config.page_size, 2 * model.head_dim)
        return staging.rows[: count * self._page_numel].view(shape)

    def _stream(self, layer: int) -> _Staging:
        """Start a layer's copy unless it is under way; the buffer it is in."""
        staging = self._buffers[self.layers.index(layer) % NUM_BUFFERS]
        if staging.layer == layer:
            return staging
        staging.layer = layer
        stream = self.cache.copy_stream
        if stream is None:
            self._copy(layer, staging)
            return staging
        if staging.consumed is not None:
            stream.wait_event(staging.consumed)
        else:
            stream.wait_stream(torch.cuda.current_stream(self.cache.device))
        with torch.cuda.stream(stream):
            self._copy(layer, staging)
            staging.arrived = torch.cuda.Event()
            staging.arrived.record()
        return staging

    def _copy(self, layer: int, staging: _Staging) -> None:
        """Copy the step's full pages on the current stream and count the bytes."""
        transfers = self.cache.transfers
        before = transfers.totals(to_host=False).bytes
        stream = torch.cuda.current_stream().cuda_stream if self.cache.on_gpu else 0
        with self.cache.log.time_link():
            transfers.to_device(layer, self._pages, self._view(staging), stream=stream)
        moved = transfers.totals(to_host=False).bytes - before
        self.cache.log.counters[layer, COUNTER_STREAMED_BYTES] += moved
