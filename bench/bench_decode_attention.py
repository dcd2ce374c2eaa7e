"""The decode attention step of one layer: append, select, estimate, prune, resolve, fetch, attend.

The real operator over a KV cache whose rows lie in host memory, with the selections of a recorded
decode (--trace), beside torch's SDPA over the same KV in device memory, the dense step streamed
from the host, and other policies. A step is a CUDA graph of several layers in turn, so that nothing
of a layer is in the L2; before each, far host memory is read, so that no translation is cached
either. Every request has its own KV.

    python bench/bench_decode_attention.py --trace selection_trace.npz --json
    python bench/bench_decode_attention.py --case breakdown --share 0.027 --trace ...
    python bench/bench_decode_attention.py --case context-sweep --lists random --trace ...
    python bench/bench_decode_attention.py --device cpu --shape tiny --trace ...   # a check
    python bench/bench_decode_attention.py --plot out/                # from the records kept

Records: step_us and the ops' times are for one layer. floor_us is DESIGN's floor: along the path
below batch 8, by resource from there on; device_bytes is what the step's ops read and write in
device memory, missed_bytes what crosses the link; hbm_gbps, link_gbps and granules_per_s are the
rates of the machine, measured in the run. fetch_us is the gather alone with cold translations.
all_hits_us is a step that misses no row: the bound of any prefetch. wanted_recall says how much of
the trace's sets the pipeline's exact lists hold. Names of records with other sets than 0.7 % of the
context, clustered as recorded, end in /share0.027, /counts or /random.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from decode_attention.cases import batch_sweep, breakdown, context_sweep
from decode_attention.comparisons import paper_table7, policies
from decode_attention.machine import Machine
from decode_attention.plots import draw, read_records
from decode_attention.setting import BENCH, SHARE, SIZES, Setting
from decode_attention.step_graph import graph
from decode_attention.traces import require_file
from decode_attention.uneven import uneven
from harness import RESULTS

from twilight_engine import _C

CASES: dict[str, Callable[[Setting], None]] = {
    "context-sweep": context_sweep,
    "batch-sweep": batch_sweep,
    "paper-table7": paper_table7,
    "policies": policies,
    "breakdown": breakdown,
    "uneven": uneven,
    "graph": graph,
}
DEFAULT_RECORDS = RESULTS / f"{BENCH}.jsonl"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--case",
        nargs="+",
        choices=[*CASES, "all"],
        metavar="CASE",
        help=f"{', '.join(CASES)}, or all, the default (with --plot alone: none)",
    )
    add("--shape", choices=sorted(SIZES), default="llama-3.1-8b")
    add("--device", choices=("cuda", "cpu"), help="default: cuda; a CPU is for --shape tiny")
    add(
        "--trace",
        type=Path,
        default=Path("shared/selection_trace.npz"),
        help="the recorded selections (default: %(default)s)",
    )
    sets = parser.add_mutually_exclusive_group()
    sets.add_argument(
        "--share",
        type=float,
        default=SHARE,
        help="mean exact set as a share of the context (default: %(default)s)",
    )
    sets.add_argument("--counts", action="store_true", help="the trace's own set sizes instead")
    add(
        "--lists",
        choices=("traced", "random"),
        default="traced",
        help="random: sets of the trace's sizes that return as they do, but at random places, "
        "as the worst case (default: %(default)s)",
    )
    add("--steps", type=int, help="decode steps of a run (default: half of the shape's head_dim)")
    add("--warm", type=int, help="first steps, not timed (default: half of them)")
    add("--repeats", type=int, default=20, help="of an op alone (default: %(default)s)")
    add(
        "--json",
        type=Path,
        nargs="?",
        const=DEFAULT_RECORDS,
        help="append records, to bench/results/ or to this file",
    )
    add("--plot", type=Path, metavar="DIR", help="draw the records kept so far into this folder")
    return parser.parse_args(arguments)


def set_steps(args: argparse.Namespace) -> None:
    """Defaults by shape: the traces' hit rates take some 30 steps to be reached."""
    if args.steps is None:
        args.steps = SIZES[args.shape].gqa.head_dim // 2
    if args.warm is None:
        args.warm = args.steps // 2


def check(args: argparse.Namespace) -> None:
    """ValueError for options that cannot be, or not together."""
    require_file(args.trace)
    if not 2 <= args.warm < args.steps:
        raise ValueError(f"--warm is {args.warm}; it must lie in [2, --steps {args.steps})")
    if not args.counts and not 0 < args.share < 0.25:
        raise ValueError(f"--share is {args.share}; it must lie in (0, 0.25)")
    if args.repeats < 1:
        raise ValueError(f"--repeats is {args.repeats}; it must be >= 1")
    if args.device == "cpu" and args.shape != "tiny":
        raise ValueError(f"--shape is {args.shape} with --device cpu; allowed there: tiny")
    if args.device == "cuda" and not (torch.cuda.is_available() and _C.has_cuda):
        raise ValueError("--device is cuda, but there is no CUDA device or no compiled kernel")


def run_cases(args: argparse.Namespace, names: Sequence[str]) -> None:
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    sizes = SIZES[args.shape]
    machine = Machine(device, small=args.shape == "tiny")
    rates = machine.rates
    print(
        f"rates of this machine: HBM {rates.hbm_gbps:.0f} GB/s, link {rates.link_gbps:.1f} GB/s, "
        f"{rates.granules_per_s / 1e6:.1f} M translations/s",
        flush=True,
    )
    setting = Setting(
        sizes=sizes,
        device=device,
        trace=args.trace,
        share=None if args.counts else args.share,
        scatter=args.lists == "random",
        steps=args.steps,
        warm=args.warm,
        repeats=args.repeats,
        records=args.json,
        machine=machine,
    )
    try:
        with torch.inference_mode():
            for name in names:
                started = time.monotonic()
                CASES[name](setting)
                print(f"{name} took {time.monotonic() - started:.0f} s", flush=True)
    finally:
        machine.close()


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    names = args.case or ([] if args.plot else ["all"])
    if args.device is None:
        if names and not (torch.cuda.is_available() and _C.has_cuda):
            print(f"{BENCH}: skipped, it measures a GPU; --device cpu --shape tiny is a check")
            return 0
        args.device = "cuda" if names else "cpu"
    try:
        if names:
            set_steps(args)
            check(args)
            run_cases(args, list(CASES) if "all" in names else names)
        if args.plot:
            for path in draw(read_records(args.json or DEFAULT_RECORDS), args.plot):
                print(path)
    except ValueError as error:
        print(f"{BENCH}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
