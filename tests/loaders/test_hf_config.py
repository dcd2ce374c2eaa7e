"""config.json of both transformers generations, and of people who meant no good."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.loaders.checkpoints import CONFIG
from twilight_engine.layers.rope import Rope
from twilight_engine.loaders import CheckpointError, ModelConfig
from twilight_engine.loaders.hf_config import config_from_hf
from twilight_engine.models.registry import FAMILIES, family_of


def read(**changes: Any) -> ModelConfig:
    raw = {name: value for name, value in (CONFIG | changes).items() if value != "absent"}
    return config_from_hf(raw, family_of(raw))


def test_sizes_and_ids() -> None:
    config = read()
    assert (config.num_layers, config.num_q_heads, config.num_kv_heads) == (2, 4, 2)
    assert (config.head_dim, config.softmax_scale) == (8, 8**-0.5)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2, 3))
    assert config.sliding_windows == (None, None)
    assert read(eos_token_id=7, bos_token_id=0).eos_token_ids == (7,)
    assert read(bos_token_id=0).bos_token_id == 0
    assert read(num_key_value_heads="absent").num_kv_heads == 4
    assert read(dtype="float16").dtype == read(torch_dtype="float16").dtype == torch.float16


def test_both_generations_of_rope_keys() -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32}
    v5 = read(
        rope_theta="absent", rope_parameters={"rope_theta": 5e5, "rope_type": "yarn", **scaling}
    )
    v4 = read(rope_theta=5e5, rope_scaling={"type": "yarn", **scaling})
    by_layer = read(
        rope_parameters={"full_attention": {"rope_theta": 5e5, "rope_type": "yarn", **scaling}}
    )
    assert v5.rope == v4.rope == by_layer.rope
    assert (v5.rope.theta, v5.rope.rope_type, v5.rope.factor) == (5e5, "yarn", 4.0)


def test_longchat_condenses_positions() -> None:
    rope = read(rope_condense_ratio=8).rope
    assert (rope.rope_type, rope.factor) == ("linear", 8.0)


def test_windows_by_family() -> None:
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert read(**mistral).sliding_windows == (4096, 4096)
    assert read(**mistral, sliding_window=None).sliding_windows == (None, None)
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 16}
    assert read(**qwen).sliding_windows == (None, None)
    on = read(**qwen, use_sliding_window=True, max_window_layers=1)
    assert on.sliding_windows == (None, 16)


def test_model_type_serves_where_architectures_is_absent() -> None:
    assert read(architectures="absent", model_type="qwen3").qk_norm
    assert {f.model_type for f in FAMILIES} == {"llama", "mistral", "qwen2", "qwen3"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "absent"}, "'hidden_size' is missing"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": 1 << 60, "head_dim": 8}, "hidden_size is"),
        ({"hidden_size": 32.0, "head_dim": 8}, "whole number"),
        ({"num_attention_heads": 0}, "config.json: "),
        ({"num_attention_heads": None}, "config.json: "),
        ({"num_hidden_layers": 10**12}, "number of layers is 1000000000000"),
        ({"num_hidden_layers": True}, "number of layers is True"),
        ({"num_key_value_heads": 3}, "multiple of num_kv_heads"),
        ({"head_dim": 9}, "head_dim is 9"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"rms_norm_eps": "small"}, "config.json: "),
        ({"eos_token_id": "</s>"}, "token id"),
        ({"rope_theta": float("nan")}, "rope theta is nan"),
        ({"rope_parameters": [1]}, "config.json: "),
        ({"rope_scaling": {"type": "linear"}}, "needs a factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 5}},
            "must be above low_freq_factor",
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "layer_types": []},
            "layer_types must name 2 layers",
        ),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "entry below 1"),
    ],
)
def test_senseless_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "'GemmaForCausalLM'.*LlamaForCausalLM"),
        ({"architectures": "absent", "model_type": "mamba"}, "'mamba' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "rope type 'longrope'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (
            {"rope_parameters": {"a": {"rope_theta": 1e4}, "b": {"rope_theta": 1e6}}},
            "differ by layer type",
        ),
    ],
)
def test_unsupported_features_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        read(**changes)


ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(
        st.sampled_from(["rope_type", "type", "factor", "rope_theta", "low_freq_factor"]),
        st.one_of(st.sampled_from(["yarn", "llama3", "dynamic"]), st.floats(), st.none()),
    ),
)
KEYS = [*CONFIG, "head_dim", "rope_scaling", "rope_parameters", "sliding_window", "layer_types"]
KEYS += ["use_sliding_window", "max_window_layers", "attention_bias", "rope_condense_ratio"]


@given(
    st.dictionaries(st.sampled_from(KEYS), ODD_VALUES, max_size=3),
    st.sampled_from([family.architecture for family in FAMILIES]),
)
def test_any_value_gives_a_config_or_an_error_of_ours(
    changes: dict[str, Any], architecture: str
) -> None:
    try:
        config = read(**{"architectures": [architecture], **changes})
    except (CheckpointError, NotImplementedError):
        return
    Rope(config.rope, config.head_dim, config.max_position_embeddings, torch.device("cpu"))
