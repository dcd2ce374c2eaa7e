"""Mistral: Llama with a sliding window in every layer (up to v0.1) or in none.

Its GGUF files call themselves llama.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twilight_engine.loaders.config import Family


def windows(raw: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """One window for all layers; a config.json without the key means 4096, null means none."""
    return (raw.get("sliding_window", 4096),) * num_layers


MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32},
    windows=windows,
)
