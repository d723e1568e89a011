"""One run of any task: from its name and a kernel to a trained model and a record."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import time
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from ..attention.definition import check_normaliser
from ..data import CORPORA, DataError
from ..files import FileError
from ..kernels import Kernel, get
from ..models import ModelConfig
from ..results import Record, provenance
from ..training import Interrupted, OutOfMemory, Settings, fit, load_model, make_fabric, save_model
from ..training import estimate as estimated
from ..training.machine import on_first
from .base import Outcome, Prepared, Preset, TaskKind
from .classification import CLASSIFICATION
from .language_modelling import LANGUAGE_MODELLING
from .one_shot import ONE_SHOT
from .recall import RECALL
from .translation import TRANSLATION

__all__ = ["TASKS", "train", "estimate", "evaluate", "run_name"]

TASKS: dict[str, TaskKind] = {kind.name: kind for kind in (
    TRANSLATION,
    LANGUAGE_MODELLING,
    CLASSIFICATION,
    RECALL,
    ONE_SHOT,
)}
"""Every task by name."""


def find_task(name: str) -> TaskKind:
    """The task of that name; raise if there is none."""
    if name not in TASKS:
        raise ValueError(f"no task is called {name!r} (known: {', '.join(TASKS)})")
    return TASKS[name]


def find_preset(kind: TaskKind, name: str) -> Preset:
    """The preset of that name; raise if the task has none."""
    if name not in kind.presets:
        raise ValueError(f"no preset is called {name!r} (known: {', '.join(kind.presets)})")
    return kind.presets[name]


# ------------------------------------------------------------------------- values instead of a preset's

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", type(None): "none"}
_GIVEN = {"model": {"kernel": "--kernel (kernel=)", "normaliser": "--normaliser (normaliser=)",
                    "vocabulary": "the task, from its corpus"}
          | dict.fromkeys(("architecture", "classes", "pad_id", "features"), "the task"),
          "setting": {"seed": "--seed (seed=)"}, "option": {}}


def overrides(kind: TaskKind, *, model: Mapping[str, Any] | None = None, settings: Mapping[str, Any] | None = None,
              options: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """What is given instead of a preset's values, each of its field's type: ``model``, ``settings``, ``options``.

    Raises
    ------
    ValueError
        If a name is unknown (the message lists the known ones), is set elsewhere, or its value has another type.
    """
    return {"model": _typed("model", model or {}, _field_types(kind.config)),
            "settings": _typed("setting", settings or {}, _field_types(Settings)),
            "options": _typed("option", options or {}, _option_types(kind))}


def _field_types(cls: type) -> dict[str, set[type]]:
    hints = typing.get_type_hints(cls)
    return {f.name: set(typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,))
            for f in fields(cls) for hint in (hints[f.name],)}


def _option_types(kind: TaskKind) -> dict[str, set[type]]:
    """Of the options that any preset of a task has; what a preset lists by corpus is one number for any corpus."""
    found: dict[str, set[type]] = {}
    for preset in (p for size in kind.presets.values() for p in (size, *size.corpora.values())):
        for name, value in preset.options.items():
            values = value.values() if isinstance(value, dict) else (value,)
            found.setdefault(name, set()).update(map(type, values))
    return found


def _typed(what: str, given: Mapping[str, Any], known: Mapping[str, set[type]]) -> dict[str, Any]:
    free = [name for name in known if name not in _GIVEN[what]]
    found = {}
    for name, value in given.items():
        if name in known and name in _GIVEN[what]:
            raise ValueError(f"{what} {name} is given by {_GIVEN[what][name]}")
        if name not in free:
            near = difflib.get_close_matches(name, free, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            kind = {"model": "number of the model"}.get(what, what)
            raise ValueError(f"there is no {kind} called {name!r}{hint} (known: {', '.join(free) or 'none'})")
        wanted, kind = known[name], type(value)
        if kind is str and value.lower() == "none" and type(None) in wanted:
            found[name] = None
        elif kind is int and float in wanted and int not in wanted:
            found[name] = float(value)
        elif kind is float and float not in wanted and int in wanted and value.is_integer():
            found[name] = int(value)        # 1e4 steps
        elif kind in wanted:
            found[name] = value
        else:
            raise ValueError(f"{what} {name} takes {' or '.join(_WORDS[t] for t in _WORDS if t in wanted)}, "
                             f"not {value!r}")
    return found


def run_name(task: str, corpus: str, kernel: str | Kernel, preset: str, seed: int, *, normaliser: str = "sum",
             model: Mapping[str, Any] | None = None, settings: Mapping[str, Any] | None = None,
             options: Mapping[str, Any] | None = None, precision: str = "32-true") -> str:
    """The name of a run: equal names are equal runs.

    What equals the preset's value is left out, as are ``accumulate`` and ``save_every``, which change no result but
    by rounding; the rest is sorted.  A value that cannot stand in the name of a file, such as a kernel made of others,
    is told by the first digits of a hash.

    Parameters
    ----------
    task, corpus : str
        What is learned.
    kernel : str or Kernel
        Its options are part of the name.
    preset : str
        The size.
    seed : int
        Of everything random.
    normaliser : str
        Part of the name unless it is ``"sum"``.
    model, settings, options : dict, optional
        What is given instead of the preset's values.
    precision : str
        Part of the name unless it is ``"32-true"``.

    Returns
    -------
    str
        As in ``translation-multi30k-taylor-degree4-quick-steps500-seed0``.

    Raises
    ------
    ValueError
        As :func:`train` does.
    """
    kind, kernel = find_task(task), get(kernel)
    size = find_preset(kind, preset).of(corpus)
    own = overrides(kind, model=model, settings=settings, options=options)
    usual = {f.name: f.default for f in fields(kind.config)} | size.model
    listed = {name: value.get(corpus) if isinstance(value, dict) else value for name, value in size.options.items()}
    changed = {"model": {k: v for k, v in own["model"].items() if v != usual[k]},
               "settings": {k: v for k, v in own["settings"].items() if v != getattr(size.settings, k)
                            and k not in ("accumulate", "save_every")},
               "options": {k: v for k, v in own["options"].items() if v != listed.get(k)}}
    config = kernel.to_config()
    name = "-".join((task, _file_name(corpus), _file_name(config.pop("kernel")) + _listed(config)
                     + ("" if normaliser == "sum" else f"-{normaliser}") + _listed(changed["model"]),
                     preset + _listed(changed["options"]) + _listed(changed["settings"])
                     + ("" if precision == "32-true" else f"-{precision}"), f"seed{seed}"))
    return name if len(name) <= 200 else f"{name[:190]}-{_digest(name)}"


def _listed(values: Mapping[str, Any]) -> str:
    """Names and values, sorted: equal text for equal values only."""
    text, hashed = "", {}
    for name, value in sorted(_plain(values).items()):
        if isinstance(value, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9.-]*", value) and value not in _LOOK_ALIKES:
            text += f"-{name}{value.replace('-', '_')}"
        elif value is None or isinstance(value, bool | int | float):
            text += f"-{name}" if value is True else f"-{name}{value}"
        else:
            hashed[name] = value
    return text + (f"-{_digest(hashed)}" if hashed else "")


def _plain(value: Any) -> Any:
    """Equal values as the same text: 1.0 as 1, a tuple as a list."""
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


_LOOK_ALIKES = ("True", "False", "None", "inf", "nan")      # as words they would read like values of other types


def _file_name(text: str) -> str:
    """The text itself if it can stand in a file's name, else as much of it as can, and its hash."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", text)
    return plain if plain == text else f"{plain}-{_digest(text)}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()[:8]


