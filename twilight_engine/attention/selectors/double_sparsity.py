"""Selectors `double_sparsity` and `double_sparsity_online`: q . k over a few channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twilight_engine.attention.selectors.base import LayerView
from twilight_engine.layout import IndexPages, StepMeta
from twilight_engine.ops.estimate_scores import estimate_scores
from twilight_engine.ops.select_blocks import select_blocks

CHANNEL_SHARE = 4  # D / 4 INT4 channels are 1/16 of the KV, Double Sparsity's own label budget


class DoubleSparsitySelector:
    """Double Sparsity (arXiv 2408.07092): the best tokens by q . k over calibrated channels.

    The label of a token is its K in the channels that matter most to a KV head. Labels are those
    channels of the INT4 index: no second copy of K is kept, and a label score is an estimate of a
    query that is zero in all other channels. It reads what the scan of all channels reads, so here
    it saves no device bytes over `all`; it is there to be compared.

    Args:
        channels: [layer][KV head][r] channel numbers, as eval.channels.rank_channels orders them.
    Raises: ValueError for channels that are not of that form.
    """

    per_token = True

    def __init__(self, channels: Sequence[Sequence[Sequence[int]]] | Tensor) -> None:
        table = torch.as_tensor(channels)
        if table.dim() != 3 or table.is_floating_point() or table.numel() == 0:
            raise ValueError(
                f"channels has shape {list(table.shape)} and dtype {table.dtype}; it must be "
                "[num_layers, num_kv_heads, r] whole numbers"
            )
        if table.min() < 0:
            raise ValueError(f"channels has {int(table.min())}; channel numbers are >= 0")
        self._channels = table.long().cpu()
        self._masks: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    @classmethod
    def from_ranking(
        cls, ranking: Tensor, num_channels: int | None = None
    ) -> DoubleSparsitySelector:
        """The first channels of a ranking [num_layers, Hkv, D]; None: a quarter of them.

        Raises: ValueError for a num_channels that the ranking does not have.
        """
        dim = ranking.shape[-1]
        if num_channels is None:
            num_channels = max(1, dim // CHANNEL_SHARE)
        if not 1 <= num_channels <= dim:
            raise ValueError(f"num_channels is {num_channels}; it must be 1 to {dim} (head_dim)")
        return cls(ranking[..., :num_channels])

    def select(self, q: Tensor, view: LayerView) -> Tensor | None:
        mask = self._mask(view.layer, view.windows.num_kv_heads, q)
        return best_tokens(q, mask, view)

    def _mask(self, layer: int, num_kv_heads: int, q: Tensor) -> Tensor:
        """[1, Hkv, 1, D] of q's dtype: 1 for a channel that counts. Made before any capture."""
        key = (layer, q.device, q.dtype)
        if key not in self._masks:
            have, dim = self._channels.shape[:2], q.shape[-1]
            if layer >= have[0] or have[1] != num_kv_heads or self._channels.max() >= dim:
                raise ValueError(
                    f"channels are for {have[0]} layers, {have[1]} KV heads and head_dim > "
                    f"{int(self._channels.max())}; layer {layer} has {num_kv_heads} KV heads and "
                    f"head_dim {dim}"
                )
            mask = torch.zeros(num_kv_heads, dim).scatter_(1, self._channels[layer], 1.0)
            self._masks[key] = mask[None, :, None].to(q.device, q.dtype)
        return self._masks[key]


class DoubleSparsityOnlineSelector:
    """Double Sparsity without calibration: channels chosen for each query.

    A channel d matters as far as it moves logits: by the sum over the group of |q_d|, times the
    mean range of K in d over the sequence's full pages, which the index knows.
    """

    per_token = True

    def select(self, q: Tensor, view: LayerView) -> Tensor | None:
        heads = view.windows.num_kv_heads
        weight = q.float().unflatten(1, (heads, -1)).abs().sum(2)  # [N, Hkv, D]
        weight = weight * channel_ranges(view.index, view.meta)
        best = weight.topk(max(1, q.shape[-1] // CHANNEL_SHARE), dim=-1).indices
        mask = torch.zeros_like(weight).scatter_(-1, best, 1.0)
        return best_tokens(q, mask[:, :, None].to(q.dtype), view)


def channel_ranges(index: IndexPages, meta: StepMeta) -> Tensor:
    """[N, Hkv, D] mean over the visible full pages of max - min of K, float32; 0 without pages."""
    size = meta.page_size
    pages = torch.arange(-(-meta.max_len // size), device=meta.positions.device)
    seq = meta.query_seq.long()
    last = torch.minimum(meta.positions + 1, meta.window_starts[seq])
    listed = (pages >= meta.ctx_starts[:, None] // size) & ((pages + 1) * size <= last[:, None])
    ids = meta.page_table[seq][:, pages].long().clamp(min=0)
    if index.k_bounds is not None:
        bounds = index.k_bounds[ids].float()  # [N, P, Hkv, runs, 2, D]
        span = bounds[..., 1, :].amax(-2) - bounds[..., 0, :].amin(-2)
    else:
        span = 15 * index.k_scale[ids, :, 0].float()  # [N, P, Hkv, D]
    kept = listed[:, :, None, None].float()
    return (span * kept).sum(1) / kept.sum(1).clamp(min=1)


def best_tokens(q: Tensor, mask: Tensor, view: LayerView) -> Tensor:
    """The view's budget of list tokens with the largest q . k over the mask's channels.

    Args:
        mask: [N or 1, Hkv, 1, D] of q's dtype.
    Returns: [N, Hkv, tokens] uint8, united over the query heads of a KV head.
    """
    meta = view.meta
    masked = (q.unflatten(1, (view.windows.num_kv_heads, -1)) * mask).flatten(1, 2)
    tokens = -(-meta.max_len // meta.page_size) * meta.page_size
    scores = torch.full((*q.shape[:2], tokens), -torch.inf, device=q.device)
    estimate_scores(
        masked, view.index, view.windows, meta, softmax_scale=view.softmax_scale, scores=scores
    )
    t = torch.arange(tokens, device=q.device)
    edge = meta.window_starts[meta.query_seq.long()]
    resident = (t < meta.num_sink) | (t >= edge[:, None])  # [N, tokens]
    scores.masked_fill_(resident[:, None], -torch.inf)
    return select_blocks(
        scores,
        meta,
        budget=view.budget,
        block=1,
        page_size=meta.page_size,
        num_kv_heads=view.windows.num_kv_heads,
    )
