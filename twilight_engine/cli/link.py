"""How fast the host's memory reaches the device, measured."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from twilight_engine import _C

COPY_BYTES = 256 << 20
REPEATS = 5


@dataclass(frozen=True)
class LinkSpeed:
    """GB/s (10^9 bytes) of large copies; on a CPU both are one memory copy's."""

    host_to_device_gbps: float
    device_to_host_gbps: float
    is_link: bool


def measure_link(num_bytes: int = COPY_BYTES, repeats: int = REPEATS) -> LinkSpeed:
    """Best of a few copies between pinned host memory and the GPU; within memory without a GPU.

    Raises: RuntimeError if the host refuses to pin the buffer.
    """
    if torch.cuda.is_available() and _C.has_cuda:
        device = torch.cuda.current_device()
        up, down = _C.measure_link(device=device, bytes=num_bytes, repeats=repeats)
        return LinkSpeed(up, down, is_link=True)
    source = torch.zeros(num_bytes, dtype=torch.uint8)
    speed = best_gbps(torch.zeros_like(source), source, repeats)
    return LinkSpeed(speed, speed, is_link=False)


def best_gbps(target: torch.Tensor, source: torch.Tensor, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):  # the first warms up
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return source.nbytes / min(times[1:]) / 1e9
