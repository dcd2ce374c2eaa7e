"""estimate_scores in one step after another: its workspace, and the append before or beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ops.graded_case import make_case
from tests.ops.step_meta import make_meta
from tests.ops.test_estimate_scores import SENTINEL, check, compare_scores, rounding
from twilight_engine.ops.append_rows import append_rows
from twilight_engine.ops.estimate_scores import allocate_workspace, estimate_scores
from twilight_engine.reference.estimate_scores import estimate_scores as reference


@pytest.mark.gpu
def test_workspace_serves_any_number_of_steps() -> None:
    """It is left as it was found, by steps of other shapes and by replays of a graph."""
    device = torch.device("cuda")
    workspace = allocate_workspace(4, 12, 2, device)
    for lengths in ([3000, 90, 1, 700], [9000], [40, 40]):
        case = make_case(make_meta(device, lengths, page_size=16), group=6)
        check(case, workspace=workspace)
        assert not workspace.any()
    scores = torch.empty(2, 12, case.meta.max_len, device=device)
    lse = torch.empty(2, 12, device=device)
    arguments = (case.q, case.index, case.windows, case.meta)

    def step() -> None:
        estimate_scores(*arguments, softmax_scale=0.1, scores=scores, lse=lse, workspace=workspace)

    step()
    expected = lse.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            step()
    for _ in range(50):
        lse.zero_()
        graph.replay()
        assert torch.equal(lse, expected)
    assert not workspace.any()


@pytest.mark.gpu
@pytest.mark.parametrize("beside", (False, True))
def test_with_an_append_that_completes_pages(beside: bool) -> None:
    """It may start before the append has ended, or run beside it with the same rows."""
    meta = make_meta(torch.device("cuda"), [64 * 9, 64 * 40], page_size=64, num_recent=128)
    case = make_case(meta, head_dim=128, dtype=torch.bfloat16)
    pages = case.index.k_codes.shape[0]
    host = torch.empty(2, pages, 64, 256, dtype=torch.bfloat16, pin_memory=True)
    k, v = torch.randn(2, 2, 2, 128, device="cuda").bfloat16()
    workspace = allocate_workspace(2, 4, 2, meta.positions.device)
    scores = torch.full((2, 4, meta.max_len), SENTINEL, device="cuda")
    lse = torch.empty(2, 4, device="cuda")
    arguments = (case.q, case.index, case.windows, meta)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        for _ in range(3):
            current = torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side if beside else current):
                append_rows(k, v, case.windows, host, meta, index=case.index)
            estimate_scores(
                *arguments, softmax_scale=0.1, scores=scores, lse=lse, workspace=workspace,
                new_rows=(k, v) if beside else None,
            )  # fmt: skip
            current.wait_stream(side)
    for _ in range(20):
        k.normal_()
        graph.replay()
        expected = torch.full_like(scores, SENTINEL)
        _, expected_lse = reference(*arguments, softmax_scale=0.1, scores=expected)
        allowed = rounding(case, meta.max_len, 0.1)
        compare_scores(scores, expected, allowed)
        compare_scores(lse, expected_lse, allowed.amax(-1))


NEW_ROW_SHAPES = (
    {"seq_lens": [100, 3000], "group": 2, "head_dim": 64},
    {"seq_lens": [3, 4, 5, 17], "group": 9, "head_dim": 80},  # sinks; more heads than a unit has
    {"seq_lens": [700], "group": 4, "head_dim": 128, "page_size": 64},
    {"seq_lens": [333, 40], "group": 1, "head_dim": 256, "page_size": 48, "num_sink": 0},
)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("shape", NEW_ROW_SHAPES, ids=lambda s: "-".join(map(str, s["seq_lens"])))
def test_brings_new_rows(device: torch.device, shape: dict[str, Any], dtype: torch.dtype) -> None:
    """The windows lack the step's own rows, which come with it, and have them afterwards."""
    if device.type == "cpu" and dtype != torch.float32:
        pytest.skip("on a CPU rows are float32")
    lengths, group, dim = shape["seq_lens"], shape["group"], shape["head_dim"]
    page_size, sink = shape.get("page_size", 16), shape.get("num_sink", 4)
    meta = make_meta(device, lengths, page_size=page_size, num_sink=sink)
    case = make_case(meta, group=group, head_dim=dim, dtype=dtype)
    before = case.windows.rows.clone()
    new = torch.randn(2, len(lengths), 2, 2 * dim, device=device).to(dtype)
    k, v = new[0, ..., :dim], new[1, ..., dim:]  # rows apart, as slices of a projection are
    scores = torch.full((len(lengths), 2 * group, meta.max_len), SENTINEL, device=device)
    arguments = (case.q, case.index, case.windows, meta)
    scale = case.softmax_scale
    _, lse = estimate_scores(*arguments, softmax_scale=scale, scores=scores, new_rows=(k, v))
    each = sink + case.windows.window_rows
    for b, length in enumerate(lengths):
        t, slot = length - 1, int(meta.seq_slots[b])
        place = t if t < sink else sink + t % case.windows.window_rows
        for h in range(2):
            before[(slot * 2 + h) * each + place] = torch.cat((k[b, h], v[b, h]))
    assert torch.equal(case.windows.rows, before)
    expected = torch.full_like(scores, SENTINEL)
    _, expected_lse = reference(*arguments, softmax_scale=scale, scores=expected)
    allowed = rounding(case, meta.max_len, scale)
    compare_scores(scores, expected, allowed)
    compare_scores(lse, expected_lse, allowed.amax(-1))


def test_new_rows_of_several_queries() -> None:
    case = make_case(make_meta(torch.device("cpu"), [100], q_lens=[2]))
    rows = torch.zeros(2, 2, 64)
    with pytest.raises(ValueError, match="new_rows came with 2 query rows of 1 sequences"):
        estimate_scores(
            case.q, case.index, case.windows, case.meta, softmax_scale=1.0, new_rows=(rows, rows)
        )


@pytest.mark.gpu
def test_workspace_too_small() -> None:
    case = make_case(make_meta(torch.device("cuda"), [100]))
    short = torch.zeros(8, dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="workspace holds 8 elements; it needs"):
        estimate_scores(
            case.q, case.index, case.windows, case.meta, softmax_scale=1.0, workspace=short
        )
