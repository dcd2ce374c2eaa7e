"""How long a large host arena takes, against cudaHostAlloc of the same size in the same run.

Cases, in this order, each with all memory of the one before given back: `fresh` (the first touch
of memory that this machine may not have used yet), `again` (the second touch), `grown` (in steps,
as an engine grows it) and `cudaHostAlloc`. Target: `again` at least 4 times as fast as
cudaHostAlloc, which meets memory that has been touched before too.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from harness import record

from twilight_engine import _C
from twilight_engine.kv.host import HostArena

GIB = 1 << 30
TARGET_RATIO = 4.0
LAYERS, HEADS, PAGE_SIZE, HEAD_DIM = 32, 8, 64, 128  # Llama-3.1-8B, bfloat16: 8 MiB a page


def make_arena(total_bytes: int, device: torch.device) -> HostArena:
    page_bytes = LAYERS * HEADS * PAGE_SIZE * 2 * HEAD_DIM * 2
    return HostArena(
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        num_pages=total_bytes // page_bytes,
        page_size=PAGE_SIZE,
        head_dim=HEAD_DIM,
        dtype=torch.bfloat16,
        device=device,
    )


def time_arena(total_bytes: int, device: torch.device, steps: int) -> dict[str, float]:
    """Seconds to have the whole arena usable, grown in this many steps, and to close it."""
    start = time.perf_counter()
    with make_arena(total_bytes, device) as arena:
        for step in range(1, steps + 1):
            arena.ensure_pages(arena.num_pages * step // steps)
        ready = time.perf_counter()
        metrics = {
            "gib": arena.touched_bytes / GIB,
            "seconds": ready - start,
            "touch_seconds": arena.arena.touch_seconds,
            "register_seconds": arena.arena.register_seconds,
            "registrations": arena.arena.num_registrations,
            "registered_gib": arena.registered_bytes / GIB,
            "numa_node": arena.arena.numa_node,
        }
    return {**metrics, "close_seconds": time.perf_counter() - ready}


def main() -> None:
    cuda = torch.cuda.is_available() and _C.has_cuda
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=64 if cuda else 1, help="size of the arena")
    parser.add_argument("--steps", type=int, default=8, help="steps of the `grown` case")
    options = parser.parse_args()
    total_bytes = int(options.gib * GIB)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    if cuda:
        torch.zeros(1, device=device)  # creates the context outside the clock

    record("arena", "fresh", time_arena(total_bytes, device, 1))
    again = time_arena(total_bytes, device, 1)
    record("arena", "again", again)
    record("arena", "grown", time_arena(total_bytes, device, options.steps))
    if not cuda:
        print("no CUDA device: nothing was registered, and there is no cudaHostAlloc to compare")
        return
    alloc_seconds = _C.time_host_alloc(device=device.index, bytes=total_bytes)
    ratio = alloc_seconds / again["seconds"]
    record("arena", "cudaHostAlloc", {"gib": options.gib, "seconds": alloc_seconds, "ratio": ratio})
    if ratio < TARGET_RATIO:
        sys.exit(f"the arena is {ratio:.1f} times as fast as cudaHostAlloc; target {TARGET_RATIO}")


if __name__ == "__main__":
    main()