# ------------------------------------------------------------------------- training

@dataclass
class _Run:
    """All that a run is before it is trained."""

    task: str
    preset: str
    size: Preset
    fabric: Fabric
    prepared: Prepared
    config: ModelConfig
    name: str
    out: Path
    precision: str
    origin: dict[str, Any]

    def network(self) -> torch.nn.Module:
        """The model as training finds it; the seed decides."""
        torch.manual_seed(self.size.settings.seed)
        return self.config.build()

    def identity(self) -> dict[str, Any]:
        """What, beside the settings, makes the run what it is."""
        return {"kernel": self.config.kernel.to_config(), "normaliser": self.config.normaliser,
                "model": self.config.to_dict(), "data": self.prepared.data["fingerprint"],
                "precision": self.precision}

    def record(self, network: torch.nn.Module, history: list[dict[str, float]], found: Outcome, began: float) -> Record:
        """What came of it."""
        settings, last = self.size.settings, history[-1]
        config = {"model": self.config.to_dict(), "settings": asdict(settings), "options": self.size.options,
                  "decoding": self.prepared.decoding, "precision": self.precision}
        if settings.average or settings.patience:       # then they are not simply those of the last step
            config["weights"] = {"step": last["step"], "of": last.get("stopped", last["step"]),
                                 "average": settings.average}
        return Record(
            name=self.name, task=self.task, preset=self.preset, seed=settings.seed,
            kernel=self.config.kernel.to_config(),
            metrics=found.metrics | {key: value for key, value in last.items() if key.startswith("valid_")},
            baselines=found.baselines, signature=found.signature, data=self.prepared.data, config=config,
            parameters=network.parameter_count, history=history, samples=found.samples,
            provenance=self.origin | {"wall_time_s": round(time.perf_counter() - began, 1)})


