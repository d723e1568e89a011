"""One run of any task: from its name and a kernel to a trained model and a record."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import time
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from ..attention.definition import check_normaliser
from ..data import CORPORA
from ..files import FileError
from ..kernels import Kernel, get
from ..models import Transformer, TransformerConfig
from ..results import Record, provenance
from ..training import Interrupted, Settings, fit, load_model, save_model
from .base import Outcome, Prepared, Preset, TaskKind
from .translation import TRANSLATION

__all__ = ["TASKS", "train", "evaluate", "run_name"]

TASKS: dict[str, TaskKind] = {kind.name: kind for kind in (
    TRANSLATION,
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
          | dict.fromkeys(("architecture", "classes", "pad_id"), "the task"),
          "setting": {"seed": "--seed (seed=)"}, "option": {}}


def overrides(kind: TaskKind, *, model: Mapping[str, Any] | None = None, settings: Mapping[str, Any] | None = None,
              options: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """What is given instead of a preset's values, each of its field's type: ``model``, ``settings``, ``options``.

    Raises
    ------
    ValueError
        If a name is unknown (the message lists the known ones), is set elsewhere, or its value has another type.
    """
    return {"model": _typed("model", model or {}, _field_types(TransformerConfig)),
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
        if name in _GIVEN[what]:
            raise ValueError(f"{what} {name} is given by {_GIVEN[what][name]}")
        if name not in free:
            near = difflib.get_close_matches(name, free, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"there is no {what} called {name!r}{hint} (known: {', '.join(free) or 'none'})")
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

    What equals the preset's value is left out, and the rest is sorted.  A value that cannot stand in the name of a
    file, such as a kernel made of others, is told by the first digits of a hash.

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
    usual = {f.name: f.default for f in fields(TransformerConfig)} | size.model
    listed = {name: value.get(corpus) if isinstance(value, dict) else value for name, value in size.options.items()}
    changed = {"model": {k: v for k, v in own["model"].items() if v != usual[k]},
               "settings": {k: v for k, v in own["settings"].items() if v != getattr(size.settings, k)},
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
    for name, value in sorted(values.items()):
        if isinstance(value, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9.-]*", value) and value not in _LOOK_ALIKES:
            text += f"-{name}{value.replace('-', '_')}"
        elif value is None or isinstance(value, bool | int) or isinstance(value, float) and not math.isnan(value):
            text += f"-{name}" if value is True else f"-{name}{value}"
        else:
            hashed[name] = value
    return text + (f"-{_digest(hashed)}" if hashed else "")


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

    kind: TaskKind
    preset: str
    size: Preset
    fabric: Fabric
    prepared: Prepared
    config: TransformerConfig
    name: str
    out: Path
    precision: str
    origin: dict[str, Any]


def _begin(task: str, *, kernel: str | Kernel, preset: str, corpus: str | None, data_dir: str | Path | None, seed: int,
           out: str | Path | None, normaliser: str, model: Mapping[str, Any] | None,
           settings: Mapping[str, Any] | None, options: Mapping[str, Any] | None, machine: Mapping[str, Any],
           report: Callable[[dict[str, Any]], None]) -> _Run:
    """Check what was asked for, the quick checks first, and prepare the corpus."""
    kind = find_task(task)
    size = find_preset(kind, preset)
    kernel = get(kernel)
    check_normaliser(kernel, normaliser)
    own = overrides(kind, model=model, settings=settings, options=options)
    size = size.changed(**own | {"settings": own["settings"] | {"seed": seed}})
    for one in (size, *size.corpora.values()):
        TransformerConfig("decoder", vocabulary=1, kernel=kernel, normaliser=normaliser, **one.model)
    fabric = _fabric(**machine)
    origin = provenance(fabric.device)
    if fabric.world_size > 1:
        origin |= {"processes": fabric.world_size, "strategy": str(machine.get("strategy", "auto"))}
    if fabric.is_global_zero:
        report({"phase": "data"})
    folder = None if data_dir is None else Path(data_dir)
    prepared = first_alone(fabric, lambda: kind.prepare(corpus, folder, size))      # it may download
    if prepared is None:
        prepared = kind.prepare(corpus, folder, size)
    label = prepared.data["corpus"]
    if prepared.data.get("origin") == "directory" and label not in CORPORA:
        label += f"-{prepared.data['fingerprint'][:8]}"     # two readers' folders may bear one name
    precision = machine.get("precision", "32-true")
    name = run_name(task, label, kernel, preset, seed, normaliser=normaliser, precision=precision, **own)
    size = size.of(prepared.data["corpus"])
    config = TransformerConfig(**prepared.config, kernel=kernel, normaliser=normaliser, **size.model)
    return _Run(kind, preset, size, fabric, prepared, config, name,
                Path(out) if out is not None else Path("runs") / name, precision, origin)


def _fabric(*, accelerator: str = "cpu", precision: str = "32-true") -> Fabric:
    try:
        return Fabric(accelerator=accelerator, devices=1, precision=precision)
    except (RuntimeError, ImportError) as error:
        raise ValueError(f"accelerator {accelerator!r} with precision {precision!r} cannot be had: {error}") from None


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
        Instead of the preset's: numbers of :class:`kernelbook.models.TransformerConfig`, of
        :class:`kernelbook.training.Settings`, and the task's options.
    resume : bool
        Whether to finish a run that was interrupted.
    overwrite : bool
        Whether to replace what an earlier run left in ``out``.
    report : callable
        Gets dictionaries on the progress: ``{"phase": ...}``, ``{"about": ...}``, those of
        :func:`kernelbook.training.fit`, ``{"evaluated": n, "of": n}``.
    **machine
        Where to compute: ``accelerator`` (by default ``"cpu"``) and ``precision``, as Lightning Fabric names them.

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
    MemoryError
        If the machine has too little of it.
    """
    began = time.perf_counter()
    run = _begin(task, kernel=kernel, preset=preset, corpus=corpus, data_dir=data_dir, seed=seed, out=out,
                 normaliser=normaliser, model=model, settings=settings, options=options, machine=machine,
                 report=report)
    fabric, prepared, out, settings = run.fabric, run.prepared, run.out, run.size.settings
    if not fabric.is_global_zero:
        def report(event: dict[str, Any]) -> None:
            pass
    first_alone(fabric, lambda: check_folder(out, resume=resume, overwrite=overwrite))
    state_path = out / "state.safetensors"
    torch.manual_seed(seed)
    network = Transformer(run.config)
    report({"about": {"name": run.name, "data": prepared.about, "parameters": network.parameter_count,
                      "kernel": run.config.kernel, "out": str(out)}})
    identity = {"kernel": run.config.kernel.to_config(), "normaliser": normaliser, "model": run.config.to_dict(),
                "data": prepared.data["fingerprint"], "precision": run.precision}
    if overwrite:
        first_alone(fabric, lambda: _delete(out))

    def finish() -> Record:
        report({"phase": "evaluation"})
        found = prepared.evaluate(network, fabric.device, lambda done, of: report({"evaluated": done, "of": of}))
        last = {key: value for key, value in history[-1].items() if key.startswith("valid_")}
        record = Record(
            name=run.name, task=task, preset=preset, seed=seed, kernel=run.config.kernel.to_config(),
            metrics=found.metrics | last, baselines=found.baselines, signature=found.signature, data=prepared.data,
            config={"model": run.config.to_dict(), "settings": asdict(settings), "decoding": prepared.decoding,
                    "precision": run.precision},
            parameters=network.parameter_count, history=history, samples=found.samples,
            provenance=run.origin | {"wall_time_s": round(time.perf_counter() - began, 1)})
        about = {"preset": preset, "corpus": prepared.data["corpus"], "fingerprint": prepared.data["fingerprint"],
                 "settings": asdict(settings), "options": run.size.options}
        save_model(out / "model.safetensors", network,
                   {"task": task, "record": run.name, "run": about} | prepared.metadata)
        record.save(out / "record.json")
        state_path.unlink(missing_ok=True)      # the run is whole; nothing is left to resume
        return record

    report({"phase": "training"})
    try:
        with _memory_told(settings, state_path):
            history = fit(network, prepared, settings, fabric=fabric, state_path=state_path, resume=resume,
                          about=identity, report=report)
            record = first_alone(fabric, finish)
    except KeyboardInterrupt:
        if not state_path.exists():
            raise
        raise Interrupted(f"stopped at once; what was saved last is in {state_path}") from None
    return (record if fabric.world_size == 1 else fabric.broadcast(record)), out


