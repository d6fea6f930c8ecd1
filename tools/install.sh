#!/usr/bin/env bash
# Makes .venv with everything that development and the demo need: tools/install.sh [VENV_FOLDER]
# Run it through `make`, which skips it while pyproject.toml and constraints.txt are unchanged.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${1:-.venv}"

usable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

python=""
for candidate in "${PYTHON:-}" python3.11 python3.12 python3 python3.13; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null && usable "$candidate"; then
        python="$candidate"
        break
    fi
done
if [ -z "$python" ]; then
    echo "install: no Python 3.11 to 3.13 with venv was found; install one (Debian: python3 python3-venv) or set PYTHON" >&2
    exit 2
fi

if ! [ -x "$venv/bin/python" ] || ! usable "$venv/bin/python"; then
    echo "install: making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# torch first and by its exact version: a range would take the newest build, with gigabytes of CUDA libraries, also where
# a CPU build of this version lies at hand.
echo "install: torch $(sed -n 's/^torch==//p' constraints.txt)"
pip install --quiet --constraint constraints.txt "$(grep '^torch==' constraints.txt)"
echo "install: Pagewire and its other dependencies"
pip install --quiet --constraint constraints.txt --editable ".[all,dev]"
echo "install: done"
