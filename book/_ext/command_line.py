"""The directive ``{command-line} MODULE``: what ``--help`` says, for every command of a typer application.

It is printed as a terminal would show it, so the page and the program cannot disagree.
"""

import importlib
import os
from collections.abc import Iterator

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

os.environ["TYPER_USE_RICH"] = "0"         # plain text, without boxes; typer asks when it is imported
import typer.main
from typer.testing import CliRunner

PROGRAM = "kernelbook"


class CommandLine(SphinxDirective):
    """One section a command, in the order in which ``--help`` lists them."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module = importlib.import_module(self.arguments[0])
        self.env.note_dependency(module.__file__)
        runner = CliRunner(env={"COLUMNS": "78"})

        def text(path: list[str]) -> nodes.literal_block:
            output = runner.invoke(module.app, [*path, "--help"], prog_name=PROGRAM).output.strip()
            return nodes.literal_block(output, output, language="text")

        found: list[nodes.Node] = [text([])]
        for path in _commands(typer.main.get_command(module.app)):
            name = " ".join([PROGRAM, *path])
            section = nodes.section("", nodes.title("", name), text(path), ids=[nodes.make_id(name)])
            self.state.document.note_explicit_target(section)
            found.append(section)
        return found


def _commands(group, path: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """The paths of all commands that do something, a group's own members in the group's place."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, (*path, name))
        else:
            yield [*path, name]


def setup(app: Sphinx) -> dict:
    app.add_directive("command-line", CommandLine)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
