"""Exceptions of the KV tiers that callers catch. The compiled engine raises them too."""

from __future__ import annotations


class HostMemoryError(MemoryError):
    """Host RAM for the KV arena cannot be had or pinned; the message says what to change."""


class OutOfPages(RuntimeError):
    """The page pool has too few free pages.

    Args:
        message: what a user reads.
        wanted: pages asked for.
        free: pages free at that moment; pages whose copies have not ended are not counted.
    """

    def __init__(self, message: str, wanted: int, free: int) -> None:
        super().__init__(message)
        self.wanted = wanted
        self.free = free
