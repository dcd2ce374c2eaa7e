"""A tiny random model with a byte tokenizer, for tests of the runtime."""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from twilight_engine import LLM, KVConfig
from twilight_engine.loaders.config import ModelConfig
from twilight_engine.loaders.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=260,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_position_embeddings=512,
    eos_token_ids=(256,),
)
KV = KVConfig(page_size=16, num_recent=16, dense_layers=(0,), hot_bytes=1 << 18)


def byte_tokenizer() -> Tokenizer:
    """A token a byte, then <end> as 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, special_tokens={"eos_token": "<end>"}, chat_template=TEMPLATE)


def tiny_llm(**changes: Any) -> LLM:
    """An LLM of CONFIG with random weights, in float32 on the CPU."""
    options: dict[str, Any] = {
        "device": "cpu",
        "load_format": "dummy",
        "max_model_len": 256,
        "max_num_seqs": 3,
        "kv_config": KV,
        "prefill_chunk_size": 64,
        "tokenizer": byte_tokenizer(),
    }
    model = changes.pop("model", CONFIG)
    return LLM(model, **{**options, **changes})


def prompt_ids(length: int, seed: int = 0) -> list[int]:
    """A prompt of ordinary tokens, different for each seed."""
    return [(i * i * 7 + i * (seed + 3) + seed * 31) % 256 for i in range(length)]
