"""What a chapter is, and how its text becomes a notebook.

A chapter is two files side by side: the text ``NAME.md``, which is written and reviewed, and the notebook
``NAME.ipynb``, which ``tools/notebooks.py`` makes from it and runs.  A Markdown file is a chapter's text exactly
when its front matter has a ``jupytext:`` entry; nobody keeps a list.  The notebook maker, the checks and the book's
configuration all ask here.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import jupytext
import nbformat
import yaml
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
MACROS = BOOK / "macros.yml"
EXECUTION = BOOK / "execution.json"

#: What a chapter's kernel sees, whether its outputs are being stored or checked.  One thread, so that sums are
#: added up in one order on every machine.
KERNEL_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",
    "NO_COLOR": "1",
    "COLUMNS": "110",
}

#: The first code cell of every chapter: it installs the library where a notebook is opened without it.
INSTALL_CELL = '''\
try:
    import kernelbook
except ImportError:                # a hosted notebook: install the library first
    %pip install --quiet kernelbook'''

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


def is_chapter(text: Path) -> bool:
    """Whether a Markdown file is the text of a chapter."""
    found = _FRONT_MATTER.match(text.read_text("utf8"))
    return found is not None and "jupytext" in (yaml.safe_load(found[1]) or {})


def chapters(book: Path = BOOK) -> list[Path]:
    """The texts of all chapters of a book, in alphabetical order."""
    pages = (p for p in sorted(book.rglob("*.md")) if ".ipynb_checkpoints" not in p.parts)
    return [page for page in pages if is_chapter(page)]


# ------------------------------------------------------------------------------------------------- macros

def macros() -> dict[str, tuple[str, int]]:
    r"""The TeX macros of the book: name to definition and number of arguments."""
    entries = yaml.safe_load(MACROS.read_text("utf8"))
    return {name: (entry, 0) if isinstance(entry, str) else (entry[0], entry[1]) for name, entry in entries.items()}


def expanded(markdown: str, table: dict[str, tuple[str, int]]) -> str:
    r"""A text with the macros in it replaced by what they stand for, so that any reader of a notebook can show it.

    Code, in fences or between backticks, is left as it is.
    """
    return "".join(part if is_code else _expanded(part, table) for is_code, part in _parts(markdown))


_FENCE = re.compile(r"\s*(`{3,}|~{3,}|:{3,})\s*(.*)")
_CODE_DIRECTIVES = ("{code", "{literalinclude", "{eval-rst")


def _parts(markdown: str) -> Iterator[tuple[bool, str]]:
    """A text cut where code in fences begins and ends; a directive's fences are no code, but what is in them may be."""
    open_fences: list[tuple[str, bool]] = []            # the fences around the line, and whether they hold code
    part, in_code = "", False
    for line in markdown.splitlines(keepends=True):
        fence = _FENCE.match(line)
        if fence and open_fences and not fence[2] and fence[1].startswith(open_fences[-1][0]):
            open_fences.pop()
        elif fence and not in_code:
            is_code = fence[1][0] != ":" and (not fence[2].startswith("{") or fence[2].startswith(_CODE_DIRECTIVES))
            open_fences.append((fence[1], is_code))
        if in_code != any(is_code for _, is_code in open_fences):
            yield in_code, part
            part, in_code = "", not in_code
        part += line
    yield in_code, part


def _expanded(text: str, table: dict[str, tuple[str, int]]) -> str:
    names = "|".join(sorted(table, key=len, reverse=True))
    pattern = re.compile(rf"(?<!`)(`+)(?!`)[^\n]*?(?<!`)\1(?!`)|(?<!\\)\\({names})(?![A-Za-z])")
    done, position = [], 0
    while found := pattern.search(text, position):
        done.append(text[position:found.start()])
        position = found.end()
        if found[2] is None:                                     # code between backticks
            done.append(found[0])
            continue
        definition, count = table[found[2]]
        for number in range(1, count + 1):
            argument, position = _argument(text, position)
            definition = definition.replace(f"#{number}", _expanded(argument, table))
        done.append(definition)
        if re.search(r"\\[A-Za-z]+$", definition) and text[position:position + 1].isalpha():
            done.append(" ")                                     # or the next letter would join the command's name
    return "".join(done) + text[position:]


def _argument(text: str, position: int) -> tuple[str, int]:
    """The argument that begins at a position, without its braces, and where it ends."""
    found = re.compile(r"\s*(\\[A-Za-z]+|\\.|[^{}\s])").match(text, position)
    if found:
        return found[1], found.end()
    start = text.index("{", position)
    depth = 0
    for brace in re.compile(r"(?<!\\)[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start + 1:brace.start()], brace.end()
    raise ValueError(f"a brace is not closed: {text[start:start + 60]!r}")


# ------------------------------------------------------------------------------------------------- notebooks

def notebook_of(text: Path) -> NotebookNode:
    """The notebook that a chapter's text describes, before any cell has run."""
    nb = jupytext.reads(text.read_text("utf8"), fmt="md:myst")
    table = macros()
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = expanded(cell.source, table)
    nb.metadata = NotebookNode(kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"})
    nb.nbformat, nb.nbformat_minor = 4, 5
    seen: dict[str, int] = {}
    for cell in nb.cells:
        digest = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, 0) + 1
        cell["id"] = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    return nb


def normalise(nb: NotebookNode) -> NotebookNode:
    """Drop from an executed notebook, in place, what differs from run to run or belongs in no book.

    That is: timings, whatever went to stderr, and the models of live widgets, which no page and no notebook
    without a kernel can show.  A widget stays visible by its other representations (HTML, PNG).
    """
    nb.metadata.pop("widgets", None)
    nb.metadata.pop("language_info", None)
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.outputs = _joined(o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr"))
        for output in cell.outputs:
            if len(output.get("data", {})) > 1:
                output.data.pop(WIDGET_VIEW, None)
    return nb


def _joined(outputs: Iterable[NotebookNode]) -> list[NotebookNode]:
    """Outputs with what was printed in one go in one piece: a busy machine sends it in several."""
    joined: list[NotebookNode] = []
    for output in outputs:
        if joined and output.output_type == "stream" == joined[-1].output_type and output.name == joined[-1].name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def without_outputs(nb: NotebookNode) -> NotebookNode:
    """A copy of a notebook as it was before it ran."""
    nb = nbformat.reads(nbformat.writes(nb), as_version=4)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return nb


def difference(text: Path) -> str | None:
    """How a chapter's stored notebook differs from its text, outputs apart; None where the two agree."""
    stored = text.with_suffix(".ipynb")
    if not stored.exists():
        return f"{stored.name} does not exist"
    want = notebook_of(text)
    have = without_outputs(nbformat.read(stored, as_version=4))
    if want == have:
        return None
    if want.metadata != have.metadata:
        return f"the metadata of {stored.name} are {dict(have.metadata)}, not {dict(want.metadata)}"
    for number, (a, b) in enumerate(zip(want.cells, have.cells, strict=False)):
        if a != b:
            lines = difflib.unified_diff(_written(b), _written(a), stored.name, text.name, lineterm="", n=1)
            return f"cell {number} of {stored.name} is not what {text.name} says:\n" + "\n".join(lines)
    return f"{stored.name} has {len(have.cells)} cells, {text.name} describes {len(want.cells)}"


def _written(cell: NotebookNode) -> list[str]:
    return [f"{cell.cell_type} {json.dumps(cell.metadata)}", *cell.source.splitlines()]
