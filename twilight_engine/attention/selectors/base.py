"""The selector interface: which blocks of tokens a decode step estimates at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from twilight_engine.layout import IndexPages, LshHashes, StepMeta, Windows


@dataclass(frozen=True)
class LayerView:
    """What a selector may look at: one layer's device tiers and the step's shapes.

    Attributes:
        layer: number of the layer.
        index: quantised full pages by page id; their K bounds are free block metadata.
        windows: resident rows (always exact, whatever the selector says).
        meta: which tokens each query row sees.
        softmax_scale: multiplies q . k.
        budget: SparseConfig.selector_budget: a share of the listed tokens, or a count.
        block: tokens a candidate entry covers: IndexPages.candidate_block, or 1 for a selector
            whose class attribute `per_token` is True.
        lsh: the hash functions of index.lsh_codes; None in a cache without signatures.
    """

    layer: int
    index: IndexPages
    windows: Windows
    meta: StepMeta
    softmax_scale: float
    budget: float | int
    block: int
    lsh: LshHashes | None = None


class Selector(Protocol):
    """Chooses candidate blocks; anything with this method can be SparseConfig.selector.

    A class attribute `per_token = True` makes each token a block of its own. A token left out then
    still has its INT4 estimate in the tail (with `tail="mean"`): no bounds stand in for it.
    """

    def select(self, q: Tensor, view: LayerView) -> Tensor | None:
        """Candidates of one layer and step.

        Args:
            q: [N, Hq, D] query rows, device.
            view: the layer.
        Returns:
            [N, Hkv, num_blocks] uint8, 1 for a candidate block (layout.num_blocks,
            layout.block_of); None: every token. Only torch ops on the device: nothing may
            read a value back to the host.
        """
        ...
