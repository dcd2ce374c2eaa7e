"""Checkpoints and tokenizers: files in, tensors and a config out."""

from twilight_engine.loaders.config import ModelConfig, RopeConfig
from twilight_engine.loaders.errors import CheckpointError
from twilight_engine.loaders.tokenizer import Tokenizer

__all__ = ["CheckpointError", "ModelConfig", "RopeConfig", "Tokenizer"]
