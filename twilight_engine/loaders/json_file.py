"""Read JSON from files that may be broken or hostile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from twilight_engine.loaders.errors import CheckpointError

MAX_JSON_BYTES = 64 << 20  # tokenizer.json of a 256K vocabulary is about 35 MB


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object in which no key is repeated.

    Raises: CheckpointError. A repeated key could show an auditor one value and a loader another.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"a {type(value).__name__} where a JSON object belongs")
    return value


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise CheckpointError(f"the key {key!r} appears twice")
        result[key] = value
    return result


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of bounded size."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; at most {MAX_JSON_BYTES}")
    try:
        return parse_object(path.read_bytes())
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
