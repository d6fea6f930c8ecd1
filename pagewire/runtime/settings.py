"""The configuration of a role: one frozen class, three sources, and the command line made from it.

Precedence: flag, then environment variable `PAGEWIRE_<FIELD>`, then the role's table in a TOML file (`--config FILE` or
`PAGEWIRE_CONFIG`), then the default. Example of a file:

    [scheduler]
    max_num_seqs = 128

    [worker]
    block_size = 16
"""

from __future__ import annotations

import inspect
import os
import tomllib
import types
from collections.abc import Callable, Coroutine, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from pagewire.runtime import logs
from pagewire.runtime.errors import StartError, fail_start, run_role

ENV_PREFIX = "PAGEWIRE_"
CONFIG_VARIABLE = "PAGEWIRE_CONFIG"

_config_file: ContextVar[Path | None] = ContextVar("config_file", default=None)


class RoleSettings(BaseSettings):
    """Base of a role's settings. Subclasses set `role` and document every field below it: unit, and why this default.

    Make one with `load`; making one directly gives environment and TOML file below the given values.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        use_attribute_docstrings=True,
        extra="forbid",
        validate_default=True,
        # Fields such as model_dir are ours; pydantic's own names begin with model_ too.
        protected_namespaces=(),
    )

    role: ClassVar[str] = "role"
    """The role's name: its command, its TOML table and its log lines."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is logged. Per-step facts are debug, so the default stays readable under load."""
    otlp_endpoint: str = ""
    """Where OpenTelemetry traces go, by OTLP over gRPC: http://HOST:4317, or https:// with TLS. Empty: no traces."""
    trace_sample_ratio: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of the requests without a trace context of their own that are traced. Those with one say it themselves."""
    ready_fd: int | None = None
    """Inherited file descriptor on which the process reports that it is ready; set by the supervisor."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags (given to the constructor), environment, TOML table: highest first."""
        return init_settings, env_settings, _TomlTable(settings_cls, cls.role)


class _TomlTable(PydanticBaseSettingsSource):
    """The role's table of the TOML file, if there is a file."""

    def __init__(self, settings_cls: type[BaseSettings], table: str) -> None:
        super().__init__(settings_cls)
        self.table = table

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, False  # not used: __call__ gives all fields at once

    def __call__(self) -> dict[str, Any]:
        path = _config_file.get()
        if path is None:
            path = Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None
        if path is None:
            return {}
        try:
            tables = tomllib.loads(path.read_text())
        except OSError as error:
            raise StartError(f"cannot read the configuration file {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise StartError(f"{path} is not valid TOML: {error}") from None
        table = tables.get(self.table, {})
        if not isinstance(table, dict):
            raise StartError(f"{path}: {self.table!r} must be a table: [{self.table}]")
        loose = [name for name, value in tables.items() if not isinstance(value, dict)]
        if loose:
            raise StartError(f"{path}: {loose[0]!r} stands outside the tables: put it below [{self.table}]")
        return table


Settings = TypeVar("Settings", bound=RoleSettings)


def load(
    settings_class: type[Settings], flags: Mapping[str, Any] | None = None, config: Path | None = None
) -> Settings:
    """Makes the settings from all sources.

    Args:
        settings_class: the role's class.
        flags: values given on the command line, by field name; text is converted. None counts as not given.
        config: TOML file; None: the one that PAGEWIRE_CONFIG names, if any.

    Raises:
        StartError: a value is wrong (the line names the flag and says what is expected), or the file cannot be read.
    """
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    token = _config_file.set(config)
    try:
        return settings_class(**given)
    except ValidationError as error:
        raise StartError(_one_line(settings_class, error)) from None
    except ValueError as error:  # pydantic-settings: an environment variable of a structured field is not JSON
        raise StartError(" ".join(str(error).split())) from None
    finally:
        _config_file.reset(token)


def _one_line(settings_class: type[RoleSettings], error: ValidationError) -> str:
    """The first problem as one line: where it can be set and what is expected."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return f"unknown setting {name!r} in table [{settings_class.role}] of the configuration file"
    if not name:
        return str(first["msg"]).removeprefix("Value error, ")
    what = str(first["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if first["type"] == "missing":
        return f"{flag_name(name)} is missing: give the flag or set {ENV_PREFIX}{name.upper()}"
    return f"{flag_name(name)} (or {ENV_PREFIX}{name.upper()}): {what}, but it is {first['input']!r}"


def flag_name(field_name: str) -> str:
    """`max_num_seqs` as `--max-num-seqs`."""
    return "--" + field_name.replace("_", "-")


def role_command(
    settings_class: type[Settings], serve: Callable[[Settings], Coroutine[Any, Any, None] | None]
) -> Callable[..., None]:
    """The command of a role, for typer: one option per field of its settings, plus `--config`.

    Options hold text until the settings class validates them, so flag, environment and file obey the same rules. The
    command logs the effective configuration once, then runs `serve` until a signal.

    Args:
        settings_class: the role's settings.
        serve: coroutine function or synchronous function that runs the role.
    """

    def command(**options: Any) -> None:
        config = options.pop("config", None)
        if config:
            # A supervisor's children read their own tables of the same file.
            os.environ[CONFIG_VARIABLE] = str(Path(config).absolute())
        try:
            settings = load(settings_class, options, Path(config) if config else None)
        except StartError as error:
            given = options.get("ready_fd")
            fail_start(settings_class.role, error, int(given) if given and given.isdecimal() else None)
        logs.configure(settings_class.role, settings.log_level)
        logs.get_logger("pagewire.settings").info("configuration", **settings.model_dump(mode="json"))
        run_role(settings_class.role, lambda: serve(settings), settings.ready_fd)

    parameters = [_option_parameter(name, field) for name, field in settings_class.model_fields.items()]
    parameters.append(
        inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=typer.Option(
                None, "--config", metavar="FILE", help=f"TOML file with a table [{settings_class.role}]."
            ),
            annotation=str | None,
        )
    )
    command.__name__ = settings_class.role
    command.__doc__ = inspect.cleandoc(settings_class.__doc__ or "")
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _option_parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """One keyword parameter with its typer option. Its default is None, which means: not given here."""
    kind = plain_type(field.annotation)
    flag = flag_name(name)
    is_bool = kind is bool
    declaration = f"{flag}/--no-{flag.removeprefix('--')}" if is_bool else flag
    help_text = " ".join((field.description or "").split())
    option = typer.Option(
        None,
        declaration,
        help=f"{help_text} [{ENV_PREFIX}{name.upper()}; default: {_shown(field)}]",
        metavar=None if is_bool else _metavar(kind),
        show_default=False,
        hidden=name == "ready_fd",
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=option,
        annotation=(bool | None) if is_bool else (str | None),
    )


def plain_type(annotation: Any) -> Any:
    """The type without `| None`."""
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [part for part in get_args(annotation) if part is not type(None)]
        return rest[0] if len(rest) == 1 else annotation
    return annotation


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "[" + "|".join(str(choice) for choice in get_args(kind)) + "]"
    return {int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(kind, "TEXT")


def _shown(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=False) if field.default_factory is None else "computed"
    if field.is_required():
        return "none, must be given"
    return "unset" if default is None or default == "" else str(default)
