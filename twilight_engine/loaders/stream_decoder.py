"""Turn a stream of tokens into a stream of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # what a tokenizer shows for bytes that are not (yet) a character
MAX_PENDING = 16  # tokens; a character has at most 4 bytes, so more than that is really broken


class StreamDecoder:
    """Decodes tokens as they come; never emits half a character.

    The concatenation of everything emitted is the decoded text. Tokens already emitted are kept as
    context until the next piece is out, because a token's text may depend on the one before it
    (SentencePiece drops the space before the first); `context` are tokens that come before them.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        self.decode = decode
        self.ids = list(context)  # context, then what is pending
        self.pending = len(self.ids)  # index into ids of the first token whose text is not out

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is now certain, perhaps none."""
        self.ids.append(token_id)
        text = self.decode(self.ids)
        whole = not text.endswith(REPLACEMENT)
        if not whole and len(self.ids) - self.pending < MAX_PENDING:
            return ""
        return self.emit(text)

    def flush(self) -> str:
        """Return what is still pending, broken characters and all, at the end of a stream."""
        if self.pending == len(self.ids):
            return ""
        return self.emit(self.decode(self.ids))

    def emit(self, text: str) -> str:
        known = self.decode(self.ids[: self.pending])
        new = text[len(known) :]
        if new or len(self.ids) - self.pending >= MAX_PENDING:
            del self.ids[: self.pending]
            self.pending = len(self.ids)
        return new
