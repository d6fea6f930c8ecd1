"""Generates the gRPC stubs while the package is built, so that an install never lacks them."""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# A build front end does not put the project's folder on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))


class BuildWithStubs(build_py):
    """`build_py` that first writes `pagewire/v1/` from `protos/` (also for editable installs)."""

    def run(self) -> None:
        from tools.generate_stubs import generate

        generate()
        if "pagewire.v1" not in self.packages:
            self.packages.append("pagewire.v1")
        super().run()


setup(cmdclass={"build_py": BuildWithStubs})
