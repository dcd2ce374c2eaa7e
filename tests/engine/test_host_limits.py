"""Limits of the host, read from files of a made-up root, and the device probes."""

from __future__ import annotations

from pathlib import Path

import pytest

from twilight_engine import _C

GIB = 1 << 30
V1_NO_LIMIT = 9223372036854771712


def write(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return str(root)


def meminfo(gib: int) -> dict[str, str]:
    return {"proc/meminfo": f"MemTotal: 999 kB\nMemAvailable: {gib << 20} kB"}


def test_no_cgroup_leaves_mem_available(tmp_path: Path) -> None:
    limits = _C.host_limits(write(tmp_path, meminfo(32)))
    assert limits["mem_available_bytes"] == 32 * GIB
    assert limits["cgroup_limit_bytes"] == limits["cgroup_used_bytes"] == -1
    assert limits["usable_bytes"] == 31 * GIB


def test_cgroup_v2_takes_the_tightest_limit_on_the_way_up(tmp_path: Path) -> None:
    cgroup = "sys/fs/cgroup"
    root = write(
        tmp_path,
        {
            **meminfo(100),
            "proc/self/cgroup": "0::/a/b",
            f"{cgroup}/a/b/memory.max": "max",
            f"{cgroup}/a/b/memory.current": str(5 * GIB),
            f"{cgroup}/a/memory.max": str(40 * GIB),
            f"{cgroup}/a/memory.current": str(16 * GIB),
            f"{cgroup}/a/memory.stat": f"anon 1\ninactive_file {8 * GIB}",
            f"{cgroup}/memory.max": str(64 * GIB),
            f"{cgroup}/memory.current": str(16 * GIB),
        },
    )
    limits = _C.host_limits(root)
    assert limits["cgroup_limit_bytes"] == 40 * GIB
    assert limits["cgroup_used_bytes"] == 8 * GIB  # page cache can go
    assert limits["usable_bytes"] == 31 * GIB


def test_a_container_sees_its_own_cgroup_at_the_mount(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            **meminfo(100),
            "proc/self/cgroup": "0::/kubepods/pod1",
            "sys/fs/cgroup/memory.max": str(8 * GIB),
            "sys/fs/cgroup/memory.current": str(9 * GIB),
        },
    )
    assert _C.host_limits(root)["usable_bytes"] == 0


@pytest.mark.parametrize("limit, usable", [(16 * GIB, 31 * GIB // 4), (V1_NO_LIMIT, 31 * GIB)])
def test_cgroup_v1(tmp_path: Path, limit: int, usable: int) -> None:
    memory = "sys/fs/cgroup/memory/job"
    root = write(
        tmp_path,
        {
            **meminfo(32),
            "proc/self/cgroup": "4:cpu,memory:/job\n0::/",
            f"{memory}/memory.limit_in_bytes": str(limit),
            f"{memory}/memory.usage_in_bytes": str(10 * GIB),
            f"{memory}/memory.stat": f"inactive_file 7\ntotal_inactive_file {2 * GIB}",
        },
    )
    assert _C.host_limits(root)["usable_bytes"] == usable


def test_this_host() -> None:
    limits = _C.host_limits()
    assert 0 < limits["usable_bytes"] < limits["mem_available_bytes"]
    assert limits["memlock_bytes"] >= -1


@pytest.mark.skipif(_C.has_cuda, reason="this build has CUDA")
def test_probes_say_that_there_is_no_cuda() -> None:
    for probe, arguments in (
        (_C.measure_link, {}),
        (_C.time_host_alloc, {"bytes": 1}),
        (_C.device_numa_node, {}),
    ):
        with pytest.raises(RuntimeError, match="built without CUDA"):
            probe(device=0, **arguments)
    with pytest.raises(ValueError, match="this build has no CUDA"):
        _C.HostArena(num_layers=1, num_kv_heads=1, num_pages=1, page_bytes=4096, device=0)


@pytest.mark.gpu
def test_probes_on_a_device() -> None:
    to_device, to_host = _C.measure_link(device=0)
    assert 1 < to_device < 2000 and 1 < to_host < 2000
    assert _C.time_host_alloc(device=0, bytes=64 << 20) > 0
    assert _C.device_numa_node(device=0) >= -1
