"""`pagewire doctor`: looks at this machine and says, for each thing that is wrong, how to mend it."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pagewire.bundled import BUNDLED_MODEL

ROOT = Path(__file__).resolve().parents[2]
STUBS = ROOT / "pagewire" / "v1"
PROTOS = ROOT / "protos" / "pagewire" / "v1"
LEAST_PYTHON = (3, 11)
LEAST_FREE_BYTES = 2 << 30
LEAST_DESCRIPTORS = 1024

State = Literal["ok", "note", "bad"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State
    """bad: something will not work; note: works, but you may want to know."""
    found: str
    mend: str = ""
    """What to do about it."""


def command() -> Callable[..., None]:
    """The command."""
    return doctor


def doctor() -> None:
    """Check this machine and say what to mend. Exits with code 1 if something will not work."""
    # A pipe has no width: lines that are not folded are easier to search and to report.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "check", "found", "mend"):
        table.add_column(title, overflow="fold")
    marks = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "bad": "[red]bad[/red]"}
    bad = 0
    for check in run_checks():
        bad += check.state == "bad"
        table.add_row(marks[check.state], check.name, escape(check.found), escape(check.mend))
    console.print(table)
    if bad:
        console.print(f"{bad} to mend", style="red")
        sys.exit(1)
    console.print("this machine can run Pagewire", style="green")


def run_checks() -> Iterator[Check]:
    """All checks, in the order in which they build on each other."""
    yield check_python()
    yield from check_packages()
    yield check_stubs()
    yield check_bundled_model()
    yield from check_gpu()
    yield check_memory()
    yield check_shared_memory()
    yield check_descriptors()
    for port, what in ((50051, "gRPC"), (8000, "HTTP"), (9090, "metrics"), (50052, "scheduler")):
        yield check_port(port, what)


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
    required = _required_versions()
    for role, names in roles.items():
        missing = [name for name in names if _version(name) is None]
        old = [f"{name} {_version(name)} (needs {required[name]})" for name in names if _too_old(name, required)]
        found = ", ".join(f"{name} {_version(name)}" for name in names if _version(name) is not None)
        install = f"pip install 'pagewire{extras[role]}'"
        if missing:
            # Only the core is needed by every role.
            state: State = "note" if extras[role] else "bad"
            yield Check(role, state, f"missing: {', '.join(missing)}", f"{install} (only for that role)")
        elif old:
            yield Check(role, "bad", f"too old: {', '.join(old)}", f"{install} --upgrade")
        else:
            yield Check(role, "ok", found)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _required_versions() -> dict[str, str]:
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
    found, wanted = _version(package), required.get(package, "")
    if found is None or not wanted.startswith(">="):
        return False
    return _numbers(found) < _numbers(wanted.removeprefix(">=").split(",")[0])


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparison: 2.13.0+cpu is (2, 13, 0)."""
    numbers: list[int] = []
    for part in version.split("+")[0].split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)


def check_stubs() -> Check:
    """The generated gRPC stubs: there, importable, and made from the protos that lie beside them."""
    mend = "make protos"
    if importlib.util.find_spec("pagewire.v1") is None or not (STUBS / "inference_pb2.py").is_file():
        return Check("gRPC stubs", "bad", "missing", mend)
    try:
        from pagewire.v1 import inference_pb2_grpc  # noqa: F401
    except (ImportError, RuntimeError) as error:
        return Check("gRPC stubs", "bad", f"do not import: {str(error).splitlines()[0]}", mend)
    recorded = STUBS / "protos.sha256"
    if PROTOS.is_dir() and (not recorded.is_file() or recorded.read_text().strip() != protos_digest(PROTOS)):
        return Check("gRPC stubs", "bad", "older than protos/", mend)
    return Check("gRPC stubs", "ok", f"importable with grpcio {_version('grpcio')}")


def protos_digest(folder: Path) -> str:
    """SHA-256 over names and contents of the `.proto` files, as `tools.generate_stubs` records it."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.proto")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def check_bundled_model() -> Check:
    """The model that ships with Pagewire."""
    if not (BUNDLED_MODEL / "config.json").is_file():
        return Check("bundled model", "bad", "missing", "reinstall the package, or name a model with --model")
    size = sum(path.stat().st_size for path in BUNDLED_MODEL.iterdir() if path.is_file())
    return Check("bundled model", "ok", f"{size / 2**20:.1f} MiB")


def check_gpu() -> Iterator[Check]:
    """GPU, driver, torch with CUDA, CuPy: what is there, or why workers will compute on the CPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        mend = "to use a GPU, install NVIDIA's driver; workers compute on the CPU until then"
        yield Check("GPU", "note", "no CUDA driver (libcuda.so.1)", mend)
        return
    status = driver.cuInit(0)
    if status != 0:
        yield Check("GPU", "note", f"the driver found no usable GPU (cuInit: {status})", "see nvidia-smi")
        return
    number = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(number))
    cuda = f"{number.value // 1000}.{number.value % 1000 // 10}"
    yield Check("GPU", "ok", _gpu_names() or "present", "")
    yield Check("CUDA driver", "ok", f"supports CUDA {cuda}")
    extra = "cuda13" if number.value >= 13000 else "cuda12"
    package = f"cupy-{extra}x"
    if importlib.util.find_spec("cupy") is None:
        mend = f"pip install 'pagewire[{extra}]'"
        yield Check("CuPy", "bad", "missing: the GPU kernels need it", mend)
    else:
        yield Check("CuPy", "ok", _version(package) or "present")
    torch_version = _version("torch") or ""
    if torch_version.endswith("+cpu"):
        mend = "install a torch build with CUDA; see pytorch.org for the line"
        yield Check("torch with CUDA", "bad", f"torch {torch_version} has no CUDA", mend)


def _gpu_names() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    query = [tool, "--query-gpu=name,driver_version,memory.total,memory.free", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return "; ".join(result.stdout.strip().splitlines()) if result.returncode == 0 else ""


def check_memory() -> Check:
    """Main memory that is available."""
    available = _available_bytes()
    if available is None:
        return Check("memory", "note", "unknown on this system")
    found = f"{available / 2**30:.1f} GiB available"
    if available < LEAST_FREE_BYTES:
        mend = "close programs, or use a smaller model, --num-blocks and --host-blocks"
        return Check("memory", "bad", found, mend)
    return Check("memory", "ok", found)


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def check_shared_memory() -> Check:
    """/dev/shm, which torch and NCCL use between processes; containers often have 64 MiB of it."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Check("shared memory", "note", "no /dev/shm on this system")
    size = shutil.disk_usage(folder).total
    if size < 1 << 30:
        mend = "in a container, start it with --shm-size=1g; needed with several GPUs only"
        return Check("shared memory", "note", f"{size / 2**20:.0f} MiB", mend)
    return Check("shared memory", "ok", f"{size / 2**30:.1f} GiB")


def check_descriptors() -> Check:
    """The limit on open files, which bounds client connections."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < LEAST_DESCRIPTORS:
        return Check("open files", "note", f"limit {soft}", f"ulimit -n {min(65536, hard)} allows more connections")
    return Check("open files", "ok", "unlimited" if soft < 0 else f"limit {soft}")


def check_port(port: int, what: str) -> Check:
    """Whether a default port is free."""
    name = f"port {port} ({what})"
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen(1)
        except OSError as error:
            mend = "stop what listens there, or choose another port (see pagewire up --help)"
            return Check(name, "note", os.strerror(error.errno or 0).lower(), mend)
    return Check(name, "ok", "free")
