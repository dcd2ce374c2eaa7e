"""The KV tiers: host pages, device index, windows and hot rows."""

from twilight_engine.kv.errors import HostMemoryError, OutOfPages

__all__ = ["HostMemoryError", "OutOfPages"]
