"""One run of any task: from its name and a kernel to a trained model and a record."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from ..attention.definition import check_normaliser
from ..files import FileError
from ..kernels import Kernel, get
from ..models import Transformer, TransformerConfig
from ..results import Record, provenance
from ..training import Interrupted, fit, save_model
from .base import TaskKind
from .translation import TRANSLATION

__all__ = ["TASKS", "train", "run_name"]

TASKS: dict[str, TaskKind] = {kind.name: kind for kind in (TRANSLATION,)}
"""Every task by name."""


def find_task(name: str) -> TaskKind:
    """The task of that name; raise if there is none."""
    if name not in TASKS:
        raise ValueError(f"no task is called {name!r} (known: {', '.join(TASKS)})")
    return TASKS[name]


def run_name(task: str, corpus: str, kernel: Kernel, preset: str, seed: int, *, normaliser: str = "sum",
             model: Mapping[str, Any] | None = None, settings: Mapping[str, Any] | None = None) -> str:
    """The name of a run: equal names are equal runs.

    Parameters
    ----------
    task, corpus : str
        What is learned.
    kernel : Kernel
        Its options are part of the name.
    preset : str
        The size.
    seed : int
        Of everything random.
    normaliser : str
        Part of the name unless it is ``"sum"``.
    model, settings : dict, optional
        What differs from the preset.

    Returns
    -------
    str
        As in ``translation-multi30k-taylor-degree4-quick-steps500-seed0``.
    """
    def listed(options: Mapping[str, Any]) -> str:
        return "".join(f"-{key}" if value is True else f"-{key}{value}" for key, value in options.items()
                       if not isinstance(value, Kernel))

    label = kernel.to_config()["kernel"] + listed(kernel.options()) + ("" if normaliser == "sum" else f"-{normaliser}")
    return f"{task}-{corpus}-{label}{listed(model or {})}-{preset}{listed(settings or {})}-seed{seed}"


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
    resume: bool = False,
    overwrite: bool = False,
    accelerator: str = "cpu",
    precision: str = "32-true",
    report: Callable[[dict[str, Any]], None] = lambda event: None,
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
    model, settings : dict, optional
        Instead of the preset's: numbers of :class:`kernelbook.models.TransformerConfig` and of
        :class:`kernelbook.training.Settings`.
    resume : bool
        Whether to finish a run that was interrupted.
    overwrite : bool
        Whether to replace what an earlier run left in ``out``.
    accelerator, precision : str
        As Lightning Fabric names them.
    report : callable
        Gets dictionaries on the progress: ``{"phase": ...}``, ``{"about": ...}``, those of
        :func:`kernelbook.training.fit`, ``{"evaluated": n, "of": n}``.

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
    """
    began = time.perf_counter()
    kind = find_task(task)
    if preset not in kind.presets:
        raise ValueError(f"no preset is called {preset!r} (known: {', '.join(kind.presets)})")
    kernel = get(kernel)
    check_normaliser(kernel, normaliser)
    size = kind.presets[preset]
    own_model, own_settings = dict(model or {}), dict(settings or {})
    size = replace(size, settings=replace(size.settings, seed=seed, **own_settings), model=size.model | own_model)
    try:
        fabric = Fabric(accelerator=accelerator, devices=1, precision=precision)
    except (RuntimeError, ImportError) as error:
        raise ValueError(f"accelerator {accelerator!r} with precision {precision!r} cannot be had: {error}") from None
    origin = provenance(fabric.device)
    report({"phase": "data"})
    prepared = kind.prepare(corpus, None if data_dir is None else Path(data_dir), size)
    name = run_name(task, prepared.data["corpus"], kernel, preset, seed, normaliser=normaliser, model=own_model,
                    settings=own_settings)
    out = Path(out) if out is not None else Path("runs") / name
    state_path = out / "state.safetensors"
    check_folder(out, resume=resume, overwrite=overwrite)

    torch.manual_seed(seed)
    config = TransformerConfig(**prepared.config, kernel=kernel, normaliser=normaliser, **size.model)
    network = Transformer(config)
    report({"about": {"name": name, "data": prepared.about, "parameters": network.parameter_count, "kernel": kernel,
                      "out": str(out)}})
    report({"phase": "training"})
    identity = {"kernel": kernel.to_config(), "normaliser": normaliser, "model": config.to_dict(),
                "data": prepared.data["fingerprint"], "precision": precision}
    try:
        history = fit(network, prepared, size.settings, fabric=fabric, state_path=state_path, resume=resume,
                      about=identity, report=report)
        report({"phase": "evaluation"})
        found = prepared.evaluate(network, fabric.device, lambda done, of: report({"evaluated": done, "of": of}))
    except KeyboardInterrupt:
        if not state_path.exists():
            raise
        raise Interrupted(f"stopped at once; what was saved last is in {state_path}") from None
    last = {key: value for key, value in history[-1].items() if key.startswith("valid_")}
    record = Record(
        name=name, task=task, preset=preset, seed=seed, kernel=kernel.to_config(), metrics=found.metrics | last,
        baselines=found.baselines, signature=found.signature, data=prepared.data,
        config={"model": config.to_dict(), "settings": asdict(size.settings), "decoding": prepared.decoding,
                "precision": precision},
        parameters=network.parameter_count, history=history, samples=found.samples,
        provenance=origin | {"wall_time_s": round(time.perf_counter() - began, 1)})
    save_model(out / "model.safetensors", network, {"task": task, "record": name} | prepared.metadata)
    record.save(out / "record.json")
    state_path.unlink(missing_ok=True)      # the run is whole; nothing is left to resume
    return record, out


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
