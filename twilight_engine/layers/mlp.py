"""The gated feed-forward block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from twilight_engine.layers.linear import Linear


class SwiGLU(nn.Module):
    """y = W_down (silu(W_gate x) * W_up x), with W_gate and W_up stacked into one projection."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        y: Tensor = self.down_proj(F.silu(gate) * up)
        return y
