"""Prints what Pagewire requires, one per line: python dependencies.py PYPROJECT [EXTRA ...]; with extras, theirs alone."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
wanted = [project["optional-dependencies"][extra] for extra in sys.argv[2:]] or [project["dependencies"]]
print("\n".join(requirement for group in wanted for requirement in group))
