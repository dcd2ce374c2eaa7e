"""One file an op: plain torch, float32 inside; what the tests compare with."""
