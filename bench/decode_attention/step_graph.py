"""The case of the step as a CUDA graph: how many nodes a layer's step is, and what replay adds."""

from __future__ import annotations

import ctypes
import time

import torch
from torch import Tensor

from decode_attention.cases import BALANCED
from decode_attention.policies import PolicyDecode
from decode_attention.setting import Setting, print_table
from decode_attention.timing import Replay, spread, time_work
from twilight_engine.config import KVConfig
from twilight_engine.kv.cache import KVCache

SHORT = 64  # tokens of the sequence: all resident, so every list is empty
KERNEL_NODE = 0  # CU_GRAPH_NODE_TYPE_KERNEL


def count_nodes(graph: int) -> tuple[int, int]:
    """(nodes, kernel nodes) of a cudaGraph_t.

    Raises: RuntimeError if the driver refuses.
    """
    driver = ctypes.CDLL("libcuda.so.1")

    def call(name: str, *args: object) -> None:
        error = getattr(driver, name)(*args)
        if error:
            raise RuntimeError(f"{name} failed with CUresult {error}")

    handle, count = ctypes.c_void_p(graph), ctypes.c_size_t()
    call("cuGraphGetNodes", handle, None, ctypes.byref(count))
    nodes = (ctypes.c_void_p * count.value)()
    call("cuGraphGetNodes", handle, nodes, ctypes.byref(count))
    kind, kernels = ctypes.c_int(), 0
    for node in nodes:
        call("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
        kernels += kind.value == KERNEL_NODE
    return count.value, kernels


def graph(setting: Setting) -> None:
    """`graph/nodes`: a layer's step of `balanced` over a sequence that is resident altogether.

    us_per_node is the replay's time by nodes: the node's own cost and the least that its kernel
    takes. empty_us_per_node is that of as many kernels of one element, for comparison.
    """
    device, shape = setting.device, setting.sizes.gqa
    with KVCache(
        shape,
        KVConfig(dense_layers=()),
        max_model_len=setting.sizes.graph,
        max_num_seqs=1,
        device=device,
        dtype=setting.dtype,
    ) as cache:
        sequence = cache.open_sequence(SHORT)
        sequence.length = SHORT - 1
        decode = PolicyDecode(cache, [sequence], BALANCED)
        decode.begin_step()
        decode.advance()
        rows = (1, shape.num_kv_heads, shape.head_dim)
        q = torch.randn(1, shape.num_q_heads, shape.head_dim, device=device, dtype=setting.dtype)
        k, v = (torch.randn(rows, device=device, dtype=setting.dtype) for _ in range(2))

        def layers() -> list[Tensor]:
            return [decode(i, q, k, v) for i in range(shape.num_layers)]

        metrics = _measure(setting, Replay(device, layers, countable=True), shape.num_layers)
    setting.keep("graph/nodes", metrics, traced=False)
    print_table(
        "graph: a layer's step as CUDA graph nodes, every list empty",
        ("nodes", "kernels", "us", "us a node", "us an empty node", "host us a node", "eager us"),
        [
            (
                f"{metrics['nodes']:.1f}",
                f"{metrics['kernel_nodes']:.1f}",
                f"{metrics['us']:.1f}",
                f"{metrics['us_per_node']:.2f}",
                f"{metrics['empty_us_per_node']:.2f}",
                f"{metrics['host_us_per_node']:.3f}",
                f"{metrics['eager_us']:.1f}",
            )
        ],
    )


def _measure(setting: Setting, replay: Replay, num_layers: int) -> dict[str, float]:
    """Figures of one layer's step; on a CPU, which has no graphs, it counts as one node."""
    device, repeats = setting.device, setting.repeats
    nodes, kernels = (num_layers, 0) if replay.graph is None else count_nodes(replay.raw_graph)
    x = torch.zeros(1, device=device)

    def empty() -> None:
        for _ in range(nodes):
            x.add_(1)

    def median_us(work: Replay) -> float:
        return spread(time_work(device, work, repeats=repeats, before=setting.machine.flush_l2))[
            "us"
        ]

    us, empty_us = median_us(replay), median_us(Replay(device, empty))
    host_us = []
    for _ in range(repeats):
        _wait(device)
        started = time.perf_counter()
        replay()
        host_us.append((time.perf_counter() - started) * 1e6)
    eager_us = []
    for _ in range(repeats):
        _wait(device)
        started = time.perf_counter()
        replay.work()
        _wait(device)
        eager_us.append((time.perf_counter() - started) * 1e6)
    return {
        "nodes": nodes / num_layers,
        "kernel_nodes": kernels / num_layers,
        "us": us / num_layers,
        "us_per_node": us / nodes,
        "empty_us_per_node": empty_us / nodes,
        "host_us_per_node": spread(host_us)["us"] / nodes,
        "eager_us": spread(eager_us)["us"] / num_layers,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
