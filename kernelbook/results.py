"""Records of trained runs: one small JSON file each, with all it takes to trust and repeat a number.

This module is data only: it imports no training code, so chapters read results without loading any of it.

>>> suite = load_suite("five-kernels", "quick")                             # doctest: +SKIP
>>> suite.runs("translation", "EDP")[0].metrics["test_bleu"]                # doctest: +SKIP
>>> compare(suite, "translation")                                           # doctest: +SKIP
"""

from __future__ import annotations

import difflib
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import FileError, load_tensors, save_tensors, write_whole
from .kernels import Kernel, from_config

__all__ = ["Record", "FailedRun", "provenance", "find", "load", "read", "kept", "table",
           "SuiteRecords", "Group", "load_suite", "save_suite", "compare", "curves", "feature_dimension",
           "AttentionSample", "save_attention", "load_attention"]

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


@dataclass(frozen=True)
class FailedRun:
    """A run of an experiment whose loss became infinite: a result, though it has no number.

    Attributes
    ----------
    name, task, corpus, preset, seed, kernel
        As those of a :class:`Record`.
    error : str
        What training said, and at which step.
    command : str
        That makes it again.
    provenance : dict
        As that of a :class:`Record`.
    """

    name: str
    task: str
    corpus: str | None
    preset: str
    seed: int
    kernel: dict[str, Any]
    error: str
    command: str
    provenance: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike) -> Path:
        """Write it as JSON, whole or not at all.

        Raises
        ------
        FileError
            If it cannot be written.
        """
        plain = {"kind": _FAILED} | asdict(self)
        return write_whole(path, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")


_FAILED, _SUITE = "failed run", "suite"


def find(name: str) -> Path:
    """The file of that name among the results that the book reads.

    They lie in the folder ``results`` of the project and its subfolders, and come with the installed package.

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
        If there is no such file; the message lists what there is, or the nearest of many.
    """
    folder = Path(__file__).resolve().parent.parent / "results"
    here = {path.name: path for path in folder.rglob("*") if path.is_file()} if folder.is_dir() else {}
    if not here:
        try:
            here = {f.name: Path(f.locate()) for f in files("kernelbook") or () if "results" in f.parts[:-1]}
        except PackageNotFoundError:
            pass
    if name not in here:
        near = difflib.get_close_matches(name, here, n=12, cutoff=0.3) if len(here) > 12 else sorted(here)
        what = "there are" if len(here) <= 12 else f"of {len(here)} the nearest are"
        raise FileError(f"no result is called {name!r} ({what}: {', '.join(near) or 'none'})")
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
    found = read(path)
    if isinstance(found, FailedRun):
        raise FileError(f"{path} says that the run {found.name} failed: {found.error}")
    return found


def read(path: str | os.PathLike) -> Record | FailedRun:
    """Read what a run of an experiment left: a record, or the note that it failed.

    Parameters
    ----------
    path : path
        Of the JSON file.

    Returns
    -------
    Record or FailedRun

    Raises
    ------
    FileError
        If the file is missing, damaged, or neither.
    """
    plain = _plain(path)
    kind = FailedRun if plain.get("kind") == _FAILED else Record
    known = {f.name for f in fields(kind)} | ({"kind"} if kind is FailedRun else set())
    if set(plain) != known or kind is Record and plain["schema"] != SCHEMA:
        raise FileError(f"{path} is not a results record of schema {SCHEMA}: expected the keys {sorted(known)}")
    return kind(**{key: value for key, value in plain.items() if key != "kind"})


def _plain(path: str | os.PathLike) -> dict[str, Any]:
    try:
        plain = json.loads(Path(path).read_text("utf8"))
    except FileNotFoundError:
        raise FileError(f"{path} cannot be read as a results record: there is no such file") from None
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read as a results record: {error}; if it was cut short, delete it and make "
                        "the run again") from error
    if not isinstance(plain, dict):
        raise FileError(f"{path} is not a results record of schema {SCHEMA}: expected a JSON object, not a "
                        f"{type(plain).__name__}")
    return plain


def kept(record: Record, command: str | None = None) -> Record:
    """A record as it is kept with the project: small, and without sentences of a reader's own corpus.

    Parameters
    ----------
    record : Record
    command : str, optional
        That makes the run anywhere, without folders of this machine.

    Returns
    -------
    Record
    """
    history = [{key: round(value, 4) for key, value in entry.items()} for entry in record.history]
    return replace(record, history=history, samples=[] if record.data.get("origin") == "directory" else record.samples,
                   provenance=record.provenance | ({} if command is None else {"command": command}))


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


# ------------------------------------------------------------------------- experiments

@dataclass(frozen=True)
class Group:
    """What a suite of experiments trained on one corpus.

    Attributes
    ----------
    task : str
    corpus : str or None
        None where the task draws its own examples.
    metric : str
        By which it is judged.
    higher_is_better : bool
        Of the metric.
    names : dict of str to list of str
        Names of the runs by the label of their variant, in the order of their seeds, from 0.
    """

    task: str
    corpus: str | None
    metric: str
    higher_is_better: bool
    names: dict[str, list[str]]

    @property
    def title(self) -> str:
        """Task and corpus, for a heading."""
        return self.task if self.corpus is None else f"{self.task}, {self.corpus}"


