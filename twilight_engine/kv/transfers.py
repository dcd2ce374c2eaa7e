"""Copies of host pages to and from the device by the copy engines, counted and timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twilight_engine import _C
from twilight_engine.kv.host import HostArena


@dataclass(frozen=True)
class TransferTotals:
    """What one direction has moved. Busy time counts copies that have ended and were timed."""

    copies: int
    bytes: int
    timed_bytes: int
    busy_seconds: float

    @property
    def gbps(self) -> float:
        """1e9 bytes a second while busy; 0 before the first copy has ended."""
        return self.timed_bytes / self.busy_seconds / 1e9 if self.busy_seconds > 0 else 0.0


class Transfers:
    """Whole-page copies between a host arena and packed device buffers.

    Contiguous runs of pages become one copy each; nothing is allocated, so a layer can be
    streamed in a decode step. Copies under way must end before the arena closes.
    """

    def __init__(self, arena: HostArena) -> None:
        self.arena = arena
        self.engine = _C.Transfers(arena=arena.arena)

    def to_device(
        self, layer: int, pages: Tensor, out: Tensor, *, first_head: int = 0, stream: int = 0
    ) -> None:
        """out[h, i] = pages[i] of (layer, first_head + h), asynchronously on `stream`.

        Args:
            pages: [n] int32, CPU: page ids; may be reused as soon as this returns.
            out: [heads, n, S, 2 * D] of the arena's dtype, contiguous; the caller keeps it alive
                until the copies have ended (record_stream).
            stream: a cudaStream_t as an integer. On the CPU the copy is done on return.
        Raises: ValueError for shapes, dtypes, heads or pages that do not fit.
        """
        self._copy(False, layer, pages, out, first_head, stream)

    def to_host(
        self, layer: int, pages: Tensor, source: Tensor, *, first_head: int = 0, stream: int = 0
    ) -> None:
        """The way back: pages[i] of (layer, first_head + h) = source[h, i]; as `to_device`."""
        self._copy(True, layer, pages, source, first_head, stream)

    def totals(self, *, to_host: bool) -> TransferTotals:
        """Bytes and busy time of one direction so far."""
        return TransferTotals(*self.engine.totals(to_host=to_host))

    def _copy(
        self, to_host: bool, layer: int, pages: Tensor, device: Tensor, first_head: int, stream: int
    ) -> None:
        arena = self.arena
        if pages.dtype != torch.int32 or pages.is_cuda or pages.dim() != 1:
            raise ValueError(
                f"pages is {pages.dtype} {list(pages.shape)} on {pages.device}; "
                "it must be int32 [n] on the CPU"
            )
        tail = (pages.shape[0], arena.page_size, 2 * arena.head_dim)
        if device.dim() != 4 or tuple(device.shape[1:]) != tail:
            raise ValueError(
                f"the device buffer has shape {list(device.shape)}; "
                f"it must be [heads, {', '.join(map(str, tail))}]"
            )
        if device.dtype != arena.dtype or not device.is_contiguous():
            raise ValueError(
                f"the device buffer is {device.dtype}, contiguous: {device.is_contiguous()}; "
                f"it must be {arena.dtype} and contiguous"
            )
        if device.device != arena.device:
            raise ValueError(
                f"the device buffer is on {device.device}; the arena is for {arena.device}"
            )
        pages = pages.contiguous()
        self.engine.copy(
            to_host=to_host,
            layer=layer,
            head_begin=first_head,
            head_end=first_head + device.shape[0],
            pages=pages.data_ptr(),
            num_pages=pages.shape[0],
            device=device.data_ptr(),
            device_bytes=device.numel() * device.element_size(),
            stream=stream,
        )
