"""Transfers between the arena and packed device buffers: bitwise, counted, checked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from twilight_engine.kv.host import HostArena
from twilight_engine.kv.transfers import Transfers

LAYERS, HEADS, PAGES, PAGE_SIZE, HEAD_DIM = 2, 3, 600, 16, 64
ROW = (PAGE_SIZE, 2 * HEAD_DIM)


@pytest.fixture
def arena(device: torch.device) -> Iterator[HostArena]:
    with HostArena(
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        num_pages=PAGES,
        page_size=PAGE_SIZE,
        head_dim=HEAD_DIM,
        dtype=torch.bfloat16,
        device=device,
    ) as arena:
        arena.ensure_pages(1)
        arena.ensure_pages(PAGES)  # in two steps, so that a run can cross a registration
        yield arena


def finish(device: torch.device) -> int:
    """The stream to copy on."""
    return torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0


@pytest.mark.parametrize(
    "pages", [[5], list(range(PAGES)), [9, 8, 7], [3, 4, 5, 90, 91, 2, 599], []], ids=len
)
def test_there_and_back(arena: HostArena, device: torch.device, pages: list[int]) -> None:
    for layer in range(LAYERS):
        arena.layer(layer)[:, :PAGES] = torch.randn(HEADS, PAGES, *ROW).bfloat16()
    before = [arena.layer(layer).clone() for layer in range(LAYERS)]
    ids = torch.tensor(pages, dtype=torch.int32)
    transfers = Transfers(arena)

    out = torch.zeros(HEADS, len(pages), *ROW, dtype=torch.bfloat16, device=device)
    transfers.to_device(1, ids, out, stream=finish(device))
    assert torch.equal(out.cpu(), before[1][:, ids.long()])

    new = torch.randn(2, len(pages), *ROW, device=device).bfloat16()
    transfers.to_host(0, ids, new, first_head=1, stream=finish(device))
    if device.type == "cuda":
        torch.cuda.synchronize()
    expected = before[0].clone()
    expected[1:, ids.long()] = new.cpu()
    assert torch.equal(arena.layer(0), expected) and torch.equal(arena.layer(1), before[1])

    page_bytes = arena.page_bytes
    totals = transfers.totals(to_host=False), transfers.totals(to_host=True)
    assert [t.bytes for t in totals] == [n * len(pages) * page_bytes for n in (HEADS, 2)]
    assert all(t.timed_bytes == t.bytes for t in totals)
    assert all((t.busy_seconds > 0) == (t.gbps > 0) == bool(pages) for t in totals)
    runs = sum(1 for i, page in enumerate(pages) if i == 0 or page != pages[i - 1] + 1)
    assert runs * HEADS <= totals[0].copies <= (runs + 1) * HEADS


@pytest.mark.gpu
def test_more_copies_in_flight_than_events() -> None:
    with HostArena(
        num_layers=1,
        num_kv_heads=1,
        num_pages=64,
        page_size=64,
        head_dim=128,
        dtype=torch.bfloat16,
        device="cuda",
    ) as arena:
        arena.ensure_pages(64)
        transfers = Transfers(arena)
        out = torch.empty(1, 64, 64, 256, dtype=torch.bfloat16, device="cuda")
        for _ in range(1000):
            transfers.to_device(0, torch.arange(64, dtype=torch.int32), out)
        torch.cuda.synchronize()
        totals = transfers.totals(to_host=False)
        assert totals.bytes == 1000 * out.nbytes >= totals.timed_bytes > 0


def buffer(*shape: int, dtype: torch.dtype = torch.bfloat16, device: Any = "cpu") -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    "layer, pages, shape, first_head, message",
    [
        (2, [0], (3, 1, *ROW), 0, "layer is 2; it must lie in [0, 2)"),
        (0, [0], (3, 1, *ROW), 1, "heads are [1, 4); they must lie in [0, 3)"),
        (0, [-1], (3, 1, *ROW), 0, "page -1 is not one of the arena's"),
        (0, [1 << 20], (3, 1, *ROW), 0, "page 1048576 is not one of the arena's"),
        (0, [0], (3, 2, *ROW), 0, "has shape [3, 2, 16, 128]; it must be [heads, 1, 16, 128]"),
    ],
)
def test_what_does_not_fit_is_named(
    arena: HostArena,
    device: torch.device,
    layer: int,
    pages: list[int],
    shape: tuple[int, ...],
    first_head: int,
    message: str,
) -> None:
    ids = torch.tensor(pages, dtype=torch.int32)
    with pytest.raises(ValueError, match=re.escape(message)):
        Transfers(arena).to_device(layer, ids, buffer(*shape, device=device), first_head=first_head)


def test_wrong_tensors_are_named(arena: HostArena, device: torch.device) -> None:
    transfers = Transfers(arena)
    ids = torch.zeros(1, dtype=torch.int32)
    good = buffer(1, 1, *ROW, device=device)
    with pytest.raises(ValueError, match=r"it must be int32 \[n\] on the CPU"):
        transfers.to_device(0, ids.long(), good)
    with pytest.raises(ValueError, match=r"it must be torch.bfloat16 and contiguous"):
        transfers.to_device(0, ids, good.float())
    with pytest.raises(ValueError, match="the device buffer is on meta; the arena is for"):
        transfers.to_device(0, ids, good.to("meta"))


def test_a_closed_arena_has_no_pages(arena: HostArena, device: torch.device) -> None:
    transfers = Transfers(arena)
    arena.close()
    with pytest.raises(ValueError, match="page 0 is not one of the arena's 0 usable pages"):
        transfers.to_device(0, torch.zeros(1, dtype=torch.int32), buffer(3, 1, *ROW, device=device))
