"""The calibration file: what is written is read, and every broken file is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from twilight_engine.config import KVConfig, SparseConfig
from twilight_engine.loaders.calibration_file import (
    SCHEMA,
    Calibration,
    Fingerprint,
    path_beside,
    read_calibration,
    write_calibration,
)
from twilight_engine.loaders.errors import CheckpointError

MODEL = Fingerprint("tiny", 4, 2, 1, 64, 64, 256, "ab" * 32)
MADE = Calibration(
    fingerprint=MODEL,
    preset="balanced",
    attn_top_p=0.7,
    index_top_p=0.98,
    by_layer={2: (0.5, 0.98)},
    dense_layers=(0,),
    hot_kv_share=0.125,
    hot_shares=(0.0, 0.25, 0.5, 0.25),
    measured={"held_out": {"kl": 1e-4}},
    sweep=({"kl": 1e-4},),
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_calibration(MADE, path)
    assert read_calibration(path) == dataclasses.replace(MADE, path=path)
    bare = dataclasses.replace(MADE, preset="lean", index_top_p=None, by_layer={}, hot_shares=None)
    write_calibration(bare, path)
    assert read_calibration(path) == dataclasses.replace(bare, path=path)


def test_the_configs_are_the_presets_with_what_was_chosen() -> None:
    assert MADE.kv_config() == KVConfig(
        dense_layers=(0,), hot_kv_share=0.125, hot_shares=(0.0, 0.25, 0.5, 0.25)
    )
    sparse = MADE.sparse_config()
    assert sparse.layer(1) == sparse
    assert (sparse.attn_top_p, sparse.index_top_p) == (0.7, 0.98)
    assert sparse.layer(2) == SparseConfig(attn_top_p=0.5, index_top_p=0.98)
    lean = dataclasses.replace(MADE, preset="lean", index_top_p=None, by_layer={})
    assert lean.kv_config().v_index == "none"
    assert lean.sparse_config() == SparseConfig.preset("lean", attn_top_p=0.7)


def test_shares_of_many_layers_survive_the_rounding(tmp_path: Path) -> None:
    count = 700
    shares = tuple([1 / count] * count)
    many = dataclasses.replace(MODEL, num_layers=count)
    made = dataclasses.replace(MADE, fingerprint=many, hot_shares=shares, dense_layers=())
    write_calibration(made, tmp_path / "many.json")
    assert read_calibration(tmp_path / "many.json").hot_shares == pytest.approx(shares, abs=1e-6)


def test_the_file_lies_in_a_directory_or_beside_a_file(tmp_path: Path) -> None:
    assert path_beside(tmp_path) == tmp_path / "twilight_calibration.json"
    gguf = tmp_path / "model.gguf"
    assert path_beside(gguf) == tmp_path / "model.gguf.twilight_calibration.json"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"schema": "twilight-engine/calibration/9"},
            f"calibration/9'; this version .* '{SCHEMA}'",
        ),
        ({"preset": "fast"}, "preset is 'fast'; allowed: balanced, lean, paper"),
        ({"preset": ["balanced"]}, r"preset is \['balanced'\]"),
        ({"attn_top_p": "most"}, "attn_top_p is 'most'; it must be a number"),
        ({"attn_top_p": True}, "attn_top_p is True"),
        ({"attn_top_p": 1.5}, r"attn_top_p is 1.5; it must lie in \(0, 1\]"),
        ({"index_top_p": 0.5}, "index_top_p is 0.5; it must be at least attn_top_p"),
        ({"by_layer": {"4": {}}}, "by_layer names layer 4; the model has 4"),
        ({"by_layer": {"last": {}}}, "by_layer names layer 'last'"),
        ({"by_layer": {"1": {"attn_top_p": 0.5}}}, "must have attn_top_p and index_top_p"),
        ({"by_layer": {"1": {"attn_top_p": 0.5, "index_top_p": 2}}}, "index_top_p is 2"),
        ({"by_layer": []}, r"by_layer is \[\]; it must be a JSON object"),
        ({"dense_layers": [-1]}, "dense_layers names layer -1"),
        ({"dense_layers": "all"}, "dense_layers is 'all'; it must be a list"),
        ({"hot_kv_share": 7}, r"hot_kv_share is 7; it must lie in \[0, 1\]"),
        ({"hot_kv_share": None}, "hot_kv_share is None; it must be a number"),
        ({"hot_shares": [1.0]}, "hot_shares has 1 entries for 4 layers"),
        ({"hot_shares": [0.0, 0.5, 0.5, 0.5]}, "hot_shares is .* add up to 1"),
        ({"hot_shares": [0.25] * 4}, r"hot_shares gives hot rows to layers \[0\], which are dense"),
        ({"model": {"name": "tiny"}}, "model lacks num_layers, num_q_heads"),
        ({"colour": "red"}, r"unknown keys \['colour'\]"),
        ({"sweep": 3}, "sweep is 3; it must be a list"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(json.dumps({**MADE.to_json(), **changes}))
    with pytest.raises(
        CheckpointError, match=rf"broken\.json is no calibration to use: .*{message}"
    ):
        read_calibration(path)


def test_a_file_that_is_cut_off_or_lacks_a_key(tmp_path: Path) -> None:
    path = tmp_path / "cut.json"
    text = json.dumps(MADE.to_json())
    path.write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match=r"cut\.json: not valid JSON"):
        read_calibration(path)
    data = MADE.to_json()
    del data["hot_shares"]
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"lacks \['hot_shares'\]"):
        read_calibration(path)
