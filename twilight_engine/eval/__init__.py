"""Measuring a model: prompts with known answers; nothing below imports it."""
