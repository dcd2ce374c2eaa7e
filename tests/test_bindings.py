"""_C.pyi is written by hand: it must name what csrc/bindings*.cpp bind, argument for argument."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

from twilight_engine import _C

ROOT = Path(__file__).parent.parent
STUB = ast.parse((ROOT / "twilight_engine" / "_C.pyi").read_text())
BINDINGS = "".join(p.read_text() for p in sorted((ROOT / "csrc").glob("bindings*.cpp")))


def arguments(function: ast.FunctionDef) -> list[str]:
    spec = function.args
    return [a.arg for a in [*spec.posonlyargs, *spec.args, *spec.kwonlyargs] if a.arg != "self"]


def stub_functions() -> dict[str, list[str]]:
    return {n.name: arguments(n) for n in ast.walk(STUB) if isinstance(n, ast.FunctionDef)}


def bound_functions() -> dict[str, list[str]]:
    """Every `.def("name", ..., py::arg("a"), ...)` of the binding files, kernels included."""
    bound: dict[str, list[str]] = {}
    for piece in BINDINGS.split(".def(")[1:]:
        name = re.match(r'\s*"(\w+)"', piece)
        if name is not None:
            bound[name.group(1)] = re.findall(r'py::arg\("(\w+)"\)', piece)
    return bound


def test_the_stub_names_every_binding_with_its_arguments() -> None:
    stub = stub_functions()
    for name, args in bound_functions().items():
        assert name in stub, f"{name} is bound, but _C.pyi lacks it"
        assert stub[name] == args, f"{name}: _C.pyi has {stub[name]}, csrc/bindings*.cpp {args}"


def test_the_module_has_nothing_that_the_stub_lacks() -> None:
    top = {n.name for n in STUB.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    top |= {n.target.id for n in STUB.body if isinstance(n, ast.AnnAssign)}  # type: ignore[union-attr]
    module = {name for name in dir(_C) if not name.startswith("__")}
    assert module <= top
    if _C.has_cuda:
        assert top <= module


def test_the_classes_have_the_members_that_the_stub_names() -> None:
    for node in STUB.body:
        if isinstance(node, ast.ClassDef) and hasattr(_C, node.name):
            built = getattr(_C, node.name)
            members = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
            members |= {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}  # type: ignore[union-attr]
            missing = members - {name for name, _ in inspect.getmembers(built)}
            assert not missing, f"{node.name} lacks {missing}"


def test_has_cuda_says_whether_the_kernels_were_built() -> None:
    assert isinstance(_C.has_cuda, bool)
