"""What a checkpoint's files decide about sampling, and the public names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import twilight_engine
from tests.runtime.tiny import CONFIG, tiny_llm
from twilight_engine import SamplingParams
from twilight_engine.runtime.progress import NoProgress, ProgressBars, make_progress


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory with a config and sampling defaults, without weights."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": CONFIG.vocab_size,
        "hidden_size": CONFIG.hidden_size,
        "intermediate_size": CONFIG.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": CONFIG.num_q_heads,
        "num_key_value_heads": CONFIG.num_kv_heads,
        "head_dim": CONFIG.head_dim,
        "max_position_embeddings": 300,
        "eos_token_id": 256,
    }
    recommended = {"temperature": 0.6, "top_p": 0.9, "max_new_tokens": 5, "eos_token_id": [257]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps(recommended))
    return tmp_path


def test_the_checkpoints_sampling_defaults(checkpoint: Path) -> None:
    with tiny_llm(model=checkpoint, max_model_len=None) as llm:
        assert llm.max_model_len == 300
        expected = SamplingParams(temperature=0.6, top_p=0.9, max_tokens=5)
        assert llm.get_default_sampling_params() == expected
        assert llm.get_default_sampling_params(max_tokens=None).max_tokens is None
        output = llm.generate("abc", use_tqdm=False)[0].outputs[0]
        assert len(output.token_ids) <= 5
        for eos in (256, 257):
            ends = SamplingParams(logit_bias={eos: 100.0})
            assert llm.generate("abc", ends, use_tqdm=False)[0].outputs[0].token_ids == [eos]


def test_vllms_defaults_in_their_place(checkpoint: Path) -> None:
    with tiny_llm(model=checkpoint, generation_config="vllm") as llm:
        assert llm.get_default_sampling_params() == SamplingParams()


def test_every_public_name_is_there() -> None:
    for name in twilight_engine.__all__:
        assert getattr(twilight_engine, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'AsyncLLM'"):
        _ = twilight_engine.AsyncLLM


def test_progress_bars_say_what_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    bars = make_progress(True, prompt_tokens=100, max_tokens=20)
    assert isinstance(bars, ProgressBars)
    with bars:
        bars.prefilled(100.0)
        bars.decoded(7)
    shown = capsys.readouterr().err
    assert "100/100 tokens" in shown and "7/20 tokens" in shown
    assert isinstance(make_progress(False, prompt_tokens=1, max_tokens=1), NoProgress)
