"""What a model is: the sizes and choices its checkpoint states, and what its family assumes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from twilight_engine.loaders.errors import CheckpointError

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]
ROPE_TYPES: tuple[RopeType, ...] = ("default", "linear", "dynamic", "llama3", "yarn")

# Far above any model; keeps a hostile config from allocating before its tensors are checked.
LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "num_layers": 1024,
    "num_q_heads": 4096,
    "num_kv_heads": 4096,
    "head_dim": 4096,
    "max_position_embeddings": 1 << 40,
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of a whole head: base and scaling, in Hugging Face's names.

    `freq_factors` are divisors of the inverse frequencies, one a pair of channels, that some GGUF
    files carry in place of a scaling rule.
    """

    theta: float = 10000.0
    rope_type: RopeType = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    freq_factors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise NotImplementedError(
                f"rope type {self.rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
            )
        for name in (
            "theta",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "beta_fast",
            "beta_slow",
        ):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise CheckpointError(f"rope {name} is {getattr(self, name)}; it must be > 0")
        if self.theta <= 1:
            raise CheckpointError(f"rope theta is {self.theta}; it must be > 1")
        needs_original = self.rope_type in ("llama3", "yarn")
        if needs_original and not (self.original_max_position_embeddings or 0) > 0:
            raise CheckpointError(
                f"rope type {self.rope_type!r} needs original_max_position_embeddings > 0; it is "
                f"{self.original_max_position_embeddings!r}"
            )
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise CheckpointError(
                f"rope high_freq_factor ({self.high_freq_factor}) must be above low_freq_factor "
                f"({self.low_freq_factor})"
            )


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's sizes and choices.

    Args:
        sliding_windows: one a layer; with W, token t sees tokens t - W + 1 .. t; None: all.
        attention_bias: the q, k and v projections have a bias.
        output_bias: the attention's output projection has one.
        softmax_scale: multiplies the attention logits; 0 stands for 1 / sqrt(head_dim).
        eos_token_ids: any of them ends a generation.
        dtype: what the checkpoint was saved in; the engine may run in another.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    max_position_embeddings: int = 4096
    sliding_windows: tuple[int | None, ...] = ()
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    softmax_scale: float = 0.0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        for name, limit in LIMITS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
                raise CheckpointError(f"{name} is {value!r}; it must be a whole number 1..{limit}")
        if self.num_q_heads % self.num_kv_heads:
            raise CheckpointError(
                f"num_q_heads ({self.num_q_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads})"
            )
        if self.head_dim % 2 or self.head_dim < 4:
            raise CheckpointError(f"head_dim is {self.head_dim}; it must be even and at least 4")
        if not (math.isfinite(self.rms_norm_eps) and self.rms_norm_eps > 0):
            raise CheckpointError(f"rms_norm_eps is {self.rms_norm_eps}; it must be > 0")
        if not self.sliding_windows:
            object.__setattr__(self, "sliding_windows", (None,) * self.num_layers)
        if len(self.sliding_windows) != self.num_layers:
            raise CheckpointError(
                f"sliding_windows has {len(self.sliding_windows)} entries for {self.num_layers} "
                "layers"
            )
        if any(w is not None and w < 1 for w in self.sliding_windows):
            raise CheckpointError(f"sliding_windows has an entry below 1: {self.sliding_windows}")
        factors = self.rope.freq_factors
        if factors is not None and len(factors) != self.head_dim // 2:
            raise CheckpointError(
                f"rope freq_factors has {len(factors)} entries; head_dim {self.head_dim} needs "
                f"{self.head_dim // 2}"
            )
        if not self.softmax_scale:
            object.__setattr__(self, "softmax_scale", self.head_dim**-0.5)


def bounded_layers(num_layers: Any) -> int:
    """num_layers, checked before anything is sized by it."""
    limit = LIMITS["num_layers"]
    if type(num_layers) is not int or not 1 <= num_layers <= limit:
        raise CheckpointError(f"the number of layers is {num_layers!r}; it must lie in 1..{limit}")
    return num_layers


Windows = Callable[[Mapping[str, Any], int], tuple[int | None, ...]]


def no_windows(raw: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Every layer sees its whole context."""
    return (None,) * num_layers


@dataclass(frozen=True)
class Family:
    """What a model family's checkpoints leave unsaid; one is defined in each models/<family>.py.

    Args:
        defaults: values that Hugging Face assumes for keys a config.json leaves out.
        qkv_bias: whether q, k and v have a bias; None: as attention_bias says, o's too.
        windows: reads the sliding window of each layer from a config.json.
        gguf_architectures: general.architecture of this family's GGUF files.
        gguf_permuted: the q and k rows of its GGUF files are permuted for interleaved RoPE.
    """

    model_type: str
    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool | None = False
    qk_norm: bool = False
    windows: Windows = no_windows
    gguf_architectures: tuple[str, ...] = ()
    gguf_permuted: bool = False
