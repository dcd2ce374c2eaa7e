"""The estimate of one layer at a time: microseconds, GB/s, and the share of HBM's read rate.

Cases: `G<query heads a KV head>/b<sequences>/<tokens>`, 8 KV heads of 128, int4_channel, with the
errors that a margin wants. Layers of distinct codes follow each other in one CUDA graph, several
times what the L2 holds in all. Bytes: codes, scales and resident K read; scores and errors written.
Needs a CUDA device.

    python bench/bench_estimate_scores.py --json

Target: 85 % of the rate that torch reads memory at, for G 4 at 131,072 tokens; within 10 % of that
for other G.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from decode_attention.machine import hbm_gbps
from decode_attention.timing import Replay, spread, time_work
from harness import L2_FLUSH_BYTES, RESULTS, record
from torch import Tensor

from twilight_engine.config import KVConfig
from twilight_engine.kv.index import allocate_index
from twilight_engine.layout import IndexPages, StepMeta, Windows
from twilight_engine.ops.estimate_scores import allocate_workspace, estimate_scores

BENCH = "estimate_scores"
HKV, HEAD_DIM = 8, 128
KV = KVConfig()
CASES = (*((group, 1, 131072) for group in (1, 3, 4, 6, 7, 8)), (4, 8, 131072), (4, 1, 32768))
READ_BYTES = 1 << 30
REPEATS = 15


def decode_step(batch: int, tokens: int) -> StepMeta:
    """A decode step of sequences of equal length, whose pages are dealt out in order."""

    def ints(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    pages = torch.arange(batch * tokens // KV.page_size, dtype=torch.int32, device="cuda")
    return StepMeta(
        page_table=pages.view(batch, -1),
        seq_slots=ints([*range(batch)]),
        seq_lens=ints([tokens] * batch),
        window_starts=ints([(tokens - KV.num_recent) // KV.page_size * KV.page_size] * batch),
        cu_seqlens_q=ints([*range(batch + 1)]),
        query_seq=ints([*range(batch)]),
        positions=ints([tokens - 1] * batch),
        ctx_starts=ints([0] * batch),
        page_size=KV.page_size,
        num_sink=KV.num_sink,
        max_len=tokens,
    )


class Layer:
    """One layer's index and resident rows, and its query."""

    def __init__(self, meta: StepMeta, group: int) -> None:
        device = meta.positions.device
        self.index: IndexPages = allocate_index(
            meta.page_table.numel(), HKV, KV.page_size, HEAD_DIM, "int4_channel", "none", device
        )
        self.index.k_codes.random_(0, 256)
        self.index.k_scale.uniform_(0.1, 0.2)
        count = meta.num_seqs * HKV * (KV.num_sink + KV.window_rows)
        rows = torch.randn(count, 2 * HEAD_DIM, dtype=torch.bfloat16, device=device)
        self.windows = Windows(rows, HKV, KV.num_sink, KV.window_rows)
        shape = (meta.num_seqs, HKV * group, HEAD_DIM)
        self.q = torch.randn(shape, dtype=torch.bfloat16, device=device)


def moved_bytes(meta: StepMeta, group: int) -> int:
    """What one layer's estimate reads and writes."""
    tokens, first_resident = meta.max_len, int(meta.window_starts[0])
    codes = (first_resident - KV.num_sink) * HEAD_DIM // 2
    pages = -(-first_resident // KV.page_size)
    resident = (tokens - first_resident + KV.num_sink) * HEAD_DIM * 2
    written = 4 * group * (tokens + pages)
    return meta.num_seqs * HKV * (codes + pages * 4 * HEAD_DIM + resident + written)


def run(group: int, batch: int, tokens: int, rate_gbps: float, path: Path | None) -> None:
    """Time one case; record it, or print it."""
    meta = decode_step(batch, tokens)
    device = meta.positions.device
    moved = moved_bytes(meta, group)
    layers = [Layer(meta, group) for _ in range(max(2, L2_FLUSH_BYTES // moved + 1))]
    scores = torch.empty(batch, HKV * group, tokens, device=device)
    lse = torch.empty(batch, HKV * group, device=device)
    errors = torch.empty(batch, HKV * group, tokens // KV.page_size, device=device)
    workspace = allocate_workspace(batch, HKV * group, HKV, device)

    def step() -> None:
        for layer in layers:
            estimate_scores(
                layer.q, layer.index, layer.windows, meta, softmax_scale=HEAD_DIM**-0.5,
                scores=scores, lse=lse, errors=errors, workspace=workspace,
            )  # fmt: skip

    flush = torch.zeros(L2_FLUSH_BYTES, dtype=torch.uint8, device=device)
    replay = Replay(device, step)
    times = time_work(device, replay, repeats=REPEATS, before=lambda: flush.add_(1))
    us = spread([t / len(layers) for t in times])
    gbps = moved / us["us"] / 1e3
    case, share = f"G{group}/b{batch}/{tokens}", gbps / rate_gbps
    print(f"{case:16} {us['us']:7.1f} us {gbps:6.0f} GB/s {share:6.1%} of HBM", flush=True)
    if path is not None:
        metrics = {**us, "gbps": gbps, "hbm_gbps": rate_gbps, "share_of_hbm": share}
        record(BENCH, case, metrics, path=path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=RESULTS / f"{BENCH}.jsonl",
        help="append records, to bench/results/ or to this file",
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"{BENCH}: skipped, it measures a kernel")
        return 0
    device = torch.device("cuda", torch.cuda.current_device())
    rate_gbps = hbm_gbps(device, READ_BYTES)
    print(f"HBM read: {rate_gbps:.0f} GB/s", flush=True)
    for case in CASES:
        run(*case, rate_gbps, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
