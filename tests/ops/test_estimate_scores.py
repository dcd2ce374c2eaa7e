from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.compare import compare
from tests.ops.graded_case import GradedCase, make_case
from tests.ops.step_meta import make_meta
from twilight_engine.layout import StepMeta, num_blocks
from twilight_engine.ops.estimate_scores import estimate_scores
from twilight_engine.reference.estimate_errors import estimate_errors
from twilight_engine.reference.estimate_scores import estimate_scores as reference

SENTINEL = 12345.0
FACTOR = {"cpu": 1.0, "cuda": 4.0}  # on values of order ten
# Share of a page's error, |q * step| / sqrt(12), that rounding q * step to 16 bits of that norm may
# amount to: six standard deviations at D 256, for a token's step 1.7 times its page's.
ROUNDING = {"cpu": 0.0, "cuda": 0.045}


def visible(meta: StepMeta, capacity: int) -> Tensor:
    t = torch.arange(capacity, device=meta.positions.device)
    return (t >= meta.ctx_starts[:, None]) & (t <= meta.positions[:, None])


def listed(meta: StepMeta, pages: int) -> Tensor:
    """[N, pages]: which pages hold list tokens of a row."""
    first = meta.ctx_starts.clamp(min=meta.num_sink)
    last = torch.minimum(meta.positions + 1, meta.window_starts[meta.query_seq.long()])
    page = torch.arange(pages, device=first.device) * meta.page_size
    begin = torch.maximum(page, first[:, None])
    return begin < torch.minimum(page + meta.page_size, last[:, None])


