"""What the decode attention bench is made of: traces, workload, policies, floors."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from decode_attention.calibration import calibrate
from decode_attention.cases import BALANCED, new_decode
from decode_attention.comparisons import PAPER, QUEST
from decode_attention.floors import (
    Rows,
    StepBytes,
    floor_us,
    path_floor_us,
    resource_floor_us,
    step_bytes,
)
from decode_attention.host_policies import CpuGather, HostFetchLayer, PageCopies
from decode_attention.machine import Machine, Rates, granules_of
from decode_attention.policies import (
    PolicyDecode,
    QuestPages,
    ZeroCopyRows,
    forget_rows,
)
from decode_attention.steps import StepRun, rows_of
from decode_attention.traces import ScaledTrace, Trace, load_trace, nearest_rule, reflected
from decode_attention.uneven import layers_at, set_lists, uneven_sizes
from decode_attention.workload import Shape, Workload
from torch import Tensor

from tests.bench.conftest import STEPS
from twilight_engine.config import KVConfig, SparseConfig
from twilight_engine.layout import GRADE_INDEX, NO_ROW

CPU = torch.device("cpu")
TOKENS = 1024


def test_a_trace_without_its_arrays_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", shape=np.array([1, 1, 1]))
    with pytest.raises(ValueError, match="lacks the arrays n_start, mean80_indices"):
        load_trace(tmp_path / "t.npz", "mean80")


def test_rules_go_by_share() -> None:
    assert [nearest_rule(s) for s in (0.001, 0.007, 0.027, 0.2)] == [
        "mean80",
        "mean80",
        "mean90",
        "mean95",
    ]


@pytest.mark.parametrize("share", [0.005, 0.03])
@pytest.mark.parametrize("tokens", [700, 9000])
def test_scaled_sets_keep_their_share_and_return(
    share: float, tokens: int, trace_file: Path
) -> None:
    trace = load_trace(trace_file, "mean80")
    scaled = ScaledTrace(
        trace, num_layers=2, first=4, last=tokens - 192, share=share, tokens=tokens
    )
    sets = [[scaled.rows(i, 0, h, t) for t in range(STEPS)] for i in range(2) for h in range(4)]
    rows = [r for head in sets for r in head]
    assert all((np.diff(r) > 0).all() and r.min(initial=4) >= 4 for r in rows)
    assert max(r.max(initial=0) for r in rows) < tokens - 192
    assert np.mean([len(r) for r in rows]) == pytest.approx(share * tokens, rel=0.25, abs=1)
    again = [np.isin(b, a).mean() for h in sets for a, b in pairwise(h) if len(b)]
    assert np.mean(again) == pytest.approx(0.7, abs=0.08)  # three in ten change
    assert not np.array_equal(scaled.rows(0, 0, 0, 9), scaled.rows(0, 1, 0, 9))


def test_scattered_sets_are_as_large_and_return_as_often(trace_file: Path) -> None:
    trace = load_trace(trace_file, "mean90")
    kwargs = {"num_layers": 2, "first": 4, "last": 8000, "share": 0.02, "tokens": 8192}
    there, scattered = (ScaledTrace(trace, scatter=s, **kwargs) for s in (False, True))
    for h in range(4):
        before, after = ([x.rows(1, 2, h, t) for t in range(4)] for x in (there, scattered))
        assert [len(r) for r in before] == [len(r) for r in after]
        assert all((np.diff(r) > 0).all() and r[0] >= 4 and r[-1] < 8000 for r in after)
        again = [[np.isin(b, a).sum() for a, b in pairwise(x)] for x in (before, after)]
        assert again[0] == again[1]
        assert not np.array_equal(before[0], after[0])


def test_an_empty_set_becomes_one_row() -> None:
    empty = Trace([[[np.empty(0, np.int64)] * 4] * 2] * 4, 2000)
    scaled = ScaledTrace(empty, num_layers=2, first=4, last=800, share=None, tokens=1000)
    assert scaled.rows(0, 0, 0, 0).tolist() == scaled.rows(0, 0, 0, 3).tolist() == [402]


@pytest.mark.parametrize("ratio", [1, 2, 5])
def test_uneven_sizes_have_the_same_total(ratio: int) -> None:
    sizes = uneven_sizes(8, 515, ratio)
    assert sum(sizes) == 8 * 515 and max(sizes) == ratio * 515 and min(sizes) >= 0
    assert sorted(sizes)[-2] - min(sizes) <= 1


def test_uneven_lists_tell_their_sizes() -> None:
    setting: Any = SimpleNamespace(device=CPU, dtype=torch.float32)
    exact, index = [10, 86], [30, 4]
    with layers_at(setting, Shape(1, 4, 2, 64), 512, 2, 48) as layers:
        set_lists(layers[0], exact, index)
        pruned, places = layers[0].pruned, layers[0].places
        assert pruned.exact.counts.tolist() == [exact] * 2
        assert pruned.index_counts.tolist() == [index] * 2
        assert (pruned.grades == GRADE_INDEX).sum(-1).tolist() == [index] * 2
        assert places[:, 0, :10].unique().numel() == 20


def test_counts_are_the_traces_own(trace_file: Path) -> None:
    trace = load_trace(trace_file, "mean80")
    scaled = ScaledTrace(trace, num_layers=4, first=4, last=8000, share=None, tokens=8192)
    assert len(scaled.rows(1, 0, 1, 5)) == len(trace.sets[1][1][5])


def test_steps_go_to_and_fro() -> None:
    assert [reflected(i, 4) for i in range(8)] == [0, 1, 2, 3, 2, 1, 0, 1]


def make_workload(trace_file: Path, kv: KVConfig, *, share: float = 0.03) -> Workload:
    shape = Shape(2, 4, 2, 64)
    trace = load_trace(trace_file, "mean80")
    return Workload(
        shape,
        kv,
        tokens=TOKENS,
        batch=2,
        steps=6,
        make_trace=lambda first, last: ScaledTrace(
            trace, num_layers=2, first=first, last=last, share=share, tokens=TOKENS
        ),
        device=CPU,
        dtype=torch.float32,
    )


ALL_SLOTS = 4 * 2 * 2 * TOKENS * 2 * 64 * 4  # of two layers, twice the KV


def test_the_pipeline_chooses_the_traces_sets(trace_file: Path, machine: Machine) -> None:
    workload = make_workload(trace_file, KVConfig(dense_layers=()))
    match = calibrate(workload, new_decode(workload, BALANCED))
    assert match.got == pytest.approx(match.wanted, rel=0.05)
    assert match.recall > 0.97
    run = StepRun(workload, machine, new_decode(workload, BALANCED))
    assert len(run.run(2)) == 4
    rows = rows_of(workload, 2)
    wanted = np.mean([[float(workload.counts(t, i).sum()) for i in range(2)] for t in range(2, 6)])
    assert rows.exact == pytest.approx(wanted, rel=0.15)
    assert 0.1 < rows.hit_rate < 1
    assert rows.listed + rows.resident == pytest.approx(2 * 2 * (TOKENS - 1.5), abs=2)
    workload.rewind()
    assert [s.length for s in workload.sequences] == [TOKENS - 6] * 2
    workload.close()


def outputs(
    workload: Workload, machine: Machine, decode: PolicyDecode, layer: type[HostFetchLayer] | None
) -> Tensor:
    """What the first layer's third step gives under a policy."""
    run = StepRun(workload, machine, decode, layer)
    run.run(2, stop=2)
    run.begin(2)
    if run._host_layers is None:
        out = decode(0, run.q[0], workload.new_k[0], workload.new_v[0])
    else:
        run._host_layers[0]()
        host_layer = run._host_layers[0]
        assert isinstance(host_layer, HostFetchLayer)
        out = host_layer._attend()
    decode.end_step()
    workload.rewind()
    return out


