"""The host tier: every K,V row at full precision, in one pinned mapping of host memory."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor

from twilight_engine import _C


class HostArena:
    """Host memory [layer][kv_head][page][token][K|V], reserved at once and grown in extents.

    Address space for all of `num_pages` is reserved at the start; memory comes with
    `ensure_pages`, off the decode path: it is touched in parallel and, for a CUDA device,
    registered and mapped, so that kernels use the views' `data_ptr` directly. Pages beyond
    `grown_pages` must not be read or written.

    Args:
        num_layers, num_kv_heads, num_pages, page_size, head_dim: the shape; num_pages is the
            most that will ever be asked for.
        dtype: of the rows.
        device: a CUDA device to register the memory for, or the CPU.
    Raises: ValueError for sizes below 1; HostMemoryError where there is no such address space.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        num_pages: int,
        page_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, size in (("page_size", page_size), ("head_dim", head_dim)):
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be >= 1")
        self.num_layers, self.num_kv_heads, self.num_pages = num_layers, num_kv_heads, num_pages
        self.page_size, self.head_dim, self.dtype = page_size, head_dim, dtype
        self.page_bytes = page_size * 2 * head_dim * dtype.itemsize
        ordinal = device_index(torch.device(device))
        self.device = torch.device("cpu") if ordinal < 0 else torch.device("cuda", ordinal)
        self.arena = _C.HostArena(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            num_pages=num_pages,
            page_bytes=self.page_bytes,
            device=ordinal,
        )

    def layer(self, layer: int) -> Tensor:
        """One layer's rows, [Hkv, P, S, 2 * D], contiguous, without a copy.

        P is `strip_pages` >= num_pages. A view that outlives `close` reads zeros and must not
        reach a kernel any more; it keeps address space, not memory.

        Raises: ValueError for a layer that does not exist; RuntimeError after `close`.
        """
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer is {layer}; it must lie in [0, {self.num_layers})")
        shape = (self.num_kv_heads, self.strip_pages, self.page_size, 2 * self.head_dim)
        rows: Tensor = torch.frombuffer(
            self.arena.memory(),
            dtype=self.dtype,
            count=shape[0] * shape[1] * shape[2] * shape[3],
            offset=self.arena.offset(layer=layer, kv_head=0, page=0),
        )
        return rows.view(shape)

    def ensure_pages(self, num_pages: int) -> None:
        """Make pages [0, num_pages) of every layer and head usable; a whole extent at a time.

        Blocks for the time that touching and pinning take. On an error nothing has changed.

        Raises: ValueError beyond the capacity; HostMemoryError when host RAM does not suffice;
        RuntimeError after `close`.
        """
        self.arena.ensure_pages(num_pages)

    @property
    def strip_pages(self) -> int:
        """Pages a (layer, head) strip has address space for: num_pages, rounded up."""
        return self.arena.strip_pages

    @property
    def extent_pages(self) -> int:
        """Pages the arena grows by."""
        return self.arena.extent_pages

    @property
    def grown_pages(self) -> int:
        """Pages that can be used now."""
        return self.arena.grown_pages

    @property
    def touched_bytes(self) -> int:
        """Host memory in use."""
        return self.arena.touched_bytes

    @property
    def registered_bytes(self) -> int:
        """Host memory pinned for the GPU; 0 on the CPU and after `close`."""
        return self.arena.registered_bytes

    @property
    def closed(self) -> bool:
        return self.arena.closed

    def close(self) -> None:
        """Wait for the device, unpin and give all memory back. Idempotent."""
        self.arena.close()

    def __enter__(self) -> HostArena:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def device_index(device: torch.device) -> int:
    """The CUDA ordinal the engine takes; -1 for the CPU."""
    if device.type == "cpu":
        return -1
    if device.type != "cuda":
        raise ValueError(f"device is {device}; allowed: cpu, cuda")
    return torch.cuda.current_device() if device.index is None else device.index
