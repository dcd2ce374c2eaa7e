"""`twilight chat`: a conversation at the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twilight_engine.cli import options
from twilight_engine.cli.configs import calibration_choice, engine_configs

if TYPE_CHECKING:
    from twilight_engine.runtime.llm import LLM
    from twilight_engine.runtime.sampling_params import SamplingParams

LEAVE = {"/quit", "/exit"}


def chat(
    model: options.Model,
    document: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=options.PROMPT,
            help="A text to talk about; it goes before the first message.",
            show_default=False,
        ),
    ] = None,
    max_tokens: options.MaxTokens = 512,
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
    max_model_len: options.MaxModelLen = None,
    page_size: options.PageSize = None,
    dense_layers: options.DenseLayers = None,
    kv_offloading_size: options.KVOffloadingSize = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Talk to a model; answers appear as they are written.

    A line is a message; [b]/quit[/b] or Ctrl-D leaves, Ctrl-C stops an answer. Every turn reads the
    conversation from its beginning.
    """
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
    )
    opening = "" if document is None else read_document(document)
    from twilight_engine.cli.summary import calibration_line
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
        if llm.calibration is not None:
            print(calibration_line(llm.calibration), file=sys.stderr)
        converse(llm, sampling, opening)


def read_document(path: Path) -> str:
    """A text file. Raises: ValueError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8") + "\n\n"
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--document {path}: {error}") from error


def converse(llm: LLM, sampling: SamplingParams, opening: str) -> None:
    """Read messages and stream answers until the end of the input."""
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        if text in LEAVE:
            return
        if not text:
            continue
        content = opening + text if not messages else text
        messages.append({"role": "user", "content": content})
        answer = stream_answer(llm, messages, sampling)
        messages.append({"role": "assistant", "content": answer})


def stream_answer(llm: LLM, messages: list[dict[str, str]], sampling: SamplingParams) -> str:
    """Print an answer as it grows; Ctrl-C keeps what there is."""
    shown = ""
    try:
        for output in llm.stream(llm.chat_prompt(messages), sampling):
            text = output.outputs[0].text
            print(text[len(shown) :], end="", flush=True)
            shown = text
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print()
    return shown
