"""Turns a missing package into one line that says which extra brings it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pagewire.runtime.errors import StartError

PACKAGES = frozenset(
    {"fastapi", "jinja2", "matplotlib", "numpy", "safetensors", "tokenizers", "torch", "transformers", "uvicorn"}
)
"""What the extras of the roles bring, by the names that are imported."""
STUBS_LINE = "the generated gRPC stubs are missing: run `make protos` in the repository, or reinstall the package"


@contextmanager
def imports(extra: str) -> Iterator[None]:
    """Guards a role's imports.

    Args:
        extra: the extra of pyproject.toml that the role needs, for the mend.

    Raises:
        StartError: for a package of an extra, or the stubs. Anything else is a defect and keeps its traceback.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if (error.name or "").startswith("pagewire.v1"):
            raise StartError(STUBS_LINE) from None
        if missing in PACKAGES:
            raise StartError(f"the package {missing} is missing: pip install 'pagewire[{extra}]'") from None
        raise
    except ImportError as error:
        # `from pagewire.v1 import worker_pb2` says so when the folder exists but the module does not.
        if (error.name or "").startswith("pagewire.v1"):
            raise StartError(STUBS_LINE) from None
        raise
    except RuntimeError as error:
        # Generated stubs refuse a grpcio older than their generator.
        if "grpc package installed" in str(error):
            raise StartError(
                "the gRPC stubs were generated for a newer grpcio: pip install --upgrade grpcio, or run `make protos`"
            ) from None
        raise
