"""Follow every local link of the built book: pages, anchors (each of which exists once), images, scripts, style sheets.

    python tools/check_links.py _build/html

Sphinx checks the references it makes; this checks what a browser would be given, raw HTML included.  Whatever a page
loads must lie in the book: a script, style sheet or picture from elsewhere fails.  Links that a reader may choose to
follow to other sites are counted, not visited.
"""

from __future__ import annotations

import sys
from collections import Counter
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

from bs4 import BeautifulSoup

LOADED = (("img", "src"), ("script", "src"), ("iframe", "src"), ("source", "src"), ("link", "href"))
#: <link> elements that tell of another page rather than load something
DESCRIPTIVE = {"canonical", "author", "index", "search", "next", "prev", "copyright", "help", "license"}


def pages(site: Path) -> list[Path]:
    """All pages of a built book, without what came with its tools."""
    return sorted(p for p in site.rglob("*.html")
                  if not {"_static", "_sources"} & set(p.relative_to(site).parts))


@cache
def _parsed(page: Path) -> BeautifulSoup:
    return BeautifulSoup(page.read_text("utf8"), "html.parser")


@cache
def _anchors(page: Path) -> set[str]:
    elements = _parsed(page).find_all(True)
    return {e["id"] for e in elements if e.has_attr("id")} | {e["name"] for e in elements if e.has_attr("name")}


def problems(page: Path, elsewhere: set[str]) -> list[str]:
    """What is wrong with the anchors and links of one page; addresses of other sites are added to ``elsewhere``."""
    identifiers = Counter(e["id"] for e in _parsed(page).find_all(id=True))
    found = [f"the id {name!r} stands {count} times" for name, count in identifiers.items() if count > 1]
    for tag, attribute in (("a", "href"), *LOADED):
        for element in _parsed(page).find_all(tag):
            address = element.get(attribute)
            if not address or address.startswith(("data:", "mailto:", "javascript:")):
                continue
            if urlparse(address).scheme or address.startswith("//"):
                if tag == "a":
                    elsewhere.add(address)
                elif not DESCRIPTIVE & set(element.get("rel", [])):
                    found.append(f"loads {address}")
                continue
            path, anchor = urldefrag(address)
            target = (page.parent / unquote(path.split("?")[0])).resolve() if path else page
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                found.append(f"links to {address}, which does not exist")
            elif anchor and target.suffix == ".html" and anchor != "top" and unquote(anchor) not in _anchors(target):
                found.append(f"links to {address}, which has no such anchor")
    return found


def main() -> int:
    site = Path(sys.argv[1] if len(sys.argv) > 1 else "_build/html").resolve()
    everything, elsewhere, bad = pages(site), set(), 0
    for page in everything:
        for problem in problems(page, elsewhere):
            print(f"{page.relative_to(site)}: {problem}")
            bad += 1
    print(f"links: {len(everything)} pages, {bad} problems ({len(elsewhere)} links to other sites)")
    return int(bad > 0 or not everything)


if __name__ == "__main__":
    sys.exit(main())
