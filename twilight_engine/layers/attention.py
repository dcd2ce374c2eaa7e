"""The projections around attention; attention itself is the caller's."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from twilight_engine.layers.linear import Linear
from twilight_engine.layers.norm import RMSNorm
from twilight_engine.layers.rope import Rotary
from twilight_engine.loaders.config import ModelConfig


class Attend(Protocol):
    """What a model calls in each layer: store the new K and V, attend, return the result."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from T new tokens.

        Args:
            layer: number of the layer.
            q: [T, Hq, D] after RoPE (and qk-norm), model dtype.
            k, v: [T, Hkv, D], k after RoPE (and qk-norm); views, strided in dimension 0.
        Returns: [T, Hq, D], model dtype.
        """


class AttentionProjections(nn.Module):
    """q, k, v = W_qkv x, optional norm of each q and k head, RoPE, attend, W_o."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_q_heads = config.num_q_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        q_size = config.num_q_heads * config.head_dim
        heads = config.num_q_heads + 2 * config.num_kv_heads
        self.qkv_proj = Linear(
            config.hidden_size, heads * config.head_dim, bias=config.attention_bias
        )
        self.o_proj = Linear(q_size, config.hidden_size, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, layer: int, x: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        sizes = (self.num_q_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).split(sizes, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out = attend(layer, rotary.apply(q), rotary.apply(k), v)
        y: Tensor = self.o_proj(out.flatten(1))
        return y
