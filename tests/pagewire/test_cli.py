"""The command line: wrong use is one line and exit code 2, and nothing heavy is imported for it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pagewire.commands.extras import PACKAGES

ROOT = Path(__file__).resolve().parents[2]


def pagewire(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pagewire.cli", *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, **environment},
        check=False,
    )


def test_help_lists_the_commands() -> None:
    result = pagewire("--help")
    assert result.returncode == 0
    for name in ("up", "scheduler", "worker", "gateway", "generate", "chat", "doctor"):
        assert f"\n  {name}" in result.stdout


def test_without_arguments_help_is_shown() -> None:
    assert pagewire().stdout == pagewire("--help").stdout


def test_version() -> None:
    from pagewire import __version__

    assert pagewire("--version").stdout == f"pagewire {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["upp"], "pagewire: No such command 'upp'"),
        (["up", "--nope"], "pagewire up: No such option: --nope"),
        (["scheduler", "--max-num-seqs", "none"], "pagewire scheduler: --max-num-seqs (or PAGEWIRE_MAX_NUM_SEQS)"),
        (["scheduler", "--listen", "nowhere"], "pagewire scheduler: 'nowhere' is not an address"),
        (["scheduler", "--listen", "0.0.0.0:0"], "pagewire scheduler: 0.0.0.0:0 can be reached from other machines"),
        (["scheduler", "--config", "/nowhere.toml"], "pagewire scheduler: cannot read the configuration file"),
        (["generate"], "pagewire generate: Missing argument"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments: list[str], expected: str) -> None:
    result = pagewire(*arguments, PAGEWIRE_LOG_LEVEL="error")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(expected)


def test_a_port_in_use_is_one_line_and_exit_code_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        result = pagewire("scheduler", "--listen", address, PAGEWIRE_LOG_LEVEL="error")
    assert result.returncode == 2
    assert result.stderr == (
        f"pagewire scheduler: cannot listen on {address}: it is in use; stop the process that holds it or choose "
        "another port (0 picks a free one)\n"
    )


def test_without_a_server_generate_says_how_to_start_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        address = f"127.0.0.1:{holder.getsockname()[1]}"
    result = pagewire("generate", "hello", "--address", address)
    assert result.returncode == 1
    assert result.stderr == (
        f"pagewire generate: UNAVAILABLE: no server at {address}; start one with `pagewire up`, or name another with "
        "--address\n"
    )


BLOCKED = """
import sys
import tomllib

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
from pagewire.cli import main
main({arguments!r})
"""


def run_without(packages: set[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line on a machine that lacks some packages."""
    code = BLOCKED.format(blocked=packages, arguments=list(arguments))
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL, check=False
    )


def test_help_of_the_scheduler_needs_neither_torch_nor_transformers_nor_numpy() -> None:
    result = run_without({"torch", "transformers", "tokenizers", "numpy"}, "scheduler", "--help")
    assert (result.returncode, result.stderr) == (0, "")


def test_the_list_of_commands_needs_no_grpc() -> None:
    assert run_without({"grpc", "torch", "transformers"}, "--help").returncode == 0


def test_a_worker_without_torch_says_what_to_install() -> None:
    result = run_without({"torch"}, "worker", "--log-level", "error")
    assert result.returncode == 2
    assert result.stderr == "pagewire worker: the package torch is missing: pip install 'pagewire[worker]'\n"


def test_a_gateway_without_its_extra_says_what_to_install() -> None:
    result = run_without({"fastapi"}, "gateway", "--log-level", "error")
    assert result.returncode == 2
    assert result.stderr == "pagewire gateway: the package fastapi is missing: pip install 'pagewire[gateway]'\n"


def test_every_package_of_the_extras_of_the_roles_is_known_to_the_line_that_tells_of_a_missing_one() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    needed = {re.split(r"[^a-z0-9]", line)[0] for role in ("gateway", "worker") for line in extras[role]}
    assert needed <= PACKAGES


@pytest.mark.parametrize("arguments", [["scheduler", "--log-level", "error"], ["generate", "hello"]])
def test_missing_stubs_name_the_line_that_makes_them(arguments: list[str]) -> None:
    code = BLOCKED.replace('name.split(".")[0] in', 'name.startswith("pagewire.v1") and "pagewire" in')
    code = code.format(blocked={"pagewire"}, arguments=arguments)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "the generated gRPC stubs are missing: run `make protos`" in line