@dataclass(frozen=True)
class SuiteRecords:
    """A suite of experiments, and the records that there are of it.

    Attributes
    ----------
    name, preset, question : str
        The question in one sentence.
    reference : str
        The label of the variant that the others are compared with.
    variants : dict of str
        What each variant is there for, by label.
    groups : tuple of Group
        One for each task and corpus.
    records : dict of str to (Record or FailedRun)
        By name of the run; those that are missing are not in it.
    """

    name: str
    preset: str
    question: str
    reference: str
    variants: dict[str, str]
    groups: tuple[Group, ...]
    records: dict[str, Record | FailedRun] = field(default_factory=dict)

    def group(self, task: str, corpus: str | None = None) -> Group:
        """What was trained for a task; on which corpus must be said only if there are several.

        Raises
        ------
        ValueError
            If there is no such group, or several.
        """
        found = [g for g in self.groups if g.task == task and (corpus is None or g.corpus == corpus)]
        if len(found) != 1:
            there = ", ".join(f"({g.task!r}, {g.corpus!r})" for g in self.groups)
            what = "no" if not found else "more than one"
            raise ValueError(f"{what} group of the suite {self.name} is ({task!r}, {corpus!r}); there are {there}")
        return found[0]

    def runs(self, task: str, label: str, corpus: str | None = None) -> dict[int, Record | FailedRun]:
        """The records of a variant by seed, failed runs among them.

        Parameters
        ----------
        task, label : str
        corpus : str, optional
            Needed only if the task was trained on several.

        Returns
        -------
        dict

        Raises
        ------
        ValueError
            If there is no such group or label.
        """
        names = self.group(task, corpus).names
        if label not in names:
            raise ValueError(f"no variant of the suite {self.name} is called {label!r} (known: {', '.join(names)})")
        return {seed: self.records[name] for seed, name in enumerate(names[label]) if name in self.records}

    @property
    def missing(self) -> list[str]:
        """Names of the runs that have no record."""
        return [name for group in self.groups for names in group.names.values() for name in names
                if name not in self.records]


def suite_file(name: str, preset: str) -> str:
    """Name of the file that lists the runs of a suite at a preset; it lies beside their records."""
    return f"suite-{name}-{preset}.json"


