"""What MkDocs runs while it builds the site (`hooks` in mkdocs.yml).

Three things are added to the pages of `docs/`:

- The protocol reference, a page per `.proto` file, and the pages at the root of the repository.
- Where a page says `<!-- generated: NAME -->`, that part is made from the code, so it cannot go stale.
- Links that leave `docs/` (to a source file, a folder, a recorded result) are shown as pages of the site. A link whose
  target is not in the repository is a warning, which a strict build refuses.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tools.site import commands, decisions, metrics, navigation, protocol, repository, settings

log = logging.getLogger("mkdocs.hooks.pagewire")

MARKER = re.compile(r"^<!-- generated: (?P<name>[a-z]+)(?: (?P<argument>[a-z_.]+))? -->$", re.MULTILINE)

GENERATED = {
    "commands": lambda _: commands.table(),
    "decisions": lambda _: decisions.table(),
    "settings": settings.table,
    "metrics": metrics.table,
    "protocol": protocol.page,
}
"""Markdown by the marker's name, from its argument."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts pages of `docs/` that mkdocs.yml does not place into a section of their own."""
    more = navigation.unplaced(config.nav or [], Path(config.docs_dir))
    if more:
        config.nav = [*(config.nav or []), {"More": more}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the protocol and of the root, and one for every file of the repository that a page links to."""
    for name in protocol.names():
        files.append(File.generated(config, f"protocol/{name}.md", content=protocol.page(name)))
    for page in repository.root_pages(config):
        files.append(page)
    texts = {file.src_uri: file.content_string for file in files.documentation_pages()}
    for file in repository.linked_files(texts, config):
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills in what is generated, then turns links that leave `docs/` to the pages that were added for them."""
    filled = MARKER.sub(lambda match: GENERATED[match["name"]](match["argument"]), markdown)
    turned, missing = repository.turn_links(filled, page.file.src_uri)
    for target in missing:
        log.warning("%s links to %s, which is not in the repository", page.file.src_uri, target)
    return turned
