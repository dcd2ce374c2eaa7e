"""Every case of the decode attention bench at tiny sizes: structure, not times."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from bench_decode_attention import CASES, main

TIMES = ("step_us", "floor_us", "sdpa_hbm_us", "dense_streamed_us", "device_bytes", "missed_bytes")
TIMES += ("hbm_gbps", "link_gbps", "estimate_us", "prune_us", "fetch_us", "attend_us")
POLICIES = {"dense-resident", "dense-streamed", "sdpa-resident", "balanced", "lean", "paper"}
POLICIES |= {f"topk-{w}" for w in ("page-copies", "cpu-gather", "zero-copy", "previous-set", "lru")}


@pytest.fixture(scope="module")
def records(trace_file: Path) -> dict[str, dict[str, float]]:
    """All cases, run once."""
    path = trace_file.parent / "records.jsonl"
    sizes = ["--case", "all", "--steps", "5", "--warm", "3", "--repeats", "1", "--json", str(path)]
    where = ["--device", "cpu", "--shape", "tiny", "--trace", str(trace_file)]
    assert main([*where, *sizes, "--plot", str(trace_file.parent)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["case"]: row["metrics"] for row in rows}


def test_every_case_leaves_its_records(records: dict[str, dict[str, float]]) -> None:
    names = set(records)
    assert {f"context-sweep/{t}/b{b}" for t in (512, 1024) for b in (1, 2)} <= names
    assert {f"batch-sweep/512/b{b}" for b in (1, 2)} <= names
    assert {"paper-table7/1024", "breakdown/1024/b1", "graph/nodes"} <= names
    assert {"uneven/48/max1", "uneven/48/max2", "uneven/48/max1/b2"} <= names
    assert {n.split("/")[1] for n in names if n.startswith("policies/")} == POLICIES
    assert {name.split("/")[0] for name in names} == set(CASES)


def test_sweeps_have_the_fields_that_are_asked_for(records: dict[str, dict[str, float]]) -> None:
    for name, metrics in records.items():
        if "sweep" in name:
            assert set(TIMES) <= set(metrics)
            assert all(metrics[field] > 0 for field in TIMES), name
            assert metrics["wanted_recall"] > 0.9
    table7 = records["paper-table7/1024"]
    for policy in ("quest", "paper", "balanced"):
        assert table7[f"{policy}_us"] > 0 and table7[f"{policy}_cold_us"] > 0
    # Quest takes a quarter of the context, less what is resident anyway.
    assert 0.1 * 1024 < table7["quest_rows"] <= 0.26 * 1024
    ops = records["breakdown/1024/b1"]
    assert all(ops[f"{op}_floor_us"] > 0 for op in ("append", "estimate", "fetch", "merge"))


def test_uneven_lists_are_set_beside_even_ones(records: dict[str, dict[str, float]]) -> None:
    even, uneven = (records[f"uneven/48/max{ratio}"] for ratio in (1, 2))
    assert even["over_even"] == even["attend_over_even"] == 0
    assert (even["max_rows"], uneven["max_rows"]) == (48, 96)
    assert uneven["over_even"] == pytest.approx(uneven["us"] / even["us"] - 1, abs=1e-3)
    assert uneven["gbps"] > 0 and uneven["attend_gbps"] > 0 and uneven["hbm_gbps"] > 0


def test_random_lists_have_names_of_their_own(trace_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    where = ["--device", "cpu", "--shape", "tiny", "--trace", str(trace_file), "--json", str(path)]
    sizes = ["--steps", "3", "--warm", "2", "--repeats", "1", "--lists", "random"]
    assert main([*where, *sizes, "--case", "batch-sweep", "uneven", "--share", "0.03"]) == 0
    names = {json.loads(line)["case"] for line in path.read_text().splitlines()}
    assert names >= {"batch-sweep/512/b1/share0.03/random", "uneven/48/max1"}


def test_only_caches_save_link_bytes(records: dict[str, dict[str, float]]) -> None:
    moved = {n.split("/")[1]: m["link_bytes"] for n, m in records.items() if "policies/" in n}
    assert moved["topk-lru"] <= moved["topk-previous-set"] < moved["topk-zero-copy"]
    assert moved["topk-zero-copy"] == moved["topk-cpu-gather"] < moved["topk-page-copies"]
    assert moved["topk-page-copies"] <= moved["dense-streamed"]
    assert moved["dense-resident"] == 0


def test_plots_are_drawn(records: dict[str, dict[str, float]], trace_file: Path) -> None:
    for name in ("policies", "breakdown"):
        assert (trace_file.parent / f"decode_attention_{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace", "missing.npz"], "--trace is missing.npz, which is no file"),
        (["--steps", "40", "--warm", "40"], r"--warm is 40; it must lie in \[2, --steps 40\)"),
        (["--share", "0.5"], r"--share is 0.5; it must lie in \(0, 0.25\)"),
        (["--repeats", "0"], "--repeats is 0; it must be >= 1"),
        (["--shape", "llama-3.1-8b"], "--shape is llama-3.1-8b with --device cpu; allowed there"),
        (["--steps", "33", "--warm", "2"], "33 steps; it must have 1 to 32"),
    ],
)
def test_wrong_options_are_one_line_and_2(
    arguments: list[str], message: str, trace_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--device", "cpu", "--shape", "tiny", "--trace", str(trace_file)]
    assert main([*where, "--case", "batch-sweep", *arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error)


def test_without_records_there_is_nothing_to_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--plot", str(tmp_path), "--json", str(tmp_path / "none.jsonl")]) == 2
    assert "no records to plot" in capsys.readouterr().err
