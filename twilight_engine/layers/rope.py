"""Rotary position embeddings and every scaling of them in use."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from twilight_engine.loaders.config import RopeConfig


@dataclass(frozen=True)
class Rotary:
    """The rotation of each token of a step, computed once and used by every layer."""

    cos: Tensor  # [T, 1, D / 2] float32, times the attention factor
    sin: Tensor  # [T, 1, D / 2] float32

    def apply(self, x: Tensor) -> Tensor:
        """Rotate x [T, H, D], whose channels i and i + D / 2 form pair i; float32 inside."""
        a, b = x.float().chunk(2, dim=-1)
        rotated = torch.cat((a * self.cos - b * self.sin, b * self.cos + a * self.sin), dim=-1)
        return rotated.to(x.dtype)

    def slice(self, start: int, end: int) -> Rotary:
        """The rotation of tokens start .. end - 1."""
        return Rotary(self.cos[start:end], self.sin[start:end])


class Rope:
    """Turns positions into rotations.

    angle[t, i] = positions[t] * inv_freq[i], inv_freq[i] = theta^(-2i / D), then scaled.
    Dynamic NTK depends on how long the request is: its base is fixed when the request is prefilled,
    so that keys rotated earlier stay true, and its lengths come with every call.

    Source: transformers' modeling_rope_utils; YaRN (arXiv 2309.00071); Llama 3.1.
    """

    def __init__(
        self, config: RopeConfig, head_dim: int, max_positions: int, device: torch.device
    ) -> None:
        self.config = config
        self.head_dim = head_dim
        self.max_positions = max_positions
        self.exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        self.inv_freq = scaled_inv_freq(config, self.exponents, head_dim)
        self.attention_factor = attention_factor(config)

    def __call__(self, positions: Tensor, lengths: Tensor | int | None = None) -> Rotary:
        """Rotations of tokens at `positions`.

        Args:
            positions: [T] integers.
            lengths: dynamic NTK only: the length each token's request had when its base was fixed
                (its prompt's), [T] or one for all; at most max_positions means no scaling.
        Raises: ValueError if dynamic NTK gets no lengths.
        """
        inv_freq = self.inv_freq
        if self.config.rope_type == "dynamic":
            if lengths is None:
                raise ValueError("lengths is None; dynamic NTK rope needs each request's length")
            inv_freq = self.dynamic_inv_freq(lengths)
        angles = (positions.float()[:, None] * inv_freq)[:, None, :]
        return Rotary(angles.cos() * self.attention_factor, angles.sin() * self.attention_factor)

    def dynamic_inv_freq(self, lengths: Tensor | int) -> Tensor:
        """[D / 2], or [T, D / 2] for a tensor of lengths; never read on the host."""
        length = torch.as_tensor(lengths, device=self.exponents.device).float()
        stretch = self.config.factor * length.clamp(min=self.max_positions) / self.max_positions
        power = self.head_dim / (self.head_dim - 2)
        base = self.config.theta * (stretch - (self.config.factor - 1)) ** power
        return 1.0 / base[..., None] ** self.exponents


def scaled_inv_freq(config: RopeConfig, exponents: Tensor, head_dim: int) -> Tensor:
    """The inverse frequencies [D / 2] of every scaling that does not depend on the request."""
    inv_freq = 1.0 / config.theta**exponents
    if config.freq_factors is not None:
        inv_freq = inv_freq / torch.tensor(config.freq_factors, device=inv_freq.device)
    if config.rope_type == "linear":
        return inv_freq / config.factor
    if config.rope_type == "llama3":
        return llama3_inv_freq(config, inv_freq)
    if config.rope_type == "yarn":
        return yarn_inv_freq(config, inv_freq, head_dim)
    return inv_freq


def llama3_inv_freq(config: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Divide long wavelengths by `factor`, keep short ones, and blend those in between."""
    original = config.original_max_position_embeddings or 0
    turns = original * inv_freq / (2 * math.pi)  # over the original context
    blend = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * inv_freq / config.factor + blend * inv_freq


def yarn_inv_freq(config: RopeConfig, inv_freq: Tensor, head_dim: int) -> Tensor:
    """Blend by channel pair: many turns over the original context keep their frequency."""
    original = config.original_max_position_embeddings or 0

    def pair_with(turns: float) -> float:
        wavelength = original / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(config.theta))

    low, high = pair_with(config.beta_fast), pair_with(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as the reference does: no division by zero
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device=inv_freq.device)
    interpolated = ((pairs - low) / (high - low)).clamp(0, 1)
    return inv_freq / config.factor * interpolated + inv_freq * (1 - interpolated)


def attention_factor(config: RopeConfig) -> float:
    """What multiplies cos and sin; other than 1 for YaRN only."""
    if config.rope_type != "yarn":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor

    def temperature(scale: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * scale * math.log(config.factor) + 1.0

    if config.mscale and config.mscale_all_dim:
        return temperature(config.mscale) / temperature(config.mscale_all_dim)
    return temperature(1.0)
