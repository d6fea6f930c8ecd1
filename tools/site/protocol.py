"""The protocol reference, from the descriptors and comments of `protos/`.

A page per `.proto` file, `protocol/NAME.md`: its services with their calls, its messages with their fields, its enums.
Every call, message, field and value has an anchor: its name without the package, such as `#StopParams.max_tokens`.
"""

from __future__ import annotations

import itertools
import re
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import grpc_tools
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

from tools.generate_stubs import PROTO_ROOT, proto_files

# Field numbers in descriptor.proto, of which the paths of comments are made.
FILE_MESSAGE, FILE_ENUM, FILE_SERVICE = 4, 5, 6
MESSAGE_FIELD, MESSAGE_NESTED, MESSAGE_ENUM, MESSAGE_ONEOF = 2, 3, 4, 8
ENUM_VALUE, SERVICE_METHOD = 2, 2
SYNTAX = 12

Path_ = tuple[int, ...]


@cache
def descriptors() -> FileDescriptorSet:
    """All files of `protos/`, with comments."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "descriptors.bin"
        arguments = [
            f"-I{PROTO_ROOT}",
            f"-I{Path(grpc_tools.__file__).parent / '_proto'}",
            "--include_source_info",
            f"--descriptor_set_out={out}",
            *map(str, proto_files()),
        ]
        if protoc.main(["protoc", *arguments]) != 0:
            raise RuntimeError("protoc failed: see the lines above")
        return FileDescriptorSet.FromString(out.read_bytes())


def names() -> list[str]:
    """The stems of the files, such as `inference`."""
    return [Path(file.name).stem for file in descriptors().file]


def page(name: str) -> str:
    """The Markdown of one file's page, or for `index` the list of all of them."""
    if name == "index":
        return "\n".join(_index())
    file = next(file for file in descriptors().file if Path(file.name).stem == name)
    return "\n".join(_File(file).lines())


def _index() -> Iterator[str]:
    yield "| file | services | what it is |"
    yield "|---|---|---|"
    for file in descriptors().file:
        stem = Path(file.name).stem
        services = ", ".join(f"[{s.name}]({stem}.md#{s.name})" for s in file.service)
        yield f"| [{stem}.proto]({stem}.md) | {services} | {_cell(_File(file).purpose(), first_sentence=True)} |"


@dataclass
class _File:
    descriptor: FileDescriptorProto

    def __post_init__(self) -> None:
        self.comments: dict[Path_, str] = {
            tuple(location.path): _clean(location.leading_comments or location.trailing_comments)
            for location in self.descriptor.source_code_info.location
        }

    def purpose(self) -> str:
        """What the file's head says, without the licence of a file that others wrote."""
        location = next((one for one in self.descriptor.source_code_info.location if list(one.path) == [SYNTAX]), None)
        if location is None:
            return ""
        parts = [*location.leading_detached_comments, location.leading_comments]
        return "\n\n".join(_clean(part) for part in parts if "Licensed under" not in part).strip()

    def lines(self) -> Iterator[str]:
        file = self.descriptor
        stem = Path(file.name).stem
        yield f"# {stem}.proto"
        yield ""
        yield f"Package `{file.package}`, file [`protos/{file.name}`](../../protos/{file.name})."
        yield ""
        yield _prose(self.purpose())
        yield ""
        for index, service in enumerate(file.service):
            yield from self._service(service, (FILE_SERVICE, index), stem)
        if file.message_type:
            yield "## Messages"
            yield ""
        for index, message in enumerate(file.message_type):
            yield from self._message(message, (FILE_MESSAGE, index), "")
        if file.enum_type:
            yield "## Enums"
            yield ""
        for index, enum in enumerate(file.enum_type):
            yield from self._enum(enum, (FILE_ENUM, index), "")

    def _service(self, service: ServiceDescriptorProto, path: Path_, stem: str) -> Iterator[str]:
        yield f"## {service.name} {{ #{service.name} }}"
        yield ""
        yield _prose(self.comments.get(path, ""))
        yield ""
        for index, method in enumerate(service.method):
            asks = _link(method.input_type, many=method.client_streaming)
            answers = _link(method.output_type, many=method.server_streaming)
            yield f"### {method.name} {{ #{service.name}.{method.name} }}"
            yield ""
            yield f"{asks} → {answers}"
            yield ""
            yield _prose(self.comments.get((*path, SERVICE_METHOD, index), ""))
            yield ""

    def _message(self, message: DescriptorProto, path: Path_, scope: str) -> Iterator[str]:
        name = scope + message.name
        yield f"### {name} {{ #{name} }}"
        yield ""
        yield _prose(self.comments.get(path, ""))
        yield ""
        maps = {f"{nested.name}": nested for nested in message.nested_type if nested.options.map_entry}
        if message.field:
            yield "| field | no. | type | meaning |"
            yield "|---|---:|---|---|"
        shown: set[int] = set()
        for index, field in enumerate(message.field):
            if field.HasField("oneof_index") and not field.proto3_optional and field.oneof_index not in shown:
                shown.add(field.oneof_index)
                oneof = message.oneof_decl[field.oneof_index]
                meaning = _cell(self.comments.get((*path, MESSAGE_ONEOF, field.oneof_index), ""))
                yield f'| <span id="{name}.{oneof.name}"></span>*one of* `{oneof.name}` | | | {meaning} |'
            in_oneof = field.HasField("oneof_index") and not field.proto3_optional
            meaning = _cell(self.comments.get((*path, MESSAGE_FIELD, index), ""))
            label = f'<span id="{name}.{field.name}"></span>{"· " if in_oneof else ""}`{field.name}`'
            yield f"| {label} | {field.number} | {_field_type(field, maps)} | {meaning} |"
        yield ""
        for index, nested in enumerate(message.nested_type):
            if not nested.options.map_entry:
                yield from self._message(nested, (*path, MESSAGE_NESTED, index), f"{name}.")
        for index, enum in enumerate(message.enum_type):
            yield from self._enum(enum, (*path, MESSAGE_ENUM, index), f"{name}.")

    def _enum(self, enum: EnumDescriptorProto, path: Path_, scope: str) -> Iterator[str]:
        name = scope + enum.name
        yield f"### {name} {{ #{name} }}"
        yield ""
        yield _prose(self.comments.get(path, ""))
        yield ""
        yield "| value | no. | meaning |"
        yield "|---|---:|---|"
        for index, value in enumerate(enum.value):
            meaning = _cell(self.comments.get((*path, ENUM_VALUE, index), ""))
            yield f'| <span id="{name}.{value.name}"></span>`{value.name}` | {value.number} | {meaning} |'
        yield ""


