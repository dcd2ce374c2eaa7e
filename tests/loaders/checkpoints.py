"""Small checkpoints for the loader tests, written without our own code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
HEAD_DIM = 8
GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GGUF_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def weights(*, qkv_bias: bool = False, qk_norm: bool = False) -> dict[str, Tensor]:
    """Random tensors that CONFIG asks for."""
    generator = torch.Generator().manual_seed(3)
    hidden, inner, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    kv = CONFIG["num_key_value_heads"] * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")
        }
        for name, size in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (size, hidden)
            if qkv_bias and name != "o":
                shapes[f"{at}.self_attn.{name}_proj.bias"] = (size,)
            if qk_norm and name in "qk":
                shapes[f"{at}.self_attn.{name}_norm.weight"] = (HEAD_DIM,)
        shapes |= {f"{at}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, inner)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def write_directory(
    directory: Path,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    shards: int = 1,
    config: Mapping[str, Any] = CONFIG,
) -> Path:
    """A Hugging Face directory, in several shards with an index if asked."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    found = dict(weights() if tensors is None else tensors)
    if shards == 1:
        save_file(found, directory / "model.safetensors")
        return directory
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        names = list(found)[shard::shards]
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({name: found[name] for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in GGUF_TOP:
        return f"{GGUF_TOP[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_LAYER[part]}.{kind}"


def permute(tensor: Tensor) -> Tensor:
    """What llama.cpp's converter does to q and k of the llama architecture."""
    pairs = tensor.reshape(-1, 2, HEAD_DIM // 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    arch: str = "llama",
    kind: str = "F32",
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """A GGUF file of CONFIG's sizes with matrices quantised to `kind`."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_rope_freq_base(CONFIG["rope_theta"])
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool}
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add.get(type(value), writer.add_uint32)(key, value)
    quant = gguf.GGMLQuantizationType[kind]
    for name, tensor in tensors.items():
        permuted = (arch == "llama" and ".q_proj" in name) or (
            arch == "llama" and ".k_proj" in name
        )
        array = (permute(tensor) if permuted else tensor).contiguous().numpy()
        if tensor.ndim == 2 and kind != "F32":
            writer.add_tensor(gguf_name(name), gguf.quantize(array, quant), raw_dtype=quant)
        else:
            writer.add_tensor(gguf_name(name), array)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
