"""Run a passage: prefill once, then simulate any grading of its last tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from twilight_engine.attention.prefill import causal_attention
from twilight_engine.eval.simulation.attention import LayerTrace, simulate_layer
from twilight_engine.eval.simulation.grading import Grading
from twilight_engine.layers.attention import Attend
from twilight_engine.models.decoder import DecoderModel


@dataclass
class PrefilledPassage:
    """A context's K and V of every layer, and the tokens to predict after it."""

    target_ids: Tensor  # [T]: the last context token, then all targets but the last
    next_ids: Tensor  # [T]: the targets
    keys: list[Tensor]  # by layer [n, Hkv, D]
    values: list[Tensor]


@dataclass
class Outcome:
    """Log-probabilities [T, V] of a passage's targets, and the graded layers' traces."""

    log_probs: Tensor
    traces: dict[int, LayerTrace] = field(default_factory=dict)


class _Recorder:
    """Dense causal attention of a prompt that keeps K and V; callable as `attend`."""

    def __init__(self, model: DecoderModel, length: int) -> None:
        config = model.config
        shape = (length, config.num_kv_heads, config.head_dim)
        self.config, self.end = config, 0
        self.keys = [
            torch.empty(shape, dtype=model.dtype, device=model.device)
            for _ in range(config.num_layers)
        ]
        self.values = [torch.empty_like(k) for k in self.keys]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        start = self.end - len(k)
        self.keys[layer][start : self.end] = k
        self.values[layer][start : self.end] = v
        return causal_attention(
            q,
            self.keys[layer][: self.end],
            self.values[layer][: self.end],
            softmax_scale=self.config.softmax_scale,
            sliding_window=self.config.sliding_windows[layer],
        )


@torch.inference_mode()
def prefill_passage(
    model: DecoderModel, context_ids: list[int], target_ids: list[int], chunk: int = 8192
) -> PrefilledPassage:
    """Prefill all context tokens but the last, densely; the steps start with that one.

    Raises: NotImplementedError for a model with sliding windows.
    """
    if any(window is not None for window in model.config.sliding_windows):
        raise NotImplementedError("sliding windows; simulated: full attention in every layer")
    device = model.device
    ids = torch.tensor([*context_ids, *target_ids], device=device)
    length = len(context_ids) - 1
    recorder = _Recorder(model, length)
    rotary = model.rotary(torch.arange(length, device=device), length)
    x = model.embed(ids[:length])
    for layer in range(model.config.num_layers):
        for start in range(0, length, chunk):
            recorder.end = min(start + chunk, length)
            part = rotary.slice(start, recorder.end)
            rows = slice(start, recorder.end)
            x[rows] = model.run_layer(layer, x[rows], part, recorder)
    return PrefilledPassage(ids[length:-1], ids[length + 1 :], recorder.keys, recorder.values)


class _Simulator:
    """Attention of all steps of a passage at once; callable as `attend`."""

    def __init__(
        self,
        passage: PrefilledPassage,
        model: DecoderModel,
        grading: Grading,
        by_layer: Mapping[int, Grading],
    ) -> None:
        self.passage, self.scale = passage, model.config.softmax_scale
        self.grading, self.by_layer = grading, by_layer
        self.traces: dict[int, LayerTrace] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = torch.cat([self.passage.keys[layer], k])
        values = torch.cat([self.passage.values[layer], v])
        if layer in self.grading.dense_layers:
            out = causal_attention(q, keys, values, softmax_scale=self.scale, sliding_window=None)
            return out.to(q.dtype)
        grading = self.by_layer.get(layer, self.grading)
        out, self.traces[layer] = simulate_layer(q, keys, values, grading, self.scale)
        return out.to(q.dtype)


@torch.inference_mode()
def simulate(
    model: DecoderModel,
    passage: PrefilledPassage,
    grading: Grading,
    by_layer: Mapping[int, Grading] | None = None,
) -> Outcome:
    """Every step of a passage under a grading, teacher-forced.

    Args:
        by_layer: another grading for some layers; `grading` alone says which are dense.
    """
    attend = _Simulator(passage, model, grading, by_layer or {})
    return Outcome(run_steps(model, passage, attend), attend.traces)


@torch.inference_mode()
def run_steps(model: DecoderModel, passage: PrefilledPassage, attend: Attend) -> Tensor:
    """Log-probabilities [T, V] of a passage's targets under any attention of its steps."""
    start = len(passage.keys[0])
    positions = torch.arange(start, start + len(passage.target_ids), device=model.device)
    logits = model(passage.target_ids, positions, attend, torch.full_like(positions, start + 1))
    assert isinstance(logits, Tensor)
    return logits.log_softmax(-1)


def kl_divergence(dense: Tensor, other: Tensor) -> Tensor:
    """[T] KL(dense || other) in nats of log-probabilities [T, V]."""
    return (dense.exp() * (dense - other)).sum(-1)


def log_loss(log_probs: Tensor, targets: Tensor) -> float:
    """Mean negative log-probability of the targets [T], of log-probabilities [T, V]."""
    return -log_probs.gather(-1, targets[:, None]).mean().item()
