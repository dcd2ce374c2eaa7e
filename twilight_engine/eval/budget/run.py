"""Budgets of every passage by every rule and mass, what is on disk already left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from twilight_engine.config import EVERY_CANDIDATE, KVConfig, SparseConfig
from twilight_engine.eval.budget.measure import BudgetObserver
from twilight_engine.eval.items import Passage
from twilight_engine.eval.records import Record, RunFolder
from twilight_engine.eval.simulation.grading import Grading
from twilight_engine.eval.simulation.passage import (
    PrefilledPassage,
    kl_divergence,
    log_loss,
    prefill_passage,
    run_steps,
    simulate,
)
from twilight_engine.models.decoder import DecoderModel

SOFTMAX = "softmax"  # top-p of the true softmax, a query head
RULES = ("balanced", "paper", "paper, K per channel")
KV = KVConfig()  # whose dense layers and pages every rule here has
PERCENTILES = 101  # of a passage's budgets that its record keeps
LOW = 0.05  # quantile of the captured mass beside its mean
DIGITS = 6  # of a record's numbers


def grading_of(rule: str, p: float, num_layers: int) -> Grading:
    """How a rule of RULES grades at attn_top_p; 1 makes every row exact, whatever the rule.

    balanced: the default preset. paper: Twilight as published. "paper, K per channel": its union
    and renormalising over all tokens, by the index of the default preset.
    """
    if p >= 1:
        return Grading.of(KV, SparseConfig(), num_layers).replace(attn_top_k=EVERY_CANDIDATE)
    preset = rule.split(",")[0]
    sparse = SparseConfig.preset(preset)
    index_top_p = None if sparse.index_top_p is None else max(sparse.index_top_p, p)
    sparse = sparse.replace(attn_top_p=p, index_top_p=index_top_p)
    kv = KVConfig.preset(preset)
    if rule != preset:
        kv = KVConfig.preset(preset, k_index="int4_channel")
        sparse = sparse.replace(selector="all")
    return Grading.of(kv, sparse, num_layers)


def graded_layers(num_layers: int) -> list[int]:
    """Layers that the rules grade. Raises: ValueError if there is none."""
    assert KV.dense_layers != "all"
    graded = [layer for layer in range(num_layers) if layer not in KV.dense_layers]
    if not graded:
        raise ValueError(
            f"the model has {num_layers} layers, all of them dense in every rule; a budget needs "
            f"at least {len(KV.dense_layers) + 1}"
        )
    return graded


def check_context(length: int, targets: int) -> None:
    """ValueError for a context in which every token is a sink or in the window."""
    least = KV.num_sink + KV.window_rows
    if length - targets < least:
        raise ValueError(
            f"length is {length} with {targets} targets; it must be at least {least + targets}: "
            "shorter contexts are resident on the device, and no rule has a choice"
        )


def resident_rows(length: int, targets: int) -> float:
    """Sinks and window rows of a passage, mean over its steps."""
    ends = torch.arange(length - targets, length)
    window = (ends - KV.num_recent).div(KV.page_size, rounding_mode="floor") * KV.page_size
    return (KV.num_sink + ends - window).double().mean().item()


def record_name(rule: str, p: float) -> str:
    """As which method a run's folder has it."""
    return f"{rule}@{p}"


@torch.inference_mode()
def run_budget(
    model: DecoderModel,
    passages: Sequence[Passage],
    masses: Sequence[float],
    folder: RunFolder,
    *,
    done: Callable[[int], None] = lambda count: None,
    doing: Callable[[str], None] = lambda what: None,
) -> None:
    """Fill the folder with a record for every passage, rule and mass that it lacks.

    Args:
        masses: p, each in (0, 1].
        done: called with how many records more are there; doing: with what comes next.
    Raises: ValueError for a model or a context where nothing is graded; NotImplementedError for a
        model with sliding windows.
    """
    graded_layers(model.config.num_layers)
    for passage in passages:
        check_context(len(passage.context_ids) + len(passage.target_ids), len(passage.target_ids))
        _run_passage(model, passage, masses, folder, done, doing)


