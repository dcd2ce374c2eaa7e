"""Requests, the scheduler and the runner: when steps run."""
