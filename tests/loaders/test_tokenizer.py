"""Tokenizers: BOS, special tokens, chat templates, GGUF vocabularies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from twilight_engine.loaders import CheckpointError, Tokenizer
from twilight_engine.loaders.gguf_header import GGUFHeader
from twilight_engine.loaders.gguf_tokenizer import QWEN2_PATTERN, tokenizer_from_gguf

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG: dict[str, Any] = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "special": True},
    "chat_template": TEMPLATE,
}


def write_tokenizer(directory: Path, *, bos_by_backend: bool, **config: Any) -> Path:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["some words to learn merges from, some words"], trainer)
    backend.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    if bos_by_backend:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(CONFIG | config))
    return directory


@pytest.mark.parametrize("bos_by_backend", [True, False])
def test_bos_comes_once(bos_by_backend: bool, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, bos_by_backend=bos_by_backend, add_bos_token=True)
    tokenizer = Tokenizer.from_directory(tmp_path)
    plain = tokenizer.encode("some words", add_special_tokens=False)
    assert 0 not in plain
    assert tokenizer.encode("some words") == [0, *plain]
    assert tokenizer.encode("<s>some words") == [0, *plain]
    assert tokenizer.bos_token_id == 0 and tokenizer.eos_token_id == 1


def test_no_bos_unless_asked(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(write_tokenizer(tmp_path, bos_by_backend=False))
    assert 0 not in tokenizer.encode("some words")


def test_decode_and_special_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(write_tokenizer(tmp_path, bos_by_backend=True))
    ids = tokenizer.encode("gr\u00fc\u00df dich")
    assert tokenizer.decode(ids) == "gr\u00fc\u00df dich"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>gr\u00fc\u00df dich"
    assert tokenizer.vocab_size == tokenizer.backend.get_vocab_size() > max(ids)


MESSAGES = [{"role": "user", "content": "hi"}]
RENDERED = "<s><|user|>hi</s><|assistant|>"


def test_chat_template_from_config(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(write_tokenizer(tmp_path, bos_by_backend=True))
    text = tokenizer.apply_chat_template(MESSAGES)
    assert text == RENDERED
    assert tokenizer.encode(text).count(0) == 1
    without = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False)
    assert without == "<s><|user|>hi</s>"


def test_chat_template_by_name_and_by_file(tmp_path: Path) -> None:
    named = [{"name": "tool", "template": "no"}, {"name": "default", "template": TEMPLATE}]
    write_tokenizer(tmp_path, bos_by_backend=True, chat_template=named)
    assert Tokenizer.from_directory(tmp_path).apply_chat_template(MESSAGES) == RENDERED
    (tmp_path / "chat_template.jinja").write_text("file wins {{ extra }}")
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.apply_chat_template(MESSAGES, extra=1) == "file wins 1"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].__class__.__mro__ }}", "refused"),
        ("{{ messages.append(1) }}", "refused"),
        ("{% for i in range(1000000000) %}{% endfor %}", "refused"),
        ("{{ 1 + 'a' }}", "refused"),
        ("{{ 1 // 0 }}", "refused"),
        ("{{ messages[0].nothing.at.all }}", "refused"),
    ],
)
def test_templates_run_in_a_sandbox(template: str, message: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, bos_by_backend=True, chat_template=template)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_directory(tmp_path).apply_chat_template(MESSAGES)


def test_template_errors(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, bos_by_backend=True, chat_template="{% if %}")
    with pytest.raises(CheckpointError, match="does not compile"):
        Tokenizer.from_directory(tmp_path)
    write_tokenizer(tmp_path, bos_by_backend=True, chat_template=None)
    with pytest.raises(ValueError, match="no chat template"):
        Tokenizer.from_directory(tmp_path).apply_chat_template(MESSAGES)
    write_tokenizer(tmp_path, bos_by_backend=True)
    with pytest.raises(ValueError, match=r"messages\[0\] is 'hi'; it needs a role"):
        Tokenizer.from_directory(tmp_path).apply_chat_template(["hi"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "only fast tokenizers"),
        ({"tokenizer.json": "{}"}, "is not a tokenizer"),
        ({"tokenizer.json": "\x00\xff"}, "is not a tokenizer"),
    ],
)
def test_broken_directories(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_directory(tmp_path)


BYTES = [f"<0x{i:02X}>" for i in range(256)]
PIECES = ["\u2581", "h", "e", "l", "o", "w", "he", "ll", "\u2581he", "llo", "\u2581hello", "lo"]


def spm_metadata(**changes: Any) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *PIECES]
    types = [2, 3, 3] + [6] * 256 + [1] * len(PIECES)
    best_first = ["he", "ll", "llo", "\u2581he", "\u2581hello", "lo"]
    ranks = [-float(best_first.index(p)) if p in best_first else -100.0 for p in PIECES]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types),
        "tokenizer.ggml.scores": np.array([0.0] * 259 + ranks, np.float32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | changes


def gguf_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    return tokenizer_from_gguf(Path("m.gguf"), GGUFHeader(metadata, {}))


def test_sentencepiece_vocabulary() -> None:
    tokenizer = gguf_tokenizer(spm_metadata())
    names = [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("hello w\u00e9")]
    assert names == ["<s>", "\u2581hello", "\u2581", "w", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("hello w\u00e9")) == "hello w\u00e9"
    assert tokenizer.encode("<s>hello")[:2] == [1, 259 + PIECES.index("\u2581hello")]


def test_sentencepiece_settings() -> None:
    settings = {"add_bos_token": False, "add_space_prefix": False}
    changes = {f"tokenizer.ggml.{name}": value for name, value in settings.items()}
    tokenizer = gguf_tokenizer(spm_metadata(**changes))
    names = [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("he")]
    assert names == ["he"]


def bpe_metadata(pre: str, **changes: Any) -> dict[str, Any]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "12", "123", "<|bos|>", "<think>"]
    types = [1] * (len(alphabet) + 2) + [3, 4]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types),
        "tokenizer.ggml.merges": ["1 2", "12 3"],
        "tokenizer.ggml.bos_token_id": len(tokens) - 2,
    } | changes


@pytest.mark.parametrize(
    ("pre", "digits", "bos"),
    [("smollm", 6, 0), ("qwen2", 6, 0), ("llama-bpe", 2, 1), ("gpt-2", 2, 0), ("default", 2, 0)],
)
def test_pre_tokenizers(pre: str, digits: int, bos: int) -> None:
    tokenizer = gguf_tokenizer(bpe_metadata(pre))
    ids = tokenizer.encode("123123")
    assert len(ids) == digits + bos
    text = "It's \u00fcber-12  ok\n\n x"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    marked = tokenizer.encode("a<think>b", add_special_tokens=False)
    assert len(marked) == 3
    assert tokenizer.decode(marked) == "a<think>b"  # user-defined tokens are text


def test_qwen2_pattern_is_the_models_own() -> None:
    module = pytest.importorskip("transformers.models.qwen2.tokenization_qwen2")
    assert QWEN2_PATTERN == module.PRETOKENIZE_REGEX


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.tokens": None}, "tokens is missing"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "a token twice"),
        ({"tokenizer.ggml.merges": None}, "merges is missing"),
        ({"tokenizer.ggml.merges": ["abc"]}, "no pair"),
        ({"tokenizer.ggml.merges": ["zz yy"]}, "do not fit the vocabulary"),
        ({"tokenizer.ggml.token_type": np.zeros(3)}, "one number a token"),
        ({"tokenizer.ggml.bos_token_id": 1 << 31}, "there are 260 tokens"),
        ({"tokenizer.chat_template": "{% if %}"}, "does not compile"),
    ],
)
def test_broken_vocabularies(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        gguf_tokenizer(bpe_metadata("smollm", **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.pre": "klingon"}, "'klingon'; supported: smollm"),
        ({"tokenizer.ggml.model": "bert"}, "'bert'; supported: 'gpt2', 'llama'"),
    ],
)
def test_unsupported_vocabularies(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        gguf_tokenizer(bpe_metadata("smollm", **changes))
