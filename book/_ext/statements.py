"""Definitions, theorems, proofs and exercises, in HTML that is valid and reads as mathematics is printed.

sphinx-proof and sphinx-exercise give all proofs of a page one id, and all contents of statements another; here
they are numbered.  The word that opens a proof is set apart from it.
"""

from collections import Counter

from docutils import nodes
from sphinx.application import Sphinx
from sphinx_proof.nodes import proof_node

REPEATED = {"proof", "proof-content", "exercise-content", "solution-content"}


def tidy(app: Sphinx, doctree: nodes.document) -> None:
    counts = Counter()
    for node in doctree.findall(nodes.Element):
        for position, identifier in enumerate(node.get("ids", [])):
            if identifier in REPEATED:
                counts[identifier] += 1
                node["ids"][position] = f"{identifier}-{counts[identifier]}"
    for proof in doctree.findall(proof_node):
        first = next(iter(proof.findall(nodes.Text)), None)
        if first is not None and first.startswith("Proof. "):
            first.parent.replace(first, [nodes.emphasis("", "Proof."), nodes.Text(first.removeprefix("Proof."))])


def setup(app: Sphinx) -> dict:
    app.connect("doctree-read", tidy, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
