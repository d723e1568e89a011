"""Write requirements.lock: the exact versions of everything that this environment was made of.

    python tools/lock.py            write it, from the environment that runs this
    python tools/lock.py --check    fail where this environment differs from it

The lock is a list of constraints: it says which version, never that something is to be installed, so a package of
one platform does no harm on another.  It holds what the project and its extras need, directly or not, and nothing
else that happens to be installed.
"""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"

HEAD = """\
# The versions that the book is built and tested with; used as constraints (pip install -c requirements.lock).
# Written by `make lock`.  The ranges that the library works with are in pyproject.toml.
"""


def locked() -> str:
    """The lock of the environment that is running."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))
    todo = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    todo += [line for extra in project["project"]["optional-dependencies"].values() for line in extra]
    versions: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        need = Requirement(todo.pop())
        key = (canonicalize_name(need.name), frozenset(need.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            found = distribution(need.name)
        except PackageNotFoundError:            # wanted on another platform only, or by an extra that nobody asked for
            continue
        versions[key[0]] = Version(found.version).public        # without a local build's suffix, such as +cpu
        for line in found.requires or []:
            marker = Requirement(line).marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in need.extras or {""}):
                todo.append(line)
    return HEAD + "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))


def main() -> int:
    if "--check" not in sys.argv:
        LOCK.write_text(locked(), "utf8")
        return 0
    differences = set(locked().splitlines()) ^ set(LOCK.read_text("utf8").splitlines())
    for line in sorted(differences):
        print(f"differs from {LOCK.name}: {line}")
    return int(bool(differences))


if __name__ == "__main__":
    sys.exit(main())
