"""Selector `lsh`: the tokens whose K collides with the query in random hash tables."""

from __future__ import annotations

from torch import Tensor

from twilight_engine.attention.selectors.base import LayerView
from twilight_engine.config import MAGICPIG_LSH
from twilight_engine.ops.lsh_candidates import lsh_candidates
from twilight_engine.ops.lsh_codes import lsh_codes

NEEDS_SIGNATURES = (
    "selector is 'lsh', but the cache keeps no signatures of K; build it with "
    f"KVConfig(lsh={MAGICPIG_LSH})"
)


class LshSelector:
    """MagicPIG's tables (arXiv 2410.16179): tokens that agree in two tables, united over a group.

    A token of angle a to the query agrees in one table with probability (1 - a / pi)^bits, so the
    mask is a sample that leans to large q . k. MagicPIG attends over the sample alone and divides
    each weight by the probability that it was drawn; here the mask only proposes candidates, which
    are estimated and pruned as any selector's are. It has no budget: KVConfig.lsh sets the odds.
    """

    per_token = True  # an entry of the mask is a token, not a block

    def select(self, q: Tensor, view: LayerView) -> Tensor | None:
        if view.lsh is None:
            raise ValueError(NEEDS_SIGNATURES)
        return lsh_candidates(lsh_codes(q, view.lsh), view.index, view.meta)
