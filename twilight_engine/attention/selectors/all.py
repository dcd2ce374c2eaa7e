"""Selector `all`: every token is a candidate; the INT4 scan is cheap."""

from __future__ import annotations

from torch import Tensor

from twilight_engine.attention.selectors.base import LayerView


class AllSelector:
    """Keeps every token, so that top-p speaks of the whole context."""

    def select(self, q: Tensor, view: LayerView) -> Tensor | None:
        return None
