"""`twilight calibrate` at work: from options to a table, a file and its plot."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from twilight_engine.cli.calibrate import INDEX_MASSES, WITH_V_INDEX, WITHOUT_V_INDEX
from twilight_engine.cli.configs import parse_shares
from twilight_engine.cli.errors import FAILED, end
from twilight_engine.cli.evaluate_run import PLAIN_WIDTH, read_texts
from twilight_engine.config import KVConfig, SparseConfig
from twilight_engine.eval.calibration.budget import DeviceBudget
from twilight_engine.eval.calibration.plot import plot_sweep
from twilight_engine.eval.calibration.report import setting_name, sweep_table, to_calibration
from twilight_engine.eval.calibration.sample import Sample, Setting
from twilight_engine.eval.calibration.search import Result, Search, Tolerance
from twilight_engine.eval.frontier import COLD_STEPS
from twilight_engine.eval.items import Passage
from twilight_engine.eval.progress import EvalProgress
from twilight_engine.eval.simulation.grading import Grading
from twilight_engine.eval.tasks.ppl import passages as cut
from twilight_engine.kv.plan import dense_layer_set
from twilight_engine.loaders.calibration_file import Fingerprint, path_beside, write_calibration
from twilight_engine.models.fingerprint import fingerprint
from twilight_engine.models.load import LoadedModel, load_model, read_config
from twilight_engine.runtime.arguments import context_length, pick_device

Masses = list[tuple[float, float | None]]


@dataclass(frozen=True)
class CalibrateRun:
    """The command's options; see cli.calibrate."""

    model: str
    text: list[Path]
    length: int
    targets: int
    passages: int
    ppl_tolerance: float
    kl_tolerance: float
    device_budget: str | None
    context: int | None
    preset: str
    attn_top_p: str | None
    index_top_p: str | None
    by_layer: bool
    out: Path | None
    device: str
    dtype: str

    @property
    def kv(self) -> KVConfig:
        return KVConfig.preset(self.preset)

    @property
    def sparse(self) -> SparseConfig:
        return SparseConfig.preset(self.preset)

    @property
    def path(self) -> Path:
        """Where the file goes."""
        return path_beside(Path(self.model).expanduser()) if self.out is None else self.out


def run_calibration(options: CalibrateRun) -> None:
    """Check every option, search, show the table and write the file; exits with 1 without one."""
    tolerance = Tolerance(options.ppl_tolerance, options.kl_tolerance)
    masses = parse_masses(options)
    check_sample(options)
    texts = read_texts(options.text)
    identity = fingerprint(options.model)
    config = read_config(options.model)
    context = context_length(options.context, config)
    budget = DeviceBudget.parse(options.device_budget, config, options.kv, context)
    check_writable(options.path)
    context_length(options.length, config)  # warns of too long ones
    loaded = load_model(options.model, dtype=options.dtype, device=pick_device(options.device))
    if loaded.tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer; calibrate needs one to read texts")
    found = cut(
        loaded.tokenizer,
        texts,
        length=options.length,
        targets=options.targets,
        count=options.passages,
    )
    halves = split(found, len(texts))
    result = search(options, loaded, halves, budget, tolerance, masses)
    show(options, result, identity, budget, tolerance, halves)


def search(
    options: CalibrateRun,
    loaded: LoadedModel,
    halves: tuple[list[Passage], list[Passage]],
    budget: DeviceBudget,
    tolerance: Tolerance,
    masses: Masses,
) -> Result:
    """Run the search under a progress bar where there is a terminal."""
    config = loaded.config
    sparse, dense = options.sparse, dense_layer_set(config, options.kv)
    base = Grading.of(options.kv, sparse, config.num_layers)
    preset = Setting(sparse.attn_top_p, sparse.index_top_p, dense)
    # The masses, about six sets of dense layers, the preset, two checks; each layer alone, twice.
    expected = (len(masses) + 9) * len(halves[0]) + 2 * options.by_layer * config.num_layers
    with EvalProgress(expected, show=sys.stderr.isatty()) as progress:
        samples = []
        for name, passages in zip(("choose on", "check on"), halves, strict=True):
            progress.doing(f"read the passages to {name}")
            samples.append(Sample(loaded.model, base, passages, lambda: progress.done(1)))
        progress.doing("try settings")
        made = Search(samples[0], samples[1], budget, tolerance)
        return made.run(preset, masses, by_layer=options.by_layer)


