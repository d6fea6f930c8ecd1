"""Where the model that ships with Pagewire lies: small, trained by this project, enough to see the service run."""

from __future__ import annotations

from pathlib import Path

BUNDLED_MODEL = Path(__file__).resolve().parent / "bundled_model"
BUNDLED_NAME = "pagewire-bundled"
"""The name it is served under unless another is given."""
