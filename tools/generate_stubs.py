"""Writes the Python stubs of `protos/` into `pagewire/v1/` (git-ignored): `python -m tools.generate_stubs`.

The import path of the stubs equals the proto package, so nothing in them is rewritten. `protos.sha256` beside them
records what they were made from, for `pagewire doctor` and to skip the work when nothing has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO_ROOT = ROOT / "protos"
STUB_FOLDER = ROOT / "pagewire" / "v1"
RECORD = STUB_FOLDER / "protos.sha256"


def generate() -> None:
    """Generates messages, services and type stubs of every `.proto`; exits with one line if grpcio-tools is missing."""
    try:
        from grpc_tools import protoc
    except ImportError:
        sys.exit("grpcio-tools is missing: pip install grpcio-tools==1.84.0, then run this again")
    STUB_FOLDER.mkdir(parents=True, exist_ok=True)
    (STUB_FOLDER / "__init__.py").write_text('"""Generated from protos/ by tools/generate_stubs.py. Do not edit."""\n')
    arguments = [f"-I{PROTO_ROOT}", f"--python_out={ROOT}", f"--pyi_out={ROOT}", f"--grpc_python_out={ROOT}"]
    if protoc.main(["protoc", *arguments, *(str(path) for path in proto_files())]) != 0:
        sys.exit("protoc failed: see the lines above")
    RECORD.write_text(digest() + "\n")


def proto_files() -> list[Path]:
    """The protocol's files, in order."""
    return sorted((PROTO_ROOT / "pagewire" / "v1").glob("*.proto"))


def digest() -> str:
    """SHA-256 over names and contents of the protocol's files."""
    result = hashlib.sha256()
    for path in proto_files():
        result.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return result.hexdigest()


def is_fresh() -> bool:
    """Whether the stubs were made from the protocol as it is."""
    return RECORD.is_file() and RECORD.read_text().strip() == digest()


def main() -> None:
    """Generates, or with `--if-stale` only if the protocol has changed."""
    parser = argparse.ArgumentParser(description="Write the gRPC stubs of protos/ into pagewire/v1/.")
    parser.add_argument("--if-stale", action="store_true", help="do nothing if they are up to date")
    if parser.parse_args().if_stale and is_fresh():
        return
    generate()


if __name__ == "__main__":
    main()
