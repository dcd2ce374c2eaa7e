"""The shapes a prompt may come in, and what each becomes: text and tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from twilight_engine.loaders.tokenizer import Tokenizer

# "text", [1, 2, 3], {"prompt": "text"} or {"prompt_token_ids": [1, 2, 3]}, the last with an
# optional "prompt" that is only passed on.
Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]

_ALLOWED = (
    "a string, a list of token ids, {'prompt': ...} or {'prompt_token_ids': ...}, or a list of them"
)


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def as_prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several -> a list; a list of whole numbers is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise ValueError(f"prompts is {prompts!r:.200}; it must be {_ALLOWED}")
    if prompts and all(map(_is_token, prompts)):
        return [prompts]
    return list(prompts)


def is_one_prompt(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is a single prompt, not a list of them."""
    if isinstance(prompts, (list, tuple)):
        return bool(prompts) and all(map(_is_token, prompts))
    return True


def read_prompt(
    prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int, number: int
) -> tuple[str | None, list[int]]:
    """A prompt's text, if it has one, and its tokens.

    Args:
        number: of the prompt in its call, for messages.
    Raises: ValueError for other shapes, an empty prompt, or tokens outside the vocabulary.
    """
    text: Any = None
    ids: Any = None
    if isinstance(prompt, str):
        text = prompt
    elif isinstance(prompt, Mapping):
        unknown = set(prompt) - {"prompt", "prompt_token_ids"}
        if unknown or not prompt:
            raise ValueError(f"prompt {number} has keys {sorted(prompt)}; it must be {_ALLOWED}")
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    else:
        ids = prompt
    if ids is None:
        if not isinstance(text, str):
            raise ValueError(f"prompt {number} is {prompt!r:.200}; it must be {_ALLOWED}")
        if tokenizer is None:
            raise ValueError(
                f"prompt {number} is text, but the model came without a tokenizer; give token ids"
            )
        ids = tokenizer.encode(text)
    if not isinstance(ids, (list, tuple)) or not all(map(_is_token, ids)):
        raise ValueError(f"prompt {number} is {prompt!r:.200}; it must be {_ALLOWED}")
    if not ids:
        raise ValueError(f"prompt {number} has no tokens; it must have at least one")
    outside = [i for i in ids if not 0 <= i < vocab_size]
    if outside:
        raise ValueError(
            f"prompt {number} has token {outside[0]}; the vocabulary is 0 .. {vocab_size - 1}"
        )
    return text, list(ids)


def is_one_conversation(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> bool:
    """Whether this is one conversation, not a list of them.

    Raises: ValueError for neither.
    """
    if isinstance(messages, (list, tuple)) and messages:
        if all(isinstance(m, Mapping) for m in messages):
            return True
        if all(isinstance(m, (list, tuple)) and m for m in messages):
            return False
    raise ValueError(
        f"messages is {messages!r:.200}; it must be a list of {{'role': ..., 'content': ...}}, "
        "not empty, or a list of such lists"
    )
