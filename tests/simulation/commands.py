"""`pagewire replay` in this process."""

from __future__ import annotations

import gc

import pytest

from pagewire.cli import main


def replay(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `pagewire replay`."""
    gc.collect()  # what an earlier test left and complains of when it is destroyed is not the command's word
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["replay", *map(str, arguments)])
    said = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, said.out, said.err
