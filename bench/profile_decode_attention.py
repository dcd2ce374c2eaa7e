"""Nsight Compute's view of each kernel of one layer's decode attention step.

Runs itself under `ncu` for one step of the real operator, launched kernel by kernel, with the
selections of a recorded decode; ncu runs the kernels of one layer one after another with cold
caches. Prints a line a kernel: time, share of the peak DRAM throughput, active warps, registers
and shared memory, and what its warps waited for, in warps a cycle with an issue.

    python bench/profile_decode_attention.py --trace selection_trace.npz
    python bench/profile_decode_attention.py --tokens 32768 --batch 1 --trace ...
"""

from __future__ import annotations

import argparse
import csv
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from decode_attention.calibration import calibrate
from decode_attention.cases import BALANCED, new_decode
from decode_attention.machine import Machine
from decode_attention.setting import SHARE, SIZES, Setting, print_table
from decode_attention.steps import StepRun
from decode_attention.traces import require_file

from twilight_engine import _C
from twilight_engine.config import KVConfig

STALLS = (
    "no_instruction",  # the code was not there yet
    "long_scoreboard",  # device memory or the L2
    "short_scoreboard",  # shared memory
    "barrier",
    "membar",
    "wait",
    "math_pipe_throttle",
    "lg_throttle",
    "sleeping",
)
METRICS = {
    "gpu__time_duration.sum": "us",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps %",
    "smsp__inst_executed.sum": "k inst",
    "launch__grid_size": "blocks",
    "launch__registers_per_thread": "regs",
    "launch__shared_mem_per_block": "smem KB",
    **{
        f"smsp__average_warps_issue_stalled_{stall}_per_issue_active.ratio": stall
        for stall in STALLS
    },
}
UNITS = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "byte/block": 1 / 1024, "Kbyte/block": 1.0}
TOP_STALLS = 3
STEPS, WARM = 12, 8
LAYERS = 2  # ncu saves all memory that a kernel may write, for each of its passes

Kernels = dict[str, dict[str, float]]  # by kernel, in order of launch: column -> value


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokens", type=int, default=128 << 10, help="of a sequence (default: %(default)s)")
    add("--batch", type=int, default=1, help="sequences (default: %(default)s)")
    add("--trace", type=Path, default=Path("shared/selection_trace.npz"))
    add("--inside", action="store_true", help="run the step itself; what ncu is given to run")
    return parser.parse_args(arguments)


def run_step(tokens: int, batch: int, trace: Path) -> None:
    """Some steps to fill the hot rows, then one with a layer under the profiler."""
    device = torch.device("cuda", torch.cuda.current_device())
    machine = Machine(device, small=False)
    setting = Setting(
        sizes=SIZES["llama-3.1-8b"],
        device=device,
        trace=trace,
        share=SHARE,
        scatter=False,
        steps=STEPS,
        warm=WARM,
        repeats=1,
        records=None,
        machine=machine,
    )
    shape = replace(setting.gqa(tokens, batch), num_layers=LAYERS)
    kv = KVConfig(dense_layers=())
    try:
        with (
            torch.inference_mode(),
            setting.workload(shape, kv, tokens, batch, share=SHARE) as workload,
        ):
            calibrate(workload, new_decode(workload, BALANCED))
            decode = new_decode(workload, BALANCED)
            run = StepRun(workload, machine, decode)
            run.run(WARM, stop=STEPS - 1)
            run.begin(STEPS - 1)
            machine.cool()
            for layer in range(shape.num_layers):
                if layer != shape.num_layers // 2:
                    run.launch_layer(layer)
                    continue
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                run.launch_layer(layer)
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
            decode.end_step()
    finally:
        machine.close()


def read_kernels(lines: Iterable[str]) -> Kernels:
    """ncu's CSV, a row a kernel and metric, by function name; what precedes its header is skipped.

    Raises: ValueError if there is no header or no kernel of ours.
    """
    text = iter(lines)
    header = next((line for line in text if line.startswith('"ID"')), None)
    if header is None:
        raise ValueError("ncu printed no table; its own message is above")
    samples: dict[str, dict[str, list[float]]] = {}
    for row in csv.DictReader([header, *text]):
        column = METRICS.get(row["Metric Name"])
        if column is None:
            continue
        value = float(row["Metric Value"].replace(",", "")) * UNITS.get(row["Metric Unit"], 1.0)
        kernel = samples.setdefault(row["Kernel Name"].removesuffix("_kernel"), {})
        kernel.setdefault(column, []).append(value / 1e3 if column == "k inst" else value)
    if not samples:
        raise ValueError("ncu saw no kernel of twilight_engine")
    return {
        name: {column: statistics.mean(values) for column, values in columns.items()}
        for name, columns in samples.items()
    }


def table_row(name: str, kernel: dict[str, float]) -> tuple[str, ...]:
    stalls = sorted((s for s in STALLS if s in kernel), key=lambda s: -kernel[s])[:TOP_STALLS]
    columns = [c for c in METRICS.values() if c not in STALLS]
    return (
        name,
        *(f"{kernel[c]:.1f}" if c in kernel else "" for c in columns),
        ", ".join(f"{s} {kernel[s]:.1f}" for s in stalls),
    )


def profile(args: argparse.Namespace) -> Kernels:
    """Run the step under ncu. Raises: ValueError if ncu fails."""
    command = [
        "ncu",
        *("--csv", "--page", "details", "--clock-control", "none", "--profile-from-start", "off"),
        *("--kernel-name-base", "demangled", "--kernel-name", "regex:twilight"),
        *("--print-kernel-base", "function", "--metrics", ",".join(METRICS)),
        *(sys.executable, __file__, "--inside"),
        *("--tokens", str(args.tokens), "--batch", str(args.batch), "--trace", str(args.trace)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        raise ValueError(f"ncu ended with {done.returncode}")
    return read_kernels(done.stdout.splitlines())


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if not (torch.cuda.is_available() and _C.has_cuda):
        print("profile_decode_attention: skipped, it measures a GPU")
        return 0
    try:
        require_file(args.trace)
        if args.inside:
            run_step(args.tokens, args.batch, args.trace)
            return 0
        if shutil.which("ncu") is None:
            raise ValueError("ncu was not found; it comes with the CUDA toolkit (Nsight Compute)")
        kernels = profile(args)
    except ValueError as error:
        print(f"profile_decode_attention: {error}", file=sys.stderr)
        return 2
    headers = ("kernel", *(c for c in METRICS.values() if c not in STALLS), "warps wait for")
    rows = [table_row(name, kernel) for name, kernel in kernels.items()]
    print_table(f"one layer's step at {args.tokens} tokens, batch {args.batch}", headers, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
