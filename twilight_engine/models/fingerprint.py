"""What tells a model from others, read from its checkpoint without loading it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from twilight_engine.loaders.calibration_file import Fingerprint
from twilight_engine.models.load import LoadFormat, open_checkpoint


def fingerprint(model: str | Path, load_format: LoadFormat = "auto") -> Fingerprint:
    """The sizes of a model and a hash of its norms' weights.

    Norms are small, stored unquantised, and as good as unchanged by a conversion of dtype once they
    are rounded to bfloat16; so a checkpoint and its GGUF files are the same model.

    Raises: ValueError for a model without weights; CheckpointError for broken files.
    """
    checkpoint = open_checkpoint(model, load_format)
    if checkpoint.open_weights is None:
        raise ValueError(f"{checkpoint.source} has no weights to tell it from other models by")
    source = checkpoint.open_weights()
    digest = hashlib.sha256()
    for name in sorted(name for name in source.tensors if name.endswith("norm.weight")):
        weights = source.read(name).to(torch.float32).to(torch.bfloat16)
        digest.update(name.encode() + weights.view(torch.int16).numpy().tobytes())
    config = checkpoint.config
    return Fingerprint(
        name=Path(model).expanduser().resolve().name,
        num_layers=config.num_layers,
        num_q_heads=config.num_q_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        norms_sha256=digest.hexdigest(),
    )
