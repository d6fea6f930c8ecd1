"""Prints what Pagewire requires, one per line; with extras, what these add: dependencies.py PYPROJECT [EXTRA ...]."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
wanted = [project["optional-dependencies"][extra] for extra in sys.argv[2:]] or [project["dependencies"]]
print("\n".join(requirement for group in wanted for requirement in group))
