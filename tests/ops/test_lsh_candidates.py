"""lsh_candidates: bitwise the reference's; near tokens are found, far ones are not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.ops.lsh_case import make_hashes
from tests.ops.step_meta import make_meta
from twilight_engine.kv.index import allocate_index
from twilight_engine.layout import NO_ROW, IndexPages, StepMeta, num_blocks
from twilight_engine.ops.lsh_candidates import lsh_candidates
from twilight_engine.ops.lsh_codes import lsh_codes
from twilight_engine.reference.lsh_candidates import lsh_candidates as lsh_candidates_reference


def signed_index(
    meta: StepMeta, tables: int, values: int, device: torch.device, heads: int = 2
) -> IndexPages:
    """Random signatures of `values` different values, so that two of them agree now and then."""
    pages = int(meta.page_table.max()) + 1
    size = meta.page_size
    index = allocate_index(
        pages, heads, size, 64, "int4_channel", "none", device, lsh_tables=tables
    )
    assert index.lsh_codes is not None
    index.lsh_codes.copy_(random_codes(index.lsh_codes.shape, values))
    return index


def random_codes(shape: tuple[int, ...], values: int) -> Tensor:
    """int16 in a range around 0x8000 as uint16: high and low bytes and signs all matter."""
    return (torch.randint(0, values, shape) * 257 + 0x7F80).to(torch.int16)


@pytest.mark.parametrize("page_size", [1, 16, 61, 64])
@pytest.mark.parametrize("tables", [2, 7, 64, 75, 150, 511, 512])
@pytest.mark.parametrize(("batch", "group"), [(1, 1), (3, 3), (1, 8), (3, 6), (17, 7)])
def test_lsh_candidates(
    device: torch.device, batch: int, group: int, tables: int, page_size: int
) -> None:
    lens = [5 * page_size + 1, 3, 4 * page_size, 2 * page_size + 2][:batch]
    lens += [2 * page_size + 5 * b for b in range(batch - len(lens))]
    meta = make_meta(device, lens, page_size=page_size)
    index = signed_index(meta, tables, min(16, max(2, tables // 2)), device)
    shape = (batch, 2 * group, tables)
    q_codes = random_codes(shape, min(16, max(2, tables // 2))).to(device)
    got = lsh_candidates(q_codes, index, meta)
    assert torch.equal(got, lsh_candidates_reference(q_codes, index, meta))


@pytest.mark.parametrize("tables", [75, 150])
@pytest.mark.parametrize("values", [100, 200])
@pytest.mark.parametrize("sliding", [None, 300])
def test_rare_agreements_over_many_rows(
    device: torch.device, sliding: int | None, values: int, tables: int
) -> None:
    """Sampling rates like the paper's; several rows a sequence, missing pages, a dirty output."""
    meta = make_meta(device, [900, 650], q_lens=[5, 1], page_size=61, sliding=sliding)
    meta.page_table[0, 11] = NO_ROW
    index = signed_index(meta, tables, values, device)
    q_codes = random_codes((6, 6, tables), values).to(device)
    out = torch.full((6, 2, num_blocks(meta.max_len, 1, 61)), 9, dtype=torch.uint8, device=device)
    got = lsh_candidates(q_codes, index, meta, candidates=out)
    assert got is out
    assert torch.equal(got, lsh_candidates_reference(q_codes, index, meta))
    assert 0.01 < got.float().mean() < 0.9
    assert got[:5, :, 10 * 61 : 11 * 61].any() and not got[:5, :, 11 * 61 : 12 * 61].any()


