"""`twilight generate`: one prompt, one answer, and what it cost."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twilight_engine.cli import options
from twilight_engine.cli.configs import calibration_choice, engine_configs

if TYPE_CHECKING:
    from twilight_engine.runtime.llm import LLM
    from twilight_engine.runtime.outputs import RequestOutput


def generate(
    model: options.Model,
    prompt: Annotated[
        str | None,
        typer.Option(rich_help_panel=options.PROMPT, help="The prompt.", show_default=False),
    ] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=options.PROMPT,
            help="A UTF-8 file with the prompt; - reads stdin.",
            show_default=False,
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            rich_help_panel=options.PROMPT,
            help="The prompt is a message: put it through the model's chat template.",
        ),
    ] = False,
    max_tokens: options.MaxTokens = 128,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = 0,
    preset: options.OpenPreset = None,
    calibration: options.Calibration = "auto",
    policy: options.Policy = None,
    attn_top_p: options.AttnTopP = None,
    attn_top_k: options.AttnTopK = None,
    index_top_p: options.IndexTopP = None,
    selector: options.Selector = None,
    fetch: options.Fetch = None,
    audit_every: options.AuditEvery = None,
    max_model_len: options.MaxModelLen = None,
    page_size: options.PageSize = None,
    dense_layers: options.DenseLayers = None,
    kv_offloading_size: options.KVOffloadingSize = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    report: options.Report = None,
    as_json: options.Json = False,
) -> None:
    """Generate text from a prompt, with the KV cache in host memory.

    The text goes to stdout; progress and what the run cost go to stderr.

    [b]twilight generate[/b] model.gguf --prompt "Once upon a time"

    [b]twilight generate[/b] model/ --chat --prompt-file question.txt --report out/
    """
    text = read_prompt(prompt, prompt_file)
    kv, sparse = engine_configs(
        preset,
        policy=policy,
        attn_top_p=attn_top_p,
        attn_top_k=attn_top_k,
        index_top_p=index_top_p,
        selector=selector,
        fetch=fetch,
        page_size=page_size,
        dense_layers=dense_layers,
        audit_every=audit_every,
    )
    from twilight_engine.runtime.llm import LLM
    from twilight_engine.runtime.sampling_params import SamplingParams

    sampling = SamplingParams(
        temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed
    )
    with LLM(
        model,
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
        max_num_seqs=1,
        kv_config=kv,
        sparse_config=sparse,
        preset=preset,
        calibration=calibration_choice(calibration),
        kv_offloading_size=kv_offloading_size,
    ) as llm:
        ready = llm.chat_prompt([{"role": "user", "content": text}]) if chat else text
        attention = llm.sparse_config.replace(audit_every=audit_every)
        (output,) = llm.generate(
            ready, sampling, sparse_config=attention, use_tqdm=sys.stderr.isatty()
        )
        show(output, llm, model, report, as_json)


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt's text from whichever option has it.

    Raises: ValueError for both or neither, or a file that cannot be read as text.
    """
    if (prompt is None) == (prompt_file is None):
        what = "no prompt" if prompt is None else "two prompts"
        raise ValueError(f"{what} given; use either --prompt TEXT or --prompt-file FILE")
    if prompt is not None:
        text = prompt
    elif prompt_file == "-":
        text = sys.stdin.read()
    else:
        try:
            text = Path(str(prompt_file)).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--prompt-file {prompt_file}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompt-file {prompt_file} is not UTF-8: {error}") from error
    if not text:
        raise ValueError("the prompt is empty; it must have at least one character")
    return text


def show(output: RequestOutput, llm: LLM, model: str, folder: Path | None, as_json: bool) -> None:
    """Text or JSON to stdout; the cost, and with a folder the whole report, to stderr."""
    from rich.console import Console

    from twilight_engine.cli.report_files import write_report
    from twilight_engine.cli.report_table import report_tables
    from twilight_engine.cli.summary import calibration_line, output_json, summary_line
    from twilight_engine.runtime.report import RunShape, build_report

    report = build_report([output], RunShape.of(llm, model))
    if as_json:
        print(json.dumps(output_json(output, report), allow_nan=False))
    else:
        print(output.outputs[0].text, flush=True)
    console = Console(stderr=True, highlight=False)
    if folder is not None:
        written = write_report(report, folder)
        console.print(report_tables(report))
        console.print(f"report: {', '.join(str(path) for path in written)}", soft_wrap=True)
    if not as_json:
        if llm.calibration is not None:
            console.print(calibration_line(llm.calibration), style="dim", soft_wrap=True)
        console.print(summary_line(report), style="dim", soft_wrap=True)
