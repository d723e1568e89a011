"""What holds of every chapter, whatever it is about: text and notebook in step, run in order, fit to be read."""

from __future__ import annotations

import hashlib
import json
import pkgutil
import re

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from chapters import BOOK, EXECUTION, INSTALL_CELL, ROOT, WIDGET_VIEW, chapters, difference

import kernelbook

CHAPTERS = chapters()
LONGEST_CELL = 40
each_chapter = pytest.mark.parametrize("text", CHAPTERS, ids=lambda text: text.stem)


def code_cells(text):
    cells = nbformat.read(text.with_suffix(".ipynb"), as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


@each_chapter
def test_text_and_notebook_are_in_step(text):
    problem = difference(text)
    assert problem is None, f"{problem}\nrun: make notebooks CHAPTER={text.stem}"


@each_chapter
def test_every_cell_was_run_once_and_in_order(text):
    cells = [cell for cell in code_cells(text) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


@each_chapter
def test_outputs_are_fit_to_be_read(text):
    """No traceback, no warning, no progress bar, no machine's folders, and nothing that only a live kernel can show."""
    for cell in code_cells(text):
        for output in cell.outputs:
            assert output.output_type != "error" or "raises-exception" in cell.metadata.get("tags", []), cell.source
            assert output.get("name") != "stderr", cell.source
            assert set(output.get("data", {})) != {WIDGET_VIEW}, f"shows nothing without a kernel:\n{cell.source}"
            shown = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert not re.search(r"\d+%\|.*\||/(?:home|Users|root|work|tmp)/", shown), shown


@each_chapter
def test_no_cell_escapes_the_comparison(text):
    escapes = re.compile(r"nbval[-_](skip|ignore[-_]output)|skip-execution", re.IGNORECASE)
    for cell in code_cells(text):
        assert not escapes.search(" ".join(cell.metadata.get("tags", [])) + cell.source), cell.source


@each_chapter
def test_cells_are_short(text):
    for cell in code_cells(text):
        assert len(cell.source.splitlines()) <= LONGEST_CELL, cell.source


@each_chapter
def test_first_cell_installs_the_library_where_it_is_missing(text):
    assert code_cells(text)[0].source == INSTALL_CELL


@each_chapter
def test_every_picture_has_alternative_text(text):
    for cell in code_cells(text):
        for output in cell.outputs:
            data = output.get("data", {})
            if "text/html" in data:
                images = BeautifulSoup(data["text/html"], "html.parser").find_all("img")
                assert all((image.get("alt") or "").strip() for image in images), cell.source
            elif "image/png" in data or "image/svg+xml" in data:
                alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
                assert alt.strip(), f"say what the figure shows, in mystnb: image: alt:\n{cell.source}"


def contents(node) -> list[str]:
    """All files that a table of contents names."""
    if isinstance(node, list):
        return [file for item in node for file in contents(item)]
    if isinstance(node, dict):
        return [*([node["file"]] if "file" in node else []), *(f for value in node.values() for f in contents(value))]
    return []


def test_the_table_of_contents_lists_every_page():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text("utf8"))
    listed = [toc["root"], *contents(toc)]
    pages = {page.relative_to(ROOT).with_suffix("").as_posix() for page in BOOK.rglob("*.md")
             if not {"_static", ".ipynb_checkpoints"} & set(page.parts)}
    assert sorted(listed) == sorted(pages)


def test_every_notebook_has_a_text():
    notebooks = {n for n in BOOK.rglob("*.ipynb") if ".ipynb_checkpoints" not in n.parts}
    assert notebooks == {text.with_suffix(".ipynb") for text in CHAPTERS}


def test_the_status_page_knows_every_chapter_as_it_is():
    record = json.loads(EXECUTION.read_text("utf8"))
    stored = {text.stem: hashlib.sha256(text.with_suffix(".ipynb").read_bytes()).hexdigest() for text in CHAPTERS}
    assert {name: entry["sha256"] for name, entry in record.items()} == stored


def test_no_chapter_takes_longer_than_it_may():
    """Three minutes each, twenty together."""
    seconds = [entry["seconds"] for entry in json.loads(EXECUTION.read_text("utf8")).values()]
    assert max(seconds) <= 180 and sum(seconds) <= 1200


def test_the_reference_covers_the_library():
    described = set(re.findall(r"(?:automodule::|\{command-line\}) ([\w.]+)",
                               "".join(page.read_text("utf8") for page in (BOOK / "api").glob("*.md"))))
    modules = {f"kernelbook.{module.name}" for module in pkgutil.iter_modules(kernelbook.__path__)
               if not module.name.startswith("_")}
    assert modules - described == set(), "add them to a page in book/api"