def _clean(comment: str) -> str:
    """A comment without the blank that follows `//` and without the lines that are for a linter."""
    lines = [line.removeprefix(" ").rstrip() for line in comment.splitlines()]
    return "\n".join(line for line in lines if not line.startswith("buf:lint:")).strip()


def _field_type(field: FieldDescriptorProto, maps: dict[str, DescriptorProto]) -> str:
    entry = maps.get(field.type_name.rpartition(".")[2])
    if entry is not None:
        key, value = entry.field
        return f"map&lt;{_plain_type(key)}, {_plain_type(value)}&gt;"
    prefix = ""
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        prefix = "repeated "
    elif field.proto3_optional:
        prefix = "optional "
    return prefix + _plain_type(field)


def _plain_type(field: FieldDescriptorProto) -> str:
    if field.type_name:
        return _link(field.type_name)
    return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


@cache
def _places() -> dict[str, tuple[str, str]]:
    """Page and anchor of every message and enum, by its full name with the leading dot."""
    places: dict[str, tuple[str, str]] = {}

    def add(package: str, stem: str, scope: str, messages: Sequence[DescriptorProto]) -> None:
        for message in messages:
            name = scope + message.name
            places[f".{package}.{name}"] = stem, name
            places.update(
                {f".{package}.{name}.{enum.name}": (stem, f"{name}.{enum.name}") for enum in message.enum_type}
            )
            add(package, stem, f"{name}.", message.nested_type)

    for file in descriptors().file:
        stem = Path(file.name).stem
        add(file.package, stem, "", file.message_type)
        places.update({f".{file.package}.{enum.name}": (stem, enum.name) for enum in file.enum_type})
    return places


def _link(full_name: str, *, many: bool = False) -> str:
    prefix = "stream of " if many else ""
    if full_name not in _places():
        return f"{prefix}`{full_name.removeprefix('.')}`"
    stem, anchor = _places()[full_name]
    return f"{prefix}[{anchor}]({stem}.md#{anchor})"


CODE = re.compile(r"(`[^`]*`)")


def _prose(text: str) -> str:
    """A comment as paragraphs. Lines that are set in, such as tables and steps, keep their form."""
    parts = []
    for is_set_in, lines in itertools.groupby(text.splitlines(), key=lambda line: line.startswith("  ")):
        together = "\n".join(lines)
        parts.append(f"\n```text\n{textwrap.dedent(together)}\n```\n" if is_set_in else _escaped(together))
    return "\n".join(parts)


def _escaped(text: str) -> str:
    """Outside of code `<` would begin a tag."""
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in CODE.split(text))


def _cell(text: str, *, first_sentence: bool = False) -> str:
    """A comment as a cell of a table."""
    line = " ".join(text.split())
    if first_sentence:
        line = re.split(r"(?<=\.)\s", line)[0]
    return _escaped(line).replace("|", "\\|")
