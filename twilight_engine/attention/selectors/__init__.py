"""Which tokens a decode step may look at: the selector interface and its implementations."""

from __future__ import annotations

from twilight_engine.attention.selectors.all import AllSelector
from twilight_engine.attention.selectors.base import LayerView, Selector
from twilight_engine.attention.selectors.lsh import LshSelector
from twilight_engine.attention.selectors.quest import QuestSelector
from twilight_engine.attention.selectors.streaming import StreamingSelector
from twilight_engine.config import SparseConfig

__all__ = [
    "AllSelector",
    "LayerView",
    "LshSelector",
    "QuestSelector",
    "Selector",
    "StreamingSelector",
    "make_selector",
]


def make_selector(config: SparseConfig) -> Selector:
    """The selector a config names, or the object it carries."""
    if config.selector == "all":
        return AllSelector()
    if config.selector == "quest":
        return QuestSelector()
    if config.selector == "streaming":
        return StreamingSelector()
    if config.selector == "lsh":
        return LshSelector()
    selector: Selector = config.selector
    return selector
