"""Signatures of one layer compared with a step's queries: GB/s beside a copy on the device.

Cases: `<bits>x<tables>/<tokens>`, one sequence, 8 KV heads of 4 query heads; the codes are read
once, 2 bytes a table, token and KV head. `floor_us` is torch's copy of half of them, which moves as
many bytes. Needs a CUDA device.

    python bench/bench_lsh_candidates.py
"""

from __future__ import annotations

import sys

import torch
from harness import record, time_us

from twilight_engine.kv.index import allocate_index
from twilight_engine.layout import StepMeta
from twilight_engine.ops.lsh_candidates import lsh_candidates

BENCH = "lsh_candidates"
HKV, GROUP, PAGE_SIZE = 8, 4, 64
WINDOW, NUM_SINK = 128, 4
TABLES = {"10x150": 150, "8x75": 75}
TOKENS = (8192, 32768, 131072)


def step(tokens: int) -> StepMeta:
    """A decode step of one sequence whose pages are in order."""

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    pages = torch.arange(tokens // PAGE_SIZE, dtype=torch.int32, device="cuda")
    return StepMeta(
        page_table=pages[None],
        seq_slots=ints(0),
        seq_lens=ints(tokens),
        window_starts=ints(tokens - WINDOW),
        cu_seqlens_q=ints(0, 1),
        query_seq=ints(0),
        positions=ints(tokens - 1),
        ctx_starts=ints(0),
        page_size=PAGE_SIZE,
        num_sink=NUM_SINK,
        max_len=tokens,
    )


def run(name: str, tables: int, tokens: int) -> None:
    """Time and record one case."""
    meta, device = step(tokens), torch.device("cuda")
    pages = tokens // PAGE_SIZE
    index = allocate_index(
        pages, HKV, PAGE_SIZE, 128, "int4_channel", "none", device, lsh_tables=tables
    )
    assert index.lsh_codes is not None
    index.lsh_codes.random_(0, 256)
    q_codes = torch.randint(0, 256, (1, HKV * GROUP, tables), device=device).to(torch.int16)
    out = lsh_candidates(q_codes, index, meta)
    times = time_us(lambda _: lsh_candidates(q_codes, index, meta, candidates=out))
    source = index.lsh_codes[: max(1, pages // 2)]
    target = torch.empty_like(source)
    floor = time_us(lambda _: target.copy_(source))["us"]
    moved = 2 * tables * HKV * (tokens - WINDOW)
    metrics = {**times, "gbps": moved / times["us"] / 1e3, "floor_us": floor}
    record(BENCH, f"{name}/{tokens}", {**metrics, "share_of_floor": floor / times["us"]})


def main() -> int:
    if not torch.cuda.is_available():
        print("lsh_candidates: skipped, it measures a kernel")
        return 0
    for name, tables in TABLES.items():
        for tokens in TOKENS:
            run(name, tables, tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
