"""One file an op: checks, then dispatch to CUDA, numba or torch."""
