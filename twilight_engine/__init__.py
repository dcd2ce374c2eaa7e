"""Twilight Engine: long-context decoding with the KV cache in host memory."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twilight_engine.config import KVConfig, SparseConfig
    from twilight_engine.runtime.llm import LLM
    from twilight_engine.runtime.metrics import RequestMetrics
    from twilight_engine.runtime.outputs import CompletionOutput, RequestOutput
    from twilight_engine.runtime.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "CompletionOutput",
    "KVConfig",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "SparseConfig",
]

_HOME = {
    "LLM": "runtime.llm",
    "CompletionOutput": "runtime.outputs",
    "KVConfig": "config",
    "RequestMetrics": "runtime.metrics",
    "RequestOutput": "runtime.outputs",
    "SamplingParams": "runtime.sampling_params",
    "SparseConfig": "config",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: `import twilight_engine` stays cheap."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
