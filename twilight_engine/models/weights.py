"""Fill a model's weights: from a checked checkpoint, or at random."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from twilight_engine.loaders.config import ModelConfig
from twilight_engine.loaders.errors import CheckpointError
from twilight_engine.loaders.tensors import TensorInfo, TensorSource
from twilight_engine.models.decoder import DecoderModel

DUMMY_STD = 0.02  # Hugging Face's initializer_range
# Leftovers of old checkpoints that are recomputed here.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")


@dataclass(frozen=True)
class Target:
    """Where a checkpoint's tensor goes: rows start .. start + shape[0] of a parameter."""

    parameter: str
    shape: tuple[int, ...]
    start: int = 0


def targets(config: ModelConfig) -> dict[str, Target]:
    """Every tensor a checkpoint of this config must hold, by its Hugging Face name."""
    hidden = config.hidden_size
    result = {
        "model.embed_tokens.weight": Target("embed_tokens", (config.vocab_size, hidden)),
        "model.norm.weight": Target("norm.weight", (hidden,)),
    }
    if not config.tie_word_embeddings:
        result["lm_head.weight"] = Target("lm_head.weight", (config.vocab_size, hidden))
    for layer in range(config.num_layers):
        result |= {
            f"model.layers.{layer}.{name}": Target(
                f"layers.{layer}.{target.parameter}", target.shape, target.start
            )
            for name, target in layer_targets(config).items()
        }
    return result


def layer_targets(config: ModelConfig) -> dict[str, Target]:
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size = config.num_q_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    result = {
        "input_layernorm.weight": Target("input_norm.weight", (hidden,)),
        "post_attention_layernorm.weight": Target("post_attention_norm.weight", (hidden,)),
    }
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            full = f"self_attn.{name}.weight"
            result[full] = Target(f"attention.{name}.weight", (config.head_dim,))

    def linear(name: str, parameter: str, out: int, size: int, start: int, bias: bool) -> None:
        result[f"{name}.weight"] = Target(f"{parameter}.weight", (out, size), start)
        if bias:
            result[f"{name}.bias"] = Target(f"{parameter}.bias", (out,), start)

    bias, qkv = config.attention_bias, "attention.qkv_proj"
    linear("self_attn.q_proj", qkv, q_size, hidden, 0, bias)
    linear("self_attn.k_proj", qkv, kv_size, hidden, q_size, bias)
    linear("self_attn.v_proj", qkv, kv_size, hidden, q_size + kv_size, bias)
    linear("self_attn.o_proj", "attention.o_proj", hidden, q_size, 0, config.output_bias)
    linear("mlp.gate_proj", "mlp.gate_up_proj", inner, hidden, 0, config.mlp_bias)
    linear("mlp.up_proj", "mlp.gate_up_proj", inner, hidden, inner, config.mlp_bias)
    linear("mlp.down_proj", "mlp.down_proj", hidden, inner, 0, config.mlp_bias)
    return result


def check_tensors(tensors: Mapping[str, TensorInfo], wanted: Mapping[str, Target]) -> None:
    """Hold a checkpoint's tensors against the ones its config asks for.

    Raises: CheckpointError that names the tensors missing, of another shape or type, or unknown.
    """

    def fail(what: str, names: list[str]) -> None:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise CheckpointError(f"the checkpoint {what}: {', '.join(names[:8])}{more}")

    missing = [name for name in wanted if name not in tensors]
    if missing:
        fail("lacks tensors that its config asks for", missing)
    tied = "lm_head.weight"
    unknown = [n for n in tensors if n not in wanted and n != tied]
    unknown = [n for n in unknown if not n.endswith(IGNORED_SUFFIXES)]
    if unknown:
        fail("has tensors that its config has no place for", unknown)
    for name, target in wanted.items():
        info = tensors[name]
        if info.shape != target.shape:
            fail(f"has {list(info.shape)} where its config asks for {list(target.shape)}", [name])
        if not info.is_float:
            fail(f"holds {info.dtype} where floating-point weights belong", [name])


def load_weights(
    model: DecoderModel,
    source: TensorSource,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Check a checkpoint against the model, take memory, and copy it in, tensor by tensor.

    Args:
        progress: called with (tensors done, tensors in all) after each.
    """
    wanted = targets(model.config)
    check_tensors(source.tensors, wanted)
    model.allocate()
    parameters = dict(model.named_parameters())
    for done, (name, target) in enumerate(wanted.items(), start=1):
        place = parameters[target.parameter][target.start : target.start + target.shape[0]]
        place.copy_(source.read(name))
        if progress is not None:
            progress(done, len(wanted))


def randomise_weights(model: DecoderModel, seed: int = 0) -> None:
    """Take memory and fill it at random on the model's own device: norms 1, the rest normal."""
    model.allocate()
    generator = torch.Generator(model.device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
        else:
            parameter.normal_(0.0, DUMMY_STD, generator=generator)
