from __future__ import annotations

from collections import Counter
from pathlib import Path

from benchmarks import planted_defects, sanitize

DONE = """========= COMPUTE-SANITIZER
collecting ... collected 3 items

tests/kernels/test_wgmma.py::test_products[cuda] PASSED                  [ 33%]
tests/kernels/test_wgmma.py::test_others[cuda-{'lag': 2}] SKIPPED (no) [ 66%]
tests/kernels/test_wgmma.py::test_wrong[cuda] ========= Error: Race reported between Write access at probe+0x150
=========     and Read access at probe+0x160 [512 hazards]
FAILED                                                                    [100%]

FAILED tests/kernels/test_wgmma.py::test_wrong[cuda]
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""


def test_a_log_tells_how_each_test_ended_and_what_the_tool_found() -> None:
    assert sanitize.read(DONE) == sanitize.Outcome(Counter(PASSED=1, SKIPPED=1, FAILED=1), 2)


def test_a_tool_that_was_cut_short_has_not_found_nothing() -> None:
    cut = sanitize.read(DONE[: DONE.index("FAILED  ")])
    assert cut.errors is None
    clean = sanitize.Outcome(Counter(PASSED=4), 0)
    row = sanitize.row("racecheck", "test_wgmma", 7, [clean, cut])
    assert row["errors"] is None
    assert (row["passed"], row["skipped"], row["failed"], row["not_reached"]) == (5, 1, 0, 1)


def test_a_tool_that_fails_itself_has_found_nothing_and_not_nothing() -> None:
    failed = DONE.replace(
        "Error: Race", "Internal Sanitizer Error: The Sanitizer failed to handle a hardware exception"
    )
    assert sanitize.read(failed).errors is None


def test_every_test_is_in_one_part_of_its_file_and_planted_defects_come_first(tmp_path: Path) -> None:
    tests = {"test_decode": [f"a{i}" for i in range(19)], "test_linear": ["b"]}
    found = sanitize.parts(["memcheck"], tests, tmp_path)
    planted = len(planted_defects.DEFECTS["memcheck"])
    assert [part.name for part in found[:planted]] == list(planted_defects.DEFECTS["memcheck"])
    assert [part.name for part in found[planted:]] == ["test_decode"] * 3 + ["test_linear"]
    assert sorted(name for part in found for name in part.tests) == sorted(tests["test_decode"] + ["b"])
    assert max(len(part.tests) for part in found) <= sanitize.TESTS_PER_PROCESS
    assert len({part.log for part in found}) == len(found)


def test_every_kernel_is_checked() -> None:
    names = sanitize.kernel_names()
    heads = sum(file.read_text().count('extern "C" __global__') for file in sanitize.CSRC.glob("*.cu"))
    assert len(names) == heads + 2
