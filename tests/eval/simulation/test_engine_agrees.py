"""The simulation and the engine are the same method: same log-probabilities, same exact rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.runtime.tiny import CONFIG
from twilight_engine.config import PRESETS, KVConfig, SparseConfig
from twilight_engine.eval.methods import parse_method
from twilight_engine.eval.simulation.grading import Grading
from twilight_engine.eval.simulation.passage import kl_divergence, prefill_passage, simulate
from twilight_engine.kv.cache import KVCache
from twilight_engine.models.load import load_model
from twilight_engine.runtime.runner import Runner

CONTEXT, STEPS = 700, 12


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = dataclasses.replace(
        CONFIG, num_layers=5, sliding_windows=(), max_position_embeddings=2048
    )
    loaded = load_model(config, dtype=torch.float32, device="cpu", load_format="dummy")
    for layer in loaded.model.layers:  # sharper attention than random weights have
        layer.attention.qkv_proj.weight.mul_(4.0)
    return loaded.model


@pytest.fixture(scope="module")
def ids(model):
    generator = torch.Generator().manual_seed(1)
    total = CONTEXT + STEPS + 1
    return torch.randint(0, model.config.vocab_size, (total,), generator=generator).tolist()


def decoded(model, ids, kv: KVConfig, sparse: SparseConfig):
    """Log-probabilities [STEPS, V] and exact rows [STEPS, L, H] of the engine's steps."""
    cache = KVCache(
        model.config, kv, max_model_len=1024, max_num_seqs=1, device="cpu", dtype=torch.float32
    )
    with cache:
        runner = Runner(model, cache, prefill_chunk_size=1024)
        sequence = cache.open_sequence(len(ids))
        runner.prefill(sequence, ids[: CONTEXT - 1])
        decode = runner.start_decode([sequence], [sparse], [CONTEXT - 1])
        tokens = torch.tensor(ids[CONTEXT - 1 : CONTEXT - 1 + STEPS])
        rows = [decode.step(token.view(1)).log_softmax(-1) for token in tokens]
        return torch.cat(rows), cache.log.request(sequence.sequence_id)


CASES = [(name, {}) for name in PRESETS] + [
    ("balanced", {"group_rule": "union"}),
    ("balanced", {"tail": "renormalise", "mass_margin": 0.0}),
    ("balanced", {"attn_top_k": 150}),
    ("lean", {"mass_margin": 2.0, "attn_top_p": 0.5}),
    ("balanced", {"attn_top_p": 1.0}),
]


@pytest.mark.parametrize(("preset", "changes"), CASES)
def test_same_steps(model, ids, preset, changes):
    check_same(model, ids, KVConfig.preset(preset), SparseConfig.preset(preset, **changes))


@pytest.mark.parametrize(
    "name", ["quest:100", "streaming:300", "top_k:250", "quest+paper@0.85:200", "streaming+paper"]
)
def test_same_steps_of_selectors(model, ids, name):
    method = parse_method(name)
    traces = check_same(model, ids, method.kv, method.sparse)
    assert all(trace.wanted.any() for trace in traces.values())
    assert any((trace.wanted.sum(-1) < CONTEXT - 200).all() for trace in traces.values())


def check_same(model, ids, kv, sparse):
    want, steps = decoded(model, ids, kv, sparse)
    grading = Grading.of(kv, sparse, model.config.num_layers)
    passage = prefill_passage(model, ids[:CONTEXT], ids[CONTEXT : CONTEXT + STEPS])
    got = simulate(model, passage, grading)
    assert kl_divergence(want, got.log_probs).abs().max() < 1e-6
    for layer, trace in got.traces.items():
        rows = trace.wanted.sum(-1).T  # [T, H]
        engine = torch.from_numpy(steps.exact[:, layer])
        # A row on the threshold may fall either way: two orders of summation.
        assert (rows - engine).abs().max() <= 1
        assert (trace.index_rows.T - torch.from_numpy(steps.index[:, layer])).abs().max() <= 2
        assert torch.allclose(
            trace.estimated_mass.T.float(), torch.from_numpy(steps.mass[:, layer]), atol=1e-3
        )
    return got.traces


def test_dense_layers_alone_give_the_plain_forward(model, ids):
    every = Grading(dense_layers=tuple(range(model.config.num_layers)))
    passage = prefill_passage(model, ids[:CONTEXT], ids[CONTEXT : CONTEXT + STEPS], chunk=256)
    want, _ = decoded(model, ids, KVConfig(dense_layers="all"), SparseConfig(policy="dense"))
    assert torch.allclose(simulate(model, passage, every).log_probs, want, atol=1e-4)


def test_grading_refuses_what_is_not_simulated():
    with pytest.raises(NotImplementedError, match=r"fetch 'page'; simulated: 'all', 'quest'"):
        Grading.of(KVConfig(), SparseConfig(fetch="page"), 4)
    with pytest.raises(NotImplementedError, match="'quest' with k_index 'int4_channel'"):
        Grading.of(KVConfig(), SparseConfig(selector="quest", tail="renormalise"), 4)
    with pytest.raises(NotImplementedError, match="'streaming' with tail 'mean'"):
        Grading.of(KVConfig(), SparseConfig(selector="streaming"), 4)
    for selector in ("lsh", "double_sparsity", "double_sparsity_online"):
        with pytest.raises(NotImplementedError, match=f"selector '{selector}'"):
            Grading.of(KVConfig(), SparseConfig(selector=selector, tail="renormalise"), 4)
