"""Each family against transformers, in float32 on the CPU, on small random checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compare import compare
from tests.models.dense import DenseAttend, greedy
from twilight_engine.models import load_model

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("Llama", {"num_key_value_heads": 6}),
    "llama-gqa-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 20}),
    "llama-linear": ("Llama", {"rope": {"rope_type": "linear", "factor": 8.0}}),
    "llama-dynamic-short": ("Llama", {"rope": {"rope_type": "dynamic", "factor": 4.0}}),
    "llama-dynamic-long": (
        "Llama",
        {"rope": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16},
    ),
    "llama3": ("Llama", {"rope": LLAMA3, "rope_theta": 5e5, "head_dim": 64}),
    "llama-yarn": ("Llama", {"rope": YARN, "head_dim": 32}),
    "yarn-attention-factor": ("Llama", {"rope": YARN | {"attention_factor": 1.3}}),
    "yarn-mscale": ("Llama", {"rope": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}}),
    "yarn-betas": (
        "Llama",
        {"rope": YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}},
    ),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "mistral-full": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {"rope_theta": 1e6}),
    "qwen2-tied-yarn": ("Qwen2", {"tie_word_embeddings": True, "rope": YARN}),
    "qwen2-windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32, "rope_theta": 1e6}),
    "qwen3-biases-tied": (
        "Qwen3",
        {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "qwen3-layer-types": (
        "Qwen3",
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def save(case: str, directory: Path) -> Any:
    """Save a random checkpoint of a case; returns transformers' model."""
    name, changes = CASES[case]
    settings = SMALL | changes
    theta = settings.pop("rope_theta", 10000.0)
    rope = settings.pop("rope", {"rope_type": "default"})
    config = getattr(transformers, f"{name}Config")(
        **settings, rope_parameters={"rope_theta": theta, **rope}
    )
    torch.manual_seed(7)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("norm.weight", ".bias")):  # neither all ones nor all zeros
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_equal_transformers(case: str, tmp_path: Path) -> None:
    theirs = save(case, tmp_path)
    ours = load_model(tmp_path).model
    prompt = torch.randint(0, SMALL["vocab_size"], (29,))
    with torch.no_grad():
        expected = theirs(prompt[None]).logits[0]
    actual = ours(prompt, torch.arange(29), DenseAttend(ours.config), lengths=29)
    compare(actual, expected, factor=4.0)
    if case == "llama-dynamic-long":
        return  # transformers re-bases as it decodes; here a request's base stays what it was
    with torch.no_grad():
        tokens = theirs.generate(
            prompt[None], max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None
        )
    assert greedy(ours, prompt.tolist(), 12) == tokens[0, 29:].tolist()
