"""The table of ncu's CSV; ncu itself needs a GPU."""

from __future__ import annotations

import pytest
import torch
from profile_decode_attention import main, read_kernels, table_row

HEADER = '"ID","Process ID","Kernel Name","Block Size","Metric Name","Metric Unit","Metric Value"'
ESTIMATE, PRUNE = "estimate_scores_kernel", "prune_kernel"
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"


def line(kernel: str, metric: str, unit: str, value: str) -> str:
    return f'"0","1","{kernel}","(256, 1, 1)","{metric}","{unit}","{value}"'


ROWS = [
    "==PROF== Connected to process 1",
    HEADER,
    line(ESTIMATE, "gpu__time_duration.sum", "ns", "52,000"),
    line(ESTIMATE, "gpu__time_duration.sum", "us", "54.0"),
    line(ESTIMATE, "smsp__inst_executed.sum", "inst", "7,500"),
    line(ESTIMATE, STALL.format("no_instruction"), "inst", "3.5"),
    line(ESTIMATE, STALL.format("barrier"), "inst", "0.25"),
    line(PRUNE, "launch__registers_per_thread", "register/thread", "64"),
]


def test_kernels_are_averaged_and_named():
    kernels = read_kernels(ROWS)
    assert list(kernels) == ["estimate_scores", "prune"]
    assert kernels["estimate_scores"]["us"] == 53.0
    assert kernels["estimate_scores"]["k inst"] == 7.5
    assert kernels["prune"] == {"regs": 64.0}
    row = table_row("estimate_scores", kernels["estimate_scores"])
    assert row[:2] == ("estimate_scores", "53.0")
    assert row[-1] == "no_instruction 3.5, barrier 0.2"


@pytest.mark.parametrize(
    ("rows", "message"),
    [(ROWS[:1], "ncu printed no table"), ([HEADER], "no kernel of twilight_engine")],
)
def test_what_ncu_did_not_say_is_said(rows: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        read_kernels(rows)


def test_without_a_gpu_it_is_skipped(capsys: pytest.CaptureFixture[str]):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    assert main([]) == 0
    assert "skipped" in capsys.readouterr().out