class Elsewhere(RuntimeError):
    """Another process of the run failed, and says why."""


def first_alone(fabric: Fabric, act: Callable[[], Any]) -> Any:
    """What ``act()`` returns, done by the first process while the others wait: they get None, or fail as it does."""
    if fabric.world_size == 1:
        return act()
    result, failure = None, None
    if fabric.is_global_zero:
        try:
            result = act()
        except Exception as error:
            failure = error
    message = fabric.broadcast(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    if message is not None:
        raise Elsewhere(f"the first process failed: {message}")
    return result


@contextmanager
def _memory_told(settings: Settings, state_path: Path) -> Iterator[None]:
    """Where memory runs out, say what would take less of it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = str(error)
        if not isinstance(error, MemoryError) and not re.search(r"out of memory|n.t allocate memory|not enough memory",
                                                                said):
            raise
        kept = f"; what was saved last is in {state_path}" if state_path.exists() else ""
        raise MemoryError(f"out of memory{kept}. Lower the tokens of a batch (now --setting batch_tokens="
                          f"{settings.batch_tokens}), or choose a smaller --preset or model (--model width=..., "
                          f"layers=...). The machine says: {(said.splitlines() or ['nothing'])[0]}") from error


def check_folder(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise unless a run may be written to a folder."""
    there = next(p for p in (out, *out.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise FileError(f"{out} cannot be the folder of a run: {there} is "
                        f"{'read-only' if there.is_dir() else 'not a folder'}; choose another with --out")
    finished, state = (out / "record.json").exists(), (out / "state.safetensors").exists()
    if resume:
        if not state:
            what = "is a finished run" if finished else "holds no interrupted run"
            raise FileError(f"{out} {what}: there is nothing to resume; leave out --resume")
    elif (finished or state) and not overwrite:
        mend = "add --resume to go on with it, " if state else ""
        raise FileError(f"{out} holds {'a finished' if finished else 'an interrupted'} run: {mend}"
                        "add --overwrite to replace it, or choose another folder with --out")


def _delete(out: Path) -> None:
    """What an earlier run left."""
    for name in ("record.json", "model.safetensors", "state.safetensors"):
        (out / name).unlink(missing_ok=True)


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
    own = overrides(kind, options=options)["options"]
    size = Preset(Settings(**about["settings"]), {}, about["options"] | own, metadata=metadata)
    if corpus is None and data_dir is None and about["corpus"] in CORPORA:
        corpus = about["corpus"]
    report({"phase": "data"})
    prepared = kind.prepare(corpus, None if data_dir is None else Path(data_dir), size)
    plain = json.loads(json.dumps(prepared.metadata))       # as it is stored: a tuple is a list there
    if differing := [key for key, value in plain.items() if metadata.get(key) != value]:
        raise ValueError(f"the model was trained on other data than {prepared.data['name']}: they differ in "
                         f"{', '.join(differing)}; evaluate it on its own corpus, {about['corpus']}")
    report({"phase": "evaluation"})
    device = next(network.parameters()).device
    return prepared.data | {"task": kind.name}, prepared.evaluate(
        network, device, lambda done, of: report({"evaluated": done, "of": of}), split=split)
