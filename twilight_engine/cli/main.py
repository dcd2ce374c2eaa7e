"""`twilight`: the command and what it offers."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from twilight_engine.cli.calibrate import calibrate
from twilight_engine.cli.chat import chat
from twilight_engine.cli.demo import demo
from twilight_engine.cli.doctor import doctor
from twilight_engine.cli.errors import OneLineErrors
from twilight_engine.cli.evaluate import app as evaluate
from twilight_engine.cli.generate import generate
from twilight_engine.cli.warm_up import warm_up

app = typer.Typer(
    cls=OneLineErrors,
    name="twilight",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (generate, chat, calibrate, demo, doctor, warm_up):
    app.command()(command)
app.add_typer(evaluate)


@app.callback(invoke_without_command=True)
def twilight(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.")
    ] = False,
) -> None:
    """Long-context decoding with the KV cache in host memory."""
    if show_version:
        print(package_version())
    elif context.invoked_subcommand is None:
        context.get_help()
        raise typer.Exit


def package_version() -> str:
    """The installed version, or that it runs from a source tree."""
    try:
        return version("twilight-engine")
    except PackageNotFoundError:
        return "not installed (running from a source tree)"


if __name__ == "__main__":
    app()