def _begin(
    task: str, *, kernel: str | Kernel = "edp", preset: str = "quick", corpus: str | None = None,
    data_dir: str | Path | None = None, seed: int = 0, out: str | Path | None = None, normaliser: str = "sum",
    model: Mapping[str, Any] | None = None, settings: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None, accelerator: str = "cpu", devices: int | str = 1, num_nodes: int = 1,
    strategy: str = "auto", precision: str = "32-true", log_dir: str | Path | None = None,
    report: Callable[[dict[str, Any]], None] = lambda event: None
) -> _Run:
    """Check what was asked for, the quick checks first; start the processes; prepare the corpus."""
    kind = find_task(task)
    size = find_preset(kind, preset)
    kernel = get(kernel)
    check_normaliser(kernel, normaliser)
    own = overrides(kind, model=model, settings=settings, options=options)
    size = size.changed(**own | {"settings": own["settings"] | {"seed": seed}})
    for one in (size, *size.corpora.values()):
        kind.config(**kind.stand_in, kernel=kernel, normaliser=normaliser, **one.model)
    fabric = make_fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy,
                         precision=precision, log_dir=log_dir)
    origin = provenance(fabric.device)
    if fabric.world_size > 1:
        origin |= {"processes": fabric.world_size, "strategy": strategy}
    if fabric.is_global_zero:
        report({"phase": "data"})
    folder, kept = None if data_dir is None else Path(data_dir), []
    # The first process alone downloads; the others find the corpus in the cache.
    on_first(fabric, lambda: kept.append(kind.prepare(corpus, folder, size)))
    prepared = kept[0] if kept else kind.prepare(corpus, folder, size)
    label = prepared.data["corpus"]
    if prepared.data.get("origin") == "directory" and label not in CORPORA:
        label += f"-{prepared.data['fingerprint'][:8]}"     # two readers' folders may bear one name
    name = run_name(task, label, kernel, preset, seed, normaliser=normaliser, precision=precision, **own)
    size = size.of(prepared.data["corpus"])
    config = kind.config(**prepared.config, kernel=kernel, normaliser=normaliser, **size.model)
    return _Run(task, preset, size, fabric, prepared, config, name,
                Path(out) if out is not None else Path("runs") / name, precision, origin)


