"""The cases that set policies side by side: the paper's table 7, and what people use instead."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from decode_attention.baselines import best_sdpa
from decode_attention.calibration import calibrate
from decode_attention.cases import BALANCED, STREAMED_STEPS, new_decode
from decode_attention.host_policies import CpuGather, PageCopies
from decode_attention.policies import (
    MakeAttention,
    PolicyDecode,
    QuestPages,
    ZeroCopyRows,
    forget_rows,
)
from decode_attention.setting import Setting, print_table
from decode_attention.steps import StepTimes, measure_steps
from decode_attention.workload import Shape, Workload
from twilight_engine.attention.decode import DecodeAttention
from twilight_engine.attention.step import window_start
from twilight_engine.config import EVERY_CANDIDATE, KVConfig, SparseConfig

PAPER = SparseConfig.preset("paper")
QUEST = PAPER.replace(attn_top_k=EVERY_CANDIDATE)
DENSE = SparseConfig(policy="dense")
# Sets of the other presets as multiples of balanced's: the traces' 2,034 and 5,597 rows to 233.
SET_RATIOS = {"balanced": 1.0, "lean": 8.7, "paper": 24.0}
OTHER_RULE = "mean95"
MOST_SHARE = 0.25  # what the paper's selector leaves


def paper_table7(setting: Setting) -> None:
    """`paper-table7/<tokens>`: MHA, one sequence, one layer.

    `paper` has no cache: its hot rows are emptied before each step, so that every row is fetched.
    `paper_direct` has no room for any: its rows are read from the host by the attention itself.
    Warm: the translations of the layer's host rows stay from step to step, as in a bench of an
    operator alone. Cold: before each step far host memory is read, as other layers would be.
    """
    table: list[tuple[object, ...]] = []
    for tokens in setting.sizes.table7:
        metrics = _table7(setting, tokens)
        setting.keep(f"paper-table7/{tokens}", metrics)
        for name in ("quest", "paper", "paper_direct", "balanced"):
            us, cold = metrics[f"{name}_us"], metrics[f"{name}_cold_us"]
            table.append(
                (
                    f"{tokens} {name}",
                    f"{us:.1f}",
                    f"{metrics['quest_us'] / us:.1f}x",
                    f"{cold:.1f}",
                    f"{metrics['quest_cold_us'] / cold:.1f}x",
                    f"{metrics[f'{name}_rows']:.0f}",
                    f"{metrics[f'{name}_link_bytes'] / us / 1e3:.1f}",
                )
            )
    print_table(
        "paper-table7: MHA, one sequence, one layer's step; translations warm, and cold",
        ("tokens, policy", "us", "to quest", "cold us", "to quest", "rows a head", "link GB/s"),
        table,
    )


def _table7(setting: Setting, tokens: int) -> dict[str, float]:
    shape, machine = setting.sizes.mha, setting.machine
    share = setting.sizes.table7_rows / tokens
    metrics: dict[str, float] = {}

    def both(
        name: str,
        workload: Workload,
        decode: Callable[[], DecodeAttention],
        prepare: Callable[[], object] = lambda: None,
    ) -> None:
        run = partial(measure_steps, workload, machine, warm=setting.warm, prepare=prepare)
        warm = run(decode(), cool=machine.flush_l2)
        cold = run(decode())
        row_bytes = workload.cache.row_bytes
        metrics.update(
            {
                f"{name}_us": warm.us["us"],
                f"{name}_cold_us": cold.us["us"],
                f"{name}_rows": warm.rows.exact / shape.num_kv_heads,
                f"{name}_link_bytes": warm.rows.missed * row_bytes,
            }
        )

    def decode(w: Workload, sparse: SparseConfig, attention: MakeAttention) -> DecodeAttention:
        return PolicyDecode(w.cache, w.sequences, sparse, attention)

    most = tokens // 4 + 2 * KVConfig().page_size
    staging = shape.num_kv_heads * most * 2 * shape.head_dim * setting.dtype.itemsize
    kv = KVConfig.preset("paper", dense_layers=(), hot_bytes=2 * staging)
    with setting.workload(shape, kv, tokens, 1, share=share) as w:
        calibrate(w, new_decode(w, PAPER))
        quest = partial(QuestPages, most_rows=most)
        both("quest", w, lambda: decode(w, QUEST, quest))
        empty = partial(forget_rows, w.cache, keep_last=False)
        both("paper", w, lambda: new_decode(w, PAPER), empty)
    kv = KVConfig.preset("paper", dense_layers=(), hot_bytes=0)
    with setting.workload(shape, kv, tokens, 1, share=share) as w:
        calibrate(w, new_decode(w, PAPER))
        both("paper_direct", w, lambda: new_decode(w, PAPER))
    kv = KVConfig(dense_layers=())
    with setting.workload(shape, kv, tokens, 1, share=setting.share) as w:
        calibrate(w, new_decode(w, BALANCED))
        both("balanced", w, lambda: new_decode(w, BALANCED))
    return metrics


def policies(setting: Setting) -> None:
    """`policies/<policy>/<tokens>`: one sequence."""
    for tokens in setting.sizes.policies:
        shape = setting.gqa(tokens, 1)
        found = {
            **_dense(setting, shape, tokens),
            **_top_k(setting, shape, tokens),
            **_presets(setting, shape, tokens),
        }
        row_bytes = 2 * shape.head_dim * setting.dtype.itemsize
        table: list[tuple[object, ...]] = []
        for name, step in found.items():
            us, link = step.us, step.rows.missed * row_bytes
            metrics = {
                "step_us": us["us"],
                "step_us_p10": us["us_p10"],
                "step_us_p90": us["us_p90"],
                "exact_rows": step.rows.exact / shape.num_kv_heads,
                "link_bytes": link,
                "hit_rate": step.rows.hit_rate,
            }
            setting.keep(f"policies/{name}/{tokens}", metrics)
            table.append(
                (
                    name,
                    f"{us['us']:.1f}",
                    f"{us['us_p10']:.1f}-{us['us_p90']:.1f}",
                    f"{metrics['exact_rows']:.0f}",
                    f"{link / 1e6:.2f}",
                    f"{link / us['us'] / 1e3:.1f}",
                )
            )
        print_table(
            f"policies at {tokens} tokens, batch 1: one layer's step",
            ("policy", "us", "p10-p90", "exact rows a head", "link MB", "link GB/s"),
            table,
        )


def _dense(setting: Setting, shape: Shape, tokens: int) -> dict[str, StepTimes]:
    warm, stop = STREAMED_STEPS
    found: dict[str, StepTimes] = {}
    for name, kv in (
        ("dense-resident", KVConfig(dense_layers="all")),
        ("dense-streamed", KVConfig(dense_layers=())),
    ):
        with setting.workload(shape, kv, tokens, 1, share=setting.share) as w:
            decode = DecodeAttention(w.cache, w.sequences, [DENSE])
            until = stop if name == "dense-streamed" else None
            found[name] = measure_steps(w, setting.machine, decode, warm=warm, stop=until)
    sdpa = best_sdpa(setting.machine, shape, tokens, 1, setting.dtype, repeats=setting.repeats)
    us = min(sdpa.values())
    times = {"us": us, "us_p10": us, "us_p90": us}
    found["sdpa-resident"] = StepTimes(times, found["dense-resident"].rows)
    return found


def _top_k(setting: Setting, shape: Shape, tokens: int) -> dict[str, StepTimes]:
    """Fixed top-k of the exact estimate's kind, dropped tail, rows brought in five ways."""
    found: dict[str, StepTimes] = {}
    kv = KVConfig(dense_layers=())
    machine, warm = setting.machine, setting.warm
    with setting.workload(shape, kv, tokens, 1, share=setting.share) as w:
        calibrate(w, new_decode(w, BALANCED))
        top_k = _same_rows(w)

        found["topk-previous-set"] = measure_steps(
            w,
            machine,
            new_decode(w, top_k),
            warm=warm,
            prepare=partial(forget_rows, w.cache, keep_last=True),
        )
        found["topk-lru"] = measure_steps(w, machine, new_decode(w, top_k), warm=warm)
    row_bytes = 2 * shape.head_dim * setting.dtype.itemsize
    staging = shape.num_layers * shape.num_kv_heads * tokens * row_bytes  # pages may be all
    kv = KVConfig(dense_layers=(), hot_bytes=staging)
    with setting.workload(shape, kv, tokens, 1, share=setting.share) as w:
        calibrate(w, new_decode(w, BALANCED))
        top_k = _same_rows(w)
        gather = partial(ZeroCopyRows, most_rows=top_k.attn_top_k)
        found["topk-zero-copy"] = measure_steps(
            w, machine, PolicyDecode(w.cache, w.sequences, top_k, gather), warm=warm
        )
        found["topk-cpu-gather"] = measure_steps(
            w, machine, new_decode(w, top_k), warm=warm, make_layer=CpuGather
        )
        pages = top_k.replace(fetch="page")
        found["topk-page-copies"] = measure_steps(
            w, machine, new_decode(w, pages), warm=warm, make_layer=PageCopies
        )
    return found


