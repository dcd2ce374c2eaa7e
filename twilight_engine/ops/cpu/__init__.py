"""The numba paths of the ops that are slow in torch on a CPU."""
