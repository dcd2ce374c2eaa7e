"""Install the newest wheel of a folder in a bare venv and import it (`make wheel`).

The venv sees this interpreter's packages for the dependencies, and gets only the wheel of its own.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

CHECK = """
import twilight_engine
from twilight_engine import _C
assert {root!r} in twilight_engine.__file__, twilight_engine.__file__
kernels = "kernels" if _C.has_cuda else "no kernels"
print("wheel: ok,", kernels)
"""


def main(folder: str) -> None:
    wheel = max(Path(folder).glob("twilight_engine-*.whl"), key=lambda p: p.stat().st_mtime)
    with tempfile.TemporaryDirectory() as root:
        venv.create(root, with_pip=True)
        python = Path(root, "bin", "python")
        install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)]
        subprocess.run([python, *install], check=True)
        site = next(Path(root).glob("lib/python*/site-packages"))
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-c", CHECK.format(root=root)], cwd=root, check=True)
        twilight = Path(root, "bin", "twilight")
        subprocess.run([twilight, "--help"], cwd=root, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main(sys.argv[1])
