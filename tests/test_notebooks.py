"""The command that makes notebooks: the same bytes twice, all or nothing, and an error that says where."""

from __future__ import annotations

import json

import nbformat
import notebooks
import pytest
from chapters import expanded, is_chapter, normalise

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


def test_what_a_busy_machine_prints_in_pieces_is_one_piece():
    def printed(text, name="stdout"):
        return nbformat.v4.new_output("stream", name=name, text=text)

    cell = nbformat.v4.new_code_cell("loop()")
    cell.outputs = [printed("a\n"), printed("dropped", "stderr"), printed("b\n"),
                    nbformat.v4.new_output("display_data", data={"text/plain": "x"}), printed("c\n")]
    normalise(nbformat.v4.new_notebook(cells=[cell]))
    assert [output.get("text") for output in cell.outputs] == ["a\nb\n", None, "c\n"]


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


MACROS = {"R": (r"\mathbb{R}", 0), "Rn": (r"\mathbb{R}^n", 0), "kap": (r"\kappa", 0),
          "norm": (r"\lVert #1 \rVert", 1), "inner": (r"\langle #1, #2 \rangle", 2)}


@pytest.mark.parametrize(("text", "notebook"), [
    (r"$x \in \R^d$, $\Rn$, $\Rest$", r"$x \in \mathbb{R}^d$, $\mathbb{R}^n$, $\Rest$"),
    (r"$\norm{q-k}^2$ and $\norm{x}y$", r"$\lVert q-k \rVert^2$ and $\lVert x \rVert y$"),
    (r"$\norm{\inner{a_{1}}{\kap b}}$", r"$\lVert \langle a_{1}, \kappa b \rangle \rVert$"),
    (r"$\norm x$, $\norm\kap$", r"$\lVert x \rVert$, $\lVert \kappa \rVert$"),
    (r"$\norm{\{x\}}$", r"$\lVert \{x\} \rVert$"),
    (r"`\R` and ``\R ` \R`` are written for $\R$", r"`\R` and ``\R ` \R`` are written for $\mathbb{R}$"),
    ("```python\n\\R\n```\n$\\R$", "```python\n\\R\n```\n$\\mathbb{R}$"),
    ("```{prf:theorem}\n$\\R$\n```\n$\\R$\n```{prf:proof}\n\\R\n```",
     "```{prf:theorem}\n$\\mathbb{R}$\n```\n$\\mathbb{R}$\n```{prf:proof}\n\\mathbb{R}\n```"),
    ("````{exercise}\n```python\n\\R\n```\n$\\R$\n````", "````{exercise}\n```python\n\\R\n```\n$\\mathbb{R}$\n````"),
    ("$$\n\\norm{\nx}\n$$", "$$\n\\lVert \nx \\rVert\n$$"),
    (r"a row \\R of a table", r"a row \\R of a table"),
])
def test_macros_are_written_out_in_notebooks(text, notebook):
    assert expanded(text, MACROS) == notebook