def rounding(case: GradedCase, capacity: int, softmax_scale: float) -> Tensor:
    """[N, Hq, C]: what the scores of list tokens may be off by beside float's own rounding."""
    meta = case.meta
    errors = estimate_errors(case.q, case.index, meta, softmax_scale=softmax_scale)
    t = torch.arange(capacity, device=errors.device)
    page = (t // meta.page_size).clamp(max=errors.shape[2] - 1)
    seen = (t >= meta.num_sink) & (t < meta.window_starts[meta.query_seq.long()][:, None])
    return ROUNDING[case.q.device.type] * errors[:, :, page] * seen[:, None]


def compare_scores(scores: Tensor, expected: Tensor, allowed: Tensor) -> None:
    """compare(), once each finite score has been moved by up to `allowed`."""
    off = (scores - expected).nan_to_num(0.0, 0.0, 0.0)
    moved = scores - off.clamp(-allowed, allowed)
    compare(moved, expected, step_dtype=torch.float32, factor=FACTOR[scores.device.type])


def check(
    case: GradedCase,
    *,
    candidates: Tensor | None = None,
    block: int | None = None,
    left_out: str = "midpoint",
    with_errors: bool = True,
    workspace: Tensor | None = None,
) -> None:
    """Equal to the reference where a row sees, untouched where it does not."""
    n, hq, _ = case.q.shape
    capacity = case.meta.max_len + 5
    scores = torch.full((n, hq, capacity), SENTINEL, device=case.q.device)
    expected = scores.clone()
    arguments = {
        "softmax_scale": case.softmax_scale,
        "candidates": candidates,
        "block": block,
        "left_out": left_out,
    }
    pages = -(-case.meta.max_len // case.meta.page_size) + 1
    errors = torch.full((n, hq, pages), SENTINEL, device=case.q.device) if with_errors else None
    expected_errors = None if errors is None else errors.clone()
    scores, lse = estimate_scores(
        case.q, case.index, case.windows, case.meta, scores=scores, errors=errors,
        workspace=workspace, **arguments
    )  # fmt: skip
    expected, expected_lse = reference(
        case.q, case.index, case.windows, case.meta, scores=expected, errors=expected_errors,
        **arguments
    )  # fmt: skip
    allowed = rounding(case, capacity, case.softmax_scale)
    compare_scores(scores, expected, allowed)
    compare_scores(lse, expected_lse, allowed.amax(-1))
    hidden = ~visible(case.meta, capacity)[:, None].expand(-1, hq, -1)
    assert (scores[hidden] == SENTINEL).all()
    if errors is not None and expected_errors is not None:
        for of_row, expected_of_row, seen in zip(
            errors, expected_errors, listed(case.meta, pages), strict=True
        ):
            compare(of_row[:, seen], expected_of_row[:, seen], step_dtype=torch.float32)


@pytest.mark.parametrize("k_index", ["int4_channel", "int4_token"])
@pytest.mark.parametrize("page_size", [16, 61, 64])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_matches_reference(
    device: torch.device, head_dim: int, page_size: int, k_index: str
) -> None:
    meta = make_meta(device, [500, 33, 301], page_size=page_size)
    check(make_case(meta, group=3, head_dim=head_dim, k_index=k_index))


@pytest.mark.parametrize("group", [1, 3, 4, 6, 7, 8, 12])
@pytest.mark.parametrize("k_index", ["int4_channel", "int4_token"])
def test_group_sizes(device: torch.device, group: int, k_index: str) -> None:
    meta = make_meta(device, [401], page_size=64)
    check(make_case(meta, group=group, num_kv_heads=3, k_index=k_index))


@pytest.mark.parametrize("left_out", ["midpoint", "drop"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("page_size", [16, 61, 64])
@pytest.mark.parametrize("k_index", ["int4_channel", "int4_token"])
def test_candidates(
    device: torch.device, k_index: str, page_size: int, share: float, left_out: str
) -> None:
    meta = make_meta(device, [700, 129], page_size=page_size)
    case = make_case(meta, group=6, k_index=k_index)
    check(case, candidates=case.candidates(share), left_out=left_out)


@pytest.mark.parametrize("left_out", ["midpoint", "drop"])
@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("page_size", [16, 61, 64])
@pytest.mark.parametrize("k_index", ["int4_channel", "int4_token"])
def test_candidates_by_token(
    device: torch.device, k_index: str, page_size: int, share: float, left_out: str
) -> None:
    meta = make_meta(device, [700, 129], page_size=page_size)
    case = make_case(meta, group=6, k_index=k_index)
    tokens = num_blocks(meta.max_len, 1, page_size)
    candidates = (torch.rand(2, 2, tokens) < share).to(device, torch.uint8)
    check(case, candidates=candidates, block=1, left_out=left_out)


@pytest.mark.parametrize("batch", [1, 3, 17])
@pytest.mark.parametrize("sliding", [None, 70])
def test_batches_and_sliding_windows(device: torch.device, batch: int, sliding: int | None) -> None:
    lengths = [1 + 53 * i % 600 for i in range(batch)]
    meta = make_meta(device, lengths, page_size=16, sliding=sliding)
    check(make_case(meta))


def test_several_query_rows_a_sequence(device: torch.device) -> None:
    meta = make_meta(device, [300, 90], q_lens=[5, 3], page_size=16, num_recent=24)
    case = make_case(meta, group=4)
    check(case)
    check(case, candidates=case.candidates(0.5), left_out="drop")


@pytest.mark.parametrize("num_sink", [0, 40])
def test_empty_list_region(device: torch.device, num_sink: int) -> None:
    check(make_case(make_meta(device, [1, 16, 40], page_size=16, num_sink=num_sink, num_recent=64)))


def test_row_that_sees_nothing(device: torch.device) -> None:
    meta = make_meta(device, [200, 100], page_size=16)
    meta.positions[1] = -1  # a padding row of a batch bucket
    case = make_case(meta)
    check(case)
    _, lse = estimate_scores(case.q, case.index, case.windows, meta, softmax_scale=1.0)
    assert torch.isneginf(lse[1]).all() and torch.isfinite(lse[0]).all()


@pytest.mark.parametrize("with_errors", [False, True])
def test_errors_are_optional(device: torch.device, with_errors: bool) -> None:
    case = make_case(make_meta(device, [300, 90], page_size=16), group=4)
    candidates = case.candidates(0.5)
    check(case, candidates=candidates, left_out="drop", with_errors=with_errors)


@pytest.mark.parametrize("k_index", ["int4_channel", "int4_token"])
@pytest.mark.parametrize("page_size", [65, 100, 200])
def test_pages_of_more_than_a_piece(device: torch.device, page_size: int, k_index: str) -> None:
    case = make_case(make_meta(device, [900, 150], page_size=page_size), group=4, k_index=k_index)
    check(case)
    check(case, candidates=case.candidates(0.5))
    check(case, candidates=case.candidates(0.5), left_out="drop")


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("batch", [1, 5, 40])
def test_many_pages(head_dim: int, batch: int) -> None:
    """Units that many blocks share, blocks that go through many units, rows beyond a warp's 32."""
    torch.manual_seed(batch)
    lengths = [20_000 // batch + 997 * i % 1400 for i in range(batch)]
    meta = make_meta(torch.device("cuda"), lengths, page_size=64)
    check(make_case(meta, group=4, num_kv_heads=3, head_dim=head_dim, dtype=torch.bfloat16))


@pytest.mark.gpu
def test_aligned_scores() -> None:
    """Rows of scores at multiples of 16 bytes, as the engine's are: written in vectors."""
    device = torch.device("cuda")
    for group in (1, 3, 4, 7, 8):
        meta = make_meta(device, [5000, 777], page_size=64, sliding=4100)
        case = make_case(meta, group=group, head_dim=128)
        scores = torch.full((2, 2 * group, 5056), SENTINEL, device=device)
        expected = scores.clone()
        arguments = (case.q, case.index, case.windows, meta)
        estimate_scores(*arguments, softmax_scale=0.1, scores=scores)
        reference(*arguments, softmax_scale=0.1, scores=expected)
        compare_scores(scores, expected, rounding(case, 5056, 0.1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows(dtype: torch.dtype) -> None:
    meta = make_meta(torch.device("cuda"), [700, 33], page_size=64)
    for group in (1, 4, 7):
        check(make_case(meta, group=group, head_dim=128, dtype=dtype))


@pytest.mark.gpu
def test_large_keys_lose_no_precision() -> None:
    """q * scale beyond float16's range: errors stay small beside the codes' own."""
    case = make_case(make_meta(torch.device("cuda"), [700], page_size=64), sharpness=200.0)
    case.index.k_scale.mul_(1000.0)
    scores, _ = estimate_scores(case.q, case.index, case.windows, case.meta, softmax_scale=1.0)
    expected, _ = reference(case.q, case.index, case.windows, case.meta, softmax_scale=1.0)
    seen = visible(case.meta, case.meta.max_len)[:, None].expand_as(scores)
    excess = (scores - expected).abs() - rounding(case, case.meta.max_len, 1.0)
    assert excess[seen].max() < 1e-5 * expected[seen].abs().max()


@pytest.mark.parametrize("k_index", ["int4_channel", "int4_token"])
@pytest.mark.parametrize("group", [4, 5])
def test_zero_and_non_finite_queries(device: torch.device, group: int, k_index: str) -> None:
    case = make_case(make_meta(device, [300], page_size=64), group=group, k_index=k_index)
    case.q[0, 0], case.q[0, 1, 7], case.q[0, 2, 9] = 0, torch.nan, torch.inf
    scores, _ = estimate_scores(case.q, case.index, case.windows, case.meta, softmax_scale=1.0)
    expected, _ = reference(case.q, case.index, case.windows, case.meta, softmax_scale=1.0)
    seen = visible(case.meta, case.meta.max_len)[0]
    assert scores[0, 0, seen].abs().max() < 1e-6
    assert not scores[0, 1:3, seen].isfinite().any()
    allowed = rounding(case, case.meta.max_len, 1.0)
    compare_scores(scores[0, 3:, seen], expected[0, 3:, seen], allowed[0, 3:, seen])


def test_bad_arguments(device: torch.device) -> None:
    case = make_case(make_meta(device, [100]))
    arguments = (case.q, case.index, case.windows, case.meta)
    with pytest.raises(ValueError, match="left_out is 'zero'; allowed: 'midpoint', 'drop'"):
        estimate_scores(*arguments, softmax_scale=1.0, left_out="zero")
    with pytest.raises(ValueError, match="scores holds 8 tokens; max_len is 103"):
        scores = torch.empty(1, 4, 8, device=device)
        estimate_scores(*arguments, softmax_scale=1.0, scores=scores)
    with pytest.raises(ValueError, match="errors holds 6 pages; it needs 7"):
        errors = torch.empty(1, 4, 6, device=device)
        estimate_scores(*arguments, softmax_scale=1.0, errors=errors)
    off = torch.zeros(1, 2, 8, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="holds 8 blocks; 103 tokens in blocks of 16 need 7"):
        estimate_scores(*arguments, softmax_scale=1.0, candidates=off)
    with pytest.raises(ValueError, match="holds 8 blocks; 103 tokens in blocks of 1 need 112"):
        estimate_scores(*arguments, softmax_scale=1.0, candidates=off, block=1)
    with pytest.raises(ValueError, match="block is 2; allowed: 1, 16"):
        estimate_scores(*arguments, softmax_scale=1.0, candidates=off, block=2)
    with pytest.raises(NotImplementedError, match=r"q has dtype torch\.float64; supported"):
        estimate_scores(case.q.double(), *arguments[1:], softmax_scale=1.0)
