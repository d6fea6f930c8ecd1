"""Who may import whom: the layers of the architecture, read from the source without running it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROLES = ("gateway", "scheduler", "worker")
OUR_PACKAGES = (*ROLES, "kernels", "pagewire")

SCHEDULER_EDGES = {
    "__init__",
    "block_watch",
    "codec",
    "config",
    "control",
    "duplex",
    "engine",
    "fanout",
    "gateway_link",
    "metrics",
    "recorder",
    "server",
    "traces",
    "worker_link",
}
"""Modules of the scheduler that may know the wire, the clock and the event loop."""

CORE_MODULES = sorted({path.stem for path in (ROOT / "scheduler").glob("*.py")} - SCHEDULER_EDGES)
"""All others are the deciding core: pure, so a thousand scenarios run in a second."""

IMPURE = {
    "asyncio",
    "concurrent",
    "datetime",
    "logging",
    "multiprocessing",
    "os",
    "pathlib",
    "random",
    "secrets",
    "select",
    "selectors",
    "signal",
    "socket",
    "subprocess",
    "threading",
    "time",
    "uuid",
}
"""Standard modules with a clock, sockets, threads, randomness or the outside world."""

FORBIDDEN_LIBRARIES = {
    "scheduler": {"torch", "cupy", "transformers", "tokenizers", "safetensors", "numpy"},
    "gateway": {"torch", "cupy", "safetensors"},
    "kernels": {"grpc", "grpc_health", "grpc_reflection", "grpc_status", "google", "transformers", "pagewire"},
}

ALLOWED_OF_PAGEWIRE = (
    "pagewire.v1",
    "pagewire.runtime",
    "pagewire.recording",
    "pagewire.__version__",
    "pagewire.bundled",
)
"""What a role may take from `pagewire`: generated stubs, shared toolkit, version, the shipped model's path."""


def modules(package: str) -> list[Path]:
    """Every source file of a package, generated ones left out."""
    generated = ROOT / "pagewire" / "v1"
    found = [path for path in sorted((ROOT / package).rglob("*.py")) if generated not in path.parents]
    assert found, f"{package} has no modules"
    return found


def imports(path: Path) -> Iterator[str]:
    """Absolute dotted names that a module imports, wherever in it. `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports absolutely"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


@pytest.mark.parametrize("role", ROLES)
def test_roles_never_import_each_other(role: str) -> None:
    others = set(ROLES) - {role}
    for path in modules(role):
        assert not tops(path) & others, f"{path} imports another role"


@pytest.mark.parametrize("role", ROLES)
def test_roles_take_from_pagewire_only_stubs_toolkit_version_and_the_place_of_the_shipped_model(role: str) -> None:
    for path in modules(role):
        for name in imports(path):
            if name.partition(".")[0] == "pagewire":
                assert name.startswith(ALLOWED_OF_PAGEWIRE), f"{path} imports {name}"


@pytest.mark.parametrize(("package", "libraries"), FORBIDDEN_LIBRARIES.items())
def test_packages_stay_clear_of_libraries_that_are_not_theirs(package: str, libraries: set[str]) -> None:
    for path in modules(package):
        assert not tops(path) & libraries, f"{path} imports {sorted(tops(path) & libraries)}"


def test_kernels_import_none_of_our_packages_but_themselves() -> None:
    for path in modules("kernels"):
        assert not tops(path) & (set(OUR_PACKAGES) - {"kernels"}), f"{path} reaches up"


def test_the_toolkit_imports_no_role() -> None:
    for path in (ROOT / "pagewire" / "runtime").glob("*.py"):
        assert not tops(path) & {*ROLES, "kernels", "torch", "transformers", "numpy"}, path


@pytest.mark.parametrize("module", CORE_MODULES)
def test_the_schedulers_core_imports_only_the_pure_standard_library_and_itself(module: str) -> None:
    path = ROOT / "scheduler" / f"{module}.py"
    for name in imports(path):
        top = name.partition(".")[0]
        if top == "scheduler":
            assert name.split(".")[1] in CORE_MODULES, f"{path} imports {name}"
        else:
            assert top in sys.stdlib_module_names, f"{path} imports {name}"
            assert top not in IMPURE, f"{path} imports {name}"


def test_the_core_is_there() -> None:
    assert {"block_manager", "dispatcher", "scheduler", "sequence", "step_plan"} <= set(CORE_MODULES)


BLOCKED = ("torch", "cupy", "transformers", "tokenizers", "numpy", "safetensors")
IMPORT_ALL = """
import importlib, pkgutil, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("blocked: " + name)

sys.meta_path.insert(0, Block())
import {package}
for module in pkgutil.walk_packages({package}.__path__, "{package}."):
    importlib.import_module(module.name)
print("imported")
"""


@pytest.mark.parametrize(
    ("package", "blocked"), [("scheduler", BLOCKED), ("pagewire.runtime", BLOCKED), ("gateway", ("torch", "cupy"))]
)
def test_a_package_imports_where_the_heavy_libraries_are_missing(package: str, blocked: tuple[str, ...]) -> None:
    program = IMPORT_ALL.format(package=package, blocked=set(blocked))
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.stdout == "imported\n", ended.stderr
