"""torch's SDPA over the same KV resident in device memory: the fastest backend and form."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from decode_attention.machine import Machine
from decode_attention.timing import Replay, time_work
from decode_attention.workload import Shape

ROTATED_BYTES = 512 << 20  # copies of the KV in turn hold this much at least: far above the L2
GPU_BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)


def best_sdpa(
    machine: Machine, shape: Shape, tokens: int, batch: int, dtype: torch.dtype, repeats: int
) -> dict[str, float]:
    """Microseconds a layer by "backend/form", of those that take this shape.

    Forms: the query heads of a group share KV heads (`enable_gqa`), or are the rows of one query
    of their KV head, which is the same attention for a single new token.
    """
    device, heads, dim = machine.device, shape.num_kv_heads, shape.head_dim
    num_bytes = 2 * batch * heads * tokens * dim * dtype.itemsize
    copies = 1 if machine.small else max(1, -(-ROTATED_BYTES // num_bytes))
    kv = [
        [torch.randn(batch, heads, tokens, dim, device=device, dtype=dtype) for _ in range(2)]
        for _ in range(copies)
    ]
    q = torch.randn(batch, shape.num_q_heads, 1, dim, device=device, dtype=dtype)
    group = shape.num_q_heads // heads

    def gqa(k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=group > 1)

    def rows(k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q.view(batch, heads, group, dim), k, v)

    found: dict[str, float] = {}
    for backend in GPU_BACKENDS if device.type == "cuda" else (SDPBackend.MATH,):
        for name, form in (("gqa", gqa), ("rows", rows)):
            us = _time(machine, backend, form, kv, repeats)
            if us is not None:
                found[f"{backend.name.lower()}/{name}"] = us / copies
    if not found:
        raise RuntimeError(f"no SDPA backend takes batch {batch}, {tokens} tokens, {shape}")
    return found


def _time(
    machine: Machine,
    backend: SDPBackend,
    form: Callable[[Tensor, Tensor], Tensor],
    kv: list[list[Tensor]],
    repeats: int,
) -> float | None:
    """Median microseconds over all copies; None where the backend refuses the shape."""

    def attend() -> None:
        with sdpa_kernel(backend):
            for k, v in kv:
                form(k, v)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that say why the other backends are not used
            attend()
    except RuntimeError:  # "No available kernel": torch's only way to say so
        return None
    work = Replay(machine.device, attend, warm=True)
    return statistics.median(
        time_work(machine.device, work, repeats=repeats, before=machine.flush_l2)
    )
