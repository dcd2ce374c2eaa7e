"""GGUF files: round trips of every quantisation, and damage."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.compare import compare
from tests.loaders.checkpoints import CONFIG, weights, write_directory, write_gguf
from tests.models.dense import DenseAttend
from twilight_engine.loaders import CheckpointError
from twilight_engine.loaders.gguf_file import GGUFFile, config_from_gguf, read_data
from twilight_engine.loaders.gguf_header import SUPPORTED_TYPES, read_gguf_header
from twilight_engine.models import load_model, read_config
from twilight_engine.models.llama import LLAMA
from twilight_engine.models.weights import check_tensors, targets

WRITABLE = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


@pytest.mark.parametrize("kind", WRITABLE)
def test_weights_round_trip(kind: str, tmp_path: Path) -> None:
    tensors = weights()
    path = write_gguf(tmp_path / "m.gguf", tensors, kind=kind)
    header = read_gguf_header(path)
    file = GGUFFile(path, header, config_from_gguf(path, header, LLAMA), LLAMA)
    assert set(file.tensors) == set(tensors)
    quant = gguf.GGMLQuantizationType[kind]
    for name, tensor in tensors.items():
        expected = tensor
        if tensor.ndim == 2 and kind != "F32":
            stored = gguf.quantize(tensor.numpy(), quant)
            expected = torch.from_numpy(gguf.dequantize(stored, quant))
        got = file.read(name)
        assert got.dtype == torch.float32
        assert torch.equal(got, expected), name


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_dequantise(kind: str, tmp_path: Path) -> None:
    quant = gguf.GGMLQuantizationType[kind]
    assert quant in SUPPORTED_TYPES
    row_bytes = gguf.GGML_QUANT_SIZES[quant][1] * 2  # 512 columns
    raw = np.random.default_rng(0).integers(0, 64, (5, row_bytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x.weight", raw, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    place = read_gguf_header(tmp_path / "m.gguf").tensors["x.weight"]
    got = read_data(tmp_path / "m.gguf", "x.weight", place)
    assert got.shape == (5, 512)
    np.testing.assert_array_equal(got, gguf.dequantize(raw, quant))


@pytest.mark.parametrize(
    ("arch", "name", "options"),
    [
        ("llama", "Llama", {}),
        ("qwen2", "Qwen2", {"qkv_bias": True}),
        ("qwen3", "Qwen3", {"qk_norm": True}),
    ],
)
def test_a_model_is_the_one_of_the_safetensors(
    arch: str, name: str, options: dict[str, bool], tmp_path: Path
) -> None:
    tensors = weights(**options)
    theirs = CONFIG | {"architectures": [f"{name}ForCausalLM"], "head_dim": 8}
    expected = load_model(write_directory(tmp_path / "hf", tensors, config=theirs))
    actual = load_model(write_gguf(tmp_path / "m.gguf", tensors, arch=arch))
    assert actual.config.tie_word_embeddings is False
    ids, positions = torch.arange(20) % 64, torch.arange(20)
    compare(
        actual.model(ids, positions, DenseAttend(actual.config)),
        expected.model(ids, positions, DenseAttend(expected.config)),
    )


def test_tied_weights_and_rope_scaling(tmp_path: Path) -> None:
    tensors = weights()
    del tensors["lm_head.weight"]
    yarn = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 32,
    }
    config = read_config(write_gguf(tmp_path / "y.gguf", tensors, metadata=yarn))
    assert config.tie_word_embeddings
    assert (config.rope.rope_type, config.rope.factor) == ("yarn", 4.0)
    assert config.rope.original_max_position_embeddings == 32


def test_llama3_divisors_equal_the_scaling_rule(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    raw = CONFIG | {"rope_scaling": scaling}
    expected = load_model(write_directory(tmp_path / "hf", config=raw)).model.rope
    plain = load_model(write_directory(tmp_path / "plain")).model.rope
    divisors = (plain.inv_freq / expected.inv_freq).numpy()
    path = write_gguf(tmp_path / "m.gguf", weights(), extra={"rope_freqs.weight": divisors})
    compare(load_model(path).model.rope.inv_freq, expected.inv_freq)


def test_metadata_agrees_with_the_reference_reader(tmp_path: Path) -> None:
    metadata = {
        "a.text": "über\n",
        "a.bool": True,
        "a.float": 0.25,
        "a.ints": [1, -2, 3],
        "a.texts": ["x", "", "\u20ac"],
    }
    path = write_gguf(tmp_path / "m.gguf", weights(), kind="Q8_0", metadata=metadata)
    header, reference = read_gguf_header(path), gguf.GGUFReader(path)
    for key, field in reference.fields.items():
        if key.startswith("GGUF."):
            continue
        value = header.metadata[key]
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()
    for tensor in reference.tensors:
        ours = header.tensors[tensor.name]
        assert ours.start == tensor.data_offset
        assert ours.num_bytes == tensor.n_bytes
        assert ours.shape == tuple(int(d) for d in reversed(tensor.shape))


def key(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def head(num_tensors: int, num_keys: int, rest: bytes, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + rest


def info(name: str, dims: list[int], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return struct.pack("<Q", len(name)) + name.encode() + sizes + struct.pack("<IQ", kind, offset)


PAD = bytes(256)
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF"),
    "other": (b"PK\x03\x04" + PAD, "not a GGUF"),
    "many keys": (head(0, 1 << 60, PAD), "metadata keys"),
    "many tensors": (head(1 << 60, 0, PAD), "claims"),
    "long string": (head(0, 1, struct.pack("<Q", 1 << 40) + PAD), "at most"),
    "string past the end": (head(0, 1, struct.pack("<Q", 5000) + PAD), "truncated"),
    "long array": (head(0, 1, key("a", 9, struct.pack("<IQ", 4, 1 << 40)) + PAD), "numbers"),
    "long text array": (head(0, 1, key("a", 9, struct.pack("<IQ", 8, 1 << 40)) + PAD), "strings"),
    "nested array": (head(0, 1, key("a", 9, struct.pack("<IQ", 9, 1)) + PAD), "metadata type 9"),
    "unknown type": (head(0, 1, key("a", 77, b"") + PAD), "metadata type 77"),
    "repeated key": (head(0, 2, key("a", 0, b"1") * 2 + PAD), "twice"),
    "repeated tensor": (head(2, 0, info("t", [4], 0, 0) * 2 + PAD), "twice"),
    "no dims": (head(1, 0, info("t", [], 0, 0) + PAD), "0 dimensions"),
    "many dims": (head(1, 0, info("t", [1] * 9, 0, 0) + PAD), "9 dimensions"),
    "huge": (head(1, 0, info("t", [1 << 40, 1 << 40], 0, 0) + PAD), "truncated"),
    "odd rows": (head(1, 0, info("t", [33], 8, 0) + PAD), "no multiple of 32"),
    "unaligned": (head(1, 0, info("t", [4], 0, 4) + PAD), "not aligned"),
    "overlap": (head(2, 0, info("t", [32], 0, 0) + info("u", [4], 0, 32) + PAD), "overlaps"),
    "past the end": (head(1, 0, info("t", [4], 0, 1 << 20) + PAD), "truncated"),
    "alignment": (head(0, 1, key("general.alignment", 4, b"\3\0\0\0") + PAD), "alignment"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused(case: str, tmp_path: Path) -> None:
    data, message = BROKEN[case]
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (head(0, 0, PAD, version=1), "GGUF version 1; supported: 2 and 3"),
        (head(1, 0, info("t", [4], 99, 0) + PAD), "type 99; supported: F32, F16"),
        (head(0, 1, key("general.architecture", 8, struct.pack("<Q", 3) + b"rwk") + PAD), "'rwk'"),
    ],
)
def test_unsupported_files_say_what_is_supported(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(NotImplementedError, match=message):
        load_model(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.block_count": 0}, "the number of layers is 0"),
        ({"llama.attention.head_count": 0}, "bad metadata"),
        ({"llama.attention.head_count": "x"}, "bad metadata"),
        ({"llama.attention.head_count_kv": 3}, "multiple of num_kv_heads"),
        ({"llama.embedding_length": 48}, "where its config asks for"),
        ({"llama.rope.freq_base": 0.5}, "theta is 0.5"),
        ({"llama.block_count": 3}, "lacks tensors"),
    ],
)
def test_metadata_must_make_sense(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", weights())
    header = read_gguf_header(path)
    header.metadata.update(metadata)
    with pytest.raises(CheckpointError, match=message):
        config = config_from_gguf(path, header, LLAMA)
        check_tensors(GGUFFile(path, header, config, LLAMA).tensors, targets(config))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    vocab = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "ab", "abc"]
    vocab += [f"<{i}>" for i in range(64 - len(vocab))]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": vocab,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * 61,
        "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.chat_template": "{{ messages }}",
    }
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, weights(), kind="Q8_0", metadata=metadata)
    tokenizer = load_model(path).tokenizer
    assert tokenizer is not None and tokenizer.encode("abc<s>") == [30, 1]
    return path.read_bytes()


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    edits=st.lists(st.tuples(st.integers(0, 4500), st.integers(0, 255)), max_size=5),
    cut=st.integers(0, 9000) | st.none(),
)
def test_damage_gives_an_error_or_a_model(
    edits: list[tuple[int, int]], cut: int | None, small: bytes, tmp_path: Path
) -> None:
    data = bytearray(small)
    for place, value in edits:
        data[place] = value
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(data[:cut]))
    tracemalloc.start()
    try:
        load_model(path)
    except (CheckpointError, NotImplementedError):
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 32 << 20
