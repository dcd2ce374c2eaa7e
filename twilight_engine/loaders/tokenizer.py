"""Text to tokens and back, with the checkpoint's own special tokens and chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from twilight_engine.loaders.chat_template import ChatTemplate
from twilight_engine.loaders.errors import CheckpointError
from twilight_engine.loaders.json_file import MAX_JSON_BYTES, read_json
from twilight_engine.loaders.stream_decoder import StreamDecoder

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class Tokenizer:
    """A `tokenizers` tokenizer with what a model needs around it.

    Args:
        backend: does the work.
        special_tokens: text of bos_token, eos_token and so on, as templates know them.
        chat_template: Jinja source, or None.
        add_bos: `encode` begins with the BOS token even if the backend does not see to it.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        chat_template: str | None = None,
        add_bos: bool = False,
    ) -> None:
        self.backend = backend
        self.special_tokens = dict(special_tokens)
        self.bos_token_id = self.token_id(special_tokens.get("bos_token"))
        self.eos_token_id = self.token_id(special_tokens.get("eos_token"))
        self.add_bos = add_bos and self.bos_token_id is not None
        self.chat_template = (
            ChatTemplate(chat_template, special_tokens) if chat_template is not None else None
        )

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """Read tokenizer.json, and beside it tokenizer_config.json and chat_template.jinja.

        Raises: CheckpointError; a slow tokenizer's files alone are not enough.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{directory} has no tokenizer.json; only fast tokenizers are supported"
            )
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has more than {MAX_JSON_BYTES} bytes")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        config = optional_json(directory / "tokenizer_config.json")
        named = optional_json(directory / "special_tokens_map.json") | config
        special = {name: token_text(named[name]) for name in SPECIAL_NAMES if named.get(name)}
        template = find_template(directory, config)
        try:
            add_bos = config.get("add_bos_token") is True
            return cls(backend, special_tokens=special, chat_template=template, add_bos=add_bos)
        except ValueError as error:
            raise CheckpointError(f"{directory}: {error}") from error

    def token_id(self, token: str | None) -> int | None:
        """The id of a token's exact text, or None."""
        found: int | None = None if token is None else self.backend.token_to_id(token)
        return found

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        size: int = self.backend.get_vocab_size()
        return size

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Tokens of a text.

        With add_special_tokens, the BOS token comes first where the model wants one, and only once
        even if the text (a rendered chat) begins with it already.
        """
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and self.bos_token_id is not None:
            bos = self.bos_token_id
            text_bos = self.special_tokens["bos_token"]
            if ids[:2] == [bos, bos] and not text.startswith(2 * text_bos):
                return ids[1:]
            if self.add_bos and ids[:1] != [bos]:
                return [bos, *ids]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of some tokens; bytes that are no character show as U+FFFD."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def stream_decoder(
        self, skip_special_tokens: bool = True, context: Sequence[int] = ()
    ) -> StreamDecoder:
        """A decoder for tokens that come one by one, after those of `context`."""
        return StreamDecoder(lambda ids: self.decode(ids, skip_special_tokens), context)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt of a conversation, to be encoded with `encode`.

        Raises: ValueError if the checkpoint has no template, or if it refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("this model has no chat template; give a plain prompt instead")
        return self.chat_template.render(
            messages, add_generation_prompt=add_generation_prompt, **kwargs
        )


def optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def token_text(token: Any) -> str:
    """A token's text, from a string or a serialised AddedToken."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise CheckpointError(f"special token {token!r:.200} has no text")
    return text


def find_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja wins over the key of tokenizer_config.json, a string or named list."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has more than {MAX_JSON_BYTES} bytes")
        return path.read_text(encoding="utf-8", errors="replace")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{directory}: chat_template must be a string or a list of them")
    return template