def test_policies_attend_the_same_rows(trace_file: Path, machine: Machine) -> None:
    kv = KVConfig(dense_layers=(), hot_bytes=ALL_SLOTS)
    workload = make_workload(trace_file, kv)
    calibrate(workload, new_decode(workload, BALANCED))
    config = SparseConfig(attn_top_k=250, index_top_p=None, tail="renormalise", mass_margin=0.0)
    gather = partial(ZeroCopyRows, most_rows=250)
    for sparse in (config, config.replace(fetch="page")):
        expected = outputs(workload, machine, new_decode(workload, sparse), None)
        hosts = [PageCopies] if sparse.fetch == "page" else [CpuGather]
        for layer in hosts:
            decode = new_decode(workload, sparse)
            torch.testing.assert_close(outputs(workload, machine, decode, layer), expected)
        if sparse.fetch == "row":
            staged = PolicyDecode(workload.cache, workload.sequences, sparse, gather)
            torch.testing.assert_close(outputs(workload, machine, staged, None), expected)
    workload.close()


def test_staged_lists_of_unequal_lengths_do_not_meet(trace_file: Path, machine: Machine) -> None:
    workload = make_workload(trace_file, KVConfig(dense_layers=(), hot_bytes=ALL_SLOTS))
    calibrate(workload, new_decode(workload, BALANCED))
    assert len(workload.counts(2, 0).unique()) > 1
    expected = outputs(workload, machine, new_decode(workload, BALANCED), None)
    staged = PolicyDecode(workload.cache, workload.sequences, BALANCED, ZeroCopyRows)
    torch.testing.assert_close(outputs(workload, machine, staged, None), expected)
    workload.close()


