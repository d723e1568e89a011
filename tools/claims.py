"""Which statement of the book is checked where.

A statement is a theorem, proposition, lemma or corollary of a chapter.  A check of it is a code cell of a chapter
with an ``assert``, or a test that can fail, with a comment that names its label::

    # checks: thm-gauge, E4.1

So are the experiments of ``book/register.yml`` named, by their numbers.  The page *Statements and their checks* is made
from what is found here, and a test fails where something has no check or no proof.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml
from chapters import BOOK, ROOT, chapters

REGISTER = BOOK / "register.yml"
KINDS = ("theorem", "proposition", "lemma", "corollary")

_DIRECTIVE = re.compile(r"^(`{3,}|:{3,})\{prf:(\w+)\}[ \t]*(.*)\n((?::\w[\w-]*:.*\n)*)", re.MULTILINE)
_CELL = re.compile(r"^(`{3,})\{code-cell\}[^\n]*\n(.*?)^\1[ \t]*$", re.MULTILINE | re.DOTALL)
_CHECKS = re.compile(r"^[ \t]*#[ \t]*checks:[ \t]*(.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Statement:
    """A numbered statement of a chapter."""

    kind: str
    title: str
    label: str
    chapter: str
    proved: bool


@dataclass(frozen=True)
class Check:
    """A cell or test that checks a statement or an experiment."""

    name: str               # a label, or the number of an experiment
    place: str              # the chapter, or the test file and function
    can_fail: bool


def statements_of(text: str, chapter: str = "") -> list[Statement]:
    """The statements in a chapter's text, in order; proved where a proof follows before anything else is stated."""
    found = list(_DIRECTIVE.finditer(text))
    statements = []
    for here, after in zip(found, [*found[1:], None], strict=True):
        if here[2] in KINDS:
            label = re.search(r"^:label:[ \t]*(\S+)", here[4], re.MULTILINE)
            proved = after is not None and after[2] == "proof" and "\n## " not in text[here.end():after.start()]
            statements.append(Statement(here[2], here[3].strip(), label[1] if label else "", chapter, proved))
    return statements


def _names(source: str) -> Iterator[str]:
    for line in _CHECKS.findall(source):
        yield from (name.strip() for name in line.split(","))


def checks_in_text(text: str, chapter: str = "") -> list[Check]:
    """The checks in the code cells of a chapter's text."""
    return [Check(name, chapter, bool(re.search(r"\bassert\b", cell[2])))
            for cell in _CELL.finditer(text) for name in _names(cell[2])]


def checks_in_tests(source: str, file: str = "") -> list[Check]:
    """The checks in the functions of a test module."""
    found, lines = [], source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            body = "\n".join(lines[node.lineno - 1:node.end_lineno])
            can_fail = any(isinstance(n, ast.Assert) or isinstance(n, ast.Attribute)
                           and n.attr in ("raises", "assert_allclose", "assert_close") for n in ast.walk(node))
            found += [Check(name, f"{file}::{node.name}", can_fail) for name in _names(body)]
    return found


@cache
def statements() -> list[Statement]:
    """All statements of the book."""
    return [s for text in chapters() for s in statements_of(text.read_text("utf8"), text.stem)]


@cache
def checks() -> list[Check]:
    """All checks, in chapters and in tests."""
    cells = [c for text in chapters() for c in checks_in_text(text.read_text("utf8"), text.stem)]
    tests = [c for path in sorted((ROOT / "tests").glob("test_*.py"))
             for c in checks_in_tests(path.read_text("utf8"), path.name)]
    return cells + tests


def register(path: Path = REGISTER) -> dict:
    """The permanent numbers of statements, and the experiments."""
    return yaml.safe_load(path.read_text("utf8"))
