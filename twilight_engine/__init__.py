"""Twilight Engine: long-context decoding with the KV cache in host memory."""
