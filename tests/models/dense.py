"""A plain dense Attend over a growing cache of one sequence, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from twilight_engine.loaders.config import ModelConfig
from twilight_engine.models import DecoderModel


class DenseAttend:
    """Causal attention with each layer's sliding window, in float32."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer in self.keys:
            k = torch.cat((self.keys[layer], k))
            v = torch.cat((self.values[layer], v))
        self.keys[layer], self.values[layer] = k, v
        group = self.config.num_q_heads // self.config.num_kv_heads
        keys, values = (t.float().repeat_interleave(group, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * self.config.softmax_scale
        last = torch.arange(len(k) - len(q), len(k))[:, None]
        token = torch.arange(len(k))[None]
        visible = token <= last
        window = self.config.sliding_windows[layer]
        if window is not None:
            visible &= token > last - window
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)


def greedy(model: DecoderModel, prompt: list[int], count: int) -> list[int]:
    """The first `count` greedy tokens after a prompt."""
    attend = DenseAttend(model.config)
    tokens, start = list(prompt), 0
    for _ in range(count):
        new = torch.tensor(tokens[start:])
        positions = torch.arange(start, len(tokens))
        logits = model(new, positions, attend, lengths=len(prompt))
        start = len(tokens)
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :]
