"""Checkpoints and tokenizers: files in, tensors and a config out."""
