"""Passages of long texts, whose last tokens are to be predicted."""

from __future__ import annotations

from collections.abc import Sequence

from twilight_engine.eval.items import Passage
from twilight_engine.loaders.tokenizer import Tokenizer


def passages(
    tokenizer: Tokenizer,
    texts: Sequence[tuple[str, str]],
    *,
    length: int,
    targets: int,
    count: int,
) -> list[Passage]:
    """`count` slices of `length` tokens, from the texts in turn, each at its own place.

    Args:
        texts: (name, text) pairs.
        targets: last tokens of each slice that are predicted.
    Raises: ValueError for a text with too few tokens, with both numbers; for targets that leave no
        context; without texts.
    """
    if not texts:
        raise ValueError("texts is empty; give at least one (name, text)")
    if not 0 < targets < length:
        raise ValueError(f"targets is {targets}; it must lie in [1, {length - 1}], below length")
    each = -(-count // len(texts))
    found: dict[str, list[Passage]] = {}
    for name, text in texts[:count]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) < each * length:
            raise ValueError(
                f"the text {name} has {len(ids)} tokens; {each} passages of {length} tokens need "
                f"{each * length}: give more or longer texts, fewer passages or a shorter length"
            )
        spare = (len(ids) - each * length) // each
        starts = [i * (length + spare) + spare // 2 for i in range(each)]
        found[name] = [
            Passage(
                f"{name}/{start}",
                tuple(ids[start : start + length - targets]),
                tuple(ids[start + length - targets : start + length]),
            )
            for start in starts
        ]
    return [slices[i] for i in range(each) for slices in found.values()][:count]
