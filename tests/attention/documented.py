"""The selectors that docs/selectors.md shows, as they stand there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

EXAMPLES = 2  # code blocks that define a selector, the first in the file


def documented_selector(name: str) -> Any:
    """The class of that name."""
    text = (Path(__file__).parents[2] / "docs" / "selectors.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in text.split("```python")[1 : 1 + EXAMPLES]:
        exec(block.split("```")[0].split("with LLM")[0], names)
    return names[name]
