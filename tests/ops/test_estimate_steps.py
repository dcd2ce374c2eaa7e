"""estimate_scores in one step after another: its workspace, and the kernels just before it."""

from __future__ import annotations

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
@pytest.mark.parametrize("behind_append", (False, True))
def test_right_behind_an_append_that_completes_pages(behind_append: bool) -> None:
    """It may start before the append has ended, and then sees the rows and pages that it writes."""
    meta = make_meta(torch.device("cuda"), [64 * 9, 64 * 40], page_size=64, num_recent=128)
    case = make_case(meta, head_dim=128, dtype=torch.bfloat16)
    pages = case.index.k_codes.shape[0]
    host = torch.empty(2, pages, 64, 256, dtype=torch.bfloat16, pin_memory=True)
    k, v = torch.randn(2, 2, 2, 128, device="cuda").bfloat16()
    workspace = allocate_workspace(2, 4, 2, meta.positions.device)
    scores = torch.full((2, 4, meta.max_len), SENTINEL, device="cuda")
    lse = torch.empty(2, 4, device="cuda")
    arguments = (case.q, case.index, case.windows, meta)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            append_rows(k, v, case.windows, host, meta, index=case.index)
            estimate_scores(
                *arguments, softmax_scale=0.1, scores=scores, lse=lse, workspace=workspace,
                behind_append=behind_append,
            )  # fmt: skip
    for _ in range(20):
        k.normal_()
        graph.replay()
        expected = torch.full_like(scores, SENTINEL)
        _, expected_lse = reference(*arguments, softmax_scale=0.1, scores=expected)
        allowed = rounding(case, meta.max_len, 0.1)
        compare_scores(scores, expected, allowed)
        compare_scores(lse, expected_lse, allowed.amax(-1))


@pytest.mark.gpu
def test_workspace_too_small() -> None:
    case = make_case(make_meta(torch.device("cuda"), [100]))
    short = torch.zeros(8, dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="workspace holds 8 elements; it needs"):
        estimate_scores(
            case.q, case.index, case.windows, case.meta, softmax_scale=1.0, workspace=short
        )
