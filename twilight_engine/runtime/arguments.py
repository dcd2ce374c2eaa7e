"""What LLM's arguments come to: a device, a cache config, a context length, a tokenizer."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from twilight_engine.config import DEFAULT_PRESET, KVConfig, SparseConfig
from twilight_engine.loaders.calibration_file import Calibration
from twilight_engine.loaders.config import ModelConfig
from twilight_engine.loaders.tokenizer import Tokenizer
from twilight_engine.ops.launch import has_kernels
from twilight_engine.runtime.sampling_params import SamplingParams

GIB = 1 << 30


def check_at_least_one(**values: int | None) -> None:
    """ValueError for the first that is no whole number >= 1; None passes."""
    for name, value in values.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is {value!r}; it must be a whole number >= 1")


def pick_device(device: str | torch.device) -> torch.device:
    """The device to compute on; "auto" is the GPU if there is one that our kernels can use.

    Raises: ValueError for a device that is not there, RuntimeError for a GPU without kernels.
    """
    if device != "auto":
        try:
            chosen = torch.device(device)
        except RuntimeError:  # torch knows no such kind of device
            chosen = torch.device("meta")
        if chosen.type not in ("cpu", "cuda"):
            raise ValueError(f"device is {device!r}; allowed: 'auto', 'cpu', 'cuda', 'cuda:N'")
        if chosen.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device is {device!r}, but torch finds no CUDA device here")
        if chosen.type == "cuda" and not has_kernels():
            raise RuntimeError(
                f"device is {device!r}, but twilight_engine was built without CUDA kernels "
                "(nvcc was not found at build time); build it again with nvcc, or use 'cpu'"
            )
        if chosen.type == "cuda" and chosen.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        return chosen
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if not has_kernels():
        warnings.warn(
            "there is a GPU, but twilight_engine was built without CUDA kernels; using the CPU",
            stacklevel=3,
        )
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def make_configs(
    kv_config: KVConfig | None,
    sparse_config: SparseConfig | None,
    preset: str | None,
    calibration: Calibration | None,
    kv_offloading_size: float | None,
    hot_bytes: int | None,
) -> tuple[KVConfig, SparseConfig]:
    """The caller's configs; in place of one that is None the calibration's, else the preset's."""
    if calibration is not None:
        kv, sparse = calibration.kv_config(), calibration.sparse_config()
    else:
        preset = DEFAULT_PRESET if preset is None else preset
        kv, sparse = KVConfig.preset(preset), SparseConfig.preset(preset)
    kv = with_budgets(kv_config or kv, kv_offloading_size, hot_bytes)
    return kv, sparse_config or sparse


def with_budgets(
    config: KVConfig, kv_offloading_size: float | None, hot_bytes: int | None
) -> KVConfig:
    """A cache config with the budgets that were given apart; hot_bytes replaces hot_kv_share."""
    if kv_offloading_size is not None:
        if config.host_bytes is not None:
            raise ValueError(
                f"kv_offloading_size is {kv_offloading_size} GiB and host_bytes "
                f"{config.host_bytes}; give one of them"
            )
        if kv_offloading_size <= 0:
            raise ValueError(f"kv_offloading_size is {kv_offloading_size}; it must be > 0 GiB")
        config = dataclasses.replace(config, host_bytes=int(kv_offloading_size * GIB))
    if hot_bytes is not None:
        if config.hot_bytes is not None:
            raise ValueError(
                f"hot_bytes is {hot_bytes} and kv_config's {config.hot_bytes}; give one of them"
            )
        config = dataclasses.replace(config, hot_bytes=hot_bytes, hot_kv_share=None)
    return config


def context_length(max_model_len: int | None, config: ModelConfig) -> int:
    """The most tokens of a sequence; warns beyond what the model was made for."""
    if max_model_len is None:
        return config.max_position_embeddings
    if max_model_len > config.max_position_embeddings:
        warnings.warn(
            f"max_model_len is {max_model_len}; the model was made for "
            f"{config.max_position_embeddings} positions and may fail beyond them",
            stacklevel=3,
        )
    return max_model_len


def default_sampling(
    generation_defaults: Mapping[str, Any], changes: Mapping[str, Any]
) -> SamplingParams:
    """SamplingParams as a checkpoint's generation defaults have them, with some fields changed."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    found = {name: generation_defaults[name] for name in names if name in generation_defaults}
    if "max_new_tokens" in generation_defaults:
        found["max_tokens"] = generation_defaults["max_new_tokens"]
    return SamplingParams(**{**found, **changes})


def pick_tokenizer(
    tokenizer: Tokenizer | str | Path | None, of_model: Tokenizer | None
) -> Tokenizer | None:
    """The tokenizer that was asked for, else the model's."""
    if tokenizer is None:
        return of_model
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    return Tokenizer.from_directory(Path(tokenizer).expanduser())
