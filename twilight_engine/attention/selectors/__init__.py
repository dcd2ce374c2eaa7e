"""Which tokens a decode step may look at: the selector interface and its implementations."""

from __future__ import annotations

from collections.abc import Callable

from twilight_engine.attention.selectors.all import AllSelector
from twilight_engine.attention.selectors.base import LayerView, Selector
from twilight_engine.attention.selectors.double_sparsity import (
    DoubleSparsityOnlineSelector,
    DoubleSparsitySelector,
)
from twilight_engine.attention.selectors.lsh import NEEDS_SIGNATURES, LshSelector
from twilight_engine.attention.selectors.quest import QuestSelector
from twilight_engine.attention.selectors.streaming import StreamingSelector
from twilight_engine.config import SparseConfig

__all__ = [
    "NEEDS_CHANNELS",
    "NEEDS_SIGNATURES",
    "AllSelector",
    "DoubleSparsityOnlineSelector",
    "DoubleSparsitySelector",
    "LayerView",
    "LshSelector",
    "QuestSelector",
    "Selector",
    "StreamingSelector",
    "make_selector",
]


BY_NAME: dict[str, Callable[[], Selector]] = {
    "all": AllSelector,
    "quest": QuestSelector,
    "double_sparsity_online": DoubleSparsityOnlineSelector,
    "lsh": LshSelector,
    "streaming": StreamingSelector,
}
NEEDS_CHANNELS = (
    "selector 'double_sparsity' needs the model's calibrated channels; pass a "
    "DoubleSparsitySelector(channels) as docs/selectors.md shows, or use 'double_sparsity_online'"
)


def make_selector(config: SparseConfig) -> Selector:
    """The selector a config names, or the object it carries.

    Raises: ValueError for double_sparsity by name alone: its channels are a model's own.
    """
    if config.selector == "double_sparsity":
        raise ValueError(NEEDS_CHANNELS)
    if isinstance(config.selector, str):
        return BY_NAME[config.selector]()
    selector: Selector = config.selector
    return selector