def _same_rows(workload: Workload) -> SparseConfig:
    """A fixed k with as many rows as the wanted sets have on average, and no lower grades."""
    kv, length = workload.cache.config, workload.prompt + workload.steps // 2
    resident = kv.num_sink + length - window_start(length, kv.num_recent, kv.page_size)
    counts = [
        float(workload.counts(t, layer).float().mean())
        for t in range(workload.steps)
        for layer in range(workload.shape.num_layers)
    ]
    k = resident + max(1, round(sum(counts) / len(counts)))
    return SparseConfig(attn_top_k=k, index_top_p=None, tail="renormalise", mass_margin=0.0)


def _presets(setting: Setting, shape: Shape, tokens: int) -> dict[str, StepTimes]:
    found: dict[str, StepTimes] = {}
    for name, ratio in SET_RATIOS.items():
        sparse = SparseConfig.preset(name)
        share = None if setting.share is None else min(MOST_SHARE, setting.share * ratio)
        rule = None if name == "balanced" else OTHER_RULE
        kv = KVConfig.preset(name, dense_layers=())
        with setting.workload(shape, kv, tokens, 1, share=share, rule=rule) as w:
            calibrate(w, new_decode(w, sparse))
            found[name] = measure_steps(
                w, setting.machine, new_decode(w, sparse), warm=setting.warm
            )
    return found
