"""load_model: what it takes, what it says, and weights made up."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.loaders.checkpoints import CONFIG, weights, write_directory, write_gguf
from tests.loaders.test_tokenizer import write_tokenizer
from tests.models.dense import DenseAttend
from twilight_engine.loaders import CheckpointError, ModelConfig
from twilight_engine.models import load_model, read_config

TINY = ModelConfig("llama", 50, 32, 64, 2, 4, 2, 16)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("meta-llama/Llama-3.1-8B", {}, "no directory or file here.*hub ids are not downloaded"),
        ("/nowhere/model.gguf", {}, "no directory or file here"),
        (TINY, {}, "load_format 'dummy' makes them up"),
        (TINY, {"load_format": "pt"}, "load_format is 'pt'; allowed: auto, safetensors"),
        (TINY, {"load_format": "dummy", "dtype": "int8"}, "dtype is 'int8'; allowed: 'auto'"),
        (TINY, {"load_format": "dummy", "dtype": torch.float64}, "dtype is torch.float64"),
    ],
)
def test_wrong_arguments_are_named(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(model, **options)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=r"'gguf' needs a \.gguf file"):
        load_model(tmp_path, load_format="gguf")
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"needs a directory.*or a \.gguf file"):
        load_model(tmp_path / "model.bin")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="a list where a JSON object belongs"):
        load_model(tmp_path)


def test_a_checkpoint_directory_brings_everything(tmp_path: Path) -> None:
    write_directory(tmp_path, config=CONFIG | {"eos_token_id": 9})
    write_tokenizer(tmp_path, bos_by_backend=True)
    generation = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": [5, 9]}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    steps: list[tuple[int, int]] = []
    loaded = load_model(tmp_path, progress=lambda done, total: steps.append((done, total)))
    assert loaded.generation_defaults == {"temperature": 0.6, "top_p": 0.9, "do_sample": True}
    assert loaded.config.eos_token_ids == (5, 9, 1)  # generation config, config, tokenizer
    assert loaded.tokenizer is not None
    assert loaded.source == str(tmp_path)
    assert steps[-1] == (len(weights()),) * 2
    assert loaded.model.dtype == torch.float32
    (tmp_path / "generation_config.json").write_text('{"temperature": "hot"}')
    with pytest.raises(CheckpointError, match="temperature is 'hot'"):
        load_model(tmp_path)


def test_read_config_takes_the_same_things(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "hf")
    assert read_config(directory) == read_config(directory / "config.json")
    assert read_config(write_gguf(tmp_path / "m.gguf", weights())).num_layers == 2
    assert read_config(TINY) is TINY


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", torch.float16])
def test_dummy_weights(dtype: Any, device: torch.device) -> None:
    loaded = load_model(TINY, dtype=dtype, device=device, load_format="dummy")
    model = loaded.model
    assert {p.dtype for p in model.parameters()} == {model.dtype}
    assert {p.device.type for p in model.parameters()} == {device.type}
    assert model.norm.weight.eq(1).all()
    assert abs(float(model.embed_tokens.float().std()) - 0.02) < 2e-3
    ids = torch.arange(7, device=device)
    attend = DenseAttend(TINY) if device.type == "cpu" else (lambda layer, q, k, v: q)
    logits = model(ids, ids, attend)
    assert logits.shape == (7, 50) and logits.dtype == torch.float32
    assert math.isfinite(float(logits.sum()))
    again = load_model(TINY, dtype=dtype, device=device, load_format="dummy").model
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_dummy_from_files(tmp_path: Path) -> None:
    directory = write_directory(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for source in (directory, directory / "config.json"):
        loaded = load_model(source, load_format="dummy")
        assert loaded.config.hidden_size == 32 and loaded.tokenizer is None
