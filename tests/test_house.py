"""The house rules that no other tool holds: one-way imports, sizes, charters, the make targets."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

linter = pytest.importorskip("importlinter.cli", reason="import-linter is not installed")

ROOT = Path(__file__).parent.parent
MAX_LINES = {".py": 300, ".cu": 400, ".cuh": 400, ".h": 400, ".cpp": 400}
SOURCE_FOLDERS = ("twilight_engine", "engine", "csrc", "tests", "bench")


def source_files() -> list[Path]:
    found = [p for folder in SOURCE_FOLDERS for p in (ROOT / folder).rglob("*")]
    return [p for p in found if p.suffix in MAX_LINES and "__pycache__" not in p.parts]


def test_imports_run_one_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert linter.lint_imports(no_cache=True) == linter.EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_an_upward_import_breaks_the_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "twilight_engine"
    shutil.copytree(
        ROOT / "twilight_engine", copy, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (copy / "kv" / "climbs.py").write_text("import twilight_engine.runtime\n")
    run = "from importlinter.cli import lint_imports_command as c; c(['--no-cache'])"
    done = subprocess.run([sys.executable, "-c", run], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "twilight_engine.kv.climbs" in done.stdout


def test_only_ops_and_kv_call_the_compiled_module() -> None:
    package = ROOT / "twilight_engine"
    allowed = {"ops", "kv", "cli"}  # cli: doctor says how _C was built
    callers = {
        p.relative_to(package).parts[0]
        for p in package.rglob("*.py")
        if re.search(r"import _C|twilight_engine\._C", p.read_text())
    }
    assert callers <= allowed


def test_no_file_is_longer_than_the_style_allows() -> None:
    long = []
    for path in source_files():
        name = str(path.relative_to(ROOT))
        lines = len(path.read_text().splitlines())
        if lines > MAX_LINES[path.suffix]:
            long.append(f"{name}: {lines}")
    assert not long


def test_every_package_states_its_charter() -> None:
    inits = sorted((ROOT / "twilight_engine").rglob("__init__.py"))
    assert inits
    bare = [str(p.relative_to(ROOT)) for p in inits if not p.read_text().startswith('"""')]
    assert not bare


def test_make_has_the_targets_that_the_readme_names() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    assert {"demo", "test", "test-gpu", "test-sanitizers", "check", "bench"} <= targets
    named = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text()))
    assert named <= targets


def test_ci_is_executable_and_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()


def test_constraints_pin_every_tool() -> None:
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert {"torch", "ruff", "mypy", "clang-format", "import-linter", "pytest"} <= set(pinned)