def save_suite(suite: SuiteRecords, folder: str | os.PathLike) -> Path:
    """Write which runs a suite has, in the subfolder of its preset; its records lie there already.

    What was listed before of other tasks and corpora stays, and so do further seeds.

    Parameters
    ----------
    suite : SuiteRecords
    folder : path
        Of the results.

    Returns
    -------
    Path

    Raises
    ------
    FileError
        If it cannot be written.
    """
    path = Path(folder) / suite.preset / suite_file(suite.name, suite.preset)
    groups = {(g.task, g.corpus): g for g in suite.groups}
    if path.exists():
        try:
            before = _listed(_plain(path), path).groups
        except FileError:
            before = ()         # it holds nothing that cannot be made again
        for old in before:
            new = groups.setdefault((old.task, old.corpus), old)
            longer = {label: old.names[label] for label, names in new.names.items()
                      if old.names.get(label, [])[:len(names)] == names}
            groups[old.task, old.corpus] = replace(new, names=new.names | longer)
    plain = {"kind": _SUITE, "schema": SCHEMA} | asdict(replace(suite, groups=tuple(groups.values()), records={}))
    del plain["records"]
    return write_whole(path, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")


def _listed(plain: dict[str, Any], path: str | os.PathLike) -> SuiteRecords:
    known = {f.name for f in fields(SuiteRecords)} - {"records"} | {"kind", "schema"}
    try:
        if plain["kind"] != _SUITE or plain["schema"] != SCHEMA or set(plain) != known:
            raise KeyError(f"expected the keys {sorted(known)}")
        own = {key: value for key, value in plain.items() if key not in ("kind", "schema")}
        return SuiteRecords(**own | {"groups": tuple(Group(**group) for group in plain["groups"])})
    except (KeyError, TypeError) as error:
        raise FileError(f"{path} is not the list of a suite's runs ({error}); delete it, and kernelbook results run "
                        "writes it again") from None


def load_suite(name: str, preset: str = "quick", *, folder: str | os.PathLike | None = None) -> SuiteRecords:
    """A suite of experiments with all its records.

    Parameters
    ----------
    name, preset : str
        As in ``kernelbook results run NAME --preset PRESET``.
    folder : path, optional
        Of the results; by default those that the book reads.

    Returns
    -------
    SuiteRecords

    Raises
    ------
    FileError
        If nothing of it is there, or a file is damaged.
    """
    file = suite_file(name, preset)
    try:
        path = find(file) if folder is None else next(iter(Path(folder).rglob(file)))
    except (FileError, StopIteration):
        raise FileError(f"there are no results of the suite {name!r} at the preset {preset!r}"
                        f"{'' if folder is None else f' in {folder}'}; make them with: "
                        f"kernelbook results run {name} --preset {preset}") from None
    suite = _listed(_plain(path), path)
    records = {}
    for run in sorted({run for group in suite.groups for names in group.names.values() for run in names}):
        if (at := path.parent / f"{run}.json").exists():
            records[run] = read(at)
    return replace(suite, records=records)


def feature_dimension(record: Record) -> float:
    """Dimension of the feature space of a record's kernel, at the width of its queries and keys."""
    model = record.config["model"]
    return from_config(record.kernel).feature_dimension(model.get("qk_width") or model["width"] // model["heads"])


def compare(
    suite: SuiteRecords,
    task: str,
    corpus: str | None = None,
    *,
    metric: str | None = None,
    level: float = 0.95,
) -> list[dict[str, Any]]:
    """The variants of a suite beside its reference: means over seeds, and paired differences, with their intervals.

    Parameters
    ----------
    suite : SuiteRecords
    task, corpus : str
        Which group; the corpus is needed only if there are several of the task.
    metric : str, optional
        By default the one by which the task is judged.
    level : float
        Of confidence; see :func:`kernelbook.evaluation.mean_interval`.

    Returns
    -------
    list of dict
        One a variant, in the suite's order: ``label``, ``why``, ``kernel`` (its name); ``values`` (by seed), ``n``,
        ``diverged`` and ``missing`` (numbers of runs), ``mean``, ``sd``, ``low``, ``high``; ``difference``,
        ``difference_low``, ``difference_high`` and ``pairs`` (over the seeds that the reference has too), ``p_value``
        (that the difference is 0) and ``p_adjusted`` (of all the group's, by :func:`kernelbook.evaluation.holm`);
        ``parameters``, ``feature_dimension``, ``wall_time_s`` (the mean) and ``device``.  What is not known is None.

    Raises
    ------
    ValueError
        If there is no such group.
    """
    from .evaluation import holm, mean_interval, paired_difference

    group = suite.group(task, corpus)
    metric = metric or group.metric

    def values(label: str) -> dict[int, float]:
        runs = suite.runs(task, label, group.corpus)
        found = {seed: r.metrics.get(metric) for seed, r in runs.items() if isinstance(r, Record)}
        return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}

    reference = values(suite.reference) if suite.reference in group.names else {}
    rows = []
    for label, names in group.names.items():
        runs, own = suite.runs(task, label, group.corpus), values(label)
        whole = [r for r in runs.values() if isinstance(r, Record)]
        both = {seed: own[seed] for seed in own if seed in reference and label != suite.reference}
        mean = mean_interval(own, level) if own else None
        change = paired_difference(both, {seed: reference[seed] for seed in both}, level) if both else None
        rows.append({
            "label": label, "why": suite.variants.get(label, ""),
            "kernel": next(iter(runs.values())).kernel["kernel"] if runs else None,
            "values": own, "n": len(own), "diverged": sum(isinstance(r, FailedRun) for r in runs.values()),
            "missing": len(names) - len(runs),
            "mean": mean and mean.mean, "sd": statistics.stdev(own.values()) if len(own) > 1 else None,
            "low": mean and mean.low, "high": mean and mean.high,
            "difference": change and change.mean, "difference_low": change and change.low,
            "difference_high": change and change.high, "pairs": len(both),
            "p_value": change and change.p_value,
            "parameters": whole[0].parameters if whole else None,
            "feature_dimension": feature_dimension(whole[0]) if whole else None,
            "wall_time_s": statistics.fmean(r.provenance["wall_time_s"] for r in whole) if whole else None,
            "device": ", ".join(sorted({str(r.provenance.get("device")) for r in whole})) or None})
    adjusted = holm({row["label"]: row["p_value"] for row in rows if row["p_value"] is not None})
    return [row | {"p_adjusted": adjusted.get(row["label"])} for row in rows]


def curves(suite: SuiteRecords, task: str, corpus: str | None = None, *, metric: str = "valid_loss"
           ) -> list[dict[str, Any]]:
    """Learning curves of a suite's variants.

    Runs are validated after each epoch, whose length depends a little on the seed: curves are interpolated to the steps
    of the run that has fewest.

    Parameters
    ----------
    suite : SuiteRecords
    task, corpus : str
        Which group, as in :func:`compare`.
    metric : str
        A key of the records' history.

    Returns
    -------
    list of dict
        One a variant that has a run: ``label``, ``kernel`` (its name), ``steps``, and ``runs``, the metric at these
        steps, one list a seed.  Failed runs are left out.
    """
    import numpy as np

    group, found = suite.group(task, corpus), []
    for label in group.names:
        whole = [r for r in suite.runs(task, label, group.corpus).values() if isinstance(r, Record)]
        lines = [([h["step"] for h in r.history], [h[metric] for h in r.history]) for r in whole
                 if r.history and all(metric in h for h in r.history)]
        if lines:
            steps = min((xs for xs, _ in lines), key=len)
            found.append({"label": label, "kernel": whole[0].kernel["kernel"], "steps": steps,
                          "runs": [np.interp(steps, *line).tolist() for line in lines]})
    return found


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
