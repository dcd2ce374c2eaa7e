"""The sampling defaults that a checkpoint recommends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twilight_engine.loaders.errors import CheckpointError
from twilight_engine.loaders.hf_config import token_ids
from twilight_engine.loaders.json_file import read_json

DEFAULTS = (
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "max_new_tokens",
)


def read_generation_config(
    directory: Path,
) -> tuple[dict[str, float | int | bool], tuple[int, ...]]:
    """Sampling defaults by Hugging Face's names, and EOS ids; empty without the file."""
    path = directory / "generation_config.json"
    raw: Mapping[str, Any] = read_json(path) if path.exists() else {}
    found: dict[str, float | int | bool] = {}
    for name in DEFAULTS:
        value = raw.get(name)
        if value is None:
            continue
        if not isinstance(value, (int, float)):
            raise CheckpointError(f"{path}: {name} is {value!r}; it must be a number")
        found[name] = value
    return found, token_ids(raw.get("eos_token_id"))
