"""Text of a sequence as its tokens arrive, cut at the first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from twilight_engine.loaders.tokenizer import Tokenizer
from twilight_engine.runtime.sampling_params import SamplingParams

CONTEXT_TOKENS = 8  # of the prompt; decides about the space before the first word


class OutputText:
    """A sequence's text.

    Args:
        tokenizer: None leaves the text empty.
        prompt_ids: the last of them are the context of the first piece.
    """

    def __init__(
        self, params: SamplingParams, tokenizer: Tokenizer | None, prompt_ids: Sequence[int]
    ) -> None:
        self._stop = tuple(params.stop or ())
        self._longest = max(map(len, self._stop), default=1)
        self._include_stop = params.include_stop_str_in_output
        self._decoder = None
        if tokenizer is not None and params.detokenize:
            context = list(prompt_ids[-CONTEXT_TOKENS:])
            self._decoder = tokenizer.stream_decoder(params.skip_special_tokens, context)
        self._searched = 0  # no stop string begins before this character
        self.text = ""

    def push(self, token_id: int, *, search: bool = True) -> str | None:
        """Add a token's text; returns the stop string found, if any, and cuts the text there.

        Args:
            search: look for stop strings; text added without is never searched later.
        """
        if self._decoder is None:
            return None
        self.text += self._decoder.push(token_id)
        return self._search(search)

    def finish(self, *, search: bool = True) -> str | None:
        """Add what was held back as half a character; returns a stop string as push does."""
        if self._decoder is None:
            return None
        self.text += self._decoder.flush()
        return self._search(search)

    def visible(self) -> str:
        """The text that no stop string can take back any more."""
        if self._include_stop:
            return self.text
        return self.text[: max(0, len(self.text) - (self._longest - 1))]

    def _search(self, search: bool) -> str | None:
        if not search:
            self._searched = len(self.text)
            return None
        found = [(at, s) for s in self._stop if (at := self.text.find(s, self._searched)) >= 0]
        if not found:
            self._searched = max(self._searched, len(self.text) - self._longest + 1)
            return None
        at, stop = min(found)
        self.text = self.text[: at + len(stop)] if self._include_stop else self.text[:at]
        return stop
