"""The host arena: views, growth, layout, limits, closing."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from twilight_engine import _C
from twilight_engine.kv import HostMemoryError
from twilight_engine.kv.host import HostArena

MIB = 1 << 20


def make(device: torch.device | str = "cpu", **changes: Any) -> HostArena:
    shape: dict[str, Any] = {
        "num_layers": 3,
        "num_kv_heads": 2,
        "num_pages": 40,
        "page_size": 16,
        "head_dim": 64,
        "dtype": torch.float32,
    }
    return HostArena(**{**shape, **changes}, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("page_size, head_dim", [(16, 64), (61, 80), (64, 128), (1, 64)])
def test_views_share_memory_and_do_not_overlap(
    device: torch.device, dtype: torch.dtype, page_size: int, head_dim: int
) -> None:
    with make(device, dtype=dtype, page_size=page_size, head_dim=head_dim) as arena:
        arena.ensure_pages(40)
        assert arena.strip_pages >= arena.grown_pages >= 40
        for layer in range(3):
            rows = arena.layer(layer)
            assert rows.shape == (2, arena.strip_pages, page_size, 2 * head_dim)
            assert rows.dtype == dtype and rows.is_contiguous() and rows.device.type == "cpu"
            for head in range(2):
                rows[head, :40] = layer * 2 + head + 1
                page = arena.arena.offset(layer=layer, kv_head=head, page=7)
                assert rows[head, 7].data_ptr() - arena.layer(0).data_ptr() == page
        for layer in range(3):
            again = arena.layer(layer)
            for head in range(2):
                assert (again[head, :40] == layer * 2 + head + 1).all()


def test_memory_comes_in_extents_and_keeps_what_was_written(device: torch.device) -> None:
    with make(device, num_pages=4000) as arena:
        assert arena.grown_pages == arena.touched_bytes == arena.registered_bytes == 0
        arena.ensure_pages(1)
        first = arena.grown_pages
        assert first == arena.extent_pages < 4000
        assert first * arena.page_bytes % (64 << 10) == 0
        assert arena.touched_bytes == 6 * first * arena.page_bytes
        arena.layer(1)[1, first - 1] = 5
        arena.ensure_pages(first)  # already there
        assert arena.grown_pages == first
        arena.ensure_pages(first + 1)
        assert arena.grown_pages == 2 * first
        assert (arena.layer(1)[1, first - 1] == 5).all()
        assert (arena.layer(1)[1, first] == 0).all()
        arena.ensure_pages(4000)
        assert 4000 <= arena.grown_pages <= arena.strip_pages
        pinned = arena.touched_bytes if device.type == "cuda" else 0
        assert arena.registered_bytes == pinned


def test_large_strips_hold_whole_huge_pages() -> None:
    with make(num_pages=100_000, page_size=64, head_dim=128, dtype=torch.bfloat16) as arena:
        assert arena.strip_pages * arena.page_bytes % (2 * MIB) == 0
        assert arena.extent_pages * arena.page_bytes == 4 * MIB
        assert arena.strip_pages < 100_000 * 1.07
        assert arena.touched_bytes == 0


def test_close_gives_everything_back_and_views_stay_harmless(device: torch.device) -> None:
    arena = make(device)
    arena.ensure_pages(3)
    view = arena.layer(0)
    view.fill_(1)
    arena.close()
    arena.close()
    assert arena.closed
    assert arena.registered_bytes == arena.touched_bytes == arena.grown_pages == 0
    with pytest.raises(RuntimeError, match="HostArena is closed"):
        arena.layer(0)
    with pytest.raises(RuntimeError, match="HostArena is closed"):
        arena.ensure_pages(1)
    del arena
    assert (view == 0).all()  # address space stays with the view


def test_a_forked_child_closes_only_its_own() -> None:
    arena = make()
    arena.ensure_pages(3)
    arena.layer(0).fill_(7)
    child = os.fork()
    if child == 0:
        arena.close()
        os._exit(0 if arena.closed else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert not arena.closed and (arena.layer(0) == 7).all()
    arena.close()


def test_more_than_host_ram_is_refused_before_it_is_taken() -> None:
    there = _C.host_limits()["mem_available_bytes"]
    page = 64 * 2 * 128 * 2
    pages = 2 * there // (6 * page)
    with make(num_pages=pages, page_size=64, head_dim=128, dtype=torch.bfloat16) as arena:
        with pytest.raises(HostMemoryError) as caught:
            arena.ensure_pages(pages)
        text = str(caught.value)
        for part in ("host RAM", "GiB more", "from 0 to", "usable", "MemAvailable", "host_bytes"):
            assert part in text
        assert arena.grown_pages == arena.touched_bytes == 0
        arena.ensure_pages(1)  # the arena is as it was


def test_address_space_beyond_reason_is_a_host_memory_error() -> None:
    with pytest.raises(HostMemoryError, match=r"host RAM: .*address space"):
        make(num_pages=1 << 31, page_size=64, head_dim=256)


@pytest.mark.parametrize("name", ["num_layers", "num_kv_heads", "num_pages", "page_size"])
def test_sizes_below_one_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; it must be >= 1"):
        make(**{name: 0})


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"device is meta; allowed: cpu, cuda"):
        make("meta")
    with make() as arena:
        with pytest.raises(ValueError, match=r"layer is 3; it must lie in \[0, 3\)"):
            arena.layer(3)
        with pytest.raises(ValueError, match="num_pages is 41; the arena has room for 40"):
            arena.ensure_pages(41)


@pytest.mark.gpu
def test_a_kernel_reads_and_writes_through_the_view() -> None:
    with make("cuda") as arena:
        arena.ensure_pages(40)
        rows = arena.layer(2)[:, :40]
        rows.copy_(torch.randn(rows.shape))
        device_rows = rows.to("cuda", non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(device_rows.cpu(), rows)
        assert arena.arena.num_registrations >= 1
