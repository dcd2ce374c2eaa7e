"""Read a Hugging Face config.json, of transformers 4 or 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from twilight_engine.loaders.config import Family, ModelConfig, RopeConfig, bounded_layers
from twilight_engine.loaders.errors import CheckpointError

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
ROPE_NUMBERS = (
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)


def config_from_hf(raw: Mapping[str, Any], family: Family) -> ModelConfig:
    """Build the ModelConfig of a family from the content of a config.json.

    Raises: CheckpointError for values that make no sense; NotImplementedError for features this
    engine lacks (quantised weights, other activations, partial rotary embeddings).
    """
    refuse_unsupported(raw)
    try:
        return build_config(raw, family)
    except CheckpointError:
        raise
    except (TypeError, KeyError, ValueError, AttributeError, ArithmeticError) as error:
        detail = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"config.json: {detail}") from error


def build_config(raw: Mapping[str, Any], family: Family) -> ModelConfig:
    def get(key: str) -> Any:
        value = raw.get(key)
        return family.defaults.get(key) if value is None else value

    num_q_heads = raw["num_attention_heads"]
    num_layers = raw["num_hidden_layers"]
    attention_bias = bool(get("attention_bias"))
    return ModelConfig(
        model_type=family.model_type,
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=get("num_key_value_heads") or num_q_heads,
        head_dim=get("head_dim") or raw["hidden_size"] // num_q_heads,
        rms_norm_eps=float(get("rms_norm_eps") or 1e-6),
        rope=rope_from_hf(raw, get("max_position_embeddings")),
        max_position_embeddings=get("max_position_embeddings"),
        sliding_windows=family.windows(raw, bounded_layers(num_layers)),
        attention_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.qkv_bias is None else False,
        mlp_bias=bool(get("mlp_bias")),
        qk_norm=family.qk_norm,
        tie_word_embeddings=bool(get("tie_word_embeddings")),
        bos_token_id=next(iter(token_ids(raw.get("bos_token_id"))), None),
        eos_token_ids=token_ids(raw.get("eos_token_id")),
        dtype=DTYPES.get(str(raw.get("dtype") or raw.get("torch_dtype")), torch.bfloat16),
    )


def refuse_unsupported(raw: Mapping[str, Any]) -> None:
    if raw.get("quantization_config"):
        raise NotImplementedError(
            "config.json has a quantization_config; supported: float32, float16 and bfloat16 "
            "safetensors, and quantised GGUF files"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise NotImplementedError(f"hidden_act {raw['hidden_act']!r}; supported: 'silu'")


def token_ids(value: Any) -> tuple[int, ...]:
    """A token id, a list of them or null, as a tuple."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
        raise CheckpointError(f"token id {value!r}; it must be a whole number >= 0 or a list")
    return tuple(ids)


def rope_from_hf(raw: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
    """rope_parameters (transformers 5), or rope_theta with rope_scaling (4)."""
    params = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    by_layer_type = [value for value in params.values() if isinstance(value, dict)]
    if by_layer_type:
        if any(value != by_layer_type[0] for value in by_layer_type):
            raise NotImplementedError("rope_parameters that differ by layer type are not supported")
        params = by_layer_type[0]
    if float(params.get("partial_rotary_factor", raw.get("partial_rotary_factor") or 1.0)) != 1.0:
        raise NotImplementedError("partial_rotary_factor other than 1 is not supported")
    rope_type: Any = params.get("rope_type") or params.get("type") or "default"
    factor = params.get("factor")
    condense = raw.get("rope_condense_ratio")  # LongChat 16K: positions divided by this
    if rope_type == "default" and condense:
        rope_type, factor = "linear", condense
    original = params.get("original_max_position_embeddings") or max_position_embeddings
    if rope_type == "yarn" and factor is None:
        factor = max_position_embeddings / original
    if rope_type in ("linear", "dynamic", "llama3") and factor is None:
        raise CheckpointError(f"rope type {rope_type!r} needs a factor")
    numbers: dict[str, Any] = {
        name: float(params[name]) for name in ROPE_NUMBERS if params.get(name) is not None
    }
    return RopeConfig(
        theta=float(params.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        rope_type=rope_type,
        factor=1.0 if factor is None else float(factor),
        original_max_position_embeddings=int(original),
        truncate=bool(params.get("truncate", True)),
        **numbers,
    )
