"""Prompts put together from tokens: the chat template's frame, an instruction, a question."""

from __future__ import annotations

from collections.abc import Sequence

from twilight_engine.loaders.tokenizer import Tokenizer

MARK = "%%MESSAGE%%"  # where the user's message goes in a rendered conversation


class Prompter:
    """Puts a user's message, and the beginning of its answer, into a tokenizer's frame.

    Pieces are tokenised on their own, at line and sentence ends where tokens end anyway, so a
    prompt's length is the sum of its pieces'. Without a chat template, or with chat=False, the
    prompt is a text to complete.

    Args:
        chat: whether to use the chat template; a model that thinks first is asked not to.
    Raises: ValueError for a template that does not render the message as it is.
    """

    def __init__(self, tokenizer: Tokenizer, *, chat: bool = True) -> None:
        self.tokenizer = tokenizer
        self.is_chat = chat and tokenizer.chat_template is not None
        self.head, self.tail = "", ""
        if self.is_chat:
            messages = [{"role": "user", "content": MARK}]
            rendered = tokenizer.apply_chat_template(messages, enable_thinking=False)
            if rendered.count(MARK) != 1:
                raise ValueError(
                    f"the chat template renders a user's message {rendered.count(MARK)} times; "
                    f"tasks need one that renders it once"
                )
            self.head, self.tail = rendered.split(MARK)

    def encode(self, text: str) -> list[int]:
        """Tokens of a piece in the middle of a prompt."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_each(self, pieces: Sequence[str]) -> list[list[int]]:
        """Tokens of many pieces, each on its own."""
        encoded = self.tokenizer.backend.encode_batch(list(pieces), add_special_tokens=False)
        return [piece.ids for piece in encoded]

    def opening(self, instruction: str) -> list[int]:
        """Tokens from the start of the prompt to where the context begins."""
        text = self.head + instruction
        return self.tokenizer.encode(text, add_special_tokens=not self.is_chat)

    def question(self, question: str, answer_prefix: str = "") -> tuple[int, ...]:
        """Tokens from the end of the context to where the answer begins.

        Args:
            question: the user's message ends with it.
            answer_prefix: the first words of the answer, to go on from.
        """
        tail = self.tail if self.is_chat else "\nAnswer:"
        if answer_prefix and not tail[-1:].isspace():
            tail += " "
        return tuple(self.encode(question + tail + answer_prefix))

    def room(
        self,
        length: int,
        opening: Sequence[int],
        question: Sequence[int],
        max_new_tokens: int,
        *,
        least: int,
    ) -> int:
        """Tokens of context that are left of `length`.

        Raises: ValueError if they are fewer than `least`.
        """
        rest = len(opening) + len(question) + max_new_tokens
        if length < rest + least:
            raise ValueError(
                f"length is {length}; this task needs at least {rest + least} tokens: {rest} for "
                f"instruction, question and answer, {least} for a context"
            )
        return length - rest
