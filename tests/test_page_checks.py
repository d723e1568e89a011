"""The checks of the built pages are themselves checked: each fault, put into a page, must be found."""

from __future__ import annotations

import shutil

import check_links
import check_pages
import pytest

PIXEL = ("data:image/png;base64,"
         "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
PAGE = """\
<!DOCTYPE html><html lang="en">
<head><title>A page</title><meta name="viewport" content="width=device-width, initial-scale=1"></head>
<body><a href="#main">Skip</a><main id="main"><h1>A page</h1><article>{}</article></main></body>
</html>"""

LINKS = {
    "links to b.html, which does not exist": '<a href="b.html">b</a>',
    "links to a.html#nowhere, which has no such anchor": '<a href="a.html#nowhere">a</a>',
    "links to a.png, which does not exist": '<img alt="a" src="a.png">',
    "loads https://example.org/a.js": '<script src="https://example.org/a.js"></script>',
    "the id 'twice' stands 2 times": '<p id="twice">a</p><p id="twice">b</p>',
}


@pytest.mark.parametrize("problem", LINKS)
def test_links(problem, tmp_path):
    (tmp_path / "a.html").write_text(PAGE.format(LINKS[problem]))
    assert check_links.problems(tmp_path / "a.html", set()) == [problem]


def test_links_that_are_well(tmp_path):
    elsewhere = set()
    (tmp_path / "a.html").write_text(PAGE.format('<a href="https://example.org">out</a> <a href="a.html#main">up</a>'))
    assert check_links.problems(tmp_path / "a.html", elsewhere) == [] and elsewhere == {"https://example.org"}


SLIDER = ('<div class="kb-slider"><label>width <input type="range" max="1" value="0"></label><output>0</output>'
          f'<img alt="one" src="{PIXEL}"></div>'
          '<script>document.querySelector("input").oninput = e => { %s }</script>')
FOLLOWS = ("const v = e.target.value; document.querySelector('output').textContent = v;"
           "document.querySelector('img').alt = 'frame ' + v; document.querySelector('img').src += '#' + v")
PAGES = {
    "picture without alternative text": f'<img src="{PIXEL}">',
    "picture that does not load": '<img alt="a" src="data:image/png;base64,AAAA">',
    "pixels wider than a phone": '<div style="width: 500px">wide</div>',
    "pixels wider than a desktop": '<div style="width: 1500px">wide</div>',
    "console: ": "<script>throw new Error('a fault')</script>",
    "asks for https://example.org": '<img alt="a" src="https://example.org/a.png">',
    "could not load file:": '<script src="nowhere.js"></script>',
    "mathematics in error": '<mjx-merror data-mjx-error="Undefined control sequence">x</mjx-merror>',
    "mathematics not set: x^2": '<span class="math">x^2</span>',
    "mathematics not set: <p>": r"<p>where $\norm{x}$ is small</p>",
    "headings of the first level": "<h1>Another</h1>",
    "control without a name": '<input type="text">',
    "1 pictures at 2 positions": SLIDER % "document.querySelector('output').textContent = e.target.value",
    "is in plain sight": '<div class="solution dropdown" id="s">'
                         '<button class="toggle-button">+</button><p>It is 4.</p></div>',
    "the keyboard stops at what cannot be seen": '<a href="#main" style="visibility: visible; font-size: 0">hidden</a>',
}
WELL = ('<p>It costs $5 or $6.</p><div style="overflow-x: auto"><div style="width: 900px">scrolls</div></div>'
        + SLIDER % FOLLOWS)


@pytest.fixture(scope="module")
def driver():
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("Chromium and its driver are not installed")
    with check_pages.browser() as driver:
        driver.get("about:blank")
        check_pages.traffic(driver)
        yield driver


@pytest.mark.parametrize("problem", [*PAGES, "none"])
def test_pages(problem, driver, tmp_path, monkeypatch):
    monkeypatch.setattr(check_pages, "SECONDS", 1)
    (tmp_path / "a.html").write_text(PAGE.format(PAGES.get(problem, WELL)))
    found = check_pages.check_page(driver, tmp_path / "a.html", tmp_path / "picture")
    if problem == "none":
        assert found == []
    else:
        assert any(problem in text for text in found), found
    assert (tmp_path / "picture.phone.png").exists()
