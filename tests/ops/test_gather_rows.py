"""gather_rows copies exactly the rows listed, bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.hot_cases import to_device
from twilight_engine.layout import NO_ROW, NUM_COUNTERS, FetchLists
from twilight_engine.ops.gather_rows import MAX_SEGMENTS, gather_rows
from twilight_engine.reference import gather_rows as reference


def host_rows(hkv: int, pages: int, page_size: int, width: int, dtype: torch.dtype) -> Tensor:
    """Random bits in host memory, pinned where there is a device; heads lie apart."""
    apart = torch.empty(
        hkv, pages + 2, page_size, width, dtype=dtype, pin_memory=torch.cuda.is_available()
    )
    apart.view(torch.uint8).random_(0, 256)
    return apart[:, :pages]


def random_fetch(b: int, hkv: int, most: int, num_keys: int, num_rows: int) -> FetchLists:
    """Ascending keys, distinct targets, rubbish past the counts, and some entries to skip."""
    fetch = FetchLists.empty(b, hkv, most, torch.device("cpu"))
    fetch.src.fill_(1 << 30)
    fetch.dst.fill_(1 << 30)
    targets = torch.randperm(num_rows).int()
    for i in range(b):
        for h in range(hkv):
            count = int(torch.randint(0, most + 1, ()))
            fetch.src[i, h, :count] = torch.randint(0, num_keys, (count,)).sort().values.int()
            fetch.dst[i, h, :count], targets = targets[:count], targets[count:]
            fetch.counts[i, h] = count
            if count > 4:
                fetch.dst[i, h, 2] = NO_ROW
                fetch.src[i, h, 3] = NO_ROW
    return fetch


def bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().view(torch.uint8)  # nan patterns compare too


def check_gather(
    device: torch.device, host_kv: Tensor, fetch: FetchLists, num_rows: int, **options: object
) -> None:
    start = torch.zeros(num_rows, host_kv.shape[3], dtype=host_kv.dtype)
    start.view(torch.uint8).random_(0, 256)
    want, want_counters = start.clone(), torch.zeros(NUM_COUNTERS, dtype=torch.int64)
    reference.gather_rows(host_kv, fetch, want, counters=want_counters)
    rows, counters = start.to(device), want_counters.to(device).zero_()
    gather_rows(host_kv, to_device(fetch, device), rows, counters=counters, **options)  # type: ignore[arg-type]
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(bits(rows), bits(want))
    assert torch.equal(counters.cpu(), want_counters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("b", "hkv", "page_size"), [(1, 8, 64), (3, 1, 16), (17, 3, 61)])
def test_matches_reference(
    device: torch.device, dtype: torch.dtype, head_dim: int, b: int, hkv: int, page_size: int
) -> None:
    host_kv = host_rows(hkv, 9, page_size, 2 * head_dim, dtype)
    fetch = random_fetch(b, hkv, 23, 9 * page_size, 2000)
    check_gather(device, host_kv, fetch, 2000)


@pytest.mark.parametrize("num_blocks", [1, 3, 64])
@pytest.mark.parametrize("most", [1, 700])
def test_any_number_of_blocks(device: torch.device, num_blocks: int, most: int) -> None:
    host_kv = host_rows(2, 30, 64, 128, torch.float32)
    fetch = random_fetch(2, 2, most, 30 * 64, 3000)
    check_gather(device, host_kv, fetch, 3000, num_blocks=num_blocks)


def test_many_segments_most_of_them_empty(device: torch.device) -> None:
    host_kv = host_rows(8, 4, 16, 32, torch.float32)
    fetch = random_fetch(150, 8, 2, 64, 3000)
    fetch.counts[1:149] = 0
    check_gather(device, host_kv, fetch, 3000)


def test_whole_pages_and_nothing(device: torch.device) -> None:
    host_kv = host_rows(1, 6, 16, 128, torch.bfloat16)
    fetch = FetchLists.empty(1, 1, 32, torch.device("cpu"))
    check_gather(device, host_kv, fetch, 64)
    fetch.src[0, 0] = torch.cat([torch.arange(16, 32), torch.arange(64, 80)]).int()
    fetch.dst[0, 0] = torch.arange(10, 42).int()
    fetch.counts[0, 0] = 32
    check_gather(device, host_kv, fetch, 64)


@pytest.mark.gpu
def test_runs_on_the_current_stream() -> None:
    host_kv = host_rows(2, 30, 64, 128, torch.float32)
    with torch.cuda.stream(torch.cuda.Stream()):
        check_gather(torch.device("cuda"), host_kv, random_fetch(2, 2, 200, 30 * 64, 3000), 3000)


def test_bad_arguments_are_named(device: torch.device) -> None:
    host_kv = host_rows(2, 3, 16, 128, torch.float32)
    fetch = FetchLists.empty(1, 2, 4, device)
    rows = torch.zeros(8, 128, device=device)
    with pytest.raises(ValueError, match=r"rows has dtype torch\.float64"):
        gather_rows(host_kv, fetch, rows.double())
    with pytest.raises(ValueError, match=r"rows has shape \[8, 64\]; it must be \[any, 128\]"):
        gather_rows(host_kv, fetch, rows[:, :64].contiguous())
    with pytest.raises(ValueError, match=r"host_kv\[0\] has strides"):
        gather_rows(host_kv[..., :64], fetch, rows[:, :64].contiguous())
    with pytest.raises(ValueError, match="num_blocks is 0"):
        gather_rows(host_kv, fetch, rows, num_blocks=0)
    with pytest.raises(ValueError, match="24 bytes each; they must be a multiple of 16"):
        gather_rows(host_kv[..., :6].contiguous(), fetch, rows[:, :6].contiguous())
    many = FetchLists.empty(MAX_SEGMENTS, 2, 1, device)
    with pytest.raises(ValueError, match=f"{2 * MAX_SEGMENTS} segments"):
        gather_rows(host_kv, many, rows)


@pytest.mark.gpu
def test_device_memory_is_refused() -> None:
    fetch = FetchLists.empty(1, 2, 4, torch.device("cuda"))
    rows = torch.zeros(8, 128, device="cuda")
    with pytest.raises(ValueError, match="host_kv is on cuda:0; it must be in host memory"):
        gather_rows(torch.zeros(2, 3, 16, 128, device="cuda"), fetch, rows)
