"""Which channels of K matter: the calibration of Double Sparsity, on a model's own text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from twilight_engine.attention.prefill import causal_attention
from twilight_engine.attention.selectors import DoubleSparsitySelector
from twilight_engine.eval.methods import Method
from twilight_engine.models.decoder import DecoderModel

SAMPLE_TOKENS = 2048  # the paper calibrates on samples of 512


class _Ranker:
    """Dense causal attention of one sample that sums |q_d k_d|; callable as `attend`."""

    def __init__(self, model: DecoderModel) -> None:
        config = self.config = model.config
        self.sums = torch.zeros(config.num_layers, config.num_kv_heads, config.head_dim)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = self.config.num_kv_heads
        product = q.float().unflatten(1, (heads, -1)) * k.float()[:, :, None]
        self.sums[layer] = product.abs().sum((0, 2)).cpu()
        return causal_attention(
            q,
            k,
            v,
            softmax_scale=self.config.softmax_scale,
            sliding_window=self.config.sliding_windows[layer],
        )


@torch.inference_mode()
def rank_channels(model: DecoderModel, token_ids: Sequence[int]) -> Tensor:
    """Channels of each KV head, those that move logits most first.

    By the mean over tokens and the group's query heads of |q_d * k_d| after RoPE, each token's
    query against its own key.

    Args:
        token_ids: the sample, at least one token.
    Returns: [num_layers, Hkv, D] int64, CPU.
    Source: Double Sparsity (arXiv 2408.07092), its "qk" rule.
    """
    if len(token_ids) < 1:
        raise ValueError("token_ids is empty; a sample has at least one token")
    ids = torch.tensor(token_ids, device=model.device)
    ranker = _Ranker(model)
    rotary = model.rotary(torch.arange(len(ids), device=model.device), len(ids))
    x = model.embed(ids)
    for layer in range(model.config.num_layers):
        x = model.run_layer(layer, x, rotary, ranker)
    return ranker.sums.argsort(dim=-1, descending=True, stable=True)


def with_channels(
    methods: Sequence[Method], model: DecoderModel, token_ids: Sequence[int]
) -> list[Method]:
    """The methods, with channels from a sample's first tokens for those that select by them."""
    if not any(method.sparse.selector == "double_sparsity" for method in methods):
        return list(methods)
    ranking = rank_channels(model, token_ids[:SAMPLE_TOKENS])
    selector = DoubleSparsitySelector.from_ranking(ranking)
    return [
        dataclasses.replace(method, sparse=method.sparse.replace(selector=selector))
        if method.sparse.selector == "double_sparsity"
        else method
        for method in methods
    ]
