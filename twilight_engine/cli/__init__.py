"""The `twilight` command; nothing below imports it."""

import os

# Before torch loads its thread pool. By default its idle workers spin, and the numba loops between
# torch's calls get what is left of the cores: a decode step on two cores took 3.8 s instead of 0.26.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
