"""The cases that time the operator as it is: context and batch sweeps, and the breakdown."""

from __future__ import annotations

import dataclasses

from decode_attention.baselines import best_sdpa
from decode_attention.breakdown import ATTENTION, OpTimes, time_ops
from decode_attention.calibration import Match, calibrate
from decode_attention.floors import (
    StepBytes,
    floor_us,
    path_floor_us,
    resource_floor_us,
    step_bytes,
)
from decode_attention.policies import PolicyDecode
from decode_attention.setting import Setting, print_table
from decode_attention.steps import StepTimes, measure_steps
from decode_attention.workload import Workload
from twilight_engine.attention.decode import DecodeAttention
from twilight_engine.config import KVConfig, SparseConfig

STREAMED_STEPS = (1, 3)  # timed from, until: a dense step over the link takes long
BALANCED = SparseConfig.preset("balanced")


@dataclasses.dataclass(frozen=True)
class Measured:
    """One shape: whole steps, ops alone, bytes and floor."""

    match: Match
    step: StepTimes
    ops: OpTimes
    bytes: StepBytes
    ops_bytes: dict[str, float]

    @property
    def us(self) -> float:
        return self.step.us["us"]


@dataclasses.dataclass(frozen=True)
class Point:
    """What a run knows of one shape."""

    found: Measured
    metrics: dict[str, float]


def new_decode(workload: Workload, sparse: SparseConfig) -> PolicyDecode:
    return PolicyDecode(workload.cache, workload.sequences, sparse)


def measure(setting: Setting, workload: Workload) -> Measured:
    """Whole steps and every op of the preset `balanced`."""
    match = calibrate(workload, new_decode(workload, BALANCED))
    machine = setting.machine
    step = measure_steps(workload, machine, new_decode(workload, BALANCED), warm=setting.warm)
    ops = time_ops(
        workload,
        machine,
        new_decode(workload, BALANCED),
        at=setting.middle,
        repeats=setting.repeats,
    )
    shape, cache = workload.shape, workload.cache
    found = step_bytes(
        step.rows,
        group=shape.num_q_heads // shape.num_kv_heads,
        batch_heads=workload.batch * shape.num_kv_heads,
        head_dim=shape.head_dim,
        itemsize=cache.dtype.itemsize,
        kv=cache.config,
        balanced=True,
        margin=BALANCED.mass_margin > 0,
        granules=ops.granules_by_row * step.rows.missed,
    )
    row = shape.num_kv_heads * shape.head_dim * cache.dtype.itemsize * 2
    append = 3 * workload.batch * row  # read, and written to the window and the host
    return Measured(match, step, ops, found, {"append": append, **found.device})


def metrics_of(setting: Setting, workload: Workload, found: Measured) -> dict[str, float]:
    """The figures of a sweep's record that our operator gives."""
    rates, rows = setting.machine.rates, found.step.rows
    heads = workload.batch * workload.shape.num_kv_heads
    ops = {name: times["us"] for name, times in found.ops.us.items()}
    return {
        "step_us": found.us,
        "step_us_p10": found.step.us["us_p10"],
        "step_us_p90": found.step.us["us_p90"],
        "floor_us": floor_us(found.bytes, rates, workload.batch),
        "floor_path_us": path_floor_us(found.bytes, rates),
        "floor_resource_us": resource_floor_us(found.bytes, rates),
        "device_bytes": found.bytes.total,
        "missed_bytes": found.bytes.missed,
        "missed_granules": found.bytes.granules,
        "hbm_gbps": rates.hbm_gbps,
        "link_gbps": rates.link_gbps,
        "granules_per_s": rates.granules_per_s,
        **{f"{name}_us": us for name, us in ops.items()},
        "fetch_warm_us": found.ops.fetch_warm_us,
        "attend_us": sum(ops[name] for name in ATTENTION),
        "exact_rows": rows.exact / heads,
        "index_rows": rows.index / heads,
        "hit_rate": rows.hit_rate,
        "wanted_rows": found.match.wanted,
        "wanted_recall": found.match.recall,
        "layers": workload.shape.num_layers,
    }


def point(setting: Setting, tokens: int, batch: int) -> Point:
    """One shape, measured once a run: several cases show it."""
    known = setting.points.get((tokens, batch))
    if known is not None:
        return known
    shape = setting.gqa(tokens, batch)
    with setting.workload(
        shape, KVConfig(dense_layers=()), tokens, batch, share=setting.share
    ) as workload:
        found = measure(setting, workload)
        metrics = metrics_of(setting, workload, found)
        metrics["all_hits_us"] = _all_hits(setting, workload)
        metrics["dense_streamed_us"] = _streamed(setting, workload)
    sdpa = best_sdpa(setting.machine, shape, tokens, batch, setting.dtype, setting.repeats)
    metrics["sdpa_hbm_us"] = min(sdpa.values())
    made = setting.points[tokens, batch] = Point(found, metrics)
    return made


