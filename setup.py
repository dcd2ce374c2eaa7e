"""Builds twilight_engine._C: engine/ (C++20) always, csrc/ (CUDA) where nvcc is found.

TWILIGHT_NVCC names another nvcc, or is empty to build without kernels; TWILIGHT_CUDA_ARCHS lists
the architectures (default "80 90").
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
ARCHS = os.environ.get("TWILIGHT_CUDA_ARCHS", "80 90").split()


def find_nvcc() -> Path | None:
    name = os.environ.get("TWILIGHT_NVCC")
    if name == "":
        return None
    found = shutil.which(name or "nvcc")
    if found is None and Path("/usr/local/cuda/bin/nvcc").exists():
        found = "/usr/local/cuda/bin/nvcc"
    return Path(found).resolve() if found else None


def find_cuda_home(nvcc: Path) -> Path:
    """The toolkit that holds the runtime: nvcc may be a link or a wrapper outside of it."""
    candidates = [nvcc.parent.parent, Path("/usr/local/cuda")]
    if "CUDA_HOME" in os.environ:
        candidates.insert(0, Path(os.environ["CUDA_HOME"]))
    for home in candidates:
        if (home / "include" / "cuda_runtime.h").exists():
            return home
    tried = ", ".join(map(str, candidates))
    raise SystemExit(
        f"{nvcc} was found, but no include/cuda_runtime.h under {tried}; set CUDA_HOME to the "
        "toolkit, or TWILIGHT_NVCC= (empty) to build without kernels"
    )


def sources(folder: str, pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / folder).glob(pattern))


def newest_header() -> float:
    headers = [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/*.cuh"), *ROOT.glob("engine/*.h")]
    return max((p.stat().st_mtime for p in headers), default=0.0)


class BuildWithNvcc(build_ext):
    """build_ext that also compiles csrc/*.cu with plain nvcc, in parallel."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        nvcc = find_nvcc()
        if nvcc is None:
            self.announce("nvcc not found: building twilight_engine._C without CUDA kernels", 3)
        else:
            cuda_home = find_cuda_home(nvcc)
            ext.define_macros.append(("TWILIGHT_CUDA", "1"))
            ext.include_dirs.append(str(cuda_home / "include"))
            lib_dirs = [cuda_home / d for d in ("lib64", "lib") if (cuda_home / d).is_dir()]
            ext.library_dirs += map(str, lib_dirs)
            ext.libraries += ["cudart_static", "dl", "rt", "pthread"]
            # Ours alone: torch loads a shared CUDA runtime into the global scope, and calls that
            # reach a mix of both crash.
            ext.extra_link_args.append("-Wl,--exclude-libs,ALL")
            objects = self.compile_kernels(nvcc)
            ext.extra_objects += objects
            ext.depends += objects  # linked again when only a kernel has changed
        super().build_extension(ext)

    def compile_kernels(self, nvcc: Path) -> list[str]:
        out = Path(self.build_temp) / "csrc"
        out.mkdir(parents=True, exist_ok=True)
        gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS]
        gencode.append(f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}")
        flags = ["-O3", "-std=c++20", "-lineinfo", "-Xcompiler", "-fPIC,-Wall", "-I", str(ROOT)]

        def compile_one(source: str) -> str:
            obj = out / (Path(source).stem + ".o")
            newest = max(Path(source).stat().st_mtime, newest_header())
            if not obj.exists() or obj.stat().st_mtime < newest:
                command = [str(nvcc), *flags, *gencode, "-c", source, "-o", str(obj)]
                subprocess.run(command, check=True, cwd=ROOT)
            return str(obj)

        workers = int(os.environ.get("MAX_JOBS", os.cpu_count() or 2))
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(compile_one, sources("csrc", "*.cu")))


ParallelCompile("MAX_JOBS").install()  # the C++ files; the kernels have their own pool

extension = Pybind11Extension(
    "twilight_engine._C",
    sources=[*sources("csrc", "bindings*.cpp"), *sources("engine", "*.cpp")],
    include_dirs=["."],
    cxx_std=20,
    extra_compile_args=["-O3", "-Wall"],
)

setup(ext_modules=[extension], cmdclass={"build_ext": BuildWithNvcc})
