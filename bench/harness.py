"""Timing and records shared by the benches: CUDA events, cold L2, median and p10-p90."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
L2_FLUSH_BYTES = 256 << 20  # several times the 50-60 MB L2 of Hopper


def commit() -> str:
    """What is checked out; TWILIGHT_COMMIT says it for a copy of the tree without its history."""
    if "TWILIGHT_COMMIT" in os.environ:
        return os.environ["TWILIGHT_COMMIT"]
    done = subprocess.run(
        ["git", "-c", "safe.directory=*", "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        cwd=RESULTS.parent,
    )
    return done.stdout.strip() or "unknown"


def gpu_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def time_us(
    run: Callable[[int], object], *, repeats: int = 30, warmup: int = 5, flush_l2: bool = True
) -> dict[str, float]:
    """Microseconds of `run(i)`: median, p10 and p90 over repeats; i lets the caller rotate inputs.

    On a GPU by CUDA events with the L2 overwritten before each; on a CPU by the host clock.
    """
    for i in range(warmup):
        run(i)
    times: list[float] = []
    if torch.cuda.is_available():
        flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        for i in range(repeats):
            if flush_l2:
                flush.fill_(i & 0xFF)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            run(warmup + i)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
    else:
        for i in range(repeats):
            start_s = time.perf_counter()
            run(warmup + i)
            times.append((time.perf_counter() - start_s) * 1e6)
    cuts = statistics.quantiles(times, n=10) if len(times) > 1 else [times[0]] * 9
    return {"us": statistics.median(times), "us_p10": cuts[0], "us_p90": cuts[-1]}


def record(bench: str, case: str, metrics: dict[str, float], *, path: Path | None = None) -> None:
    """Append one JSON line to bench/results/<bench>.jsonl and print it."""
    row = {
        "bench": bench,
        "case": case,
        "gpu": gpu_name(),
        "commit": commit(),
        "torch": torch.__version__,
        "metrics": {name: round(float(value), 4) for name, value in metrics.items()},
    }
    target = path or RESULTS / f"{bench}.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a") as out:
        out.write(json.dumps(row) + "\n")
    print(case, " ".join(f"{k}={v}" for k, v in row["metrics"].items()), flush=True)
