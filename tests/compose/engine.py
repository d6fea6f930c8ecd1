"""A Docker engine and a base image for the tests: what this machine has, or what root can make on a Debian machine.

An engine that runs already is used as a user would use it: images are built on the public base image. Where none runs,
dockerd is started with everything it keeps in one temporary folder, and the base image is made of Debian's packages, so
that nothing is pulled: debootstrap, and the wheels that the roles need, found by the image's own pip settings.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PUBLIC_BASE = "python:3.12-slim"
"""The default of docker-compose.yml."""
LOCAL_BASE = "pagewire-base:test"
SUITE, SUITE_PYTHON = "bookworm", "3.11"
PIP_SETTINGS = "[global]\nno-index = true\nfind-links = /wheelhouse\ndisable-pip-version-check = true\n"
DAEMON_VARIANTS = (["--storage-driver=overlay2"], ["--storage-driver=vfs"])
DAEMON_START_S = 30


class NoEngineError(Exception):
    """Why there is no engine here."""


@dataclass(frozen=True)
class Engine:
    """How to reach an engine, and what to build on."""

    environment: dict[str, str]
    """For docker and compose."""
    compose: list[str]
    """The command: `docker compose`, or the older `docker-compose`."""

    @property
    def has_buildkit(self) -> bool:
        """Whether this machine's docker can build with BuildKit, which recent ones cannot without a plug-in."""
        return _works("docker", "buildx", "version", environment=self.environment)

    def docker(self, *arguments: str, timeout: float = 60) -> str:
        """Runs `docker ...`; returns what it printed. Raises with its complaint when it fails."""
        return run(["docker", *arguments], self.environment, timeout)


def run(command: list[str], environment: dict[str, str], timeout: float) -> str:
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ... failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout


def _works(*command: str, environment: dict[str, str] | None = None) -> bool:
    limit_s = 300 if "pull" in command else 30
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=limit_s, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _compose() -> list[str]:
    for command in (["docker", "compose"], ["docker-compose"]):
        if _works(*command, "version"):
            return command
    raise NoEngineError("neither `docker compose` nor `docker-compose` is installed")


@contextlib.contextmanager
def engine() -> Iterator[Engine]:
    """An engine for the length of a `with` block. Raises NoEngineError where none, or no base image, can be had."""
    if shutil.which("docker") is None:
        raise NoEngineError("docker is not installed (Debian: docker.io docker-compose debootstrap)")
    compose = _compose()
    # Images are kept here, gigabytes, for which /tmp may not have room.
    folder = Path(tempfile.mkdtemp(prefix="pagewire-engine-", dir="/var/tmp"))
    try:
        if _works("docker", "info"):
            yield _with_base(Engine(dict(os.environ), compose), folder, may_pull=True)
        else:
            with _daemon(folder) as host:
                yield _with_base(Engine({**os.environ, "DOCKER_HOST": host}, compose), folder, may_pull=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _with_base(made: Engine, folder: Path, *, may_pull: bool) -> Engine:
    """The engine with a base image: what the environment names, else the public one, else one made here."""
    if "PAGEWIRE_BASE" in os.environ:
        return made
    if may_pull and (_works("docker", "image", "inspect", PUBLIC_BASE) or _works("docker", "pull", PUBLIC_BASE)):
        return made
    _need_root_and("debootstrap")
    try:
        _make_base(folder / "base", made)
    except (RuntimeError, subprocess.SubprocessError) as error:
        raise NoEngineError(f"a base image can neither be pulled nor made: {error}") from None
    return Engine({**made.environment, "PAGEWIRE_BASE": LOCAL_BASE}, made.compose)


def _need_root_and(program: str) -> None:
    if os.geteuid() != 0:
        raise NoEngineError(f"no Docker engine with a base image answers, and only root can run {program}")
    if shutil.which(program, path=_with_sbin()["PATH"]) is None:
        raise NoEngineError(f"no Docker engine with a base image answers, and {program} is not installed")


def _drops_forwarded() -> bool:
    """Whether the packet filter, as an earlier dockerd may have left it, keeps containers from each other."""
    command = ["iptables", "-S", "FORWARD"]
    try:
        found = subprocess.run(command, env=_with_sbin(), capture_output=True, text=True, check=False)
    except OSError:
        return False
    return "-P FORWARD DROP" in found.stdout


def _with_sbin() -> dict[str, str]:
    return {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}


@contextlib.contextmanager
def _daemon(folder: Path) -> Iterator[str]:
    """dockerd with the first variant that this kernel takes; yields its address."""
    _need_root_and("dockerd")
    host = f"unix://{folder}/docker.sock"
    complaint = ""
    for variant in DAEMON_VARIANTS:
        log = folder / "dockerd.log"
        # Neither a default bridge nor, where it can be, rules of its own: nothing of the machine's network is changed
        # for good. Containers talk on compose's own bridge, published ports go through docker-proxy.
        command = ["dockerd", "--host", host, "--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec"]
        command += ["--pidfile", f"{folder}/dockerd.pid", "--bridge=none", *variant]
        command += ["--ip-masq=false", f"--iptables={str(_drops_forwarded()).lower()}"]
        with log.open("wb") as output:
            daemon = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=_with_sbin())
        try:
            deadline = time.monotonic() + DAEMON_START_S
            while daemon.poll() is None and time.monotonic() < deadline:
                if _works("docker", "--host", host, "info"):
                    yield host
                    return
                time.sleep(0.2)
            complaint = log.read_text()[-600:]
        finally:
            if daemon.poll() is None:
                daemon.send_signal(signal.SIGTERM)
                try:
                    daemon.wait(timeout=60)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
    raise NoEngineError(f"dockerd does not start here: {complaint}")


def _make_base(folder: Path, made: Engine) -> None:
    """Debian with Python and a wheelhouse, imported as LOCAL_BASE."""
    command = ["debootstrap", "--variant=minbase", "--include=python3,python3-pip,python3-venv"]
    run([*command, SUITE, str(folder)], _with_sbin(), timeout=300)
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [torch, *project["project"]["dependencies"], *extras["gateway"], *extras["worker"], *extras["cuda12"]]
    wanted += ["nvidia-cuda-nvrtc-cu12", *project["build-system"]["requires"], "wheel"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--constraint"]
    command += ["constraints.txt", "--python-version", SUITE_PYTHON, "--dest", f"{folder}/wheelhouse", *wanted]
    run(command, dict(os.environ), timeout=600)
    (folder / "etc/pip.conf").write_text(PIP_SETTINGS)
    with subprocess.Popen(["tar", "-C", str(folder), "-c", "."], stdout=subprocess.PIPE) as tar:
        subprocess.run(
            ["docker", "import", "-", LOCAL_BASE], stdin=tar.stdout, env=made.environment, check=True, timeout=300,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
    shutil.rmtree(folder)
