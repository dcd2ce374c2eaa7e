"""What building the index costs in prefill: a layer's share of its dense prefill at 32K tokens.

Case `prefill/<tokens>`, Llama-3.1-8B's layer in bfloat16: `index_us` is index_pages over all pages
(K and V codes, grids, page means; `gbps` by its bytes), `append_us` the rows' way to the host and
the windows (append_rows; `link_gbps`), `sdpa_us` torch's causal attention, `gemms_us` the layer's
seven products. `share` is index_us over sdpa_us + gemms_us. Needs a CUDA device and 134 MB of
pinned host memory.

    python bench/bench_index_pages.py --json

Target: share at most 3 %.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from harness import RESULTS, record, time_us
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from twilight_engine.kv.index import allocate_index, index_page_bytes
from twilight_engine.layout import StepMeta, Windows
from twilight_engine.ops.append_rows import append_rows
from twilight_engine.ops.index_pages import index_pages

BENCH = "index_pages"
DEFAULT_RECORDS = RESULTS / f"{BENCH}.jsonl"
HQ, HKV, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 64
HIDDEN, INTERMEDIATE = 4096, 14336
PRODUCTS = [  # (in, out): q, k, v, o, gate, up, down
    (HIDDEN, HQ * HEAD_DIM),
    (HIDDEN, HKV * HEAD_DIM),
    (HIDDEN, HKV * HEAD_DIM),
    (HQ * HEAD_DIM, HIDDEN),
    (HIDDEN, INTERMEDIATE),
    (HIDDEN, INTERMEDIATE),
    (INTERMEDIATE, HIDDEN),
]
NUM_SINK, WINDOW_ROWS = 4, 256
TARGET_SHARE = 0.03
REPEATS = 10
DEVICE = torch.device("cuda")


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)


def time_index(k: Tensor, v: Tensor) -> dict[str, float]:
    """Quantise every page of k and v [L, Hkv, D], the format of the preset `balanced`."""
    pages = k.shape[0] // PAGE_SIZE
    index = allocate_index(pages, HKV, PAGE_SIZE, HEAD_DIM, "int4_channel", "int4", DEVICE)
    ids = torch.arange(pages, dtype=torch.int32, device=DEVICE)
    staged = [x.unflatten(0, (pages, PAGE_SIZE)) for x in (k, v)]
    times = time_us(lambda _: index_pages(*staged, ids, index), repeats=REPEATS)
    written = index_page_bytes(HKV, PAGE_SIZE, HEAD_DIM, "int4_channel", "int4") * pages
    moved = written + 2 * k.numel() * k.element_size()
    return {"index_us": times["us"], "gbps": moved / times["us"] / 1e3}


def time_append(k: Tensor, v: Tensor) -> dict[str, float]:
    """Write the rows to pinned host pages and to the windows, as one prefill chunk."""
    tokens = k.shape[0]
    pages = tokens // PAGE_SIZE
    host = torch.empty(HKV, pages, PAGE_SIZE, 2 * HEAD_DIM, dtype=torch.bfloat16, pin_memory=True)
    rows = torch.empty(
        HKV * (NUM_SINK + WINDOW_ROWS), 2 * HEAD_DIM, dtype=torch.bfloat16, device=DEVICE
    )

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    meta = StepMeta(
        page_table=torch.arange(pages, dtype=torch.int32, device=DEVICE)[None],
        seq_slots=ints(0),
        seq_lens=ints(tokens),
        window_starts=ints(tokens - WINDOW_ROWS // 2),
        cu_seqlens_q=ints(0, tokens),
        query_seq=torch.zeros(tokens, dtype=torch.int32, device=DEVICE),
        positions=torch.arange(tokens, dtype=torch.int32, device=DEVICE),
        ctx_starts=torch.zeros(tokens, dtype=torch.int32, device=DEVICE),
        page_size=PAGE_SIZE,
        num_sink=NUM_SINK,
        max_len=tokens,
    )
    windows = Windows(rows, HKV, NUM_SINK, WINDOW_ROWS)
    times = time_us(lambda _: append_rows(k, v, windows, host, meta), repeats=REPEATS)
    moved = host.numel() * host.element_size()
    return {"append_us": times["us"], "link_gbps": moved / times["us"] / 1e3}


def time_attention(k: Tensor, v: Tensor) -> float:
    """Causal attention of a whole prompt, microseconds."""
    q = random(1, HQ, k.shape[0], HEAD_DIM)
    keys, values = (x.transpose(0, 1)[None].contiguous() for x in (k, v))

    def attend(_: int) -> Tensor:
        return scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)

    return time_us(attend, repeats=REPEATS)["us"]


def time_products(tokens: int) -> float:
    """The layer's matrix products, microseconds."""
    inputs = {size: random(tokens, size) for size in (HIDDEN, INTERMEDIATE)}
    weights = [random(size, out) for size, out in PRODUCTS]

    def run(_: int) -> None:
        for weight in weights:
            inputs[weight.shape[0]] @ weight

    return time_us(run, repeats=REPEATS)["us"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=32 << 10, help="of the prompt")
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=DEFAULT_RECORDS,
        help="append records, to bench/results/ or to this file",
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"{BENCH}: skipped, it measures kernels")
        return 0
    k, v = random(args.tokens, HKV, HEAD_DIM), random(args.tokens, HKV, HEAD_DIM)
    with torch.inference_mode():
        metrics = {**time_index(k, v), **time_append(k, v)}
        metrics |= {"sdpa_us": time_attention(k, v), "gemms_us": time_products(args.tokens)}
    dense_us = metrics["sdpa_us"] + metrics["gemms_us"]
    metrics["share"] = metrics["index_us"] / dense_us
    metrics["append_share"] = metrics["append_us"] / dense_us
    case = f"prefill/{args.tokens}"
    if args.json is not None:
        record(BENCH, case, metrics, path=args.json)
    else:
        print(case, " ".join(f"{k}={v:.4g}" for k, v in metrics.items()))
    verdict = "ok" if metrics["share"] <= TARGET_SHARE else "target missed"
    print(f"{BENCH}: {verdict} share={metrics['share']:.2%} target={TARGET_SHARE:.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
