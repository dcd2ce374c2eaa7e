"""run_budget on a tiny random model: what it records, what it leaves out, what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.runtime.tiny import CONFIG
from twilight_engine.config import KVConfig, SparseConfig
from twilight_engine.eval.budget import run as budget_run
from twilight_engine.eval.budget.run import (
    RULES,
    check_context,
    graded_layers,
    grading_of,
    resident_rows,
    run_budget,
)
from twilight_engine.eval.items import Passage
from twilight_engine.eval.records import RunFolder
from twilight_engine.eval.simulation.grading import Grading
from twilight_engine.eval.simulation.passage import kl_divergence, prefill_passage, simulate
from twilight_engine.models.load import load_model

LENGTH, TARGETS, LAYERS = 330, 6, 4
MASSES = (0.7, 1.0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = dataclasses.replace(
        CONFIG, num_layers=LAYERS, sliding_windows=(), max_position_embeddings=1024
    )
    loaded = load_model(config, dtype=torch.float32, device="cpu", load_format="dummy")
    for layer in loaded.model.layers:  # sharper attention than random weights have
        layer.attention.qkv_proj.weight.mul_(4.0)
    return loaded.model


@pytest.fixture(scope="module")
def passages(model) -> list[Passage]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(2):
        ids = torch.randint(0, model.config.vocab_size, (LENGTH,), generator=generator).tolist()
        found.append(Passage(f"book/{i}", tuple(ids[:-TARGETS]), tuple(ids[-TARGETS:])))
    return found


@pytest.fixture(scope="module")
def folder(model, passages, tmp_path_factory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("run"), {})
    run_budget(model, passages, MASSES, folder)
    return folder


def record(folder: RunFolder, method: str, item: str = "book/0") -> dict[str, Any]:
    (found,) = [r for r in folder.records if r["method"] == method and r["item"] == item]
    return found


def test_every_rule_and_mass_of_every_passage(folder, passages):
    names = [f"{rule}@{p}" for rule in ("softmax", *RULES) for p in MASSES]
    assert [(r["item"], r["method"]) for r in folder.records] == [
        (passage.item_id, name) for passage in passages for name in names
    ]


def test_a_rule_is_what_the_simulation_does(model, passages, folder):
    passage = passages[0]
    prefilled = prefill_passage(model, list(passage.context_ids), list(passage.target_ids))
    dense = simulate(model, prefilled, Grading(dense_layers=tuple(range(LAYERS))))
    for rule in RULES:
        outcome = simulate(model, prefilled, grading_of(rule, 0.7, LAYERS))
        rows = torch.stack([outcome.traces[i].wanted.sum(-1) for i in (2, 3)]).double()
        got = record(folder, f"{rule}@0.7")
        assert got["layers"] == [2, 3]
        assert np.allclose(got["by_head"], rows.mean(-1), atol=1e-5)
        assert np.allclose(got["by_step"], rows.mean((0, 1)), atol=1e-5)
        assert got["mean_square"] == pytest.approx(rows.square().mean().item())
        assert got["percentiles"][0] == rows.min() and got["percentiles"][-1] == rows.max()
        nll = -outcome.log_probs[torch.arange(TARGETS), list(passage.target_ids)].mean()
        assert got["nll"] == pytest.approx(nll.item(), abs=1e-5)
        kl = kl_divergence(dense.log_probs, outcome.log_probs).mean().item()
        assert got["kl"] == pytest.approx(kl, abs=1e-9) and kl != 0
        assert got["nll_dense"] == record(folder, "softmax@0.7")["nll_dense"]


def test_the_softmax_is_of_every_layer(folder):
    got = record(folder, "softmax@0.7")
    assert got["layers"] == list(range(LAYERS))
    heads = np.array(got["by_head"])
    assert heads.shape == (LAYERS, CONFIG.num_q_heads)
    # By step and single: graded layers alone.
    assert np.mean(got["by_step"]) == pytest.approx(heads[2:].mean(), abs=1e-5)
    assert all(len(values) == LAYERS for values in got["captured"].values())
    for name, values in got["captured"].items():
        assert np.all(np.array(got["captured_low"][name]) <= np.array(values) + 1e-6)


def test_p_of_one_keeps_every_row(folder):
    resident = resident_rows(LENGTH, TARGETS)
    visible = np.mean([LENGTH - TARGETS + t for t in range(TARGETS)])
    assert np.mean(record(folder, "softmax@1.0")["by_step"]) == visible
    for rule in RULES:
        got = record(folder, f"{rule}@1.0")
        assert abs(got["kl"]) < 1e-6 and got["mass"] == pytest.approx(1.0)
        assert np.mean(got["by_step"]) == pytest.approx(visible - resident)


def test_a_run_cut_short_goes_on(model, passages, folder, tmp_path, monkeypatch):
    whole = (folder.path / "results.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "results.jsonl").write_text("".join(lines[:13]) + lines[13][:30])
    simulated: list[Grading] = []

    def counted(model, passage, grading):
        simulated.append(grading)
        return simulate(model, passage, grading)

    monkeypatch.setattr(budget_run, "simulate", counted)
    counts: list[int] = []
    run_budget(model, passages, MASSES, RunFolder(tmp_path, {}), done=counts.append)
    assert len(simulated) == 3 and sum(counts) == len(lines)
    assert (tmp_path / "results.jsonl").read_text() == whole
    counts.clear()
    run_budget(model, passages, (0.7, 0.9), again := RunFolder(tmp_path, {}), done=counts.append)
    assert sum(counts) == 16 and len(again.records) == 24  # 0.9 was new
    assert len(simulated) == 3 + 6


def test_rules_are_the_presets():
    balanced, paper = (
        Grading.of(KVConfig.preset(name), SparseConfig.preset(name), LAYERS)
        for name in ("balanced", "paper")
    )
    assert grading_of("balanced", balanced.attn_top_p, LAYERS) == balanced
    assert grading_of("paper", 0.95, LAYERS) == paper
    assert grading_of("balanced", 0.995, LAYERS).index_top_p == 0.995
    repaired = Grading.of(
        KVConfig.preset("paper", k_index="int4_channel"),
        SparseConfig.preset("paper", attn_top_p=0.6, selector="all"),
        LAYERS,
    )
    assert grading_of("paper, K per channel", 0.6, LAYERS) == repaired
    assert (repaired.group_rule, repaired.tail) == ("union", "renormalise")


@pytest.mark.parametrize(("length", "targets"), [(330, 6), (512, 64), (700, 1)])
def test_resident_rows_are_sinks_and_window(length: int, targets: int):
    counts = []
    for position in range(length - targets - 1, length - 1):
        window = (position + 1 - 128) // 64 * 64
        counts.append(sum(token < 4 or token >= window for token in range(position + 1)))
    assert resident_rows(length, targets) == pytest.approx(np.mean(counts))


def test_refusals(model, passages, tmp_path: Path):
    check_context(260, 64)
    with pytest.raises(ValueError, match=r"length is 259 with 64 targets; .* at least 260"):
        check_context(259, 64)
    with pytest.raises(ValueError, match=r"2 layers, all of them dense.* at least 3"):
        graded_layers(2)
    short = Passage("s", passages[0].context_ids[:100], passages[0].target_ids)
    with pytest.raises(ValueError, match="length is 106 with 6 targets"):
        run_budget(model, [short], MASSES, RunFolder(tmp_path, {}))
