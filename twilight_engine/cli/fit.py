"""Whether a model and a context fit this machine, tier by tier."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from twilight_engine import _C
from twilight_engine.config import KVConfig
from twilight_engine.kv.plan import MemoryPlan, plan_memory
from twilight_engine.loaders.config import ModelConfig

DEVICE_RESERVE_BYTES = 1 << 30  # CUDA's context, cuBLAS workspaces and torch's caching


@dataclass(frozen=True)
class Fit:
    """Bytes wanted by tier, and what the machine has.

    Attributes:
        device: tier -> bytes, weights first.
        host: tier -> bytes.
        device_free, host_free: what there is; on a CPU both tiers share host memory.
    """

    device: dict[str, int]
    host: dict[str, int]
    device_free: int
    host_free: int
    on_gpu: bool
    plan: MemoryPlan

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def device_fits(self) -> bool:
        return self.device_bytes <= self.device_free

    @property
    def host_fits(self) -> bool:
        shared = 0 if self.on_gpu else self.device_bytes
        return self.host_bytes + shared <= self.host_free

    @property
    def fits(self) -> bool:
        return self.device_fits and self.host_fits


def check_fit(
    config: ModelConfig, kv_config: KVConfig, *, context: int, num_seqs: int, dtype_bytes: int
) -> Fit:
    """Plan the memory of an engine and hold it against this machine.

    Raises: ValueError for a context or number of sequences below 1, or dense layers that the model
        does not have.
    """
    for name, value in (("context", context), ("num_seqs", num_seqs)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be >= 1")
    plan = plan_memory(
        config, kv_config, max_model_len=context, max_num_seqs=num_seqs, dtype_bytes=dtype_bytes
    )
    on_gpu = torch.cuda.is_available()
    host_free = max(int(_C.host_limits()["usable_bytes"]), 0)
    if on_gpu:
        device_free = max(torch.cuda.mem_get_info()[0] - DEVICE_RESERVE_BYTES, 0)
    else:
        device_free = psutil.virtual_memory().available
    return Fit(
        device={"weights": weight_bytes(config, dtype_bytes), **plan.device},
        host=dict(plan.host),
        device_free=device_free,
        host_free=host_free,
        on_gpu=on_gpu,
        plan=plan,
    )


def weight_bytes(config: ModelConfig, dtype_bytes: int) -> int:
    """Bytes of the weights in the dtype they run in."""
    hidden, heads = config.hidden_size, config.num_q_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    attention = hidden * (heads + 2 * kv) + heads * hidden
    attention += config.attention_bias * (heads + 2 * kv) + config.output_bias * hidden
    attention += 2 * config.qk_norm * config.head_dim
    mlp = 3 * hidden * config.intermediate_size
    mlp += config.mlp_bias * (2 * config.intermediate_size + hidden)
    layers = config.num_layers * (attention + mlp + 2 * hidden)
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return (layers + embeddings + hidden) * dtype_bytes
