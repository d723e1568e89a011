"""Make the notebooks: read each chapter's text, run it from top to bottom, store the notebook beside it.

    python tools/notebooks.py                    every chapter
    python tools/notebooks.py kernel_smoothing   the chapters named
    python tools/notebooks.py --check            run nothing: does each stored notebook agree with its text?

Run twice, it writes the same bytes.  A notebook is replaced only by one that ran to its end.  The seconds a chapter
took, and with what, go to ``book/execution.json``, where the status page finds them; an entry is renewed only when
its notebook has changed, so that a second run changes nothing at all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import nbformat
from chapters import EXECUTION, KERNEL_ENVIRONMENT, chapters, difference, normalise, notebook_of
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from kernelbook.files import write_whole

CELL_SECONDS = 180      # no chapter may take longer as a whole
PACKAGES = ("kernelbook", "torch", "numpy", "scipy", "scikit-learn", "matplotlib", "jupyter-book")


class ThisInterpreter(KernelSpecManager):
    """Finds one kernel only: the Python that is running, whatever kernels the user has registered."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())


class ChapterFailed(Exception):
    """A chapter did not run to its end; the message says where and why."""


def execute(text: Path) -> nbformat.NotebookNode:
    """Run the chapter with this text in a kernel of its own and return the notebook, normalised."""
    nb = notebook_of(text)
    code = [i for i, cell in enumerate(nb.cells) if cell.cell_type == "code"]
    position = 0

    def started(cell, cell_index):
        nonlocal position
        if cell_index in code:
            position = code.index(cell_index) + 1
            if sys.stdout.isatty():
                print(f"\r{text.stem}: cell {position} of {len(code)} ", end="", flush=True)

    client = NotebookClient(
        nb, km=AsyncKernelManager(kernel_spec_manager=ThisInterpreter()), timeout=CELL_SECONDS,
        record_timing=False, on_cell_start=started, resources={"metadata": {"path": str(text.parent)}},
    )
    try:
        client.execute(env={**os.environ, **KERNEL_ENVIRONMENT}, stderr=subprocess.DEVNULL)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        source = nb.cells[code[position - 1]].source
        where = f"{text}, line {_line(text, source)}, code cell {position} of {len(code)}"
        message = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
        raise ChapterFailed(f"{where}:\n{message}") from None
    return normalise(nb)


def _line(text: Path, source: str) -> int:
    """The line of the text on which a cell with this source begins."""
    before, found, _ = text.read_text("utf8").partition(source.strip())
    return before.count("\n") + 1 if found else 0


def write_if_changed(path: Path, content: str) -> bool:
    """Write a file, whole or not at all, if it does not hold this content yet; return whether it did not."""
    if path.exists() and path.read_text("utf8") == content:
        return False
    write_whole(path, content)
    return True


def record(name: str, notebook: str, seconds: float, file: Path = EXECUTION) -> None:
    """Note how long a chapter took, and with what, unless this very notebook is on record already."""
    entries = json.loads(file.read_text("utf8")) if file.exists() else {}
    digest = hashlib.sha256(notebook.encode()).hexdigest()
    if entries.get(name, {}).get("sha256") == digest:
        return
    entries[name] = {
        "sha256": digest,
        "seconds": round(seconds, 1),
        "machine": {"system": f"{platform.system()} {platform.machine()}", "cpus": os.cpu_count(),
                    "threads": int(KERNEL_ENVIRONMENT["OMP_NUM_THREADS"])},
        "versions": {"python": platform.python_version(), **{name: _public(version(name)) for name in PACKAGES}},
    }
    write_if_changed(file, json.dumps(entries, indent=1, sort_keys=True) + "\n")


def forget_all_but(names: Iterable[str], file: Path = EXECUTION) -> None:
    """Drop from the record the chapters that are no more."""
    entries = json.loads(file.read_text("utf8")) if file.exists() else {}
    if kept := {name: entries[name] for name in entries if name in set(names)}:
        write_if_changed(file, json.dumps(kept, indent=1, sort_keys=True) + "\n")


def _public(release: str) -> str:
    return re.sub(r"\+.*", "", release)


def make(text: Path, record_in: Path = EXECUTION) -> str:
    """Make one chapter's notebook; return a line that says what happened."""
    start = time.perf_counter()
    nb = execute(text)
    seconds = time.perf_counter() - start
    nbformat.validate(nb)
    content = nbformat.writes(nb) + "\n"
    changed = write_if_changed(text.with_suffix(".ipynb"), content)
    record(text.stem, content, seconds, record_in)
    return f"{text.stem}: {seconds:.1f} s, {'written' if changed else 'as it was'}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the chapters' notebooks from their texts.")
    parser.add_argument("names", nargs="*", metavar="CHAPTER", help="chapters by name; all of them by default")
    parser.add_argument("--check", action="store_true", help="run nothing; fail where text and notebook differ")
    arguments = parser.parse_args()

    known = {text.stem: text for text in chapters()}
    names = [Path(name).stem for name in arguments.names] or list(known)
    if not arguments.names and not arguments.check:
        forget_all_but(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no chapter named {', '.join(unknown)}; there are: {', '.join(known)}")

    failures = 0
    for name in names:
        if arguments.check:
            problem = difference(known[name])
            print(f"{name}: {problem + chr(10) + 'run: make notebooks CHAPTER=' + name if problem else 'in step'}")
            failures += problem is not None
            continue
        try:
            line = make(known[name])
        except ChapterFailed as failure:
            failures += 1
            line = f"{name}: FAILED\n{failure}"
        print(("\r" if sys.stdout.isatty() else "") + line, flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
