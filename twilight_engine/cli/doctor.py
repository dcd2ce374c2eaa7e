"""`twilight doctor`: what this machine has, and whether a model and a context fit it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twilight_engine.cli import options
from twilight_engine.cli.configs import calibration_choice, kv_config
from twilight_engine.cli.units import format_bytes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from twilight_engine.cli.fit import Fit
    from twilight_engine.cli.link import LinkSpeed
    from twilight_engine.cli.machine import Fact

MARKS = {"ok": "[green]✓[/]", "note": "[yellow]•[/]", "bad": "[red]✗[/]"}
MEANING = {
    "weights": "the model",
    "index": "INT4 codes, bounds and page means of every full page",
    "windows": "sinks and recent rows at full precision",
    "hot rows": "exact rows kept from earlier steps",
    "slot maps": "where each row's hot slot is",
    "dense layers": "layers that keep all their KV here",
    "step buffers": "scores, lists and grades of one layer's step",
    "prefill": "one layer's K and V, and hidden states",
    "arena": "every K,V row at full precision",
}


def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Will this model fit? A directory, .gguf or config.json.",
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of a sequence to plan for.", show_default="the model's"),
    ] = None,
    num_seqs: Annotated[int, typer.Option(help="Sequences to plan for.")] = 1,
    preset: options.OpenPreset = None,
    calibration: options.Calibration = "auto",
    page_size: options.PageSize = None,
    dense_layers: options.DenseLayers = None,
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
) -> None:
    """Look the machine over: GPU, memory, link, versions; with --model, will it fit?

    Exits with 1 if the model does not fit.

    [b]twilight doctor[/b] --model model/ --context 131072
    """
    given = page_size is not None or dense_layers is not None
    kv = kv_config(preset, page_size=page_size, dense_layers=dense_layers)
    from twilight_engine.cli.link import measure_link
    from twilight_engine.cli.machine import gpu_facts, package_facts, pinning_facts, system_facts
    from twilight_engine.cli.summary import calibration_line
    from twilight_engine.runtime.calibration import pick_calibration

    fit = found = None
    if model is not None:
        choice = calibration_choice(calibration)
        found = pick_calibration(model, choice, preset=preset, configs_given=given)
        kv = kv if found is None else found.kv_config()
        fit = plan(model, kv, context, num_seqs, dtype)
    sections = {
        "Machine": system_facts(),
        "GPU": gpu_facts(),
        "Host memory for KV": pinning_facts(),
        "Versions": package_facts(),
    }
    speed = measure_link()
    if as_json:
        path = None if found is None else str(found.path)
        print(json.dumps({**doctor_json(sections, speed, fit), "calibration": path}))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        print_sections(console, sections, speed)
        if fit is not None:
            print_fit(console, fit, speed)
        if found is not None:
            console.print(calibration_line(found), style="dim", soft_wrap=True)
    if fit is not None and not fit.fits:
        raise typer.Exit(1)


def plan(model: str, kv: Any, context: int | None, num_seqs: int, dtype: str) -> Fit:
    """The fit of a model by its config; no weights are read."""
    import torch

    from twilight_engine.cli.fit import check_fit
    from twilight_engine.models.load import pick_dtype, read_config

    config = read_config(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = config.max_position_embeddings if context is None else context
    size = pick_dtype(dtype, device, config).itemsize
    return check_fit(config, kv, context=tokens, num_seqs=num_seqs, dtype_bytes=size)


def print_sections(console: Console, sections: dict[str, list[Fact]], speed: LinkSpeed) -> None:
    from rich.table import Table

    for title, facts in sections.items():
        table = Table.grid(padding=(0, 2))
        for fact in facts:
            table.add_row(MARKS[fact.state], fact.name, fact.value)
            if fact.advice:
                table.add_row("", "", f"[dim]{fact.advice}[/]")
        if title == "Host memory for KV":
            table.add_row(MARKS["ok"], *link_row(speed))
        console.print(f"[bold]{title}[/]")
        console.print(table)
        console.print()


def link_row(speed: LinkSpeed) -> tuple[str, str]:
    if speed.is_link:
        up, down = speed.host_to_device_gbps, speed.device_to_host_gbps
        return "link, measured", f"{up:.1f} GB/s host to device, {down:.1f} GB/s back"
    text = f"{speed.host_to_device_gbps:.1f} GB/s (no GPU, so the link is a memory copy)"
    return "memory copy, measured", text


def print_fit(console: Console, fit: Fit, speed: LinkSpeed) -> None:
    place = "GPU" if fit.on_gpu else "device (here: the same memory)"
    console.print("[bold]Will it fit?[/]")
    console.print(tier_table(f"On the {place}", fit.device, fit.device_free))
    console.print(tier_table("In host memory", fit.host, fit.host_free))
    dense = fit.plan.host_bytes
    seconds = dense / speed.host_to_device_gbps / 1e9
    console.print(
        f"[dim]Read densely, {format_bytes(dense)} would cross the link at every token: "
        f"{seconds:,.2f} s at the speed measured.[/]"
    )
    console.print(verdict(fit))


def tier_table(title: str, tiers: dict[str, int], free: int) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_footer=True)
    total = sum(tiers.values())
    table.add_column("tier", footer="together")
    table.add_column("bytes", justify="right", footer=format_bytes(total))
    table.add_column("what it holds", style="dim", footer=f"of {format_bytes(free)} free")
    for tier, count in tiers.items():
        if count:
            table.add_row(tier, format_bytes(count), MEANING.get(tier, ""))
    return table


def verdict(fit: Fit) -> str:
    if fit.fits:
        return "[bold green]It fits.[/]"
    short = []
    if not fit.device_fits:
        short.append(f"{format_bytes(fit.device_bytes - fit.device_free)} too much for the device")
    if not fit.host_fits:
        wanted = fit.host_bytes + (0 if fit.on_gpu else fit.device_bytes)
        short.append(f"{format_bytes(wanted - fit.host_free)} too much for host memory")
    advice = "try a smaller --context, fewer --num-seqs, --preset lean or --dense-layers none"
    return f"[bold red]It does not fit:[/] {' and '.join(short)}; {advice}."


def doctor_json(
    sections: dict[str, list[Fact]], speed: LinkSpeed, fit: Fit | None
) -> dict[str, Any]:
    """Everything doctor prints, as JSON values."""
    data: dict[str, Any] = {
        title: {fact.name: fact.value for fact in facts} for title, facts in sections.items()
    }
    data["link"] = asdict(speed)
    if fit is not None:
        data["fit"] = {
            "fits": fit.fits,
            "device": fit.device,
            "device_free": fit.device_free,
            "host": fit.host,
            "host_free": fit.host_free,
        }
    return data
