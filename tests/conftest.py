"""Skips `gpu` tests where there is no device; fixes seeds; lets hypothesis take its time."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from hypothesis import HealthCheck, settings

# A busy machine is no failure: time limits are pytest's, not an example's.
settings.register_profile("twilight", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("twilight")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu-cases",
        type=int,
        help="run the gpu tests alone, and so many cases of each, spread over its parameters",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    cases = config.getoption("--gpu-cases")
    if cases is not None:
        chosen = some_gpu_cases(items, cases)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def some_gpu_cases(items: list[pytest.Item], cases: int) -> list[pytest.Item]:
    """At most `cases` gpu items of each test function, evenly apart, in their order."""
    by_test: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if "gpu" in item.keywords:
            by_test[item.nodeid.split("[")[0]].append(item)
    return [
        found[(2 * i + 1) * len(found) // (2 * n)]
        for found in by_test.values()
        for n in [min(cases, len(found))]
        for i in range(n)
    ]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every op test runs on the CPU everywhere and on the GPU where there is one."""
    return torch.device(request.param)
