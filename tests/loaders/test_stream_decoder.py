"""Streaming detokenisation: the pieces make the text, and none ends inside a character."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.loaders.test_tokenizer import gguf_tokenizer, spm_metadata
from twilight_engine.loaders.stream_decoder import MAX_PENDING, REPLACEMENT, StreamDecoder


def decode_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def stream(decoder: StreamDecoder, ids: Sequence[int]) -> list[str]:
    return [*(decoder.push(i) for i in ids), decoder.flush()]


@given(st.text(max_size=60))
def test_characters_come_whole(text: str) -> None:
    pieces = stream(StreamDecoder(decode_bytes), text.encode("utf-8", errors="surrogatepass"))
    assert "".join(pieces) == decode_bytes(text.encode("utf-8", errors="surrogatepass"))


@given(st.text(alphabet=st.characters(blacklist_categories=["Cs"]), max_size=60))
def test_no_piece_has_half_a_character(text: str) -> None:
    decoder = StreamDecoder(decode_bytes)
    emitted = ""
    for byte in text.encode():
        emitted += decoder.push(byte)
        assert text.startswith(emitted)


@given(st.binary(max_size=80))
def test_broken_bytes_still_come_out(data: bytes) -> None:
    decoder = StreamDecoder(decode_bytes)
    emitted = stream(decoder, data)
    assert decoder.flush() == ""
    kept = [c for c in decode_bytes(data) if c != REPLACEMENT]
    assert [c for c in "".join(emitted) if c != REPLACEMENT] == kept


def test_what_is_pending_is_bounded() -> None:
    decoder = StreamDecoder(decode_bytes)
    for _ in range(1000):
        decoder.push(0xFF)
        assert len(decoder.ids) <= 2 * MAX_PENDING


@pytest.mark.parametrize("text", ["hello hello", " hello", "w\u00e9llo \U0001f600 hello"])
def test_spaces_between_sentencepiece_tokens(text: str) -> None:
    tokenizer = gguf_tokenizer(spm_metadata())
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(stream(tokenizer.stream_decoder(), ids)) == tokenizer.decode(ids) == text
