"""Render a checkpoint's Jinja chat template in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE_CHARS = 1 << 20
# What a template that meets messages it was not written for can raise.
REFUSALS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


def raise_exception(message: str) -> NoReturn:
    """What templates call to refuse a conversation."""
    raise jinja2.TemplateError(message)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """JSON as transformers renders it: without HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


class ChatTemplate:
    """A compiled template; `render` gives the prompt of a conversation.

    The sandbox keeps a template from reaching Python's internals or changing what it is given. It
    does not bound time: render templates of checkpoints you would run.

    Raises: ValueError for a template that does not compile.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ValueError(
                f"the chat template has {len(source)} characters; at most {MAX_TEMPLATE_CHARS}"
            )
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = strftime_now
        self.source = source
        self.special_tokens = dict(special_tokens)
        try:
            self.template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ValueError(f"the chat template does not compile: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The conversation as one string.

        Args:
            messages: mappings with "role" and "content".
            kwargs: what this template takes besides (`tools`, `enable_thinking`).
        Raises: ValueError where messages are malformed or the template refuses them.
        """
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ValueError(f"messages[{number}] is {message!r:.200}; it needs a role")
        given = {"tools": None, "documents": None, **self.special_tokens, **kwargs}
        try:
            return self.template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **given
            )
        except REFUSALS as error:
            raise ValueError(f"the chat template refused the messages: {error}") from error
