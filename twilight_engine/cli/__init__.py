"""The `twilight` command; nothing below imports it."""

import os

# Before torch loads its thread pool. By default its idle workers spin, and the numba loops between
# torch's calls get what is left of the cores: on two busy ones a decode step took seconds.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
