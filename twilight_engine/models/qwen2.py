"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and windows in the upper layers if asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twilight_engine.loaders.config import Family
from twilight_engine.loaders.errors import CheckpointError


def windows(raw: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """The window of each layer: `layer_types`, or from layer `max_window_layers` on."""
    if not raw.get("use_sliding_window", False):
        return (None,) * num_layers
    window = raw.get("sliding_window", 4096)
    types = raw.get("layer_types")
    if types is None:
        first = raw.get("max_window_layers", 28)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != num_layers or set(types) - set(known):
        raise CheckpointError(f"layer_types must name {num_layers} layers as one of {known}")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768},
    qkv_bias=True,
    windows=windows,
    gguf_architectures=("qwen2",),
)
