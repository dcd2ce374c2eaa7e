"""Llama 2, 3 and 3.1-3.3, LongChat, and everything else saved as LlamaForCausalLM (SmolLM2)."""

from __future__ import annotations

from twilight_engine.loaders.config import Family

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    defaults={"max_position_embeddings": 2048},
    qkv_bias=None,
    gguf_architectures=("llama",),
    gguf_permuted=True,
)
