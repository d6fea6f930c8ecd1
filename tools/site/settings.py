"""The settings of a role as a table, from its settings class."""

from __future__ import annotations

import importlib
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from pagewire.bundled import BUNDLED_MODEL
from pagewire.runtime.settings import RoleSettings, flag_name, plain_type

CLASSES = {
    "up": "pagewire.supervisor:UpSettings",
    "scheduler": "scheduler.config:SchedulerSettings",
    "worker": "worker.config:WorkerSettings",
    "gateway": "gateway.config:GatewaySettings",
}
"""The settings class of every command that has one."""
HIDDEN = {"ready_fd"}
"""Settings that only a supervisor gives."""
COMPARISONS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}


def settings_class(role: str) -> type[RoleSettings]:
    """The class of a role's settings."""
    module, name = CLASSES[role].split(":")
    found: type[RoleSettings] = getattr(importlib.import_module(module), name)
    return found


def table(role: str) -> str:
    """A Markdown table with a row per setting: flag, default, range, meaning. The anchors are `ROLE-FIELD`."""
    rows = ["| flag | default | takes | what it does |", "|---|---|---|---|"]
    fields = settings_class(role).model_fields
    # The role's own settings before those that every role has.
    common = [name for name in fields if name in RoleSettings.model_fields]
    names = [name for name in fields if name not in common] + common
    return "\n".join(rows + [_row(role, name, fields[name]) for name in names if name not in HIDDEN])


def _row(role: str, name: str, field: FieldInfo) -> str:
    flag = flag_name(name)
    if plain_type(field.annotation) is bool:
        flag += f"`<br>`--no-{flag.removeprefix('--')}"
    anchor = f'<span id="{role}-{name.replace("_", "-")}"></span>'
    text = " ".join((field.description or "").split())
    return f"| {anchor}`{flag}` | {_default(field)} | {_takes(field)} | {_escaped(text)} |"


def _default(field: FieldInfo) -> str:
    default = field.default
    if default is None or default == "":
        return "unset"
    if default == str(BUNDLED_MODEL):
        return "the bundled model"
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"`{_number(default)}`"


def _takes(field: FieldInfo) -> str:
    kind: Any = plain_type(field.annotation)
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    word = {bool: "", int: "integer", float: "number"}.get(kind, "text")
    if kind not in (bool, int, float, str):
        word = "path"
    bounds = [
        f"{sign} {_number(getattr(limit, attribute))}"
        for limit in field.metadata
        for limit_type, (attribute, sign) in COMPARISONS.items()
        if isinstance(limit, limit_type)
    ]
    return " ".join([word, ", ".join(bounds)]).strip()


def _number(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{value:,}"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
