"""Page ids with reference counts: who holds which block of tokens, and when it may be reused."""

from __future__ import annotations

from collections.abc import Sequence

from twilight_engine import _C


class PagePool:
    """Hands out page ids; a page is one block of tokens across all layers and heads.

    A page without references is reused only after the epochs of its releases are complete, so
    that no copy or kernel still touches it. An epoch is a number the caller counts up, one a step.
    Thread safe; a call that raises has changed nothing.

    Args:
        num_pages: ids are 0 .. num_pages - 1.
    """

    def __init__(self, num_pages: int) -> None:
        self.pool = _C.PagePool(num_pages=num_pages)

    def allocate(self, n: int, *, exact: bool = True, after: int = -1) -> list[int]:
        """Take n pages, one reference each, ascending and contiguous where that is possible.

        Args:
            exact: exact prefill will fill them (else sparse decode, whose rows are approximate).
            after: a page they should follow directly if they can, or -1.
        Raises: OutOfPages, with `wanted` and `free`.
        """
        return self.pool.allocate(n=n, exact=exact, after=after)

    def share(self, pages: Sequence[int]) -> None:
        """Add a reference to each page. Raises: ValueError for a page nobody holds."""
        self.pool.share(pages=pages)

    def release(self, pages: Sequence[int], *, epoch: int = -1) -> None:
        """Drop a reference of each page; the last one makes it pending until `epoch` completes.

        Raises: ValueError for a page nobody holds.
        """
        self.pool.release(pages=pages, epoch=epoch)

    def complete(self, epoch: int) -> None:
        """Declare this epoch and all before it done: their pages are free again."""
        self.pool.complete(epoch=epoch)

    def mark_sparse(self, pages: Sequence[int]) -> None:
        """Note that sparse decode wrote rows of these pages: they are no prefix to share."""
        self.pool.mark_sparse(pages=pages)

    def references(self, page: int) -> int:
        """How many hold the page."""
        return self.pool.references(page=page)

    def is_exact(self, page: int) -> bool:
        """Whether somebody holds the page and exact prefill filled it."""
        return self.pool.is_exact(page=page)

    @property
    def num_pages(self) -> int:
        return self.pool.num_pages

    @property
    def num_free(self) -> int:
        return self.pool.num_free

    @property
    def num_pending(self) -> int:
        """Pages nobody holds whose epochs are not complete."""
        return self.pool.num_pending
