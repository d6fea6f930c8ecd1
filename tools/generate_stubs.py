"""Writes the Python stubs of `protos/` into `pagewire/v1/` (git-ignored): `python -m tools.generate_stubs`.

The import path of the stubs equals the proto package, so nothing in them is rewritten.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO_ROOT = ROOT / "protos"
STUB_FOLDER = ROOT / "pagewire" / "v1"


def generate() -> None:
    """Generates messages, services and type stubs for every `.proto`; exits with one line if grpcio-tools is missing."""
    try:
        from grpc_tools import protoc
    except ImportError:
        sys.exit("grpcio-tools is missing: pip install grpcio-tools==1.84.0, then run this again")
    STUB_FOLDER.mkdir(parents=True, exist_ok=True)
    (STUB_FOLDER / "__init__.py").write_text('"""Generated from protos/ by tools/generate_stubs.py. Do not edit."""\n')
    protos = sorted(str(path) for path in (PROTO_ROOT / "pagewire" / "v1").glob("*.proto"))
    arguments = [f"-I{PROTO_ROOT}", f"--python_out={ROOT}", f"--pyi_out={ROOT}", f"--grpc_python_out={ROOT}"]
    if protoc.main(["protoc", *arguments, *protos]) != 0:
        sys.exit("protoc failed: see the lines above")


if __name__ == "__main__":
    generate()
