"""The error of a checkpoint that cannot be trusted or understood."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A model file is broken, incomplete, hostile, or does not fit its config."""
