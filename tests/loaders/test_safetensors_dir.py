"""Safetensors directories: what loads, and what is refused before any memory is taken."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tests.loaders.checkpoints import CONFIG, weights, write_directory
from twilight_engine.loaders import CheckpointError
from twilight_engine.loaders.safetensors_dir import SafetensorsDirectory, parse_header
from twilight_engine.models import DecoderModel, load_model


@pytest.fixture
def no_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(self: DecoderModel) -> None:
        raise AssertionError("memory was taken for a broken checkpoint")

    monkeypatch.setattr(DecoderModel, "allocate", allocate)


def shard_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape: list[Any], offsets: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_tensors_come_back_bitwise(dtype: torch.dtype, tmp_path: Path) -> None:
    wanted = {
        "a": torch.randn(3, 5).to(dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "scalar": torch.tensor(2.5, dtype=dtype),
    }
    save_file(wanted, tmp_path / "model.safetensors", metadata={"format": "pt"})
    directory = SafetensorsDirectory(tmp_path)
    assert set(directory.tensors) == set(wanted)
    for name, expected in wanted.items():
        got = directory.read(name)
        assert got.dtype == dtype and torch.equal(got, expected)


def test_shards_load_as_one_file(tmp_path: Path) -> None:
    one = load_model(write_directory(tmp_path / "one")).model.state_dict()
    three = load_model(write_directory(tmp_path / "three", shards=3)).model.state_dict()
    assert all(torch.equal(one[name], three[name]) for name in one)


def test_hub_cache_layout_loads(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.parent.mkdir()
    write_directory(snapshot)
    (tmp_path / "blobs").mkdir()
    (snapshot / "model.safetensors").rename(tmp_path / "blobs" / "f00d")
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00d")
    load_model(snapshot)


BROKEN_HEADERS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "truncated"),
    "short": (b"\x05\0\0", "truncated"),
    "long claim": (struct.pack("<Q", 1 << 62) + b"{}", "claims"),
    "claim past the limit": (struct.pack("<Q", 100_000_001) + b"{}", "claims"),
    "not json": (shard_bytes(b"{nope"), "JSON"),
    "not an object": (shard_bytes(b"[1]"), "JSON object"),
    "not utf-8": (shard_bytes(b'{"\xff": 1}'), "JSON"),
    "deep": (shard_bytes(b'{"a":' * 100_000), "JSON"),
    "repeated key": (
        shard_bytes(b'{"a":%b,"a":%b}' % ((json.dumps(tensor([1], [0, 4])).encode(),) * 2)),
        "twice",
    ),
    "overlap": (
        shard_bytes({"a": tensor([2], [0, 8]), "b": tensor([2], [4, 12])}, bytes(12)),
        "overlaps",
    ),
    "hole": (shard_bytes({"a": tensor([1], [4, 8])}, bytes(8)), "hole"),
    "truncated data": (shard_bytes({"a": tensor([4], [0, 16])}, bytes(15)), "truncated"),
    "data too long": (shard_bytes({"a": tensor([4], [0, 16])}, bytes(17)), "the file at"),
    "size mismatch": (shard_bytes({"a": tensor([4], [0, 12])}, bytes(12)), "needs 16 bytes"),
    "product overflow": (shard_bytes({"a": tensor([1 << 62, 8], [0, 0])}), "needs"),
    "negative": (shard_bytes({"a": tensor([-1], [0, -4])}), "bad shape"),
    "bool as number": (shard_bytes({"a": tensor([True], [0, 4])}, bytes(4)), "bad shape"),
    "unknown dtype": (shard_bytes({"a": tensor([1], [0, 4], "F31")}, bytes(4)), "unknown dtype"),
    "extra field": (shard_bytes({"a": tensor([1], [0, 4]) | {"x": 1}}, bytes(4)), "only"),
    "one offset": (shard_bytes({"a": tensor([1], [0])}), "two data_offsets"),
}


@pytest.mark.parametrize("case", BROKEN_HEADERS)
@pytest.mark.usefixtures("no_allocation")
def test_broken_headers_are_refused(case: str, tmp_path: Path) -> None:
    data, message = BROKEN_HEADERS[case]
    write_directory(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(tmp_path)
    assert "model.safetensors" in str(caught.value)


def edit_index(directory: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("../evil.safetensors", "does not lie in"),
        ("/etc/passwd", "only .safetensors"),
        ("/tmp/evil.safetensors", "does not lie in"),
        ("sub/evil.safetensors", "does not lie in"),
        ("pytorch_model-00001-of-00002.bin", "never pickles"),
        ("gone.safetensors", "missing"),
        ("link.safetensors", "leaves the model directory"),
        (7, "not in a file"),
    ],
)
@pytest.mark.usefixtures("no_allocation")
def test_shards_stay_in_the_directory(shard: Any, message: str, tmp_path: Path) -> None:
    model = write_directory(tmp_path / "model", shards=2)
    save_file({"x": torch.zeros(1)}, tmp_path / "evil.safetensors")
    os.symlink(tmp_path / "evil.safetensors", model / "link.safetensors")
    edit_index(model, lambda weight_map: weight_map.update({"model.norm.weight": shard}))
    with pytest.raises(CheckpointError, match=message):
        load_model(model)


@pytest.mark.usefixtures("no_allocation")
def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    model = write_directory(tmp_path, shards=2)
    edit_index(model, lambda weight_map: weight_map.pop("model.norm.weight") and None)
    with pytest.raises(CheckpointError, match=r"disagree on \['model.norm.weight'\]"):
        load_model(model)


@pytest.mark.usefixtures("no_allocation")
def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    model = write_directory(tmp_path, shards=2)
    path = model / "model-00002-of-00002.safetensors"
    with safe_open(path, "pt") as file:
        second = {name: file.get_tensor(name) for name in file.keys()}
    first = weights()
    twice = next(name for name in first if name not in second)
    save_file(second | {twice: first[twice]}, path)
    with pytest.raises(CheckpointError, match="disagree"):
        load_model(model)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    text = json.dumps(index).replace(
        f'"{twice}":', f'"{twice}": "model-00002-of-00002.safetensors", "{twice}":'
    )
    (model / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="appears twice"):
        load_model(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "lacks tensors.*model.norm.weight"),
        ({"lm_head.weight": None}, "lacks tensors.*lm_head.weight"),
        ({"model.evil.weight": torch.zeros(2)}, "no place for: model.evil.weight"),
        ({"model.norm.weight": torch.zeros(31)}, r"\[31\] where its config asks for \[32\]"),
        ({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}, "holds I8 where floating"),
    ],
)
@pytest.mark.usefixtures("no_allocation")
def test_tensors_must_fit_the_config(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    tensors = {n: t for n, t in (weights() | change).items() if t is not None}
    with pytest.raises(CheckpointError, match=message):
        load_model(write_directory(tmp_path, tensors))


def test_old_leftovers_are_ignored(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    load_model(write_directory(tmp_path / "a", weights() | extra))
    tied = write_directory(tmp_path / "b", config=CONFIG | {"tie_word_embeddings": True})
    assert load_model(tied).model.lm_head is None


@pytest.mark.usefixtures("no_allocation")
def test_pickles_are_refused(tmp_path: Path) -> None:
    write_directory(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds neither"):
        load_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"pickles.*pytorch_model\.bin"):
        load_model(tmp_path)


def test_a_file_cut_short_after_the_check_is_an_error(tmp_path: Path) -> None:
    directory = SafetensorsDirectory(write_directory(tmp_path))
    path = tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size - 16)
    last = max(directory.entries, key=lambda name: directory.entries[name].end)
    with pytest.raises(CheckpointError, match="ended in the middle"):
        directory.read(last)


SMALL = shard_bytes(
    {
        "__metadata__": {"format": "pt"},
        "a": tensor([2, 2], [0, 16]),
        "b": tensor([3], [16, 22], "F16"),
        "empty": tensor([0, 7], [22, 22], "BF16"),
    },
    bytes(range(22)),
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, len(SMALL)) | st.none(),
    tail=st.binary(max_size=4),
)
def test_damaged_files_give_an_error_or_what_the_reference_reads(
    edits: list[tuple[int, int]], cut: int | None, tail: bytes, tmp_path: Path
) -> None:
    data = bytearray(SMALL)
    for place, value in edits:
        data[place] = value
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(data[:cut]) + tail)
    tracemalloc.start()
    try:
        header = parse_header(path)
    except CheckpointError:
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise AssertionError(f"accepted what the reference refuses: {error}") from error
    assert shapes == {name: entry.shape for name, entry in header.items()}
