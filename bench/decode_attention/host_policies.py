"""Policies with the host in the loop: it reads the lists, and copies or gathers what they name.

What the device does before and after is captured, so that the host's time is the policy's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from decode_attention.policies import OpenGraded, PolicyDecode, host_keys
from decode_attention.timing import Replay
from twilight_engine.layout import RowLists, StepMeta
from twilight_engine.ops.append_rows import append_rows
from twilight_engine.ops.attend_rows import attend_rows
from twilight_engine.ops.merge_states import merge_states
from twilight_engine.telemetry import MISSED

Inputs = tuple[Tensor, Tensor, Tensor]  # q [B, Hq, D], k and v [B, Hkv, D]


class HostFetchLayer:
    """One layer's step: choose rows on the device, bring them by the host, attend.

    Args:
        inputs: the step's q, k and v, at fixed addresses.
    """

    def __init__(self, decode: PolicyDecode, layer: int, inputs: Inputs) -> None:
        self.decode, self.inputs = decode, inputs
        self.graded: OpenGraded = decode.layers[layer]
        self.cache = self.graded.cache
        self._meta: StepMeta | None = None
        self._front: Callable[[], object] = self._choose
        self._back: Callable[[], object] = self._attend
        hot = self.graded.tiers.hot
        assert hot is not None, "the staging rows are the layer's hot rows"
        self.first_row, self.last_row = hot.first_row, hot.first_row + hot.slot_key.shape[0]

    def __call__(self) -> None:
        if self._meta is not self.decode.meta:  # its tensors are other ones: launch by kernel
            self._meta, self._front, self._back = self.decode.meta, self._choose, self._attend
        elif not isinstance(self._front, Replay):
            self._front = Replay(self.cache.device, self._choose, warm=True)
            self._back = Replay(self.cache.device, self._attend, warm=True)
        self._front()
        self.fetch()
        self._back()

    def fetch(self) -> None:
        """Bring the listed rows and set their locations; on the current stream."""
        raise NotImplementedError

    def take(self, row: int, count: int) -> slice:
        """Rows [row, row + count) of the layer's pool. Raises: ValueError beyond the slots."""
        if row + count > self.last_row:
            raise ValueError(
                f"hot_bytes gives a layer {self.last_row - self.first_row} slots; the step stages "
                f"{row + count - self.first_row} rows or more"
            )
        return slice(row, row + count)

    @property
    def exact(self) -> RowLists:
        return self.graded.buffers_of(self.decode.meta).pruned.exact

    @property
    def locations(self) -> Tensor:
        return self.graded.buffers_of(self.decode.meta).locations

    def _choose(self) -> None:
        q, k, v = self.inputs
        graded, meta = self.graded, self.decode.meta
        append_rows(k, v, graded.windows, graded.tiers.host, meta, index=graded.index)
        counts = graded.prune(q, meta).exact.counts
        self.cache.log.record_layer(graded.layer, {MISSED: counts})

    def _attend(self) -> Tensor:
        """[B, Hq, D]."""
        q, graded = self.inputs[0], self.graded
        scale = self.cache.model.softmax_scale
        state = attend_rows(
            q,
            graded.windows,
            graded.tiers.host,
            self.exact,
            self.locations,
            self.decode.meta,
            softmax_scale=scale,
        )
        return merge_states([state], q.dtype)[0]


class PageCopies(HostFetchLayer):
    """A cudaMemcpyAsync for each run of adjacent pages (64 tokens) that hold an exact row."""

    _ids: Sequence[np.ndarray] = ()

    def _page_ids(self) -> Sequence[np.ndarray]:
        """Page ids of each sequence; a list of thousands is turned into an array once."""
        sequences = self.decode.sequences
        if [len(ids) for ids in self._ids] != [len(s.pages) for s in sequences]:
            self._ids = [np.asarray(s.pages, dtype=np.int32) for s in sequences]
        return self._ids

    def fetch(self) -> None:
        exact, size = self.exact, self.cache.config.page_size
        counts = exact.counts.cpu().numpy()
        tokens = exact.tokens[..., : max(1, int(counts.max()))].cpu().numpy()
        locations = np.zeros_like(tokens)
        rows, row = self.graded.windows.rows, self.first_row
        stream = torch.cuda.current_stream().cuda_stream if self.cache.on_gpu else 0
        for b, ids in enumerate(self._page_ids()):
            for h in range(counts.shape[1]):
                listed = tokens[b, h, : counts[b, h]]
                if len(listed) == 0:
                    continue
                number = listed // size
                first = np.flatnonzero(np.diff(number, prepend=-1))  # of each page: lists ascend
                pages = number[first]
                place = np.repeat(np.arange(len(pages)), np.diff(first, append=len(listed)))
                locations[b, h, : len(listed)] = row + place * size + listed % size
                out = rows[self.take(row, len(pages) * size)].view(1, len(pages), size, -1)
                self.cache.transfers.to_device(
                    self.graded.layer,
                    torch.from_numpy(ids[pages]),
                    out,
                    first_head=h,
                    stream=stream,
                )
                row += len(pages) * size
        self.locations[..., : tokens.shape[2]] = torch.from_numpy(locations).to(rows.device)


class CpuGather(HostFetchLayer):
    """The CPU's cores gather the rows into a pinned buffer, one copy brings them over."""

    _pinned: Tensor | None = None

    def fetch(self) -> None:
        exact, meta = self.exact, self.decode.meta
        counts = exact.counts.cpu()
        most, total = max(1, int(counts.max())), int(counts.sum())
        host = self.graded.tiers.host
        listed = torch.arange(most) < counts[..., None]
        keys = host_keys(exact.tokens[..., :most], meta).cpu().long()
        heads = torch.arange(host.shape[0])[None, :, None]
        flat = (keys + heads * host.shape[1] * host.shape[2])[listed]
        if self._pinned is None or self._pinned.shape[0] < total:
            self._pinned = torch.empty(
                2 * total, host.shape[3], dtype=host.dtype, pin_memory=self.cache.on_gpu
            )
        # Whole words: what the elements are does not matter to a copy.
        gathered = self._pinned[:total].view(torch.int64)
        torch.index_select(host.view(-1, host.shape[3]).view(torch.int64), 0, flat, out=gathered)
        rows = self.graded.windows.rows
        rows[self.take(self.first_row, total)].copy_(self._pinned[:total], non_blocking=True)
        start = self.first_row + exact.counts.flatten().cumsum(0).view_as(exact.counts)
        place = torch.arange(most, device=rows.device)
        self.locations[..., :most] = (start - exact.counts)[..., None] + place
        if self.cache.on_gpu:
            torch.cuda.current_stream().synchronize()  # the pinned rows are this layer's again


MakeLayer = Callable[[PolicyDecode, int, Inputs], HostFetchLayer]
