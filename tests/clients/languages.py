"""The example clients under `clients/`: what each needs, how it is built and run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = ROOT / "clients"
BUILT = ROOT / "build" / "clients"
UNAVAILABLE = 69
"""Exit code of a build that cannot fetch what it needs (EX_UNAVAILABLE)."""
RUN_LIMIT_S = 180

GO_PACKAGES = "/usr/share/gocode/src/google.golang.org"
JARS = "/usr/share/java"
JAVA_LIBRARIES = (
    "geronimo-annotation-1.3-spec",
    "grpc-netty",
    "gson",
    "netty-codec-http2",
    "perfmark-api",
    "proto-google-common-protos",
    "protobuf-util",
)


class CannotBuild(Exception):  # noqa: N818
    """The toolchain is there but what it would fetch is not. The text says why."""


@dataclass(frozen=True)
class Language:
    """One example client. Its `build.sh OUT` makes `OUT/scenarios`, whatever the language."""

    name: str
    """As the matrix writes it."""
    folder: str
    """Below `clients/`."""
    tools: tuple[str, ...] = ()
    """Programs that must be on the PATH."""
    files: tuple[str, ...] = ()
    """Libraries that must be installed."""

    @property
    def source(self) -> Path:
        return CLIENTS / self.folder

    def missing(self) -> str:
        """What is not installed; empty if the client can be built."""
        tools = [tool for tool in self.tools if shutil.which(tool) is None]
        return ", ".join(tools + [file for file in self.files if not Path(file).exists()])

    def build(self) -> Path:
        """The program that runs the scenarios; built only if its sources have changed since the last time."""
        out = BUILT / self.folder
        record, digest = out / "sources.sha256", self._digest()
        program = out / "scenarios"
        if not (program.exists() and record.exists() and record.read_text() == digest):
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            command = [str(self.source / "build.sh"), str(out)]
            environment = {**_environment(), "PYTHON": sys.executable}
            built = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
            if built.returncode == UNAVAILABLE:
                raise CannotBuild(built.stderr.strip().splitlines()[-1])
            assert built.returncode == 0, f"{' '.join(command)}\n{built.stdout[-2000:]}\n{built.stderr[-6000:]}"
            record.write_text(digest)
        return program

    def run(self, scenarios: Path, addresses: dict[str, str]) -> list[dict[str, Any]]:
        """What the client's runner prints: one object per scenario (id, verdict, observed)."""
        command = [str(self.build()), str(scenarios), *(f"{name}={address}" for name, address in addresses.items())]
        ran = subprocess.run(
            command, env=_environment(), cwd=ROOT, capture_output=True, text=True, timeout=RUN_LIMIT_S, check=False
        )
        lines = [json.loads(line) for line in ran.stdout.splitlines()]
        wanted = len(json.loads(scenarios.read_text(encoding="utf-8"))["scenarios"])
        assert len(lines) == wanted, f"exit {ran.returncode}\n{ran.stdout[-2000:]}\n{ran.stderr[-6000:]}"
        return lines

    def _digest(self) -> str:
        result = hashlib.sha256()
        for folder in (self.source, CLIENTS / "protos", ROOT / "protos"):
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                result.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
        return result.hexdigest()


def _environment() -> dict[str, str]:
    """Without our import path: the clients are made from the protocol alone."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


LANGUAGES = (
    Language("Python", "python"),
    Language("Node.js", "node", ("node", "npm")),
    Language(
        "Go",
        "go",
        ("go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc"),
        (f"{GO_PACKAGES}/grpc", f"{GO_PACKAGES}/protobuf/encoding/protojson", f"{GO_PACKAGES}/genproto"),
    ),
    Language(
        "Java",
        "java",
        ("java", "javac", "protoc", "grpc_java_plugin"),
        tuple(f"{JARS}/{name}.jar" for name in JAVA_LIBRARIES),
    ),
    Language(
        "C++",
        "cpp",
        ("g++", "pkg-config", "protoc", "grpc_cpp_plugin"),
        ("/usr/include/grpcpp/grpcpp.h", "/usr/include/nlohmann/json.hpp"),
    ),
)
