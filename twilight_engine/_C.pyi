"""Types of the compiled module; tests/test_bindings.py holds this file to it."""

has_cuda: bool
