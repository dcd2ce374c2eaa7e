"""A GGUF file as a checkpoint: its config, and its tensors under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor

from twilight_engine.loaders.config import Family, ModelConfig, RopeConfig, bounded_layers
from twilight_engine.loaders.errors import CheckpointError
from twilight_engine.loaders.gguf_header import GGUFHeader, GGUFTensor
from twilight_engine.loaders.tensors import TensorInfo

TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FREQS = "rope_freqs.weight"
PERMUTED = ("self_attn.q_proj", "self_attn.k_proj")


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; unknown names stay, for the check to report."""
    stem, _, kind = name.rpartition(".")
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{kind}"
    prefix, _, rest = stem.partition(".")
    layer, _, part = rest.partition(".")
    if prefix == "blk" and part in LAYER_NAMES:
        return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"
    return name


class GGUFFile:
    """The tensors of a GGUF file, dequantised as they are read (see TensorSource)."""

    def __init__(self, path: Path, header: GGUFHeader, config: ModelConfig, family: Family) -> None:
        self.path = path
        self.config = config
        self.permuted = family.gguf_permuted
        self.places = {hf_name(n): t for n, t in header.tensors.items() if n != ROPE_FREQS}
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(t.shape, t.kind.name, True) for name, t in self.places.items()
        }

    def read(self, name: str) -> Tensor:
        """One tensor in float32."""
        tensor = torch.from_numpy(read_data(self.path, name, self.places[name]))
        if self.permuted and name.rpartition(".")[0].endswith(PERMUTED):
            return undo_permutation(tensor, self.config.head_dim)
        return tensor


def read_data(path: Path, name: str, place: GGUFTensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    raw = np.empty(place.num_bytes, np.uint8)
    with path.open("rb") as file:
        file.seek(place.start)
        if file.readinto(raw.data) != place.num_bytes:
            raise CheckpointError(f"{path}: ended in the middle of tensor {name!r}")
    rows = raw.reshape(*place.shape[:-1], -1)
    return np.ascontiguousarray(dequantize(rows, place.kind), np.float32).reshape(place.shape)


def undo_permutation(tensor: Tensor, head_dim: int) -> Tensor:
    """Undo llama.cpp's reordering of q and k rows, which pairs channels 2i and 2i + 1 for RoPE."""
    pairs = tensor.view(-1, head_dim // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def config_from_gguf(path: Path, header: GGUFHeader, family: Family) -> ModelConfig:
    """Build the ModelConfig that a GGUF file's metadata describes.

    Raises: CheckpointError for missing or senseless values; NotImplementedError for features this
    engine lacks.
    """
    try:
        return build_config(path, header, family)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except NotImplementedError as error:
        raise NotImplementedError(f"{path}: {error}") from error
    except KeyError as error:
        raise CheckpointError(f"{path}: {error} is missing from the metadata") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: bad metadata: {error}") from error


def build_config(path: Path, header: GGUFHeader, family: Family) -> ModelConfig:
    metadata, tensors = header.metadata, header.tensors
    arch = metadata["general.architecture"]

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{arch}.{key}", default)
        if isinstance(value, np.ndarray):  # some writers give one value a layer
            if len(value) == 0 or (value != value[0]).any():
                raise NotImplementedError(f"{key} that differs by layer is not supported")
            return value[0].item()
        return value

    def need(key: str) -> Any:
        value = get(key)
        if value is None:
            raise KeyError(f"{arch}.{key}")
        return value

    hidden, heads = need("embedding_length"), need("attention.head_count")
    head_dim = get("attention.key_length") or hidden // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, head_dim) != head_dim:
            raise NotImplementedError(f"{key} {get(key)} other than head_dim {head_dim}")
    if "token_embd.weight" not in tensors:
        raise CheckpointError("token_embd.weight is missing")
    num_layers = bounded_layers(need("block_count"))
    window = get("attention.sliding_window") if family.gguf_permuted else None
    return ModelConfig(
        model_type=family.model_type,
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden_size=hidden,
        intermediate_size=need("feed_forward_length"),
        num_layers=num_layers,
        num_q_heads=heads,
        num_kv_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        rms_norm_eps=float(need("attention.layer_norm_rms_epsilon")),
        rope=rope_from_gguf(path, header, arch),
        max_position_embeddings=need("context_length"),
        sliding_windows=(window or None,) * num_layers,
        attention_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm=family.qk_norm,
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=next(iter(ids_of(metadata, "bos")), None),
        eos_token_ids=ids_of(metadata, "eos", "eot"),
        dtype=torch.bfloat16,
    )


def ids_of(metadata: Mapping[str, Any], *names: str) -> tuple[int, ...]:
    """The ids of some special tokens, those that the metadata gives."""
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names]
    return tuple(dict.fromkeys(i for i in ids if isinstance(i, int)))


def rope_from_gguf(path: Path, header: GGUFHeader, arch: str) -> RopeConfig:
    """RoPE's base and scaling; Llama 3's scaling comes as a tensor of divisors."""
    metadata = header.metadata
    factors = header.tensors.get(ROPE_FREQS)
    divisors = None
    if factors is not None:
        if len(factors.shape) != 1 or factors.shape[0] > 4096:
            raise CheckpointError(f"{ROPE_FREQS} has shape {list(factors.shape)}")
        divisors = tuple(read_data(path, ROPE_FREQS, factors).tolist())
    scaling = f"{arch}.rope.scaling"
    kind = metadata.get(f"{scaling}.type", "none")
    if metadata.get(f"{scaling}.attn_factor", 1.0) != 1.0:
        raise NotImplementedError(f"{scaling}.attn_factor other than 1 is not supported")
    return RopeConfig(
        theta=float(metadata.get(f"{arch}.rope.freq_base", 10000.0)),
        rope_type="default" if kind == "none" else kind,
        factor=float(metadata.get(f"{scaling}.factor") or 1.0),
        original_max_position_embeddings=metadata.get(f"{scaling}.original_context_length"),
        freq_factors=divisors,
    )
