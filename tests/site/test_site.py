"""The documentation site: complete, without dead ends, and without a network."""

from __future__ import annotations

import html.parser
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagewire.runtime.settings import flag_name
from tools.site import metrics, navigation, protocol, repository, settings


class Tags(html.parser.HTMLParser):
    """Names and attributes of every tag of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    @property
    def ids(self) -> set[str]:
        return {value for _, attributes in self.found if (value := attributes.get("id"))}


@pytest.mark.parametrize(
    ("page", "role"),
    [("serve", "up"), ("settings", "scheduler"), ("settings", "worker"), ("settings", "gateway")],
)
def test_every_setting_of_a_role_is_on_its_page(site: Path, page: str, role: str) -> None:
    fields = set(settings.settings_class(role).model_fields) - settings.HIDDEN
    assert len(fields) > 10
    assert {f"{role}-{name.replace('_', '-')}" for name in fields} <= Tags(site / f"{page}.html").ids


def test_a_row_of_a_setting_has_its_flag_its_default_its_range_and_its_docstring() -> None:
    row = next(row for row in settings.table("worker").splitlines() if flag_name("block_size") in row)
    cells = [cell.strip() for cell in row.strip("|").split(" | ")]
    assert cells[0].endswith("`--block-size`")
    assert cells[1:3] == ["`16`", "integer ≥ 1, ≤ 256"]
    assert cells[3].startswith("Tokens in a KV block, a power of two.")


def test_a_switch_shows_both_of_its_flags() -> None:
    table = settings.table("scheduler")
    assert "`--prefix-cache`<br>`--no-prefix-cache` | on |" in table


def elements() -> Iterator[tuple[str, str]]:
    """File and anchor of every call, message, field, enum and value of the protocol."""
    for file in protocol.descriptors().file:
        name = Path(file.name).stem
        for service in file.service:
            yield name, service.name
            yield from ((name, f"{service.name}.{method.name}") for method in service.method)
        for enum in file.enum_type:
            yield name, enum.name
            yield from ((name, f"{enum.name}.{value.name}") for value in enum.value)
        scopes = [(message, message.name) for message in file.message_type]
        while scopes:
            message, scope = scopes.pop()
            yield name, scope
            yield from ((name, f"{scope}.{field.name}") for field in message.field)
            scopes += [
                (nested, f"{scope}.{nested.name}") for nested in message.nested_type if not nested.options.map_entry
            ]


def test_every_call_message_field_and_value_of_the_protocol_is_in_the_reference(site: Path) -> None:
    wanted = set(elements())
    assert len(wanted) > 300
    pages = {name: Tags(site / f"protocol/{name}.html").ids for name in protocol.names()}
    assert sorted(element for element in wanted if element[1] not in pages[element[0]]) == []


def test_the_reference_says_what_the_comments_say(site: Path) -> None:
    text = (site / "protocol/inference.html").read_text()
    assert "Below 1e-5: greedy." in text, "a field's comment"
    assert "ends a request in whatever state it is" in text, "a call's comment"
    assert "buf:lint" not in text, "lines for the linter are not for readers"


def test_every_metric_of_a_role_is_in_the_table(site: Path) -> None:
    text = (site / "metrics.html").read_text()
    for role in ("scheduler", "worker", "gateway"):
        names = {family.name for family in metrics.families(role)}
        assert len(names) > 1
        assert [name for name in sorted(names) if name not in text] == []


def test_a_metric_is_shown_with_its_labels_and_the_name_that_prometheus_knows() -> None:
    table = metrics.table("scheduler")
    assert "| `pagewire_preemptions_total` | counter | `mode` |" in table
    assert "| `pagewire_kv_blocks` | gauge | `worker`, `state` |" in table


LOADED = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("object", "data")}


def test_no_page_or_style_loads_anything_from_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 50
    foreign = [
        (page.name, value)
        for page in pages
        for tag, attributes in Tags(page).found
        for name, value in attributes.items()
        if (tag, name) in LOADED and attributes.get("rel") != "canonical" and re.match(r"(https?:)?//", value or "")
    ]
    assert foreign == []
    styles = [
        style for style in site.rglob("*.css") if re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style.read_text())
    ]
    assert styles == []


def test_a_page_that_the_navigation_does_not_place_is_found_all_the_same(tmp_path: Path) -> None:
    for name in ("index.md", "serve.md", "new.md", "clients.md"):
        (tmp_path / name).touch()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "decode.md").touch()
    nav = ["index.md", {"Operate": ["metrics.md", {"Serve": "serve.md"}]}]
    assert navigation.unplaced(nav, tmp_path) == ["clients.md", "new.md"]


def test_links_to_the_repository_are_pages_of_the_site(site: Path) -> None:
    links = [attributes.get("href") for tag, attributes in Tags(site / "scheduling.html").found if tag == "a"]
    assert "source/scheduler/scheduler.py.html" in links
    assert "class Scheduler" in re.sub(r"<[^>]+>", "", (site / "source/scheduler/scheduler.py.html").read_text())


def test_a_link_to_what_is_not_in_the_repository_is_told() -> None:
    text = (
        "[a](../scheduler/scheduler.py), ![b](../docs/architecture/roles.svg), [c](../scheduler/gone.py#L3), [d](x.md)"
    )
    turned, missing = repository.turn_links(text, "page.md")
    assert missing == ["scheduler/gone.py"]
    assert "[a](source/scheduler/scheduler.py.md)" in turned
    assert "![b](../docs/architecture/roles.svg)" in turned, "docs/ is the site's own"
    assert "[d](x.md)" in turned


def test_a_page_deeper_in_docs_reaches_the_same_source() -> None:
    turned, missing = repository.turn_links(
        "[k](../../kernels/linear.py), [l](../../CHANGELOG.md)", "kernels/linear.md"
    )
    assert (turned, missing) == ("[k](../source/kernels/linear.py.md), [l](../changelog.md)", [])
