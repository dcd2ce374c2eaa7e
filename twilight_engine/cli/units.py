"""Numbers as people read them."""

from __future__ import annotations

UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def format_bytes(count: float) -> str:
    """1536 -> '1.5 KiB': three figures, whole below 1 KiB."""
    size, unit = float(count), 0
    while abs(size) >= 1024 and unit < len(UNITS) - 1:
        size, unit = size / 1024, unit + 1
    if unit == 0:
        return f"{count:.0f} B"
    digits = 0 if size >= 100 or size == int(size) else 1 if size >= 10 or 10 * size % 1 == 0 else 2
    return f"{size:.{digits}f} {UNITS[unit]}"


def format_seconds(seconds: float) -> str:
    """0.0123 -> '12.3 ms', 75 -> '1 min 15 s'."""
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"
