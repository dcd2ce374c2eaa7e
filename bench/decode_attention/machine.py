"""The rates of this machine, measured in the run, and what makes caches cold."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from harness import L2_FLUSH_BYTES
from torch import Tensor

from decode_attention.timing import time_work
from twilight_engine.kv.host import HostArena
from twilight_engine.layout import FetchLists
from twilight_engine.ops.gather_rows import gather_rows

GRANULE_BYTES = 64 << 10  # of the GPU's translations of host addresses
FAR_BYTES = 4 << 30  # several times the host memory whose translations the GPU keeps (about 1 GB)
LINK_BYTES, READ_BYTES = 256 << 20, 4 << 30
FAR_ROW_ELEMENTS = 256  # bfloat16 [K|V] of head_dim 128
REPEATS = 7


@dataclass(frozen=True)
class Rates:
    """Measured rates: 1e9 bytes a second, and 64 KB translations of host addresses a second."""

    hbm_gbps: float
    link_gbps: float
    granules_per_s: float

    def hbm_us(self, num_bytes: float) -> float:
        return num_bytes / self.hbm_gbps / 1e3

    def link_us(self, num_bytes: float, granules: float) -> float:
        """The slower of moving the bytes and translating the addresses."""
        return max(num_bytes / self.link_gbps / 1e3, granules / self.granules_per_s * 1e6)


def hbm_gbps(device: torch.device, num_bytes: int) -> float:
    """The best rate at which torch reads memory: a sum, a maximum, a product with a vector."""
    x = torch.zeros(num_bytes // 4, device=device)
    matrix = x.view(-1, 1 << 10)
    ones = torch.ones(1 << 10, device=device)
    reads = (lambda: x.sum(), lambda: x.amax(), lambda: matrix @ ones)
    best = min(min(time_work(device, read, repeats=REPEATS)) for read in reads)
    return num_bytes / best / 1e3


class Machine:
    """The device, its rates, and far host memory whose reading evicts every translation.

    Args:
        small: sizes for a check on a CPU, where the numbers mean nothing.
    """

    def __init__(self, device: torch.device, *, small: bool) -> None:
        self.device, self.small = device, small
        scale = 1 << 12 if small else 1
        self._flush = torch.empty(L2_FLUSH_BYTES // scale, dtype=torch.uint8, device=device)
        self._far = HostArena(
            num_layers=1,
            num_kv_heads=1,
            num_pages=FAR_BYTES // scale // (64 * 2 * FAR_ROW_ELEMENTS),
            page_size=64,
            head_dim=FAR_ROW_ELEMENTS // 2,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            device=device,
        )
        self._far.ensure_pages(self._far.num_pages)
        row_bytes = FAR_ROW_ELEMENTS * self._far.dtype.itemsize
        rows_each = max(1, GRANULE_BYTES // row_bytes)
        total = self._far.num_pages * self._far.page_size
        src = torch.arange(0, total, rows_each, dtype=torch.int32, device=device)[None, None]
        dst = torch.arange(src.numel(), dtype=torch.int32, device=device).view_as(src)
        counts = torch.full((1, 1), src.numel(), dtype=torch.int32, device=device)
        self._lists = FetchLists(src, dst, counts, torch.zeros_like(counts))
        self._rows = torch.empty(
            src.numel(), FAR_ROW_ELEMENTS, dtype=self._far.dtype, device=device
        )
        self.rates = self._measure(scale)

    def forget_translations(self) -> None:
        """Read a row of every granule of far host memory: no other translation stays."""
        gather_rows(self._far.layer(0), self._lists, self._rows)

    def cool(self) -> None:
        """Make the L2 and the translations cold; keeps the stream busy for a launch or two."""
        self.forget_translations()
        self._flush.add_(1)

    def flush_l2(self) -> None:
        """Make the L2 cold, but not the translations."""
        self._flush.add_(1)

    def close(self) -> None:
        self._far.close()

    def _measure(self, scale: int) -> Rates:
        far = statistics.median(
            time_work(self.device, self.forget_translations, repeats=REPEATS, before=self.flush_l2)
        )
        return Rates(
            hbm_gbps(self.device, READ_BYTES // scale),
            self._link_gbps(LINK_BYTES // scale),
            self._lists.src.numel() / far * 1e6,
        )

    def _link_gbps(self, num_bytes: int) -> float:
        """cudaMemcpyAsync from pinned memory (on a CPU: a copy)."""
        pinned = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        target = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        copy = time_work(
            self.device, lambda: target.copy_(pinned, non_blocking=True), repeats=REPEATS
        )
        return num_bytes / statistics.median(copy) / 1e3


def granules_of(src: Tensor, counts: Tensor, row_bytes: int, head_stride_bytes: int) -> int:
    """Distinct 64 KB of host memory that one layer's fetch lists [B, Hkv, C] touch."""
    capacity = src.shape[2]
    listed = torch.arange(capacity, device=src.device) < counts[..., None]
    heads = torch.arange(src.shape[1], device=src.device)[None, :, None]
    granule = (src.long() * row_bytes + heads * head_stride_bytes) // GRANULE_BYTES
    return int(granule[listed & (src >= 0)].unique().numel())
