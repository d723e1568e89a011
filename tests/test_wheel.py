"""Where the library is not installed, as in a hosted notebook, a chapter's first cell installs it: from a wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from chapters import INSTALL_CELL, ROOT

import kernelbook

CHECK = """
import kernelbook, kernelbook.attention, kernelbook.kernels, kernelbook.results
print("imported", kernelbook.__version__, "from", kernelbook.__file__)
print("results", kernelbook.results.find("translation-bible-rbf-quick-seed0.json"))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The library's wheel, built here from a copy of its files."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "kernelbook", "results"):
        (source / name).symlink_to(ROOT / name)
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", source])
    (built,) = (folder / "dist").glob("*.whl")
    return built


def run(command: list, **environment: str) -> str:
    result = subprocess.run(command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def dependencies(folder: Path) -> Path:
    """A folder that holds what is installed here, the library itself excepted."""
    folder.mkdir()
    for installed in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(installed).iterdir():
            if not entry.name.startswith(("kernelbook", "__editable__")) and entry.suffix != ".pth":
                (folder / entry.name).symlink_to(entry)
    return folder


def test_first_cell_installs_the_library(wheel, tmp_path):
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    cell, check = tmp_path / "cell.ipy", tmp_path / "check.py"
    cell.write_text(INSTALL_CELL)
    check.write_text(CHECK)
    environment = {
        "PYTHONPATH": str(dependencies(tmp_path / "dependencies")), "PYTHONNOUSERSITE": "1", "PYTHONSAFEPATH": "1",
        "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.parent), "PIP_CONFIG_FILE": os.devnull,
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }
    absent = subprocess.run([python, check], env={**os.environ, **environment}, capture_output=True, text=True)
    assert "No module named 'kernelbook'" in absent.stderr

    run([python, "-m", "IPython", "--no-banner", cell], **environment)
    found = run([python, check], **environment)
    assert f"imported {kernelbook.__version__} from {home}" in found
    assert f"results {home}" in found           # what the chapters read comes along


def test_wheel_holds_the_library_and_the_results_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "kernelbook/kernels.py" in names and "kernelbook/attention/__init__.py" in names
    release = f"kernelbook-{kernelbook.__version__}"
    assert {name.split("/")[0] for name in names} == {"kernelbook", f"{release}.dist-info", f"{release}.data"}
    data, folder = {name for name in names if ".data/" in name}, f"{release}.data/data/share/kernelbook/results"
    results = ROOT / "results"
    kept = {path.relative_to(results).as_posix() for path in results.rglob("*") if path.is_file()}
    assert data == {f"{folder}/{name}" for name in kept}
