"""The command that makes notebooks: the same bytes twice, all or nothing, and an error that says where."""

from __future__ import annotations

import json

import nbformat
import notebooks
import pytest
from chapters import is_chapter

HEAD = """\
---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, language: python, name: python3}
---

# A chapter

"""
CELL = "```{code-cell} ipython3\n%s\n```\n\n"


def chapter(folder, *sources):
    text = folder / "chapter.md"
    text.write_text(HEAD + "".join(CELL % source for source in sources), "utf8")
    return text


def test_a_second_run_changes_nothing(tmp_path):
    text = chapter(tmp_path, "import os, sys\nprint(os.environ['OMP_NUM_THREADS'], hash('text'))",
                   "print('dropped', file=sys.stderr)\nobject.__name__")
    record = tmp_path / "execution.json"
    assert notebooks.make(text, record).endswith("written")
    first = [file.read_bytes() for file in (text.with_suffix(".ipynb"), record)]
    assert notebooks.make(text, record).endswith("as it was")
    assert [file.read_bytes() for file in (text.with_suffix(".ipynb"), record)] == first
    assert b"dropped\\n" not in first[0]
    assert json.loads(first[1])["chapter"]["versions"].keys() >= {"python", "torch", "jupyter-book"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["chapter.ipynb", "chapter.md", "execution.json"]


def test_a_chapter_that_fails_leaves_its_notebook_as_it_was(tmp_path):
    text = chapter(tmp_path, "x = 1", "y = 2\nx / 0")
    text.with_suffix(".ipynb").write_text("the last one that ran")
    where = r"chapter\.md, line 14, code cell 2 of 2:\n[\s\S]*ZeroDivisionError: division by zero"
    with pytest.raises(notebooks.ChapterFailed, match=where):
        notebooks.make(text, tmp_path / "execution.json")
    assert text.with_suffix(".ipynb").read_text() == "the last one that ran"
    assert not (tmp_path / "execution.json").exists()


def test_a_text_is_a_chapter_by_its_front_matter(tmp_path):
    assert is_chapter(chapter(tmp_path, "1"))
    (tmp_path / "page.md").write_text("---\nhtml_meta:\n  description: A page.\n---\n\n# A page\n")
    assert not is_chapter(tmp_path / "page.md")


def test_macros_are_defined_for_readers_of_the_notebook(tmp_path):
    nb = notebooks.notebook_of(chapter(tmp_path, "1"))
    assert r"\def\norm#1{" in nb.cells[0].source and "remove-cell" in nb.cells[0].metadata.tags
    nbformat.validate(nb)