def show(
    options: CalibrateRun,
    result: Result,
    identity: Fingerprint,
    budget: DeviceBudget,
    tolerance: Tolerance,
    halves: tuple[list[Passage], list[Passage]],
) -> None:
    """The table on stdout; the plot and, where a setting was chosen, the file."""
    counted = f"{len(halves[0])} + {len(halves[1])} passages x {options.targets} targets"
    title = f"{Path(options.model).stem}, {options.length:,} tokens, {counted}"
    title += f", device {budget.kv_share:.1%} of the KV"
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    console.print(sweep_table(result, title))
    path = options.path
    written = []
    try:
        plot_sweep(result, tolerance, title, path.with_suffix(".png"))
        written.append(path.with_suffix(".png"))
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
    if result.chosen is not None:
        sample = {
            "tokens": options.length,
            "targets": options.targets,
            "chosen_on": [passage.item_id for passage in halves[0]],
            "held_out": [passage.item_id for passage in halves[1]],
        }
        made = to_calibration(result, identity, options.preset, tolerance, budget, sample)
        write_calibration(made, path)
        written.insert(0, path)
        console.print(verdict(result), soft_wrap=True)
    console.print(f"written: {', '.join(map(str, written))}", style="dim", soft_wrap=True)
    if result.chosen is None:
        end(failure(result, tolerance), FAILED)


def verdict(result: Result) -> str:
    """The chosen setting on held-out text, beside the preset, and what was missed there before."""
    assert result.chosen is not None
    held = result.chosen.held_out
    text = f"[bold]chosen: {setting_name(result.chosen.candidate)}[/]; on the held-out passages "
    text += f"perplexity {held.ppl_ratio.value - 1:+.2%}, KL {held.kl.value:.1e}, "
    text += f"{held.link_bytes / 1e6:.3f} MB a step"
    if result.preset is not None and held.link_bytes > 0:
        ratio = result.preset.held_out.link_bytes / held.link_bytes
        text += f" ({ratio:.1f} times fewer than the preset with equal hot rows in this budget)"
    for missed in result.checked[:-1]:
        text += f"; {setting_name(missed.candidate)} missed the tolerance there: perplexity "
        text += f"{missed.held_out.ppl_ratio.value - 1:+.2%}, KL {missed.held_out.kl.value:.1e}"
    return text


def failure(result: Result, tolerance: Tolerance) -> str:
    """Why nothing was chosen, and what may help."""
    if result.checked:
        what = f"{len(result.checked)} settings stay within the tolerances on the first half of "
        what += "the passages, none on the other"
    else:
        best = min(result.candidates, key=lambda c: c.ppl_ratio.high or 0.0)
        what = f"no setting is shown to stay within perplexity {tolerance.ppl:+.2%} and KL "
        what += f"{tolerance.kl:g}; the closest, {setting_name(best)}, has perplexity "
        what += f"{best.ppl_ratio.value - 1:+.2%}, at most {(best.ppl_ratio.high or 1) - 1:+.2%} "
        what += f"with 95 % confidence, and KL {best.kl.value:.1e}"
    return f"{what}: give more --passages or --targets, higher masses, or a wider tolerance"


def parse_masses(options: CalibrateRun) -> Masses:
    """The pairs to try, ascending. Raises: ValueError for what is no list of masses."""
    sparse = options.sparse
    graded = sparse.index_top_p is not None
    if options.index_top_p is not None and not graded:
        raise ValueError(f"--index-top-p is given; preset {options.preset!r} has no index grade")
    words = options.attn_top_p or (WITH_V_INDEX if graded else WITHOUT_V_INDEX)
    attn = parse_shares("--attn-top-p", [words])
    index: Sequence[float | None] = [None]
    if graded:
        index = parse_shares("--index-top-p", [options.index_top_p or INDEX_MASSES])
    pairs = [(p, q) for p in attn for q in index if q is None or p <= q]
    if not pairs:
        raise ValueError(
            "every --attn-top-p is above every --index-top-p; the latter must reach it"
        )
    return pairs


def check_sample(options: CalibrateRun) -> None:
    """Raises: ValueError for passages that cannot be halved, or too few targets."""
    if options.passages < 2:
        raise ValueError(
            f"--passages is {options.passages}; it must be at least 2: one half chooses, the other "
            "checks"
        )
    if options.targets <= COLD_STEPS:
        raise ValueError(
            f"--targets is {options.targets}; it must be above {COLD_STEPS}: a passage's first "
            f"{COLD_STEPS} steps fill the hot rows and are not counted"
        )


def check_writable(path: Path) -> None:
    """Raises: ValueError where the file cannot be written, before the search."""
    folder = path.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or path.is_dir():
        raise ValueError(f"{path} cannot be written; name another file with --out")


def split(passages: Sequence[Passage], num_texts: int) -> tuple[list[Passage], list[Passage]]:
    """Passages to choose on and to check on: every other round of the texts, or passage."""
    rounds = num_texts if len(passages) > num_texts else 1
    odd = [i // rounds % 2 for i in range(len(passages))]
    pairs = list(zip(odd, passages, strict=True))
    return [p for which, p in pairs if not which], [p for which, p in pairs if which]
