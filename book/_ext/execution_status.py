"""The directive ``{execution-status}``: how long each chapter took to run, and with what.

It reads ``book/execution.json``, which ``make notebooks`` keeps; nothing is executed while the book is built.
"""

import json
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class ExecutionStatus(SphinxDirective):
    """A table of the chapters with their seconds, and a table of the versions that they ran with."""

    def run(self) -> list[nodes.Node]:
        record = Path(self.env.srcdir) / "book" / "execution.json"
        self.env.note_dependency(str(record))
        entries = json.loads(record.read_text("utf8")) if record.exists() else {}
        documents = {name: self._document(name) for name in entries}
        # the order of the table of contents, which the root document's toctrees hold
        order = {name: i for i, name in enumerate(self._contents())}
        names = sorted(entries, key=lambda name: (order.get(documents[name], len(order)), name))

        rows = [[self._link(documents[name]), f"{entries[name]['seconds']:.1f}", _machine(entries[name]["machine"])]
                for name in names]
        rows.append(["Together", f"{sum(e['seconds'] for e in entries.values()):.1f}", ""])
        times = table(["Chapter", "Seconds", "Machine"], rows, widths=[50, 15, 35])

        packages = sorted({p for e in entries.values() for p in e["versions"]}, key=lambda p: (p != "python", p))
        rows = [[p, ", ".join(sorted({e["versions"][p] for e in entries.values() if p in e["versions"]}))]
                for p in packages]
        return [times, table(["Package", "Version"], rows, widths=[50, 50])]

    def _document(self, name: str) -> str:
        found = [d for d in self.env.found_docs if d.rsplit("/", 1)[-1] == name]
        return found[0] if found else f"book/{name}"

    def _contents(self) -> list[str]:
        site_map = getattr(self.config, "external_site_map", None)
        return list(site_map) if site_map else []

    def _link(self, document: str) -> nodes.Node:
        reference = addnodes.pending_xref(
            "", nodes.inline(text=document), refdomain="std", reftype="doc", refexplicit=False, refwarn=True,
            reftarget=f"/{document}", refdoc=self.env.docname)
        return reference


def _machine(machine: dict) -> str:
    threads = machine["threads"]
    return f"{machine['system']}, {machine['cpus']} CPUs, {threads} thread{'s' * (threads != 1)}"


def table(head: list[str], rows: list[list], widths: list[int]) -> nodes.table:
    group = nodes.tgroup("", *(nodes.colspec(colwidth=w) for w in widths), cols=len(head))
    group += nodes.thead("", _row(head))
    group += nodes.tbody("", *map(_row, rows))
    return nodes.table("", group)


def _row(cells: list) -> nodes.row:
    return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", c if isinstance(c, nodes.Node) else nodes.Text(c)))
                           for c in cells))


def setup(app: Sphinx) -> dict:
    app.add_directive("execution-status", ExecutionStatus)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