def train(
    task: str,
    *,
    kernel: str | Kernel = "edp",
    preset: str = "quick",
    corpus: str | None = None,
    data_dir: str | Path | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    normaliser: str = "sum",
    model: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    report: Callable[[dict[str, Any]], None] = lambda event: None,
    **machine: Any,
) -> tuple[Record, Path]:
    """Train a model, evaluate it on held-out data, and write its weights and record.

    Parameters
    ----------
    task : str
        One of :data:`TASKS`.
    kernel : str or Kernel
        Of every attention of the model.
    preset : str
        A name among the presets of the task.
    corpus : str, optional
        A name among :data:`kernelbook.data.CORPORA`; by default the one in ``data_dir``, else the task's own.
    data_dir : path, optional
        Of the corpus in a folder of the reader's own.
    seed : int
        Of everything random.
    out : path, optional
        Folder of the run (default ``runs/`` and the run's name).
    normaliser : str
        As in :func:`kernelbook.attention.attend`.
    model, settings, options : dict, optional
        Instead of the preset's: numbers of the task's model, as of :class:`kernelbook.models.TransformerConfig`, of
        :class:`kernelbook.training.Settings`, and the task's options.
    resume : bool
        Whether to finish a run that was interrupted.
    overwrite : bool
        Whether to replace what an earlier run left in ``out``.
    report : callable
        Gets dictionaries on the progress: ``{"phase": ...}``, ``{"about": ...}``, those of
        :func:`kernelbook.training.fit`, ``{"evaluated": n, "of": n}``.
    **machine
        Where to compute, as for :func:`kernelbook.training.make_fabric`; ``accelerator`` is ``"cpu"`` by default.

    Returns
    -------
    record : Record
    out : Path
        The folder, with ``model.safetensors`` and ``record.json``.

    Raises
    ------
    ValueError
        If the task, the preset or a setting is unknown, the kernel and normaliser do not go together, or this machine
        has no such accelerator.
    FileError
        If ``out`` holds another run, or cannot be written.
    DataError
        If the corpus cannot be had.
    Interrupted
        If training was stopped; ``resume=True`` goes on.
    OutOfMemory
        If the machine has too little of it.
    """
    began = time.perf_counter()
    run = _begin(task, kernel=kernel, preset=preset, corpus=corpus, data_dir=data_dir, seed=seed, out=out,
                 normaliser=normaliser, model=model, settings=settings, options=options, report=report, **machine)
    fabric, prepared, out = run.fabric, run.prepared, run.out
    if resume:
        run.origin["resumed"] = True        # the time is that of the last part
    state_path = out / "state.safetensors"
    tell = report if fabric.is_global_zero else lambda event: None
    on_first(fabric, lambda: check_folder(out, resume=resume, overwrite=overwrite))
    network = run.network()
    tell({"about": {"name": run.name, "data": prepared.about, "parameters": network.parameter_count,
                    "kernel": run.config.kernel, "out": str(out)}})

    def finish() -> Record:
        tell({"phase": "evaluation"})
        try:
            found = prepared.evaluate(network, fabric.device, lambda done, of: tell({"evaluated": done, "of": of}))
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"out of memory in the evaluation ({str(error).partition('.')[0]}); the trained weights "
                              f"are kept in {state_path}: resume on a larger machine, or on the cpu") from error
        record = run.record(network, history, found, began)
        about = {"preset": preset, "corpus": prepared.data["corpus"], "fingerprint": prepared.data["fingerprint"],
                 "settings": asdict(run.size.settings), "options": run.size.options}
        save_model(out / "model.safetensors", network,
                   {"task": task, "record": run.name, "run": about} | prepared.metadata)
        record.save(out / "record.json")
        state_path.unlink(missing_ok=True)      # the run is whole; nothing is left to resume
        return record

    tell({"phase": "training"})
    try:
        history = fit(network, prepared, run.size.settings, fabric=fabric, state_path=state_path, resume=resume,
                      about=run.identity(), report=tell)
        return on_first(fabric, finish), out    # the others wait, and get the record
    except KeyboardInterrupt:
        if not state_path.exists():
            raise
        raise Interrupted(f"stopped at once; what was saved last is in {state_path}") from None


def estimate(task: str, **arguments: Any) -> dict[str, Any]:
    """What a run will take, from a few steps; nothing is written but the cache of a downloaded corpus.

    Parameters
    ----------
    task : str
        One of :data:`TASKS`.
    **arguments
        As for :func:`train`.

    Returns
    -------
    dict
        ``name``, ``out``, ``data`` (a line or more about it), ``device``, and what
        :func:`kernelbook.training.estimate` finds: ``parameters``, ``steps``, ``tokens_per_step``, ``tokens``,
        ``seconds``.

    Raises
    ------
    ValueError, DataError
        As :func:`train` does.
    """
    run = _begin(task, **arguments)
    found = estimated(run.network(), run.prepared, run.size.settings, run.fabric)
    return {"name": run.name, "out": str(run.out), "data": run.prepared.about, "device": str(run.fabric.device)} | found


