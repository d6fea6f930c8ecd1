"""How GPU tests are recorded, from a report as pytest writes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import gpu_tests

REPORT = """<testsuites><testsuite name="pytest">
<testcase classname="tests.worker.test_engine" name="a" time="1.5"/>
<testcase classname="tests.worker.test_engine" name="b" time="0.25"><failure message="no">no</failure></testcase>
<testcase classname="tests.kernels.test_wgmma" name="c" time="0.0"><skipped message="no"/></testcase>
<testcase classname="tests.kernels.test_wgmma" name="d" time="0.0"><error message="no">no</error></testcase>
</testsuite></testsuites>"""


def test_there_is_a_row_for_each_file_of_tests(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    assert gpu_tests.rows(report) == [
        {"file": "tests/kernels/test_wgmma.py", "passed": 0, "failed": 1, "skipped": 1, "seconds": 0.0},
        {"file": "tests/worker/test_engine.py", "passed": 1, "failed": 1, "skipped": 0, "seconds": 1.75},
    ]


def test_where_to_record_comes_first() -> None:
    with pytest.raises(SystemExit, match=r"OUT\.json"):
        gpu_tests.main(["-n", "2"])
