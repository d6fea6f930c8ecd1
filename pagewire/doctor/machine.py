"""The machine: memory, files, ports, environment, clock."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from pagewire.doctor.check import Check

LEAST_FREE_BYTES = 2 << 30
LEAST_DISK_BYTES = 1 << 30
LEAST_SHARED_BYTES = 1 << 30
LEAST_DESCRIPTORS = 1024
EARLIEST = 1_704_067_200
"""Seconds of 1 January 2024: a clock before it has not been set."""
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
SHARED_MEMORY = Path("/dev/shm")


def check_memory() -> Check:
    """Main memory that is available, to this container if it is in one."""
    available = available_bytes()
    if available is None:
        return Check("memory", "note", "unknown on this system")
    found = f"{available / 2**30:.1f} GiB available"
    if available < LEAST_FREE_BYTES:
        mend = "close programs, or use a smaller model, --num-blocks and --host-blocks; raise a container's --memory"
        return Check("memory", "bad", found, mend)
    return Check("memory", "ok", found)


def available_bytes() -> int | None:
    """The least of what the machine and the control group leave; None: unknown."""
    found: list[int] = []
    try:
        lines = MEMINFO.read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        pass
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit != "max":
            found.append(max(0, int(limit) - int(used)))
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def check_shared_memory() -> Check:
    """/dev/shm, which torch and NCCL use between processes; containers often have 64 MiB of it."""
    if not SHARED_MEMORY.is_dir():
        return Check("shared memory", "note", f"no {SHARED_MEMORY} on this system")
    size = shutil.disk_usage(SHARED_MEMORY).total
    if size < LEAST_SHARED_BYTES:
        mend = "in a container, start it with --shm-size=1g; needed with several GPUs only"
        return Check("shared memory", "note", f"{size / 2**20:.0f} MiB", mend)
    return Check("shared memory", "ok", f"{size / 2**30:.1f} GiB")


def check_temporary_folder() -> Check:
    """Where sockets between the roles and compiled kernels lie."""
    try:
        folder = Path(tempfile.gettempdir())
        with tempfile.NamedTemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        mend = "set TMPDIR to a folder that can be written to"
        return Check("temporary folder", "bad", os.strerror(error.errno or 0).lower(), mend)
    if free < LEAST_DISK_BYTES:
        mend = f"make room on the disk of {folder}, or set TMPDIR"
        return Check("temporary folder", "note", f"{free / 2**20:.0f} MiB free in {folder}", mend)
    return Check("temporary folder", "ok", f"{free / 2**30:.1f} GiB free in {folder}")


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
            mend = f"ss -ltnp 'sport = :{port}' shows who listens: stop it, or choose another port (pagewire up --help)"
            return Check(name, "note", os.strerror(error.errno or 0).lower(), mend)
    return Check(name, "ok", "free")


def check_proxy(environment: Mapping[str, str]) -> Check:
    """A proxy that gRPC would ask for this machine itself."""
    names = ("grpc_proxy", "https_proxy", "http_proxy")
    proxy = next((name for name in names if environment.get(name)), None)
    if proxy is None:
        return Check("proxy", "ok", "none for gRPC")
    spared = environment.get("no_grpc_proxy") or environment.get("no_proxy") or ""
    if not {"127.0.0.1", "127.0.0.0/8", "*"} & {part.strip() for part in spared.split(",")}:
        mend = "export no_grpc_proxy=127.0.0.1,localhost"
        return Check("proxy", "note", f"{proxy} is set: gRPC sends calls to this machine through it too", mend)
    return Check("proxy", "ok", f"{proxy} is set, and spares this machine")


def check_fork_safety(environment: Mapping[str, str]) -> Check:
    """gRPC's fork handlers: with them a child of a process that uses gRPC may hang."""
    value = environment.get("GRPC_ENABLE_FORK_SUPPORT", "").lower()
    if value in ("1", "true", "yes", "on"):
        mend = "unset GRPC_ENABLE_FORK_SUPPORT: Pagewire starts its processes anew and never forks"
        return Check("fork safety", "note", f"GRPC_ENABLE_FORK_SUPPORT={value}", mend)
    return Check("fork safety", "ok", "gRPC's fork handlers are off")


def check_clock() -> Check:
    """The wall clock. A scheduler counts epochs on from it, so that those after a restart are larger."""
    now = time.time()
    told = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < EARLIEST:
        mend = "set the clock (timedatectl set-ntp true): workers refuse epochs that go back after a restart"
        return Check("clock", "bad", f"{told} cannot be", mend)
    return Check("clock", "ok", told)
