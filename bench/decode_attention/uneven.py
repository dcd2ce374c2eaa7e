"""The case of uneven head budgets: one KV head lists more rows than the mean, for the same total.

Selections are random, since their sizes alone matter: every exact row lies in a hot slot. The index
grade is as uneven as the exact one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product

import torch
from torch import Tensor

from decode_attention.breakdown import ATTENTION, LayerOps, run_all
from decode_attention.cases import BALANCED
from decode_attention.floors import Rows, StepBytes, step_bytes
from decode_attention.policies import PolicyDecode
from decode_attention.setting import Setting, print_table
from decode_attention.timing import Replay, spread, time_work
from decode_attention.workload import Shape
from twilight_engine.config import KVConfig
from twilight_engine.kv.cache import KVCache
from twilight_engine.layout import GRADE_EXACT, GRADE_INDEX, GRADE_TAIL, SLOTS_PER_CHUNK

RATIOS = (1, 2, 5)  # of the longest list to the mean
INDEX_SHARE = 0.15  # of the context in the index grade, as in the traces at .98
PARTS = {"rows": ("attend_rows",), "attend": ATTENTION}


def uneven(setting: Setting) -> None:
    """`uneven/<mean rows>/max<ratio>`: attention over the exact rows, and over all grades.

    Of one sequence; names of larger batches, all of whose sequences are alike, end in /b<batch>.
    """
    tokens, means, batches = setting.sizes.uneven
    for batch in batches:
        table: list[tuple[object, ...]] = []
        with layers_at(setting, setting.gqa(tokens, batch), tokens, batch, max(means)) as layers:
            works = {
                part: Replay(setting.device, partial(run_all, layers, *names))
                for part, names in PARTS.items()
            }
            for mean in means:
                table += _measure(setting, layers, works, mean)
        part_headers = ("us", "GB/s", "of HBM", "over even")
        print_table(
            f"uneven head budgets at {tokens} tokens, batch {batch}, rows hot: attend_rows; "
            "all grades",
            ("mean rows/max to mean", *part_headers, *(f"all: {name}" for name in part_headers)),
            table,
        )


def _measure(
    setting: Setting, layers: list[LayerOps], works: dict[str, Replay], mean: int
) -> list[tuple[object, ...]]:
    """Records and table rows of lists of this mean size, one for each ratio."""
    machine, meta = setting.machine, layers[0].meta
    batch, heads = meta.num_seqs, layers[0].cache.model.num_kv_heads
    even: dict[str, float] = {}
    table = []
    for ratio in (r for r in RATIOS if r <= heads):
        sizes = uneven_sizes(heads, mean, ratio)
        index = uneven_sizes(heads, int(INDEX_SHARE * meta.max_len), ratio)
        for layer in layers:
            set_lists(layer, sizes, index)
        found = _bytes(layers[0], batch * sum(sizes), batch * sum(index))
        metrics = {"hbm_gbps": machine.rates.hbm_gbps, "max_rows": float(max(sizes))}
        for part, names in PARTS.items():
            times = time_work(
                setting.device, works[part], repeats=setting.repeats, before=machine.flush_l2
            )
            us = spread([t / len(layers) for t in times])["us"]
            gbps = sum(found.device[name] for name in names) / us / 1e3
            prefix = "" if part == "rows" else "attend_"
            over = us / even.setdefault(part, us) - 1
            metrics |= {f"{prefix}us": us, f"{prefix}gbps": gbps, f"{prefix}over_even": over}
        name = f"{mean}/max{ratio}"
        suffix = "" if batch == 1 else f"/b{batch}"
        setting.keep(f"uneven/{name}{suffix}", metrics, traced=False)
        table.append(_row(name, metrics))
    return table


def uneven_sizes(num_heads: int, mean: int, ratio: int) -> list[int]:
    """List sizes of num_heads * mean rows: one head has ratio * mean, the others share the rest."""
    rest = num_heads * mean - ratio * mean
    others = num_heads - 1
    sizes = [rest // others + (i < rest % others) for i in range(others)]
    sizes.insert(num_heads // 2, ratio * mean)
    return sizes


def set_lists(layer: LayerOps, exact: Sequence[int], index: Sequence[int]) -> None:
    """Random lists of these sizes, a KV head each, in place; every exact row has a hot slot.

    Every sequence has lists of the same sizes.
    """
    pruned, meta, hot = layer.pruned, layer.meta, layer.graded.tiers.hot
    assert hot is not None
    device, first, last = pruned.grades.device, meta.num_sink, int(meta.window_starts[0])
    slots = torch.randperm(hot.slot_key.shape[0], device=device).int() + hot.first_row
    pruned.grades.fill_(GRADE_EXACT)
    pruned.grades[..., first:last] = GRADE_TAIL
    for b, h in product(range(meta.num_seqs), range(len(exact))):
        num_exact, num_index = exact[h], index[h]
        tokens = torch.randperm(last - first, device=device).int() + first
        chosen, lower = (
            x.sort().values for x in tokens[: num_exact + num_index].tensor_split([num_exact])
        )
        pruned.grades[b, h, chosen.long()] = GRADE_EXACT
        pruned.grades[b, h, lower.long()] = GRADE_INDEX
        pruned.exact.tokens[b, h, :num_exact] = chosen
        layer.places[b, h, :num_exact] = slots[:num_exact]
        slots = slots[num_exact:]
    pruned.exact.counts.copy_(torch.tensor(exact))
    pruned.index_counts.copy_(torch.tensor(index))


@contextmanager
def layers_at(
    setting: Setting, shape: Shape, tokens: int, batch: int, mean_rows: int
) -> Iterator[list[LayerOps]]:
    """Layers of `batch` sequences with random rows and index, and their scores."""
    heads = shape.num_kv_heads
    chunks = -(-batch * heads * mean_rows // SLOTS_PER_CHUNK) + 1
    row_bytes = 2 * shape.head_dim * setting.dtype.itemsize
    slot_bytes = chunks * SLOTS_PER_CHUNK * (row_bytes + 16)
    config = KVConfig(dense_layers=(), hot_bytes=shape.num_layers * slot_bytes)
    with KVCache(
        shape,
        config,
        max_model_len=tokens,
        max_num_seqs=batch,
        device=setting.device,
        dtype=setting.dtype,
    ) as cache:
        sequences = [cache.open_sequence(tokens) for _ in range(batch)]
        for sequence in sequences:
            sequence.length = tokens - 1
        for tiers in cache.layers:
            assert tiers.windows is not None and tiers.index is not None
            tiers.windows.rows.normal_()
            for name in ("k_codes", "v_codes"):
                getattr(tiers.index, name).random_(256)
            for name in ("k_scale", "v_scale", "v_mean"):
                getattr(tiers.index, name).normal_(std=0.05)
        decode = PolicyDecode(cache, sequences, BALANCED)
        decode.begin_step()
        decode.advance()
        yield [_layer(decode, i, setting) for i in range(shape.num_layers)]


def _layer(decode: PolicyDecode, i: int, setting: Setting) -> LayerOps:
    shape = decode.cache.model

    def random(heads: int) -> Tensor:
        rows = len(decode.sequences), heads, shape.head_dim
        return torch.randn(rows, device=setting.device, dtype=setting.dtype)

    q, k, v = random(shape.num_q_heads), random(shape.num_kv_heads), random(shape.num_kv_heads)
    layer = LayerOps(decode.layers[i], q, k, v, decode.meta)
    layer.estimate()
    layer.prune()
    set_lists(layer, [1] * shape.num_kv_heads, [1] * shape.num_kv_heads)
    return layer


def _bytes(layer: LayerOps, exact: int, index: int) -> StepBytes:
    meta, cache = layer.meta, layer.cache
    shape = cache.model
    start = int(meta.window_starts[0])
    heads = meta.num_seqs * shape.num_kv_heads
    listed, resident = (start - meta.num_sink), meta.max_len - start + meta.num_sink
    tail = heads * listed - exact - index
    return step_bytes(
        Rows(exact, index, tail, resident=heads * resident, missed=0),
        group=shape.num_q_heads // shape.num_kv_heads,
        batch_heads=heads,
        head_dim=shape.head_dim,
        itemsize=cache.dtype.itemsize,
        kv=cache.config,
        balanced=True,
        margin=True,
        granules=0,
    )


def _row(name: str, metrics: dict[str, float]) -> tuple[object, ...]:
    cells: list[object] = [name]
    for prefix in ("", "attend_"):
        gbps = metrics[f"{prefix}gbps"]
        cells += [f"{metrics[f'{prefix}us']:.1f}", f"{gbps:.0f}"]
        cells += [f"{gbps / metrics['hbm_gbps']:.0%}", f"{metrics[f'{prefix}over_even']:+.1%}"]
    return tuple(cells)
