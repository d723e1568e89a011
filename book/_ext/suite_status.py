"""The directive ``{suite-status}``: how many runs of each suite of experiments have a record, and how many are missing.

It reads the folder ``results``; nothing is trained while the book is built.
"""

from pathlib import Path

from docutils import nodes
from execution_status import table
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from kernelbook import experiments, results
from kernelbook.files import FileError

PRESETS = ("quick", "laptop", "gpu")


class SuiteStatus(SphinxDirective):
    """A table of suites, presets and tasks, with the numbers of runs."""

    def run(self) -> list[nodes.Node]:
        folder = Path(self.env.srcdir) / "results"
        for path in [folder, *sorted(folder.glob("*/suite-*.json"))]:
            self.env.note_dependency(str(path))
        rows = [row for name in experiments.SUITES for preset in PRESETS for row in _rows(name, preset, folder)]
        return [table(["Suite", "Preset", "Task and corpus", "Runs", "Missing"], rows, widths=[20, 15, 45, 10, 10])]


def _rows(name: str, preset: str, folder: Path) -> list[list[str]]:
    try:
        suite = results.load_suite(name, preset, folder=folder)
    except FileError:                                  # nobody has begun it
        planned = len(experiments.plan(name, preset))
        return [[name, preset, "all", "0", str(planned)]]
    rows = []
    for group in suite.groups:
        names = {run for runs in group.names.values() for run in runs}
        there = len(names & set(suite.records))
        what = ", ".join(filter(None, (group.task, group.corpus)))
        rows.append([name, preset, what, str(there), str(len(names) - there)])
    return rows


def setup(app: Sphinx) -> dict:
    app.add_directive("suite-status", SuiteStatus)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
