"""Torch modules that the models share: norms, rotary embeddings, projections."""
