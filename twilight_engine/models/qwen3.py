"""Qwen3 (dense): Qwen2 with a norm on each q and k head and no biases unless its config asks."""

from __future__ import annotations

from twilight_engine.loaders.config import Family
from twilight_engine.models.qwen2 import windows

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
    qkv_bias=None,
    qk_norm=True,
    windows=windows,
    gguf_architectures=("qwen3",),
)
