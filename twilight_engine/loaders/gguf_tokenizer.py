"""Build a tokenizer from a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from twilight_engine.loaders.errors import CheckpointError
from twilight_engine.loaders.gguf_header import GGUFHeader
from twilight_engine.loaders.tokenizer import SPECIAL_NAMES, Tokenizer

CONTROL, USER_DEFINED = 3, 4  # token types that are matched whole in a text
GGUF_SPECIAL = {"unk": "unknown", "pad": "padding", "sep": "seperator"}  # GGUF's own spelling
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
PRE_TOKENIZERS = {  # tokenizer.ggml.pre -> the name used here
    "smollm": "smollm",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
    "gpt-2": "gpt2",
    "default": "gpt2",
}


def tokenizer_from_gguf(path: Path, header: GGUFHeader) -> Tokenizer:
    """The tokenizer and chat template that a GGUF file carries.

    Raises: CheckpointError for broken vocabularies; NotImplementedError for kinds of tokenizer
    that are not supported.
    """
    try:
        return build(header.metadata)
    except NotImplementedError as error:
        raise NotImplementedError(f"{path}: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def build(metadata: Mapping[str, Any]) -> Tokenizer:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise CheckpointError("tokenizer.ggml.tokens is missing")
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointError("tokenizer.ggml.tokens holds a token twice")
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        backend, add_bos = byte_level_bpe(metadata, vocab)
    elif kind == "llama":
        backend, add_bos = sentencepiece_bpe(metadata, vocab), True
    else:
        raise NotImplementedError(f"tokenizer.ggml.model {kind!r}; supported: 'gpt2', 'llama'")
    add_whole_tokens(backend, metadata, tokens)
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        special_tokens=special_texts(metadata, tokens),
        chat_template=template if isinstance(template, str) else None,
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos)),
    )


def byte_level_bpe(
    metadata: Mapping[str, Any], vocab: dict[str, int]
) -> tuple[tokenizers.Tokenizer, bool]:
    """A GPT-2 style tokenizer, and whether its kind begins with BOS unless told otherwise."""
    pre = metadata.get("tokenizer.ggml.pre", "default")
    style = PRE_TOKENIZERS.get(pre) if isinstance(pre, str) else None
    if style is None:
        known = ", ".join(PRE_TOKENIZERS)
        raise NotImplementedError(f"tokenizer.ggml.pre {pre!r}; supported: {known}")
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise CheckpointError("tokenizer.ggml.merges is missing")
    pairs = [tuple(str(merge).split(" ")) for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise CheckpointError("tokenizer.ggml.merges holds something that is no pair")
    backend = new_backend(vocab, pairs, ignore_merges=style == "llama3")
    if style == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizer(style)
    backend.decoder = decoders.ByteLevel()
    return backend, style == "llama3"


def new_backend(vocab: dict[str, int], merges: list[Any], **options: Any) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(f"the merges do not fit the vocabulary: {error}") from error


def pre_tokenizer(style: str) -> pre_tokenizers.PreTokenizer:
    """How a text is split before BPE; must be the one the model was trained with."""
    if style == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if style == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    pattern = LLAMA3_PATTERN if style == "llama3" else QWEN2_PATTERN
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, to_bytes])


def sentencepiece_bpe(metadata: Mapping[str, Any], vocab: dict[str, int]) -> tokenizers.Tokenizer:
    """A Llama 2 style tokenizer: merges follow from the scores, unknown characters from bytes."""
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or isinstance(scores, list) or len(scores) != len(vocab):
        raise CheckpointError("tokenizer.ggml.scores must have one number a token")
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    names = list(vocab)
    if not isinstance(unknown, int) or not 0 <= unknown < len(names):
        raise CheckpointError(f"tokenizer.ggml.unknown_token_id is {unknown!r}")
    merges = merges_from_scores(vocab, scores.tolist())
    backend = new_backend(
        vocab, merges, unk_token=names[unknown], byte_fallback=True, fuse_unk=True
    )
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    to_marks = normalizers.Replace(" ", "\u2581")
    first = [normalizers.Prepend("\u2581")] if prefix else []
    backend.normalizer = normalizers.Sequence([*first, to_marks])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([*steps, *last])
    return backend


def merges_from_scores(vocab: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to put a token together from two, best score first, as SentencePiece prefers."""
    found = []
    for token, number in vocab.items():
        if len(token) > 256:
            raise CheckpointError(f"a token of {len(token)} characters; at most 256")
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                order = (-scores[number], number, vocab[left], vocab[right])
                found.append((order, left, right))
    found.sort()
    return [(left, right) for _, left, right in found]


def add_whole_tokens(
    backend: tokenizers.Tokenizer, metadata: Mapping[str, Any], tokens: list[str]
) -> None:
    """Register control and user-defined tokens, which BPE must not take apart."""
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None or isinstance(types, list) or len(types) != len(tokens):
        raise CheckpointError("tokenizer.ggml.token_type must have one number a token")
    by_type: dict[int, list[AddedToken]] = {CONTROL: [], USER_DEFINED: []}
    for token, kind in zip(tokens, types.tolist(), strict=True):
        if kind in by_type and token:
            added = AddedToken(token, special=kind == CONTROL, normalized=False)
            by_type[kind].append(added)
    backend.add_special_tokens(by_type[CONTROL])
    backend.add_tokens(by_type[USER_DEFINED])


def special_texts(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    """The texts of the special tokens whose ids the metadata gives."""
    texts = {}
    for name in SPECIAL_NAMES:
        short = name.removesuffix("_token")
        key = f"tokenizer.ggml.{GGUF_SPECIAL.get(short, short)}_token_id"
        number = metadata.get(key)
        if number is None:
            continue
        if not isinstance(number, int) or not 0 <= number < len(tokens):
            raise CheckpointError(f"{key} is {number!r}; there are {len(tokens)} tokens")
        texts[name] = tokens[number]
    return texts
