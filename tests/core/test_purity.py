"""The core imports the standard library and itself, and nothing that could make two runs differ."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import scheduler

FOLDER = Path(scheduler.__file__).parent
CORE = {
    "beams",
    "block_manager",
    "block_picture",
    "block_pool",
    "block_table",
    "census",
    "chunk_sizes",
    "deadlines",
    "decode_calendar",
    "dispatcher",
    "draft",
    "events",
    "fairness",
    "gathering",
    "host_tier",
    "hypotheses",
    "inspection",
    "light_tenants",
    "line",
    "loads",
    "parked_kv",
    "parking",
    "pins",
    "placement",
    "plan_ahead",
    "policy",
    "preemption",
    "prefix_cache",
    "prefix_keys",
    "result_check",
    "rows",
    "scheduler",
    "sequence",
    "step_plan",
    "step_time",
}
FORBIDDEN = {"asyncio", "datetime", "os", "random", "secrets", "select", "socket", "threading", "time", "uuid"}


def imports_of(module: str) -> set[str]:
    tree = ast.parse((FOLDER / f"{module}.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("module", sorted(CORE))
def test_a_core_module_imports_only_the_standard_library_and_the_core(module: str) -> None:
    for name in imports_of(module):
        top = name.split(".")[0]
        if top == "scheduler":
            assert name.removeprefix("scheduler.") in CORE, f"{module} imports {name}"
        else:
            assert top in sys.stdlib_module_names, f"{module} imports {name}"
            assert top not in FORBIDDEN, f"{module} imports {name}"
