"""Errors as a person at a terminal wants them: one line on stderr, no traceback."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from twilight_engine.kv.errors import HostMemoryError, OutOfPages
from twilight_engine.loaders.errors import CheckpointError

# What a wrong option raises; click, or typer's copy of it, depending on the version.
ClickException: type[Exception] = typer.BadParameter.__mro__[2]
FAILED, WRONG_USE, INTERRUPTED = 1, 2, 130
TRACEBACK = "TWILIGHT_TRACEBACK"


class OneLineErrors(TyperGroup):
    """A command group whose errors are one line on stderr.

    Exit code 2 says that the command was used wrongly (an option, a path, a value), 1 that it could
    not be done (a broken checkpoint, too little memory, a failed kernel), 130 that Ctrl-C ended it.
    With TWILIGHT_TRACEBACK set, errors keep their traceback.
    """

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        kwargs["standalone_mode"] = False
        code: object = None
        try:
            code = super().main(*args, **kwargs)
        except ClickException as error:
            end(error.format_message(), WRONG_USE)  # type: ignore[attr-defined]
        except (KeyboardInterrupt, typer.Abort):
            end("interrupted", INTERRUPTED)
        except (ValueError, NotImplementedError, HostMemoryError, OSError, RuntimeError) as error:
            if os.environ.get(TRACEBACK):
                raise
            end(describe(error), exit_code(error))
        sys.exit(code if isinstance(code, int) else 0)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command asked for; the error for one that is not there lists those that are."""
        try:
            return super().resolve_command(ctx, args)
        except ClickException as error:
            there = ", ".join(self.list_commands(ctx))
            error.message += f" Allowed: {there}."  # type: ignore[attr-defined]
            raise


def exit_code(error: Exception) -> int:
    """2 for what the caller can put right on the command line, else 1."""
    wrong_use = isinstance(error, (ValueError, NotImplementedError))
    return WRONG_USE if wrong_use and not isinstance(error, CheckpointError) else FAILED


def describe(error: Exception) -> str:
    """The message; for an error that no check of ours foresaw, how to see where it came from."""
    message = str(error) or type(error).__name__
    foreseen = (ValueError, NotImplementedError, HostMemoryError, OutOfPages, OSError)
    return message if isinstance(error, foreseen) else f"{message} ({TRACEBACK}=1 shows where)"


def end(message: str, code: int) -> NoReturn:
    """Print one line and exit."""
    print("twilight: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)
