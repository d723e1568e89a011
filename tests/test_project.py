"""What the project's own files say of each other: versions, the lock, the commands that the README names."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib

import pytest
import yaml
from chapters import MACROS, ROOT, macros
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
LOCK = [line for line in (ROOT / "requirements.lock").read_text("utf8").splitlines() if not line.startswith("#")]


def test_the_lock_holds_exact_public_versions_only():
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in LOCK)
    assert "kernelbook" not in {line.split("==")[0] for line in LOCK}


def test_the_lock_satisfies_every_range():
    versions = dict(line.split("==") for line in LOCK)
    extras = {name: lines for name, lines in PROJECT["optional-dependencies"].items() if name != "bench"}
    # What the benchmark compares with is installed by nobody else.
    for line in [*PROJECT["dependencies"], *(line for extra in extras.values() for line in extra)]:
        need = Requirement(line)
        assert need.specifier.contains(versions[canonicalize_name(need.name)], prereleases=True), line


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf8"))
    assert citation["version"] == PROJECT["version"]
    assert f"\n## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text("utf8")


def test_make_alone_lists_the_commands():
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True).stdout
    targets = re.findall(r"^make (\w+) +\S", listed, re.MULTILINE)
    assert {"book", "test", "lab", "notebooks", "results", "clean"} <= set(targets)
    named = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text("utf8"), re.MULTILINE)
    assert named and set(named) <= set(targets)


def test_a_macro_uses_no_other():
    for name, (definition, arguments) in macros().items():
        assert not set(re.findall(r"\\([A-Za-z]+)", definition)) & set(macros()), f"{name} in {MACROS.name}"
        assert all(f"#{i + 1}" in definition for i in range(arguments)), f"{name} in {MACROS.name}"


def test_no_file_names_a_folder_of_one_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("not a working copy of the repository")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    place = re.compile(r"(?<![\w.])/(?:home|root|Users|work)/[\w.-]+")
    for name in filter(None, files):
        path = ROOT / name
        if path.is_file() and path.suffix not in {".png", ".safetensors", ".inv"}:
            assert not place.search(path.read_text("utf8", errors="ignore")), name


def test_every_planted_bug_has_one_place():
    for path in (ROOT / "tests" / "mutants").glob("*.yml"):
        for bug in yaml.safe_load(path.read_text("utf8")):
            assert (ROOT / bug["file"]).read_text("utf8").count(bug["find"]) == 1, f"{path.name}: {bug['bug']}"


def test_records_keep_no_text_of_corpora_that_are_not_ours():
    """What was read from a reader's folder may not be passed on: such a record has numbers only."""
    records = [json.loads(path.read_text()) for path in (ROOT / "results").rglob("*.json")]
    records = [r for r in records if "samples" in r]
    assert any(r["samples"] for r in records)
    assert [r["name"] for r in records if r["samples"] and r["data"]["origin"] == "directory"] == []
