"""The one way from a path to a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from twilight_engine.loaders.config import ModelConfig
from twilight_engine.loaders.generation import read_generation_config
from twilight_engine.loaders.gguf_file import GGUFFile, config_from_gguf
from twilight_engine.loaders.gguf_header import read_gguf_header
from twilight_engine.loaders.gguf_tokenizer import tokenizer_from_gguf
from twilight_engine.loaders.hf_config import config_from_hf
from twilight_engine.loaders.json_file import read_json
from twilight_engine.loaders.safetensors_dir import SafetensorsDirectory
from twilight_engine.loaders.tensors import TensorSource
from twilight_engine.loaders.tokenizer import Tokenizer
from twilight_engine.models.decoder import DecoderModel
from twilight_engine.models.registry import family_of, gguf_family_of
from twilight_engine.models.weights import load_weights, randomise_weights

LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and what its checkpoint says about using it.

    generation_defaults has Hugging Face's names (do_sample, temperature, top_p, top_k, min_p,
    repetition_penalty, max_new_tokens), those that the checkpoint sets. config.eos_token_ids unites
    the ids of config, generation config and tokenizer.
    """

    model: DecoderModel
    config: ModelConfig
    tokenizer: Tokenizer | None
    generation_defaults: Mapping[str, float | int | bool]
    source: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint opened and described, its weights not yet read."""

    config: ModelConfig
    source: str
    open_weights: Callable[[], TensorSource] | None = None
    open_tokenizer: Callable[[], Tokenizer] | None = None
    generation_defaults: Mapping[str, float | int | bool] = field(default_factory=dict)


def load_model(
    model: str | Path | ModelConfig,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    load_format: LoadFormat = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """Load a model from a Hugging Face directory or a GGUF file, or make a random one.

    Args:
        model: a directory or a .gguf file; with load_format "dummy" also a config.json or a
            ModelConfig. A hub id is not downloaded.
        dtype: of the weights and activations; "auto": float32 on a CPU, elsewhere the checkpoint's
            own, with bfloat16 for float32.
        load_format: "auto" tells by the path; "dummy" makes random weights on the device and reads
            none, but takes the tokenizer where there is one.
        progress: called with (tensors done, tensors in all).
    Raises: CheckpointError for broken or hostile files, before memory is taken for weights;
        NotImplementedError for architectures and features this engine lacks; ValueError otherwise.
    """
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format is {load_format!r}; allowed: {', '.join(LOAD_FORMATS)}")
    device = torch.device(device)
    checkpoint = open_checkpoint(model, load_format)
    tokenizer = checkpoint.open_tokenizer() if checkpoint.open_tokenizer is not None else None
    config = checkpoint.config
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        eos = united(config.eos_token_ids, [tokenizer.eos_token_id])
        config = dataclasses.replace(config, eos_token_ids=eos)
    decoder = DecoderModel(config, dtype=pick_dtype(dtype, device, config), device=device)
    if load_format == "dummy":
        randomise_weights(decoder)
    elif checkpoint.open_weights is None:
        raise ValueError(f"{checkpoint.source} has no weights; load_format 'dummy' makes them up")
    else:
        load_weights(decoder, checkpoint.open_weights(), progress)
    defaults = checkpoint.generation_defaults
    return LoadedModel(decoder, config, tokenizer, defaults, checkpoint.source)


def read_config(model: str | Path | ModelConfig) -> ModelConfig:
    """The ModelConfig of anything load_model takes, without its weights."""
    return open_checkpoint(model, "auto").config


def open_checkpoint(model: str | Path | ModelConfig, load_format: LoadFormat) -> Checkpoint:
    """Find out what `model` is and read its config."""
    if isinstance(model, ModelConfig):
        return Checkpoint(model, f"a {model.model_type} config")
    path = Path(model).expanduser()
    if not path.exists():
        raise ValueError(
            f"model is {str(model)!r}, which is no directory or file here; give a Hugging Face "
            "directory or a .gguf file (hub ids are not downloaded: fetch the model first)"
        )
    if path.is_dir() and load_format != "gguf":
        return open_directory(path)
    if path.suffix == ".gguf" or load_format == "gguf":
        return open_gguf(path)
    if path.suffix == ".json":
        raw = read_json(path)
        return Checkpoint(config_from_hf(raw, family_of(raw)), str(path))
    raise ValueError(
        f"model is {str(path)!r}; load_format {load_format!r} needs a directory with config.json "
        "and safetensors, or a .gguf file"
    )


def open_directory(path: Path) -> Checkpoint:
    raw = read_json(path / "config.json")
    config = config_from_hf(raw, family_of(raw))
    defaults, eos = read_generation_config(path)
    config = dataclasses.replace(config, eos_token_ids=united(eos, config.eos_token_ids))
    has_tokenizer = any((path / n).exists() for n in ("tokenizer.json", "tokenizer_config.json"))
    return Checkpoint(
        config,
        str(path),
        open_weights=lambda: SafetensorsDirectory(path),
        open_tokenizer=(lambda: Tokenizer.from_directory(path)) if has_tokenizer else None,
        generation_defaults=defaults,
    )


def open_gguf(path: Path) -> Checkpoint:
    if not path.is_file():
        raise ValueError(f"model is {str(path)!r}; load_format 'gguf' needs a .gguf file")
    header = read_gguf_header(path)
    family = gguf_family_of(str(header.metadata.get("general.architecture")))
    config = config_from_gguf(path, header, family)
    has_tokenizer = "tokenizer.ggml.model" in header.metadata
    return Checkpoint(
        config,
        str(path),
        open_weights=lambda: GGUFFile(path, header, config, family),
        open_tokenizer=(lambda: tokenizer_from_gguf(path, header)) if has_tokenizer else None,
    )


def united(first: Iterable[int], second: Iterable[int]) -> tuple[int, ...]:
    """The ids of both, each once, in order."""
    return tuple(dict.fromkeys([*first, *second]))


def pick_dtype(dtype: str | torch.dtype, device: torch.device, config: ModelConfig) -> torch.dtype:
    if dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if config.dtype == torch.float32 else config.dtype
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}; allowed: 'auto', {', '.join(map(repr, DTYPES))}")
    return chosen
