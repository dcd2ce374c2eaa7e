"""The parts of the gather beside a reader that need no GPU: which runs overlap, and the lists."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gather_lists
import pytest
import torch
from gather_beside import LEAST_OVERLAPPED, overlapped
from gather_lists import BESIDE_BATCH, BESIDE_ROWS, HKV, beside_rows


def spans(start: float, length: float, count: int) -> list[tuple[float, float]]:
    return [(start + i * length, start + (i + 1) * length) for i in range(count)]


def test_runs_that_the_other_stream_does_not_span_are_left_out() -> None:
    long, short = spans(0.0, 100.0, 20), spans(50.0, 30.0, 40)
    assert overlapped(short, long) == list(range(2, 40))  # from 110 on: the first long ends at 100
    assert overlapped(long, short) == list(range(1, 12))  # 100 to 1200: the last short starts 1220


def test_too_few_runs_side_by_side_are_refused() -> None:
    count = LEAST_OVERLAPPED
    assert len(overlapped(spans(10.0, 10.0, count), spans(0.0, 10.0, count + 2))) == count
    with pytest.raises(RuntimeError, match=f"{count - 1} of {count} runs"):
        overlapped(spans(10.0, 10.0, count), spans(0.0, 10.0, count + 1))


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("tokens", [BESIDE_ROWS, 1024])
def test_rows_lie_in_their_sequence(
    dense: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather_lists, "DEVICE", torch.device("cpu"))
    arena: Any = SimpleNamespace(rows_each=lambda row_bytes: tokens * BESIDE_BATCH)
    rows = beside_rows(arena, dense=dense)
    assert rows.shape == (BESIDE_BATCH, HKV, BESIDE_ROWS)
    assert (rows // tokens == torch.arange(BESIDE_BATCH)[:, None, None]).all()
    steps = rows.diff(dim=-1)
    assert (steps == 1).all() if dense else (steps >= 0).all() and (steps != 1).any()