def test_quest_pages_are_the_operators(trace_file: Path, machine: Machine) -> None:
    kv = KVConfig.preset("paper", dense_layers=(), hot_bytes=ALL_SLOTS)
    workload = make_workload(trace_file, kv)
    calibrate(workload, new_decode(workload, PAPER))
    expected = outputs(workload, machine, new_decode(workload, QUEST), None)
    quest = PolicyDecode(workload.cache, workload.sequences, QUEST, QuestPages)
    torch.testing.assert_close(outputs(workload, machine, quest, None), expected)
    workload.close()


def test_the_previous_set_forgets_what_is_older(trace_file: Path, machine: Machine) -> None:
    workload = make_workload(trace_file, KVConfig(dense_layers=(), hot_bytes=ALL_SLOTS))
    calibrate(workload, new_decode(workload, BALANCED))
    StepRun(workload, machine, new_decode(workload, BALANCED)).run(2)
    hot = workload.cache.layers[0].hot
    assert hot is not None
    last = (hot.slot_stamp == hot.step) & (hot.slot_key != NO_ROW)
    before = int((hot.slot_key != NO_ROW).sum())
    forget_rows(workload.cache, keep_last=True)
    assert torch.equal(hot.slot_key != NO_ROW, last)
    assert int((hot.slot_map != NO_ROW).sum()) == int(last.sum()) < before
    forget_rows(workload.cache, keep_last=False)
    assert (hot.slot_key == NO_ROW).all() and (hot.slot_map == NO_ROW).all()
    workload.close()


def test_staging_must_hold_the_lists(trace_file: Path) -> None:
    workload = make_workload(trace_file, KVConfig(dense_layers=(), hot_bytes=0))
    with pytest.raises(ValueError, match="hot_bytes gives a layer 0 slots; staging 4 lists of 9"):
        ZeroCopyRows(workload.cache, 0, [BALANCED] * 2, most_rows=9)
    workload.close()


RATES = Rates(hbm_gbps=1000.0, link_gbps=50.0, granules_per_s=1e6)


def test_floors_follow_the_path_or_the_resource() -> None:
    device = {"estimate": 1e6, "prune": 1e6, "fetch": 1e5, "attend_lower": 4e6, "attend_rows": 2e5}
    step = StepBytes(device, missed=1e5, granules=3)
    # 2 us before; the fetch takes 3 us (granules), what is resident 4.1 us; the misses 0.1 us.
    assert path_floor_us(step, RATES) == pytest.approx(2 + 4.1 + 0.1)
    assert resource_floor_us(step, RATES) == pytest.approx(6.3)
    assert floor_us(step, RATES, 1) == path_floor_us(step, RATES)
    assert floor_us(step, RATES, 8) == resource_floor_us(step, RATES)
    slow = StepBytes(device, missed=1e6, granules=3)
    assert resource_floor_us(slow, RATES) == pytest.approx(20)


def test_bytes_of_a_step_at_the_8b_shape() -> None:
    rows = Rows(exact=8 * 900, index=8 * 26000, tail=8 * 103972, resident=8 * 200, missed=8 * 200)
    found = step_bytes(
        rows,
        group=4,
        batch_heads=8,
        head_dim=128,
        itemsize=2,
        kv=KVConfig(),
        balanced=True,
        margin=True,
        granules=100,
    )
    # 72 bytes of index a listed token and head, 16 of scores: DESIGN's 75 MB and as much again / 4.
    assert found.device["estimate"] == pytest.approx(8 * 131000 * (72 + 16), rel=0.01)
    assert found.missed == 8 * 200 * 512
    assert found.device["attend_rows"] == pytest.approx(8 * 1100 * 512, rel=0.05)


def test_granules_are_distinct_64_kb() -> None:
    src = torch.tensor([[[0, 1, 127, 128, 5], [0, 300, NO_ROW, 7, 7]]], dtype=torch.int32)
    counts = torch.tensor([[4, 3]], dtype=torch.int32)
    assert granules_of(src, counts, row_bytes=512, head_stride_bytes=1 << 20) == 2 + 2
