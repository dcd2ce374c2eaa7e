"""lsh_codes: the reference's bits wherever a projection is not zero but for rounding."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.ops.lsh_case import differing_bits, make_hashes
from tests.ops.step_meta import make_meta
from twilight_engine.kv.index import allocate_index
from twilight_engine.layout import NO_ROW
from twilight_engine.ops.lsh_codes import (
    CENTRE_TOKENS,
    SLICE_BYTES,
    lsh_codes,
    set_lsh_centres,
    write_lsh_codes,
)
from twilight_engine.reference.lsh_codes import lsh_codes as lsh_codes_reference
from twilight_engine.reference.lsh_codes import set_lsh_centres as set_lsh_centres_reference
from twilight_engine.reference.lsh_codes import write_lsh_codes as write_lsh_codes_reference

SHAPES = [(1, 2), (8, 75), (10, 150), (16, 7), (3, 512)]
ROUNDED = 1e-5  # share of bits that a sum in another order may turn: about 1e-7 on N(0, 1)


@pytest.mark.parametrize("lsh", SHAPES)
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_signatures(device: torch.device, dim: int, lsh: tuple[int, int]) -> None:
    hashes = make_hashes(device, lsh, dim=dim)
    gpu = [torch.float16, torch.bfloat16] if device.type == "cuda" else []
    for dtype in [torch.float32, *gpu]:
        x = torch.randn(3, 5, dim, device=device).to(dtype)
        got = lsh_codes(x, hashes)
        assert got.shape == (3, 5, lsh[1])
        bits = 15 * math.prod(lsh)
        assert differing_bits(got, lsh_codes_reference(x, hashes)) <= ROUNDED * bits
    assert lsh_codes(x[0, 0], hashes).shape == (lsh[1],)
    assert lsh_codes(x[:0], hashes).shape == (0, 5, lsh[1])


def test_a_bit_is_the_side_of_its_direction(device: torch.device) -> None:
    """By hand: two tables of three bits over the axes, zero and NaN included."""
    hashes = make_hashes(device, (3, 2), dim=4)
    axes = torch.eye(4, device=device)
    directions = [axes[0], -axes[0], axes[1], axes[2], axes[3], -axes[3]]
    hashes = dataclasses.replace(hashes, projections=torch.stack(directions, dim=1))
    x = torch.tensor([[1.0, -1.0, 0.0, 2.0], [-1.0, 1.0, math.nan, -2.0]], device=device)
    x[1, :3] = torch.tensor([-1.0, 1.0, -3.0])
    assert lsh_codes(x, hashes).tolist() == [[0b001, 0b011], [0b110, 0b100]]
    assert lsh_codes(torch.full((1, 4), math.nan, device=device), hashes).tolist() == [[0, 0]]
    every = make_hashes(device, (16, 2), dim=4)
    assert lsh_codes(torch.zeros(1, 4, device=device), every).tolist() == [[-1, -1]]  # 0xFFFF


def test_many_rows_go_in_slices(device: torch.device) -> None:
    hashes = make_hashes(device, (16, 512))
    rows = 2 * SLICE_BYTES // (4 * 16 * 512) + 3
    x = torch.randn(rows, 64, device=device)
    got = lsh_codes(x, hashes)
    for at in (0, rows // 2, rows - 1):
        assert differing_bits(got[at], lsh_codes(x[at], hashes)) <= 1


def test_neighbours_agree_as_their_angle_says(device: torch.device) -> None:
    """P[one table agrees] = (1 - angle / pi)^bits, over 512 tables."""
    hashes = make_hashes(device, (4, 512), dim=128)
    for cosine in (0.0, 0.5, 0.9):
        a, b = torch.randn(2, 200, 128, device=device)
        a = a / a.norm(dim=1, keepdim=True)
        b = b - (b * a).sum(1, keepdim=True) * a
        b = cosine * a + math.sqrt(1 - cosine**2) * b / b.norm(dim=1, keepdim=True)
        share = float((lsh_codes(a, hashes) == lsh_codes(b, hashes)).float().mean())
        assert share == pytest.approx((1 - math.acos(cosine) / math.pi) ** 4, rel=0.1)


@pytest.mark.parametrize("page_size", [16, 61])
def test_rows_go_to_their_places(device: torch.device, page_size: int) -> None:
    meta = make_meta(device, [200, 3, 77], q_lens=[70, 2, 1], page_size=page_size)
    hashes = make_hashes(device, (8, 20), slots=4)
    pair = [
        allocate_index(30, 2, page_size, 64, "int4_channel", "none", device, lsh_tables=20)
        for _ in range(2)
    ]
    k = torch.randn(73, 2, 128, device=device)[..., 64:]
    write_lsh_codes(k, meta, hashes, pair[0])
    write_lsh_codes_reference(k, meta, hashes, pair[1])
    assert differing_bits(pair[0].lsh_codes, pair[1].lsh_codes) <= 1
    assert (pair[1].lsh_codes != 0).any()


@pytest.mark.parametrize("first_is_padding", [False, True])
def test_padding_goes_nowhere(device: torch.device, first_is_padding: bool) -> None:
    meta = make_meta(device, [33, 40, 17], page_size=16)
    meta.positions[1] = -1
    if first_is_padding:
        meta.page_table[0] = NO_ROW
    hashes = make_hashes(device, (8, 20), slots=4)
    index = allocate_index(12, 2, 16, 64, "int4_channel", "none", device, lsh_tables=20)
    assert index.lsh_codes is not None
    index.lsh_codes.fill_(77)
    k = torch.randn(3, 2, 64, device=device)
    write_lsh_codes(k, meta, hashes, index)
    wanted = [(2, 16)] if first_is_padding else [(0, 32), (2, 16)]
    left = torch.ones(12, 16, dtype=torch.bool)
    for n, t in wanted:
        page = int(meta.page_table[n, t // 16])
        left[page, t % 16] = False
        centred = k[n] - hashes.centres[int(meta.seq_slots[n])]
        assert differing_bits(index.lsh_codes[page, :, t % 16], lsh_codes(centred, hashes)) == 0
    assert (index.lsh_codes.transpose(1, 2).cpu()[left] == 77).all()


@pytest.mark.parametrize("length", [1, 100, CENTRE_TOKENS + 500])
def test_the_centre_is_the_mean_of_the_first_rows(device: torch.device, length: int) -> None:
    """And the same bits from strided rows, as a copy has them."""
    meta = make_meta(device, [length], q_lens=[length])
    one, two, other = (make_hashes(device, (8, 20), slots=2) for _ in range(3))
    k = torch.randn(length, 2, 64, device=device) + 3
    before = one.centres.clone()
    set_lsh_centres(k, meta, one)
    set_lsh_centres_reference(k, meta, two)
    slot = int(meta.seq_slots[0])
    torch.testing.assert_close(one.centres[slot], two.centres[slot])
    assert torch.equal(one.centres[1 - slot], before[1 - slot])
    strided = torch.cat([k, k], dim=-1).transpose(0, 1).contiguous().transpose(0, 1)[..., :64]
    set_lsh_centres(strided, meta, other)
    assert torch.equal(one.centres[slot], other.centres[slot])


def test_messages(device: torch.device) -> None:
    hashes, meta = make_hashes(device, (8, 20)), make_meta(device, [30], page_size=16)
    index = allocate_index(4, 2, 16, 64, "int4_channel", "none", device)
    k = torch.zeros(1, 2, 64, device=device)
    with pytest.raises(ValueError, match=r"x has shape \[1, 2, 32\]; its last size must be 64"):
        lsh_codes(k[..., :32], hashes)
    with pytest.raises(ValueError, match=r"index.lsh_codes is None; allocate the index with"):
        write_lsh_codes(k, meta, hashes, index)
    index = allocate_index(4, 2, 16, 64, "int4_channel", "none", device, lsh_tables=10)
    with pytest.raises(ValueError, match=r"pages of 16 and 10 tables; .* the hashes 20 tables"):
        write_lsh_codes(k, meta, hashes, index)
    with pytest.raises(ValueError, match=r"k has shape \[1, 1, 64\]"):
        write_lsh_codes(k[:, :1], meta, hashes, index)
    with pytest.raises(ValueError, match=r"meta.seq_slots has shape \[2\]"):
        set_lsh_centres(k.expand(2, -1, -1), make_meta(device, [30, 20]), hashes)
