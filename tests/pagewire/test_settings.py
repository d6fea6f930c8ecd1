"""The settings of a role: three sources, one order, and one line when something is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import pytest
import typer
from pydantic import Field, ValidationError
from typer.testing import CliRunner

from pagewire.runtime.errors import StartError
from pagewire.runtime.settings import RoleSettings, load, role_command


class ExampleSettings(RoleSettings):
    """An example role."""

    role: ClassVar[str] = "example"

    block_size: int = Field(default=16, ge=1)
    """Tokens per KV block."""
    prefix_cache: bool = True
    """Reuse blocks."""
    mode: Literal["swap", "recompute"] = "swap"
    """How to preempt."""
    name: str | None = None
    """A name."""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "pagewire.toml"
    path.write_text("[example]\nblock_size = 4\nname = 'from file'\n[worker]\nblock_size = 8\n")
    return path


def test_a_flag_wins_over_the_environment_which_wins_over_the_file_which_wins_over_the_default(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(ExampleSettings).block_size == 16
    assert load(ExampleSettings, config=config).block_size == 4
    monkeypatch.setenv("PAGEWIRE_BLOCK_SIZE", "2")
    assert load(ExampleSettings, config=config).block_size == 2
    assert load(ExampleSettings, {"block_size": "1"}, config).block_size == 1


def test_a_flag_that_was_not_given_hides_nothing(config: Path) -> None:
    assert load(ExampleSettings, {"block_size": None, "name": None}, config).name == "from file"


def test_the_environment_can_name_the_file(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEWIRE_CONFIG", str(config))
    assert load(ExampleSettings).block_size == 4


def test_an_empty_environment_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEWIRE_BLOCK_SIZE", "")
    assert load(ExampleSettings).block_size == 16


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load(ExampleSettings).block_size = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            {"block_size": "many"},
            "--block-size (or PAGEWIRE_BLOCK_SIZE): Input should be a valid integer, unable to parse string as an "
            "integer, but it is 'many'",
        ),
        (
            {"block_size": "0"},
            "--block-size (or PAGEWIRE_BLOCK_SIZE): Input should be greater than or equal to 1, but it is '0'",
        ),
        ({"mode": "x"}, "--mode (or PAGEWIRE_MODE): Input should be 'swap' or 'recompute', but it is 'x'"),
    ],
)
def test_a_wrong_value_names_its_flag_and_what_is_expected(flags: dict[str, str], line: str) -> None:
    with pytest.raises(StartError) as error:
        load(ExampleSettings, flags)
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[example]\nblok_size = 1\n", "unknown setting 'blok_size' in table [example] of the configuration file"),
        ("[example\n", "is not valid TOML"),
        ("example = 1\n", "'example' must be a table: [example]"),
        ("block_size = 1\n[example]\n", "'block_size' stands outside the tables: put it below [example]"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "pagewire.toml"
    path.write_text(text)
    with pytest.raises(StartError) as error:
        load(ExampleSettings, config=path)
    assert line in str(error.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"cannot read the configuration file .*: No such file or directory"):
        load(ExampleSettings, config=tmp_path / "absent.toml")


def test_the_command_has_an_option_for_every_field_with_its_docstring_and_default() -> None:
    application = typer.Typer()
    application.command()(role_command(ExampleSettings, lambda settings: None))
    shown = CliRunner().invoke(application, ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).output
    for text in ("--block-size", "Tokens per KV block. [PAGEWIRE_BLOCK_SIZE; default: 16]", "--no-prefix-cache"):
        assert text in shown
    assert "--ready-fd" not in shown, "only a supervisor gives it"


def test_the_command_runs_the_role_with_the_settings_and_logs_them_once(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[ExampleSettings] = []
    application = typer.Typer()
    application.command()(role_command(ExampleSettings, seen.append))
    application(args=["--block-size", "8", "--no-prefix-cache"], standalone_mode=False)
    assert [(settings.block_size, settings.prefix_cache) for settings in seen] == [(8, False)]
    logged = capsys.readouterr().err.splitlines()
    assert len(logged) == 1
    assert '"block_size": 8' in logged[0]
    assert '"role": "example"' in logged[0]
