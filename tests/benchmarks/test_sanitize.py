from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import pytest

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


def part(*tests: str, tool: str = "racecheck", folder: Path = Path()) -> sanitize.Part:
    return sanitize.Part(tool, "test_wgmma", tests, folder / "wgmma.log")


def test_tests_of_a_tool_that_was_cut_short_are_named_beside_what_others_found() -> None:
    cut = sanitize.read(DONE[: DONE.index("FAILED  ")])
    assert cut.errors is None
    clean = sanitize.Outcome(Counter(PASSED=4), 3, 1.6)
    row = sanitize.row("racecheck", "test_wgmma", [(part("a", "b", "c", "d"), clean), (part("e", "f", "g"), cut)])
    assert (row["errors"], row["unfinished"], row["seconds"]) == (3, ["e", "f", "g"], 2)
    assert (row["passed"], row["skipped"], row["failed"], row["not_reached"]) == (5, 1, 0, 1)


def test_a_tool_that_fails_itself_has_found_nothing_and_not_nothing() -> None:
    failed = DONE.replace(
        "Error: Race", "Internal Sanitizer Error: The Sanitizer failed to handle a hardware exception"
    )
    assert sanitize.read(failed).errors is None


def test_tests_among_which_a_tool_has_failed_are_run_again_without_options_and_then_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def run(one: sanitize.Part, port: int, ends: float) -> sanitize.Outcome:
        ran.append((one.tests, one.log.name))
        failed = "worse" in one.tests or ("bad" in one.tests and not one.bare)
        return sanitize.Outcome(Counter(), None if failed else 0)

    monkeypatch.setattr(sanitize, "run", run)
    assert len(sanitize.check(part("good", "fine", folder=tmp_path), 0, math.inf)) == 1
    found = sanitize.check(part("good", "bad", folder=tmp_path), 0, math.inf)
    assert ran[1:] == [(("good", "bad"), "wgmma.log"), (("good", "bad"), "wgmma-bare.log")]
    found += sanitize.check(part("good", "worse", folder=tmp_path), 0, math.inf)
    assert ran[5:] == [(("good",), "wgmma-bare-0.log"), (("worse",), "wgmma-bare-1.log")]
    row = sanitize.row("racecheck", "test_wgmma", found)
    assert (row["without_options"], row["unfinished"]) == (4, ["worse"])


def test_every_test_is_in_one_part_of_its_file_behind_planted_defects(tmp_path: Path) -> None:
    tests = {"test_decode": [f"a{i}" for i in range(19)], "test_prefill": ["b"], sanitize.REAL_SIZES: ["c", "d"]}
    found = sanitize.parts(["memcheck"], tests, tmp_path)
    planted = len(planted_defects.DEFECTS["memcheck"])
    assert [part.name for part in found[:planted]] == list(planted_defects.DEFECTS["memcheck"])
    files = [sanitize.REAL_SIZES] * 2 + ["test_decode"] * 3 + ["test_prefill"]
    assert [part.name for part in found[planted:]] == files
    assert sorted(name for part in found for name in part.tests) == sorted(itertools.chain(*tests.values()))
    assert max(len(part.tests) for part in found) <= sanitize.TESTS_PER_PROCESS
    assert len({part.log for part in found}) == len(found)
    assert "c" not in [name for part in sanitize.parts(["racecheck"], tests, tmp_path) for name in part.tests]


def test_every_kernel_is_checked() -> None:
    names = sanitize.kernel_names()
    heads = sum(file.read_text().count('extern "C" __global__') for file in sanitize.CSRC.glob("*.cu"))
    assert len(names) == heads + 2
