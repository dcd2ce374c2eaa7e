"""Which families there are, and which one a checkpoint belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twilight_engine.loaders.config import Family
from twilight_engine.models.llama import LLAMA
from twilight_engine.models.mistral import MISTRAL
from twilight_engine.models.qwen2 import QWEN2
from twilight_engine.models.qwen3 import QWEN3

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3)


def family_of(raw: Mapping[str, Any]) -> Family:
    """The family of a config.json: by architectures[0], or by model_type where there is none."""
    architectures = raw.get("architectures") or []
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    for family in FAMILIES:
        if name == family.architecture or (
            name is None and raw.get("model_type") == family.model_type
        ):
            return family
    supported = ", ".join(family.architecture for family in FAMILIES)
    raise NotImplementedError(
        f"architecture {name or raw.get('model_type')!r} is not supported; supported: {supported}"
    )


def gguf_family_of(architecture: str) -> Family:
    """The family of a GGUF file's general.architecture."""
    for family in FAMILIES:
        if architecture in family.gguf_architectures:
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.gguf_architectures)
    raise NotImplementedError(
        f"GGUF architecture {architecture!r} is not supported; supported: {supported}"
    )
