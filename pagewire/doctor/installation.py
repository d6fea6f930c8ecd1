"""The installation: Python, packages, generated stubs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from pagewire.doctor.check import Check, State

ROOT = Path(__file__).resolve().parents[2]
STUBS = ROOT / "pagewire" / "v1"
PROTOS = ROOT / "protos" / "pagewire" / "v1"
LEAST_PYTHON = (3, 11)


def check_python() -> Check:
    """Python's version."""
    found = platform.python_version()
    if sys.version_info < LEAST_PYTHON:
        return Check("Python", "bad", found, "install Python 3.11 or later and make the environment with it")
    return Check("Python", "ok", found)


def check_packages() -> Iterator[Check]:
    """The packages of each role against what this distribution requires."""
    roles = {
        "core packages": ("grpcio", "grpcio-health-checking", "grpcio-reflection", "grpcio-status", "protobuf"),
        "gateway packages": ("transformers", "tokenizers", "jinja2", "fastapi", "uvicorn"),
        "worker packages": ("torch", "safetensors", "numpy"),
    }
    extras = {"core packages": "", "gateway packages": "[gateway]", "worker packages": "[worker]"}
    required = required_versions()
    for role, names in roles.items():
        missing = [name for name in names if version(name) is None]
        old = [f"{name} {version(name)} (needs {required[name]})" for name in names if _too_old(name, required)]
        found = ", ".join(f"{name} {version(name)}" for name in names if version(name) is not None)
        install = f"pip install 'pagewire{extras[role]}'"
        if missing:
            # Only the core is needed by every role.
            state: State = "note" if extras[role] else "bad"
            yield Check(role, state, f"missing: {', '.join(missing)}", f"{install} (only for that role)")
        elif old:
            yield Check(role, "bad", f"too old: {', '.join(old)}", f"{install} --upgrade")
        else:
            yield Check(role, "ok", found)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def required_versions() -> dict[str, str]:
    """Package name to the version part of this distribution's requirement; empty when Pagewire is not installed."""
    try:
        lines = importlib.metadata.requires("pagewire") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    required: dict[str, str] = {}
    for line in lines:
        specification = line.split(";")[0].strip()
        for separator in (">=", "=="):
            name, found, version = specification.partition(separator)
            if found:
                required.setdefault(name.strip(), separator + version.strip())
                break
    return required


def _too_old(package: str, required: dict[str, str]) -> bool:
    found, wanted = version(package), required.get(package, "")
    if found is None or not wanted.startswith(">="):
        return False
    return numbers(found) < numbers(wanted.removeprefix(">=").split(",")[0])


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparison: 2.13.0+cpu is (2, 13, 0)."""
    found: list[int] = []
    for part in version.split("+")[0].split("."):
        if not part.isdecimal():
            break
        found.append(int(part))
    return tuple(found)


def check_stubs() -> Check:
    """The generated gRPC stubs: there, importable, and made from the protos that lie beside them."""
    mend = "make protos"
    if importlib.util.find_spec("pagewire.v1") is None or not (STUBS / "inference_pb2.py").is_file():
        return Check("gRPC stubs", "bad", "missing", mend)
    try:
        from pagewire.v1 import inference_pb2_grpc  # noqa: F401
    except Exception as error:
        # ImportError; RuntimeError of a grpcio older than the generator; VersionError of such a protobuf.
        mend = f"pip install --upgrade grpcio protobuf, or {mend}"
        return Check("gRPC stubs", "bad", f"do not import: {str(error).splitlines()[0]}", mend)
    recorded = STUBS / "protos.sha256"
    if PROTOS.is_dir() and (not recorded.is_file() or recorded.read_text().strip() != protos_digest(PROTOS)):
        return Check("gRPC stubs", "bad", "older than protos/", mend)
    return Check("gRPC stubs", "ok", f"importable with grpcio {version('grpcio')}")


def protos_digest(folder: Path) -> str:
    """SHA-256 over names and contents of the `.proto` files, as `tools.generate_stubs` records it."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.proto")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def check_line_editing() -> Check:
    """readline, with which `pagewire chat` edits lines."""
    if importlib.util.find_spec("readline") is None:
        mend = "only for pagewire chat: install a Python built with readline"
        return Check("line editing", "note", "this Python has no readline", mend)
    return Check("line editing", "ok", "readline")
