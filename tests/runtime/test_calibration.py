"""A calibration beside a checkpoint: when an LLM takes it, and when it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.models import LAYERS, tiny_model, tiny_weights
from tests.loaders.checkpoints import weights, write_directory, write_gguf
from tests.runtime.tiny import CONFIG
from twilight_engine import LLM, KVConfig, SamplingParams, SparseConfig
from twilight_engine.loaders.calibration_file import Calibration, path_beside, write_calibration
from twilight_engine.loaders.errors import CheckpointError
from twilight_engine.models.fingerprint import fingerprint
from twilight_engine.runtime.report import RunShape

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def calibration_of(model: Path, **changes: Any) -> Calibration:
    values: dict[str, Any] = {
        "fingerprint": fingerprint(model),
        "preset": "balanced",
        "attn_top_p": 0.6,
        "index_top_p": 0.98,
        "by_layer": {3: (0.5, 0.98)},
        "dense_layers": (0,),
        "hot_kv_share": 0.25,
        "hot_shares": (0.0, 0.5, 0.25, 0.25),
    }
    return Calibration(**{**values, **changes})


def small_llm(model: Path, **changes: Any) -> LLM:
    options: dict[str, Any] = {"device": "cpu", "max_model_len": 512, "max_num_seqs": 1}
    return LLM(model, **{**options, **changes})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return tiny_model(tmp_path / "model")


@pytest.fixture
def path(model: Path) -> Path:
    """The file beside the model."""
    write_calibration(calibration_of(model), path_beside(model))
    return path_beside(model)


def test_what_lies_beside_the_model_is_taken(model: Path, path: Path) -> None:
    with small_llm(model) as llm:
        assert llm.calibration is not None and llm.calibration.path == path
        assert llm.kv_config == calibration_of(model).kv_config()
        assert llm.sparse_config == calibration_of(model).sparse_config()
        rows = LAYERS * 512 * 0.25  # of all KV, one KV head
        assert llm.cache.plan.hot_slots == (0, rows / 2, rows / 4, rows / 4)
        assert RunShape.of(llm, "m").calibration == str(path)
        (output,) = llm.generate("hello " * 70, GREEDY, use_tqdm=False)
        dense = SparseConfig(attn_top_p=1.0)
        exact = llm.generate("hello " * 70, GREEDY, sparse_config=dense, use_tqdm=False)
    with small_llm(model, calibration=None) as llm:
        assert llm.calibration is None and RunShape.of(llm, "m").calibration is None
        assert llm.kv_config == KVConfig() and llm.sparse_config == SparseConfig()
        other = llm.generate("hello " * 70, GREEDY, sparse_config=dense, use_tqdm=False)
    assert exact[0].outputs[0].token_ids == other[0].outputs[0].token_ids
    assert output.metrics is not None and output.metrics.exact_rows > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_config": KVConfig(dense_layers=(0,))},
        {"sparse_config": SparseConfig(attn_top_p=0.9)},
        {"preset": "lean"},
    ],
)
def test_the_callers_own_settings_come_first(
    model: Path, path: Path, changes: dict[str, Any]
) -> None:
    with small_llm(model, **changes) as llm:
        assert llm.calibration is None
    with pytest.raises(ValueError, match=r"give one of them|preset is 'lean'; the calibration"):
        small_llm(model, calibration=path, **changes)


def test_budgets_go_beside_a_calibration(model: Path, path: Path) -> None:
    with small_llm(model, preset="balanced", hot_bytes=1 << 16, kv_offloading_size=0.01) as llm:
        assert llm.calibration is not None
        assert llm.kv_config.hot_bytes == 1 << 16 and llm.kv_config.hot_kv_share is None
        assert llm.kv_config.hot_shares == (0.0, 0.5, 0.25, 0.25)
        assert sum(llm.cache.plan.hot_slots) * llm.cache.row_bytes == 1 << 16


def test_a_named_file(model: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "other.json"
    write_calibration(
        calibration_of(model, preset="lean", index_top_p=None, by_layer={}), elsewhere
    )
    with small_llm(model, calibration=str(elsewhere)) as llm:
        assert llm.calibration is not None and llm.kv_config.v_index == "none"
        assert llm.sparse_config.tail == "mean" and llm.sparse_config.attn_top_p == 0.6
    with pytest.raises(ValueError, match=r"nowhere.json', which is no file here; allowed: 'auto'"):
        small_llm(model, calibration=tmp_path / "nowhere.json")


def test_a_broken_file_is_not_passed_over(model: Path, path: Path) -> None:
    path.write_text(path.read_text().replace("0.6", "1.6"))
    with pytest.raises(CheckpointError, match=r"attn_top_p is 1.6"):
        small_llm(model)
    with small_llm(model, calibration=None):
        pass


def test_another_models_file_is_refused(model: Path, path: Path) -> None:
    from safetensors.torch import save_file

    changed = tiny_weights(256)
    changed["model.layers.2.input_layernorm.weight"][3] += 1
    save_file(changed, model / "model.safetensors")
    with pytest.raises(ValueError, match=r"of model, not of model \(norms_sha256 \w{8}\.\.\., not"):
        small_llm(model)
    found = calibration_of(model)
    larger = dataclasses.replace(found.fingerprint, name="larger", num_layers=4, hidden_size=96)
    write_calibration(dataclasses.replace(found, fingerprint=larger), path)
    with pytest.raises(ValueError, match=r"of larger, not of model \(hidden_size 96, not 64\)"):
        small_llm(model)


def test_made_up_weights_have_no_calibration(model: Path, path: Path) -> None:
    with small_llm(model, load_format="dummy") as llm:
        assert llm.calibration is None
    with pytest.raises(ValueError, match="'dummy' makes up another model's weights"):
        small_llm(model, load_format="dummy", calibration=path)
    with pytest.raises(ValueError, match="'dummy' makes up another model's weights"):
        LLM(CONFIG, device="cpu", load_format="dummy", calibration=path)


def test_a_fingerprint_is_the_same_in_every_format_and_dtype(tmp_path: Path) -> None:
    tensors = {name: t.to(torch.bfloat16).float() for name, t in weights().items()}
    halves = {name: t.to(torch.bfloat16) for name, t in tensors.items()}
    found = [
        fingerprint(write_directory(tmp_path / "full", tensors, shards=2)),
        fingerprint(write_directory(tmp_path / "half", halves)),
        fingerprint(write_gguf(tmp_path / "model.gguf", tensors, kind="Q8_0")),
    ]
    assert [f.name for f in found] == ["full", "half", "model.gguf"]
    assert not found[0].differences(found[1]) and not found[0].differences(found[2])
    with pytest.raises(ValueError, match="no weights to tell it from other models"):
        fingerprint(tmp_path / "full" / "config.json")


def test_a_gguf_files_calibration_lies_beside_it(tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "model.gguf", weights())
    made = calibration_of(gguf, by_layer={}, dense_layers=(), hot_shares=(0.5, 0.5))
    write_calibration(made, path_beside(gguf))
    assert json.loads((tmp_path / "model.gguf.twilight_calibration.json").read_text())
    with LLM(gguf, device="cpu", max_num_seqs=1) as llm:
        assert llm.calibration is not None and llm.kv_config.dense_layers == ()