def _all_hits(setting: Setting, workload: Workload) -> float:
    """Microseconds of a layer's step that misses nothing: what any prefetch could reach."""
    decode = new_decode(workload, BALANCED)
    found = measure_steps(
        workload, setting.machine, decode, warm=setting.warm, query=setting.middle
    )
    return found.us["us"]


def _streamed(setting: Setting, workload: Workload) -> float:
    """Microseconds of a layer's dense step over the link."""
    dense = [SparseConfig(policy="dense")] * workload.batch
    decode = DecodeAttention(workload.cache, workload.sequences, dense)
    warm, stop = STREAMED_STEPS
    return measure_steps(workload, setting.machine, decode, warm=warm, stop=stop).us["us"]


def sweep(setting: Setting, case: str, points: list[tuple[int, int]]) -> None:
    """The operator beside dense attention in HBM and over the link, at (tokens, batch) points."""
    table: list[tuple[object, ...]] = []
    for tokens, batch in points:
        metrics = point(setting, tokens, batch).metrics
        setting.keep(f"{case}/{tokens}/b{batch}", metrics)
        table.append(sweep_row(f"{tokens}/b{batch}", metrics))
    print_table(
        f"{case}: one layer's step, us (p10-p90); bytes of the step's ops, missed rows' bytes",
        (
            "tokens/batch",
            "step",
            "p10-p90",
            "all hits",
            "floor",
            "of floor",
            "GB/s",
            "link GB/s",
            "sdpa in HBM",
            "dense streamed",
            "exact rows",
            "hits",
            "as wanted",
        ),
        table,
    )


def sweep_row(name: str, metrics: dict[str, float]) -> tuple[object, ...]:
    us = metrics["step_us"]
    return (
        name,
        f"{us:.1f}",
        f"{metrics['step_us_p10']:.1f}-{metrics['step_us_p90']:.1f}",
        f"{metrics['all_hits_us']:.1f}",
        f"{metrics['floor_us']:.1f}",
        f"{metrics['floor_us'] / us:.0%}",
        f"{metrics['device_bytes'] / us / 1e3:.0f}",
        f"{metrics['missed_bytes'] / us / 1e3:.1f}",
        f"{metrics['sdpa_hbm_us']:.1f} ({metrics['sdpa_hbm_us'] / us:.2f}x)",
        f"{metrics['dense_streamed_us']:.0f} ({metrics['dense_streamed_us'] / us:.0f}x)",
        f"{metrics['exact_rows']:.0f}",
        f"{metrics['hit_rate']:.0%}",
        f"{metrics['wanted_recall']:.1%}",
    )


def context_sweep(setting: Setting) -> None:
    """`context-sweep/<tokens>/b<batch>`."""
    sizes = setting.sizes
    sweep(setting, "context-sweep", [(t, b) for t in sizes.contexts for b in sizes.batches])


def batch_sweep(setting: Setting) -> None:
    """`batch-sweep/<tokens>/b<batch>`."""
    tokens, batches = setting.sizes.sweep
    sweep(setting, "batch-sweep", [(tokens, batch) for batch in batches])


def breakdown(setting: Setting) -> None:
    """`breakdown/<tokens>/b<batch>`: every op alone beside its own floor."""
    rates = setting.machine.rates
    for tokens, batch in setting.sizes.breakdown:
        measured = point(setting, tokens, batch)
        found, metrics = measured.found, dict(measured.metrics)
        table: list[tuple[object, ...]] = []
        for name, times in found.ops.us.items():
            us, num_bytes = times["us"], found.ops_bytes[name]
            floor = rates.hbm_us(num_bytes)
            if name == "fetch":
                floor = rates.link_us(found.bytes.missed, found.bytes.granules)
            metrics |= {f"{name}_us": us, f"{name}_floor_us": floor, f"{name}_bytes": num_bytes}
            spread = f"{times['us_p10']:.1f}-{times['us_p90']:.1f}"
            speed = f"{num_bytes / us / 1e3:.0f}"
            row = (name, f"{us:.1f}", spread, f"{num_bytes / 1e6:.2f}", speed, f"{floor:.1f}")
            table.append((*row, f"{floor / us:.0%}"))
        floor = metrics["floor_us"]
        total = sum(times["us"] for times in found.ops.us.values())
        table.append(("sum of ops", f"{total:.1f}", "", "", "", "", ""))
        step = ("whole step", f"{found.us:.1f}", "", f"{found.bytes.total / 1e6:.2f}")
        speed = f"{found.bytes.total / found.us / 1e3:.0f}"
        table.append((*step, speed, f"{floor:.1f}", f"{floor / found.us:.0%}"))
        setting.keep(f"breakdown/{tokens}/b{batch}", metrics)
        print_table(
            f"breakdown at {tokens} tokens, batch {batch} (HBM {rates.hbm_gbps:.0f} GB/s, link "
            f"{rates.link_gbps:.1f} GB/s, {rates.granules_per_s / 1e6:.0f} M translations/s; "
            f"fetch cold; {found.ops.fetch_warm_us:.1f} us with warm translations)",
            ("op", "us", "p10-p90", "MB", "GB/s", "own floor", "of floor"),
            table,
        )
