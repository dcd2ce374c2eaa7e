"""index_pages: codes and scales bitwise as the reference's, bounds true, values close."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.compare import compare
from twilight_engine.config import QUEST_BLOCK, KIndex, VIndex
from twilight_engine.kv.index import allocate_index, index_page_bytes
from twilight_engine.layout import IndexPages
from twilight_engine.ops.index_pages import index_pages
from twilight_engine.reference.index_pages import index_pages as index_pages_reference
from twilight_engine.reference.index_pages import quantise, round_down, round_up, unpack_codes

FORMATS: list[tuple[KIndex, VIndex]] = [
    ("int4_channel", "int4"),
    ("int4_channel", "none"),
    ("int4_token", "int4"),
    ("int4_token", "none"),
]
CPU = torch.device("cpu")


def tensors(index: IndexPages) -> dict[str, Tensor]:
    names = ("k_codes", "k_scale", "k_bounds", "v_codes", "v_scale")
    return {n: getattr(index, n) for n in names if getattr(index, n) is not None}


def assert_same(actual: IndexPages, expected: IndexPages) -> None:
    for name, tensor in tensors(expected).items():
        got, want = tensors(actual)[name].cpu(), tensor.cpu()
        if want.dtype == torch.float16:
            got, want = got.view(torch.int16), want.view(torch.int16)
        differ = (got != want).sum().item()
        assert differ == 0, f"{name}: {differ} of {want.numel()} differ"
    compare(actual.v_mean.float(), expected.v_mean.float(), step_dtype=torch.float16)


def biased_pages(m: int, size: int, heads: int, dim: int) -> tuple[Tensor, Tensor]:
    """Pages with the channels that break quantisers: a huge bias, constants, zeros, outliers."""
    k, v = torch.randn(2, m, size, heads, dim)
    k[..., 0] += 217.0
    k[..., 1] -= 217.0
    k[..., 2] = 0.5  # constant in float16
    k[..., 3] = 0.1  # constant, no float16
    k[..., 4] = 0.0
    k[..., 5] *= 1e-6
    k[..., 6] *= 1e-3
    k[:, 0, :, 7] = 90000.0  # beyond float16
    k[:, -1, :, 8] = -90000.0
    k[..., 9] = -0.0
    v[:, 0] = 0.25  # a constant token
    v[:, -1] *= 1000.0
    return k, v


def indexes(
    device: torch.device, num_pages: int, heads: int, size: int, dim: int, k: KIndex, v: VIndex
) -> tuple[IndexPages, IndexPages]:
    pair = [allocate_index(num_pages, heads, size, dim, k, v, device) for _ in range(2)]
    return pair[0], pair[1]


@pytest.mark.parametrize(("k_index", "v_index"), FORMATS)
@pytest.mark.parametrize("page_size", [1, 16, 61, 64])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_index_pages(
    device: torch.device, dim: int, page_size: int, k_index: KIndex, v_index: VIndex
) -> None:
    k, v = (x.to(device) for x in biased_pages(4, page_size, 3, dim))
    page_ids = torch.tensor([5, -1, 0, 3], dtype=torch.int32, device=device)
    gpu = [torch.float16, torch.bfloat16] if device.type == "cuda" else []
    for dtype in [torch.float32, *gpu]:
        x, y = k.to(dtype), v.to(dtype)
        actual, expected = indexes(device, 6, 3, page_size, dim, k_index, v_index)
        index_pages(x, y, page_ids, actual)
        index_pages_reference(x, y, page_ids, expected)
        assert_same(actual, expected)


@pytest.mark.parametrize(("k_index", "v_index"), FORMATS)
def test_strided_staging(device: torch.device, k_index: KIndex, v_index: VIndex) -> None:
    """Pages cut out of one [L, Hkv, 2D + pad] staging buffer, K and V interleaved."""
    staging = torch.randn(3 * 16 + 5, 2, 2 * 80 + 3, device=device)
    rows = staging[5:].unflatten(0, (3, 16))
    k, v = rows[..., :80], rows[..., 80:160]
    page_ids = torch.arange(3, dtype=torch.int32, device=device)
    actual, expected = indexes(device, 3, 2, 16, 80, k_index, v_index)
    index_pages(k, v, page_ids, actual)
    index_pages_reference(k, v, page_ids, expected)
    assert_same(actual, expected)


def test_no_pages(device: torch.device) -> None:
    actual, expected = indexes(device, 2, 2, 16, 64, "int4_channel", "int4")
    empty = torch.empty(0, 16, 2, 64, device=device)
    index_pages(empty, empty, torch.empty(0, dtype=torch.int32, device=device), actual)
    assert_same(actual, expected)


@pytest.mark.parametrize("k_index", ["int4_channel", "int4_token"])
def test_codes_reconstruct_within_half_a_step(k_index: KIndex) -> None:
    k, v = torch.randn(2, 3, 32, 2, 64) * 3
    k[..., 0] += 217
    index = allocate_index(3, 2, 32, 64, k_index, "int4", CPU)
    index_pages(k, v, torch.arange(3, dtype=torch.int32), index)
    assert index.v_codes is not None and index.v_scale is not None
    if k_index == "int4_channel":
        scale, minimum = index.k_scale.float()[:, :, None].unbind(3)
    else:
        scale, minimum = index.k_scale.float()[..., None].unbind(3)
    for x, codes, step, low in (
        (k, index.k_codes, scale, minimum),
        (v, index.v_codes, *index.v_scale.float()[..., None].unbind(3)),
    ):
        error = (low + step * unpack_codes(codes) - x.transpose(1, 2)).abs()
        assert (error <= 0.5 * step * (1 + 1e-5) + 1e-4).all()
    mean = v.mean(1)
    assert torch.allclose(index.v_mean.float(), mean, atol=1e-3)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-65504, 65504, width=32), min_size=1, max_size=9))
def test_grid_covers_its_values(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    scale, minimum = (t.double() for t in quantise(x.min()[None], x.max()[None]))
    assert minimum <= x.min().double()
    assert minimum + 15 * scale >= x.max().double()
    if x.min() == x.max() == x.min().half():
        assert scale == 0


@settings(max_examples=300, deadline=None)
@given(st.floats(width=32, allow_nan=False))
def test_float16_rounding(value: float) -> None:
    x = torch.tensor([value], dtype=torch.float32)
    down, up = round_down(x), round_up(x)
    inside = x.clamp(-65504, 65504).double()
    assert down.double() <= inside <= up.double()
    spacing = torch.nextafter(down, torch.full_like(down, torch.inf))
    assert down == up or spacing == up
    assert torch.isfinite(down).all() and torch.isfinite(up).all()


def test_page_bytes_are_what_is_allocated() -> None:
    for k_index, v_index in FORMATS:
        for size, dim in ((64, 128), (61, 80)):
            index = allocate_index(3, 2, size, dim, k_index, v_index, CPU)
            parts = [*tensors(index).values(), index.v_mean]
            total = sum(t.numel() * t.element_size() for t in parts)
            assert total == 3 * index_page_bytes(2, size, dim, k_index, v_index)
    assert index_page_bytes(1, 64, 128, "int4_channel", "int4") == 64 * 144
    assert index_page_bytes(1, 64, 128, "int4_channel", "none") == 64 * 76
    assert QUEST_BLOCK == 16


def test_messages() -> None:
    index = allocate_index(2, 2, 16, 64, "int4_channel", "int4", CPU)
    k = torch.zeros(1, 16, 2, 64)
    ids = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"k has shape \[1, 15, 2, 64\]"):
        index_pages(k[:, :15], k[:, :15], ids, index)
    with pytest.raises(ValueError, match=r"page_ids has dtype torch.int64"):
        index_pages(k, k, ids.long(), index)
    with pytest.raises(ValueError, match=r"v has dtype torch.float16"):
        index_pages(k, k.half(), ids, index)
    with pytest.raises(ValueError, match=r"k has stride 2 over D"):
        index_pages(torch.zeros(1, 16, 2, 128)[..., ::2], k, ids, index)
    with pytest.raises(NotImplementedError, match=r"supported on a CPU: torch.float32"):
        index_pages(k.half(), k.half(), ids, index)
    with pytest.raises(ValueError, match=r"head_dim is 63"):
        allocate_index(2, 2, 16, 63, "int4_channel", "int4", CPU)
