"""Items, passages and methods of a tiny random model, for the tests of the harness."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from tests.models.dense import DenseAttend
from tests.runtime.tiny import CONFIG, byte_tokenizer, prompt_ids
from twilight_engine.config import KVConfig, SparseConfig
from twilight_engine.eval.engine import EvalEngine
from twilight_engine.eval.items import Item, Passage
from twilight_engine.eval.methods import Method
from twilight_engine.models.load import LoadedModel, load_model

SMALL: dict[str, Any] = {"page_size": 16, "num_recent": 16, "dense_layers": (0,)}
METHODS = (
    Method("dense", KVConfig(**{**SMALL, "dense_layers": "all"}), SparseConfig(policy="dense")),
    Method("balanced", KVConfig(**SMALL), SparseConfig()),
    Method("lean", KVConfig.preset("lean", **SMALL), SparseConfig.preset("lean")),
    Method("paper", KVConfig.preset("paper", **SMALL), SparseConfig.preset("paper")),
)
DENSE, BALANCED = METHODS[:2]


def tiny_loaded(device: torch.device | str = "cpu", *, eos: tuple[int, ...] = ()) -> LoadedModel:
    config = dataclasses.replace(CONFIG, eos_token_ids=eos)
    torch.manual_seed(0)
    loaded = load_model(config, load_format="dummy", device=device)
    return dataclasses.replace(loaded, tokenizer=byte_tokenizer(), config=config)


def item(number: int, length: int, *, question: int = 6, new: int = 12, group: str = "a") -> Item:
    ids = tuple(prompt_ids(length, number))
    return Item(
        item_id=f"item-{number}",
        task="niah",
        group=group,
        context_ids=ids[: length - question],
        question_ids=ids[length - question :],
        answers=("x",),
        metric="contains",
        max_new_tokens=new,
        details={"length": 128, "depth": number % 3 / 2},
    )


ITEMS = [item(0, 150), item(1, 90, question=11, new=9), item(2, 64, question=0)]


def passage(number: int, length: int, targets: int = 10) -> Passage:
    ids = tuple(prompt_ids(length + targets, number))
    return Passage(f"passage-{number}", ids[:length], ids[length:])


PASSAGES = [passage(0, 140), passage(1, 77), passage(2, 33)]


def engine(loaded: LoadedModel | None = None, **changes: Any) -> EvalEngine:
    options: dict[str, Any] = {
        "max_len": 200,
        "batch": 3,
        "kept_targets": 10,
        "prefill_chunk_size": 64,
    }
    methods = changes.pop("methods", METHODS)
    return EvalEngine(loaded or tiny_loaded(), methods, **{**options, **changes})


def by_plain_forward(loaded: LoadedModel, passage: Passage) -> tuple[torch.Tensor, list[bool]]:
    """-log p of the targets, and whether each is the most probable token."""
    ids = torch.tensor([*passage.context_ids, *passage.target_ids])
    logits = loaded.model(ids, torch.arange(len(ids)), DenseAttend(loaded.config))
    log_p = logits.log_softmax(-1)[len(passage.context_ids) - 1 : -1]
    targets = torch.tensor(passage.target_ids)
    is_top = (log_p.argmax(-1) == targets).tolist()
    return -log_p.gather(1, targets[:, None])[:, 0], is_top
