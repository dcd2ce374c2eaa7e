"""A small trace of the recorded one's form, and a machine whose rates mean nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from decode_attention.machine import Machine

CONTEXT, STEPS = 2000, 64


@pytest.fixture(scope="session")
def trace_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets that drift, of 4 layers (and two dense ones) and 2 heads."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {"shape": np.array([6, 2, STEPS]), "n_start": np.array(CONTEXT)}
    for rule, size in (("mean80", 15), ("mean90", 60), ("mean95", 140)):
        sets = []
        for pair in range(12):
            kept = rng.choice(CONTEXT, size * (1 + pair % 2), replace=False)
            for _ in range(STEPS):
                changed = rng.random(len(kept)) < 0.3
                kept = np.where(changed, rng.integers(0, CONTEXT, len(kept)), kept)
                sets.append(np.unique(kept).astype(np.int32))
        arrays[f"{rule}_indices"] = np.concatenate(sets)
        arrays[f"{rule}_offsets"] = np.cumsum([0, *map(len, sets)])
    path = tmp_path_factory.mktemp("trace") / "selection_trace.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine(torch.device("cpu"), small=True)
    yield machine
    machine.close()
