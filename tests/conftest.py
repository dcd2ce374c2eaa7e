"""Skips `gpu` tests where there is no device; fixes seeds; lets hypothesis take its time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

# A busy machine is no failure: time limits are pytest's, not an example's.
settings.register_profile("twilight", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("twilight")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every op test runs on the CPU everywhere and on the GPU where there is one."""
    return torch.device(request.param)