def _run_passage(
    model: DecoderModel,
    passage: Passage,
    masses: Sequence[float],
    folder: RunFolder,
    done: Callable[[int], None],
    doing: Callable[[str], None],
) -> None:
    length = len(passage.context_ids) + len(passage.target_ids)
    keys = [(rule, p) for rule in (SOFTMAX, *RULES) for p in masses]
    lacking = [
        (rule, p)
        for rule, p in keys
        if not folder.has(length, passage.item_id, record_name(rule, p))
    ]
    done(len(keys) - len(lacking))
    if not lacking:
        return
    doing("prefill")
    prefilled = prefill_passage(model, list(passage.context_ids), list(passage.target_ids))
    wanted = [p for rule, p in lacking if rule == SOFTMAX]
    doing(SOFTMAX)
    observer = BudgetObserver(
        prefilled,
        masses=wanted,
        softmax_scale=model.config.softmax_scale,
        page_size=KV.page_size,
    )
    dense = run_steps(model, prefilled, observer)
    nll = log_loss(dense, prefilled.next_ids)

    def add(rule: str, p: float, measured: Record) -> None:
        key = {"length": length, "item": passage.item_id, "method": record_name(rule, p)}
        folder.add([{**key, "rule": rule, "p": p, "nll_dense": nll, **measured}])
        done(1)

    depth = model.config.num_layers
    for p, record in zip(wanted, _softmax_records(observer, graded_layers(depth)), strict=True):
        add(SOFTMAX, p, record)
    for rule, p in lacking:
        if rule != SOFTMAX:
            doing(record_name(rule, p))
            add(rule, p, _rule_record(model, prefilled, grading_of(rule, p, depth), dense))


def _rule_record(
    model: DecoderModel, passage: PrefilledPassage, grading: Grading, dense: Tensor
) -> Record:
    """One rule at one p on a passage: what it loses, and the rows it takes."""
    outcome = simulate(model, passage, grading)
    traces = [outcome.traces[layer] for layer in sorted(outcome.traces)]
    mass = torch.stack([trace.mass for trace in traces])
    return {
        "nll": log_loss(outcome.log_probs, passage.next_ids),
        "kl": kl_divergence(dense, outcome.log_probs).mean().item(),
        "mass": mass.mean().item(),
        "index_rows": torch.stack([t.index_rows for t in traces]).double().mean().item(),
        "layers": sorted(outcome.traces),
        **_described(torch.stack([trace.wanted.sum(-1) for trace in traces])),
    }


def _softmax_records(observer: BudgetObserver, graded: list[int]) -> list[Record]:
    """One a mass of the observer; single budgets and those by step are of the graded layers."""
    if not observer.layers:
        return []
    rows = torch.stack([layer.rows for layer in observer.layers])  # [layers, P, Hq, T]
    records = []
    for i in range(rows.shape[1]):
        captured = {
            name: torch.stack([layer.captured[name][i] for layer in observer.layers]).flatten(1)
            for name in observer.layers[0].captured
        }
        records.append(
            {
                "layers": list(range(len(rows))),
                **_described(rows[graded, i]),
                "by_head": _rounded(rows[:, i].double().mean(-1)),
                "captured": {name: _rounded(x.mean(1)) for name, x in captured.items()},
                "captured_low": {
                    name: _rounded(x.quantile(LOW, dim=1)) for name, x in captured.items()
                },
            }
        )
    return records


def _described(rows: Tensor) -> dict[str, Any]:
    """Budgets [layers, H, T] of a passage, down to what the tables and figures need."""
    rows = rows.double()
    share = torch.linspace(0, 1, PERCENTILES, dtype=rows.dtype, device=rows.device)
    ordered = rows.flatten().sort().values
    places = (share * (ordered.numel() - 1)).round().long()
    return {
        "by_step": _rounded(rows.mean((0, 1))),
        "by_head": _rounded(rows.mean(2)),
        "percentiles": _rounded(ordered[places]),
        "mean_square": rows.square().mean().item(),
    }


def _rounded(x: Tensor) -> Any:
    """Nested lists of floats, short on disk."""
    scale = 10**DIGITS
    return ((x.double() * scale).round() / scale).tolist()