def check_folder(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise unless a run may be written to a folder; with ``overwrite``, delete an earlier one."""
    there = next(p for p in (out, *out.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise FileError(f"{out} cannot be the folder of a run: {there} is "
                        f"{'read-only' if there.is_dir() else 'not a folder'}; choose another with --out")
    finished, state = (out / "record.json").exists(), (out / "state.safetensors").exists()
    if resume:
        if not state:
            what = "is a finished run" if finished else "holds no interrupted run"
            raise FileError(f"{out} {what}: there is nothing to resume; leave out --resume")
    elif overwrite:
        for name in ("record.json", "model.safetensors", "state.safetensors"):
            (out / name).unlink(missing_ok=True)
    elif finished or state:
        mend = "add --resume to go on with it, " if state else ""
        raise FileError(f"{out} holds {'a finished' if finished else 'an interrupted'} run: {mend}"
                        "add --overwrite to replace it, or choose another folder with --out")


# ------------------------------------------------------------------------- a trained model

def evaluate(
    checkpoint: str | Path,
    *,
    corpus: str | None = None,
    data_dir: str | Path | None = None,
    split: str = "test",
    options: Mapping[str, Any] | None = None,
    report: Callable[[dict[str, Any]], None] = lambda event: None,
) -> tuple[dict[str, Any], Outcome]:
    """Metrics of a trained model on held-out data: without further arguments, those of its record once more.

    Parameters
    ----------
    checkpoint : path
        Folder of a run, or its ``model.safetensors``.
    corpus, data_dir : str and path, optional
        As for :func:`train`; by default the corpus that the model was trained on.
    split : str
        ``"test"`` or ``"valid"``.
    options : dict, optional
        Instead of those of the run, as ``max_words``.
    report : callable
        Gets dictionaries on the progress, as that of :func:`train` does.

    Returns
    -------
    data : dict
        As in :attr:`kernelbook.results.Record.data`, and the ``task``.
    outcome : Outcome

    Raises
    ------
    ValueError
        If there is no such split or option, or the corpus is not one for this model.
    FileError
        If ``checkpoint`` is not a finished model.
    DataError
        If the corpus cannot be had.
    """
    if split not in ("test", "valid"):
        raise ValueError(f"the split is test or valid, not {split!r}")
    network, metadata = load_model(checkpoint)
    kind, about = find_task(metadata.get("task")), metadata.get("run")
    if about is None:
        raise ValueError(f"{checkpoint} does not say how its corpus was prepared; train the model anew with this "
                         "version of kernelbook")
    if not isinstance(network.config, kind.config):
        raise ValueError(f"{checkpoint} holds a {type(network).__name__}, and no model of {kind.name}: the file was "
                         "put together from two")
    own = overrides(kind, options=options)["options"]
    size = Preset(Settings(**about["settings"]), {}, about["options"] | own, metadata=metadata)
    own_folder = corpus is None and data_dir is None and about["corpus"] not in CORPORA
    if corpus is None and data_dir is None:
        corpus = about["corpus"]
    report({"phase": "data"})
    try:
        prepared = kind.prepare(corpus, None if data_dir is None else Path(data_dir), size)
    except DataError as error:
        if own_folder:
            raise DataError(f"{error}. The model was trained on a folder: name it with --data-dir") from None
        raise
    plain = json.loads(json.dumps(prepared.metadata))       # as it is stored: a tuple is a list there
    if differing := [key for key, value in plain.items() if metadata.get(key) != value]:
        raise ValueError(f"the model was trained on other data than {prepared.data['name']}: they differ in "
                         f"{', '.join(differing)}; evaluate it on its own corpus, {about['corpus']}")
    report({"phase": "evaluation"})
    device = next(network.parameters()).device
    return prepared.data | {"task": kind.name}, prepared.evaluate(
        network, device, lambda done, of: report({"evaluated": done, "of": of}), split=split)
