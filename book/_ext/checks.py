"""The directives of the page *Statements and their checks*: tables from chapters, tests and ``book/register.yml``."""

import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import claims as found


class _Table(SphinxDirective):
    head: tuple[str, ...] = ()

    def rows(self) -> list[list[str]]:
        raise NotImplementedError

    def run(self):
        self.env.note_reread()               # depends on every chapter and test
        lines = ["| " + " | ".join(cells) + " |" for cells in [self.head, ["---"] * len(self.head), *self.rows()]]
        return self.parse_text_to_nodes("```{table}\n:class: notation\n\n" + "\n".join(lines) + "\n```\n")


def _chapters(environment) -> list[str]:
    """The pages of the book, in the order of the table of contents."""
    return [document.rsplit("/", 1)[-1] for document in getattr(environment.config, "external_site_map", None) or []]


def _where(name: str, listed: list[str], own: str = "") -> str:
    """The places that check something, each once: the chapter that states it, other chapters, tests."""
    places = dict.fromkeys(c.place.split("::")[0] for c in found.checks() if c.name == name and c.can_fail)
    return ", ".join("the chapter" if place == own else f"{{doc}}`{place}`" if place in listed else f"`{place}`"
                     for place in places)


class StatementChecks(_Table):
    """Each statement, in the order of the book, and where it is checked."""

    head = ("Statement", "Title", "Checked in")

    def rows(self):
        listed = _chapters(self.env)
        of_chapter = {name: [s for s in found.statements() if s.chapter == name] for name in listed}
        rows = []
        for name, statements in of_chapter.items():
            if statements:
                rows.append([f"{{doc}}`{name}`", "", ""])
            rows += [[f"{{prf:ref}}`{s.label}`", s.title, _where(s.label, listed, own=name)] for s in statements]
        return rows


class ExperimentChecks(_Table):
    """Each experiment with its expected value, tolerance, control and place."""

    head = ("No.", "What is computed, for which statement", "Expected (tolerance)", "Control", "Executed in")

    def rows(self):
        listed = _chapters(self.env)
        return [[number, f"{row['computes']} ({', '.join(f'{{prf:ref}}`{label}`' for label in row['of'])})",
                 f"{row['expected']} ({row['tolerance']})", row["control"], _where(number, listed)]
                for number, row in found.register()["experiments"].items()]


class PermanentNumbers(_Table):
    """The permanent numbers of statements."""

    head = ("No.", "Statement")

    def rows(self):
        return [[number, ", ".join(f"{{prf:ref}}`{label}`" for label in labels)]
                for number, labels in found.register()["statements"].items()]


def setup(app: Sphinx) -> dict:
    app.add_directive("statement-checks", StatementChecks)
    app.add_directive("experiment-checks", ExperimentChecks)
    app.add_directive("permanent-numbers", PermanentNumbers)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
