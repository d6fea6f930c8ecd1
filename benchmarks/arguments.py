"""Options that measurements of a whole service share."""

from __future__ import annotations

import argparse

from pagewire.bench.anchors import CONFIG
from pagewire.bench.results import ROOT


def add_model(parser: argparse.ArgumentParser) -> None:
    """What is served, and where: `model`, `load_format` and `device` of a Launch."""
    parser.add_argument(
        "--model", default=str(ROOT / "benchmarks" / "configs" / CONFIG), help="folder of a config.json"
    )
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--device", help="default: a GPU, if there is one")
