"""Records of trained runs: one small JSON file each, with all it takes to trust and repeat a number.

This module is data only: it imports no training code, so chapters read results without loading any of it.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import FileError, load_tensors, save_tensors, write_whole
from .kernels import Kernel, from_config

__all__ = ["Record", "provenance", "find", "load", "table", "AttentionSample", "save_attention", "load_attention"]

SCHEMA = 1


@dataclass(frozen=True)
class Record:
    """What one run was, and what came of it.

    Attributes
    ----------
    name : str
        Of the run, as in ``translation-bible-rbf-quick-seed0``.
    task, preset, seed
        What was trained, at which size, from which seed.
    kernel : dict
        As :meth:`kernelbook.kernels.Kernel.to_config` gives it.
    metrics : dict
        Numbers by name; which split they come from is in the name.
    baselines : dict
        The same metric of trivial systems on the same split.
    signature : str
        How the metric was computed: sacrebleu's signature, for BLEU.
    data : dict
        Corpus, origin, fingerprint, licence, numbers of examples.
    config : dict
        Of model, tokeniser, training and decoding.
    parameters : int
        Number of trained numbers.
    history : list of dict
        One entry an epoch.
    samples : list of dict
        A few outputs beside their references.
    provenance : dict
        Device, versions, threads, commit, command, date, wall time in seconds.
    """

    name: str
    task: str
    preset: str
    seed: int
    kernel: dict[str, Any]
    metrics: dict[str, float]
    baselines: dict[str, float]
    signature: str
    data: dict[str, Any]
    config: dict[str, Any]
    parameters: int
    history: list[dict[str, float]] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def save(self, path: str | os.PathLike) -> Path:
        """Write the record as JSON, whole or not at all.

        Raises
        ------
        FileError
            If it cannot be written.
        """
        return write_whole(path, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


def find(name: str) -> Path:
    """The file of that name among the results that the book reads.

    They lie in the folder ``results`` of the project, and come with the installed package.

    Parameters
    ----------
    name : str
        Of the file, with its ending.

    Returns
    -------
    Path

    Raises
    ------
    FileError
        If there is no such file; the message lists what there is.
    """
    folder = Path(__file__).resolve().parent.parent / "results"
    here = {path.name: path for path in folder.iterdir()} if folder.is_dir() else {}
    if not here:
        try:
            here = {f.name: Path(f.locate()) for f in files("kernelbook") or () if "results" in f.parts[:-1]}
        except PackageNotFoundError:
            pass
    if name not in here:
        raise FileError(f"no result is called {name!r} (there are: {', '.join(sorted(here)) or 'none'})")
    return here[name]


def load(path: str | os.PathLike) -> Record:
    """Read a record.

    Parameters
    ----------
    path : path
        Of the JSON file.

    Returns
    -------
    Record

    Raises
    ------
    FileError
        If the file is missing, damaged, or not a record of this schema.
    """
    try:
        plain = json.loads(Path(path).read_text("utf8"))
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read as a results record: {error}") from error
    known = {f.name for f in fields(Record)}
    if not isinstance(plain, dict) or plain.get("schema") != SCHEMA or set(plain) != known:
        raise FileError(f"{path} is not a results record of schema {SCHEMA}: expected the keys {sorted(known)}")
    return Record(**plain)


def provenance(device: torch.device | str = "cpu", *, command: str | None = None) -> dict[str, Any]:
    """Where and with what a run is made; to be asked when it begins, before anybody changes the source.

    Parameters
    ----------
    device : torch.device or str
        That the model is on.
    command : str, optional
        By default the command line of this process.

    Returns
    -------
    dict
    """
    device = torch.device(device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    if command is None:
        command = shlex.join(["kernelbook" if Path(sys.argv[0]).stem in ("kernelbook", "__main__")
                              else Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"device": gpu or device.type, "cpu": platform.machine(), "cpu_count": os.cpu_count(),
            "threads": torch.get_num_threads(), "platform": platform.system(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"), "commit": _commit(), "command": command,
            "versions": {"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES}}


_PACKAGES = ("kernelbook", "torch", "lightning-fabric", "tokenizers", "sacrebleu", "safetensors")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source tree this library comes from, with a + if it was changed since; None elsewhere."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "kernelbook").strip()
        return git("rev-parse", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def table(records: Iterable[Record], *, metric: str = "test_bleu") -> list[dict[str, Any]]:
    """Rows of a comparison: one a record, sorted by task, corpus, preset, kernel and seed.

    Parameters
    ----------
    records : iterable of Record
        What to compare.
    metric : str
        Which of the metrics to show; empty where a record has none of that name.

    Returns
    -------
    list of dict
        With the keys ``name``, ``task``, ``data``, ``preset``, ``kernel``, ``seed``, ``metric``, ``baseline`` (the
        best), ``parameters``, ``device``, ``wall_time_s``.
    """
    rows = [{"name": r.name, "task": r.task, "data": r.data.get("name"), "preset": r.preset,
             "kernel": repr(from_config(r.kernel)), "seed": r.seed, "metric": r.metrics.get(metric),
             "baseline": max(r.baselines.values(), default=None), "parameters": r.parameters,
             "device": r.provenance.get("device"), "wall_time_s": r.provenance.get("wall_time_s")} for r in records]
    return sorted(rows, key=lambda row: [str(row[c]) for c in ("task", "data", "preset", "kernel", "seed")])


# ------------------------------------------------------------------------- attention of a trained model

@dataclass(frozen=True)
class AttentionSample:
    """Queries and keys of a trained translator's attention from one target sentence to its source.

    Attributes
    ----------
    source_tokens, target_tokens : list of str
        The tokens attended to (the end-of-sentence token last), and the tokens that attend: the decoder's input,
        beginning-of-sentence first.
    queries : Tensor
        ``(layers, heads, n, d)``, n the number of target tokens.
    keys : Tensor
        ``(layers, heads, m, d)``, m the number of source tokens.
    source, target : str
        The sentences.
    kernel : Kernel
        The model was trained with.
    record : str
        Name of the run.
    """

    source_tokens: list[str]
    target_tokens: list[str]
    queries: Tensor
    keys: Tensor
    source: str
    target: str
    kernel: Kernel
    record: str


def save_attention(path: str | os.PathLike, samples: list[AttentionSample]) -> Path:
    """Write samples of attention, their numbers as float32.

    Raises
    ------
    FileError
        If the file cannot be written.
    """
    tensors, about = {}, []
    for i, s in enumerate(samples):
        tensors |= {f"{i}.queries": s.queries.float(), f"{i}.keys": s.keys.float()}
        about.append({"source_tokens": s.source_tokens, "target_tokens": s.target_tokens, "source": s.source,
                      "target": s.target, "kernel": s.kernel.to_config(), "record": s.record})
    return save_tensors(path, tensors, {"samples": about})


def load_attention(path: str | os.PathLike) -> list[AttentionSample]:
    """Read what :func:`save_attention` wrote.

    Parameters
    ----------
    path : path
        Of the safetensors file.

    Returns
    -------
    list of AttentionSample

    Raises
    ------
    FileError
        If the file is missing or damaged.
    """
    tensors, metadata = load_tensors(path)
    return [AttentionSample(**(about | {"kernel": from_config(about["kernel"])}),
                            queries=tensors[f"{i}.queries"], keys=tensors[f"{i}.keys"])
            for i, about in enumerate(metadata["samples"])]