def test_two_tables_make_a_candidate_and_one_does_not(device: torch.device) -> None:
    """Wherever the two lie in the row, and whichever head of the group agrees."""
    meta = make_meta(device, [96], page_size=32, num_sink=0)
    for tables in (75, 150):
        index = signed_index(meta, tables, 1, device, heads=1)
        assert index.lsh_codes is not None
        codes, page = index.lsh_codes, int(meta.page_table[0, 0])
        q_codes = torch.zeros(1, 3, tables, dtype=torch.int16, device=device)
        for token, (head, places) in enumerate(
            [(0, (0, 1)), (2, (0, tables - 1)), (1, (73, 74)), (1, (5,)), (2, (tables - 1,))]
        ):
            value = 100 + 50 * token
            codes[page, 0, token, list(places)] = value
            q_codes[0, head, list(places)] = value
        codes[page, 0, 5, 3], codes[page, 0, 5, 40] = 7, 8  # one with each of two heads: no
        q_codes[0, 0, 3], q_codes[0, 1, 40] = 7, 8
        q_codes[0, 2, 10:12] = torch.tensor([1, 0x0100])  # the halves of a pair, swapped: no
        codes[page, 0, 6, 10:12] = torch.tensor([0x0100, 1])
        found = lsh_candidates(q_codes, index, meta)[0, 0].nonzero().flatten().tolist()
        # Later tokens overwrote the places that heads 1 and 2 shared with earlier ones.
        expected = lsh_candidates_reference(q_codes, index, meta)[0, 0]
        assert found == expected.nonzero().flatten().tolist()
        assert 0 in found and 2 in found and not {3, 4, 5, 6} & set(found)


def test_the_best_tokens_are_candidates_far_more_often(device: torch.device) -> None:
    """Of 2,000 keys, the 20 with the largest q . k against all, over 30 queries."""
    dim, size, tokens = 64, 64, 2048
    meta = make_meta(device, [tokens] * 30, page_size=size)
    meta.page_table[:] = meta.page_table[0].clone()  # 30 queries over one sequence's pages
    hashes = make_hashes(device, (8, 75), heads=1, dim=dim)
    index = allocate_index(
        int(meta.page_table.max()) + 1, 1, size, dim, "int4_channel", "none", device, lsh_tables=75
    )
    assert index.lsh_codes is not None
    k = torch.randn(tokens, dim, device=device)
    pages = meta.page_table[0, : tokens // size].long()
    index.lsh_codes[pages, 0] = lsh_codes(k, hashes).unflatten(0, (-1, size))
    q = torch.randn(30, 1, dim, device=device) * 2
    found = lsh_candidates(lsh_codes(q, hashes), index, meta)[:, 0].bool()
    listed = slice(meta.num_sink, int(meta.window_starts[0]))
    best = (q[:, 0] @ k[listed].T).topk(20, dim=1).indices
    recall = found[:, listed].gather(1, best).float().mean()
    density = found[:, listed].float().mean()
    assert recall > 0.3 and recall > 5 * density, (recall, density)


def test_empty_step(device: torch.device) -> None:
    meta = make_meta(device, [100], q_lens=[0], page_size=16)
    index = signed_index(make_meta(device, [100]), 20, 5, device)
    q_codes = torch.zeros(0, 4, 20, dtype=torch.int16, device=device)
    assert lsh_candidates(q_codes, index, meta).shape == (0, 2, num_blocks(103, 1, 16))


def test_messages(device: torch.device) -> None:
    meta = make_meta(device, [60], page_size=16)
    index = signed_index(meta, 20, 5, device)
    q_codes = torch.zeros(1, 4, 20, dtype=torch.int16, device=device)
    with pytest.raises(ValueError, match=r"q_codes has shape \[1, 4, 19\]; it must be \[1, any,"):
        lsh_candidates(q_codes[..., :19], index, meta)
    with pytest.raises(ValueError, match=r"q_codes has 3 heads; it must be a multiple of"):
        lsh_candidates(q_codes[:, :3].contiguous(), index, meta)
    with pytest.raises(ValueError, match=r"q_codes has dtype torch.int32"):
        lsh_candidates(q_codes.int(), index, meta)
    with pytest.raises(ValueError, match=r"q_codes has strides .*; it must be contiguous"):
        lsh_candidates(q_codes.repeat(1, 1, 2)[..., ::2], index, meta)
    with pytest.raises(ValueError, match=r"meta.page_size is 32; the index has pages of 16"):
        lsh_candidates(q_codes, index, dataclasses.replace(meta, page_size=32))
    with pytest.raises(ValueError, match=r"candidates has shape \[1, 2, 3\]"):
        out = torch.zeros(1, 2, 3, dtype=torch.uint8, device=device)
        lsh_candidates(q_codes, index, meta, candidates=out)
    with pytest.raises(ValueError, match=r"index.lsh_codes is None; allocate the index with"):
        lsh_candidates(q_codes, dataclasses.replace(index, lsh_codes=None), meta)
