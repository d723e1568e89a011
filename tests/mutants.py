"""Plants bugs in the library, one at a time, and shows that the tests notice: ``python tests/mutants.py``.

The bugs are listed in ``tests/mutants/*.yml``; each names a file, a text in it that occurs once, what it is
replaced by, and what the bug is.  They are planted in a copy.  A file ``x.yml`` is checked by ``tests/test_x.py``,
unless an entry names other tests.  The exit code is the number of bugs that nobody noticed.

``python tests/mutants.py features spectra`` plants those of two files only.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
LISTS = ROOT / "tests" / "mutants"
SECONDS = 300      # for the tests of one bug, on a busy machine too; an endless loop takes that long

# Processes that have the large libraries loaded already, but not the one that is tested.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "scipy.optimize", "scipy.stats", "sklearn.svm", "hypothesis", "pytest"])


def mutants(names: list[str] | None = None) -> list[dict]:
    """The planted bugs, each with ``file``, ``find``, ``replace``, ``bug`` and ``tests``."""
    found = []
    for path in sorted(LISTS.glob("*.yml")):
        if not names or path.stem in names:
            found += [{"tests": [f"tests/test_{path.stem}.py"], **entry}
                      for entry in yaml.safe_load(path.read_text("utf8"))]
    return found


def _pytest(folder: Path, tests: list[str]) -> None:
    """In a process of its own: run the tests on the library in a folder."""
    with open(folder / "output.txt", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = str(folder)             # for processes that the tests start
    sys.dont_write_bytecode = True
    import pytest

    sys.exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])))


def run(folder: Path, tests: list[str]) -> bool:
    """Whether the tests pass on the copy in a folder."""
    process = PROCESSES.Process(target=_pytest, args=(folder, tests))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        return False                                   # an endless loop is noticed too
    if process.exitcode not in (0, 1, 2):              # 2: the tests could not even be collected
        raise RuntimeError(f"the tests could not be run: {tests}\n{(folder / 'output.txt').read_text()}")
    return process.exitcode == 0


def copy(folder: Path) -> Path:
    """What the tests need, in a new folder."""
    for name in ("kernelbook", "tests", "tools", "results", "benchmarks", "book"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "_static"))
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def noticed(mutant: dict) -> bool:
    """Whether the tests fail once the bug is planted."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = copy(Path(temporary))
        path = folder / mutant["file"]
        source = path.read_text("utf8")
        if source.count(mutant["find"]) != 1:
            raise RuntimeError(f"{mutant['file']}: {source.count(mutant['find'])} times, not once: {mutant['find']!r}")
        path.write_text(source.replace(mutant["find"], mutant["replace"]), "utf8")
        return not run(folder, mutant["tests"])


def without_bugs(tests: list[str]) -> str:
    """What the tests say of the library as it is, if they fail: then nothing would follow from a failure."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = copy(Path(temporary))
        return "" if run(folder, tests) else (folder / "output.txt").read_text()


def main(names: list[str]) -> int:
    """Plant all bugs; print what became of each."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}        # before the first process starts
    planted, start = mutants(names), time.monotonic()
    if not planted:
        sys.exit(f"no bugs in {LISTS} for {names}")
    missed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = sorted({test for mutant in planted for test in mutant["tests"]})
        sound = [pool.submit(without_bugs, [test]) for test in files]
        for mutant, caught in zip(planted, pool.map(noticed, planted), strict=True):
            missed += not caught
            print(f"{'caught' if caught else 'MISSED'}  {mutant['file']}: {mutant['bug']}", flush=True)
    if failures := [text for result in sound if (text := result.result())]:
        sys.exit("\n".join([*failures, "the tests fail without any planted bug"]))
    print(f"{len(planted) - missed} of {len(planted)} caught in {time.monotonic() - start:.0f} s")
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
