"""The loop that trains every task."""

from __future__ import annotations

import copy
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from .machine import on_first, total
from .settings import Settings, learning_rate
from .state import Learner, Position, snapshot

__all__ = ["Task", "Interrupted", "OutOfMemory", "fit", "estimate"]


class Task(Protocol):
    """What the loop needs to know of a task."""

    def batches(self, epoch: int) -> list[list[int]]:
        """The training examples of each batch, in order; the same at every call and in every process."""

    def loss(self, model: nn.Module, indices: list[int], device: torch.device) -> tuple[Tensor, int]:
        """Mean loss per target of some examples, and the number of targets; the model is called as a whole."""

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Numbers to report: ``valid_loss``, in nats per target, and what else is worth a curve (``valid_...``)."""


class Interrupted(RuntimeError):
    """Training was stopped by the user, or by the system's request to end; its state is saved and it can go on."""


class OutOfMemory(ValueError):
    """A step does not fit into the memory of the device; the message says which settings to change."""


def fit(
    model: nn.Module,
    task: Task,
    settings: Settings,
    *,
    fabric: Fabric,
    state_path: Path,
    resume: bool = False,
    about: dict[str, Any] | None = None,
    report: Callable[[dict[str, Any]], None] = lambda event: None,
) -> list[dict[str, float]]:
    r"""Train a model, and save the state on the way, so that a run that was stopped or killed can go on.

    The state holds all that the rest of the run depends on: a run that is resumed ends, on the CPU, with the very
    weights it would have had.

    The model ends with the weights of the last step; with ``settings.average``, with their exponential average

    .. math:: \frac{1-b}{1-b^t}\sum_{i=1}^{t} b^{t-i}\,w_i

    instead, whose weights add up to 1 at every step; with ``settings.patience``, with those of the two that had the
    lowest ``valid_loss``.

    With several processes each takes its share of every batch, ``indices[rank::processes]``, and the losses of the
    shares are weighed by their targets: the update is that of one process on the whole batch, up to rounding and the
    draws of dropout, which are its own in every process.  The first process alone validates, saves and reports; with
    FSDP it alone has the weights of the result.

    Parameters
    ----------
    model : Module
        Trained in place.
    task : Task
        What it learns.
    settings : Settings
        How.
    fabric : Fabric
        Where: from :func:`make_fabric`.
    state_path : Path
        Of the file from which to resume.  It is written after every validation, every ``settings.save_every`` minutes,
        and when training is stopped.
    resume : bool
        Whether to go on from that file.
    about : dict, optional
        Plain values that, beside the settings, make the run what it is (its kernel, its data): a state is resumed only
        by the run that agrees with it in all of them.  ``accumulate`` and ``save_every`` may differ.
    report : callable
        Gets a dictionary a step (``step``, ``total``, ``epoch``, ``loss``, ``tokens``), one a validation
        (``history``), and, if the run stops early, one at its end (``stopped``: the step, ``best``: that of the
        weights it ends with).

    Returns
    -------
    list of dict
        One a validation: ``epoch``, ``step``, ``train_loss`` (since the last one), and what the task's ``validate``
        reports.  The last entry is that of the weights the model ends with: where ``patience`` chose earlier ones,
        their entry is repeated at the end, with ``stopped``, the step at which training ended.

    Raises
    ------
    Interrupted
        After Ctrl-C or SIGTERM in any process, at the end of the step under way, with the state saved.
    FileError
        If the state cannot be written or read, or does not belong to this run.
    FloatingPointError
        If the loss is no longer finite; the state saved last is kept.
    OutOfMemory
        If a step does not fit into memory; the state saved last is kept.
    """
    _seed(settings, fabric)
    learner = Learner(model, settings, fabric)
    # What has no influence on the result, or on its rounding and dropout only, may change when a run is resumed.
    identity = (about or {}) | {name: value for name, value in dataclasses.asdict(settings).items()
                                if name not in ("accumulate", "save_every")}
    at = learner.load(state_path, identity) if resume else Position()
    if fabric.is_global_zero:
        for left in state_path.parent.glob(f".{state_path.name}.*.tmp"):
            left.unlink(missing_ok=True)        # of a process that was killed while it wrote
    saved = time.monotonic()

    with _stop_signals() as stop, _memory_guard(settings, at, state_path):
        learner.module.train()
        while at.step < settings.steps and not at.stopped:
            batches = task.batches(at.epoch)
            if not batches:
                raise ValueError(f"epoch {at.epoch + 1} has no batch: there are no examples to train on")
            for indices in batches[at.batch:]:
                loss_sum, count = _update(learner, task, indices, settings, fabric, at.step)
                at.batch, at.step = at.batch + 1, at.step + 1
                at.loss_sum, at.count = at.loss_sum + loss_sum, at.count + count
                if fabric.is_global_zero:
                    report({"step": at.step, "total": settings.steps, "epoch": at.epoch + 1, "loss": loss_sum / count,
                            "tokens": count})
                fabric.log_dict({"train_loss": loss_sum / count, "learning_rate": learner.adamw.param_groups[0]["lr"]},
                                step=at.step)
                epoch_ends = at.batch == len(batches)
                validate = at.step == settings.steps or (
                    epoch_ends if settings.validate_every is None else at.step % settings.validate_every == 0)
                if validate:
                    _validate(learner, task, settings, fabric, at, report)
                if epoch_ends:
                    at.epoch, at.batch = at.epoch + 1, 0
                late = fabric.is_global_zero and time.monotonic() - saved >= 60 * settings.save_every
                stops, lates = total(fabric, stop.is_set(), late)       # all processes stop and save at the same step
                if validate or stops or lates:
                    learner.save(state_path, identity, at)
                    saved = time.monotonic()
                if stops:           # after the last step too: what comes then may take long
                    raise Interrupted(f"stopped after step {at.step} of {settings.steps}; the state is in {state_path}")
                if at.step == settings.steps or at.stopped:
                    break
    return _finish(learner, fabric, at, report)


def _update(learner: Learner, task: Task, indices: list[int], settings: Settings, fabric: Fabric,
            step: int) -> tuple[float, int]:
    """One update from a batch of all processes; the sum of its losses, and the number of its targets.

    The gradient of the mean loss per target, from parts of which each knows its own mean loss and targets only.  All
    are scaled by the targets of the first parts of all processes, known before the first gradient; what comes after
    is made up for at the end.
    """
    optimiser, processes = learner.optimiser, fabric.world_size
    for group in learner.adamw.param_groups:
        group["lr"] = learning_rate(step, settings)
    optimiser.zero_grad(set_to_none=True)
    own = indices[fabric.global_rank::processes]
    parts = min(settings.accumulate, math.ceil(len(indices) / processes))       # the same number in all processes
    loss_sum, count, unit = 0.0, 0, 0
    for i in range(parts):
        part = own[i::parts]
        with fabric.no_backward_sync(learner.module, enabled=i < parts - 1):
            # DDP needs every process in every pass: one without a share takes any example, at weight 0.
            loss, targets = task.loss(learner.module, part or indices[:1], fabric.device)
            targets = targets if part else 0
            more, found = total(fabric, loss.item() * targets, targets)
            loss_sum, count = loss_sum + more, count + int(found)
            if not math.isfinite(loss_sum):
                raise FloatingPointError(
                    f"the loss became {loss_sum / max(count, 1)} in step {step + 1} of {settings.steps}; lower the "
                    "learning rate, or choose a kernel and normaliser whose weights stay bounded")
            unit = unit or count
            fabric.backward(loss * (targets * processes / unit))        # times 1 exactly, where the batch is not split
    if parts > 1:
        for p in learner.inner.parameters():
            if p.grad is not None:
                p.grad.mul_(unit / count)
    fabric.clip_gradients(learner.module, optimiser, max_norm=settings.clip, error_if_nonfinite=False)
    optimiser.step()
    if learner.average is not None:
        learner.average.update(step + 1)
    return loss_sum, count


def _validate(learner: Learner, task: Task, settings: Settings, fabric: Fabric, at: Position,
              report: Callable[[dict[str, Any]], None]) -> None:
    """Add an entry to the history, and decide whether the weights are the best and training has waited long enough."""
    with learner.result() as model:
        learner.module.eval()
        model.eval()
        with torch.no_grad(), fabric.autocast():
            found = {"epoch": at.epoch + 1, "step": at.step, "train_loss": at.loss_sum / at.count}
            # A pass of the first process alone must not be one of DDP's, in which all take part.
            shown = learner.module if fabric.world_size == 1 else model
            found |= on_first(fabric, lambda: task.validate(shown, fabric.device))
        if wrong := [key for key, value in found.items() if not math.isfinite(value)]:
            # Its gradient was not finite though its loss was: the weights are lost, the last state is not.
            raise FloatingPointError(f"{', '.join(wrong)} not finite after step {at.step} of {settings.steps}; "
                                     "lower the learning rate")
        entry = {key: round(value, 6) for key, value in found.items()}
        at.history.append(entry)
        at.loss_sum, at.count = 0.0, 0
        if settings.patience:
            if at.best is None or entry["valid_loss"] < at.best["valid_loss"]:
                at.best, at.waited, learner.best = entry, 0, snapshot(model)
            else:
                at.waited += 1
                at.stopped = at.waited >= settings.patience
    model.train()
    learner.module.train()
    if fabric.is_global_zero:
        report({"history": entry})
    fabric.log_dict({key: value for key, value in entry.items() if key.startswith("valid_")}, step=at.step)


def _finish(learner: Learner, fabric: Fabric, at: Position,
            report: Callable[[dict[str, Any]], None]) -> list[dict[str, float]]:
    """Give the model the weights that training ends with; the history, with their entry last."""
    learner.finish(best=at.best is not None)
    for logger in fabric.loggers:
        logger.finalize("success")
    if at.best is None or at.best == at.history[-1]:
        return at.history
    if at.stopped and fabric.is_global_zero:
        report({"stopped": at.step, "best": at.best["step"]})
    return [*at.history, at.best | {"stopped": at.step}]


def estimate(model: nn.Module, task: Task, settings: Settings, fabric: Fabric, steps: int = 3) -> dict[str, float]:
    """What a run will take, from a few steps of a copy; the model and the random numbers stay as they are.

    The steps are batches of the first epoch, from its fewest examples to its most.  Time for validation and for the
    evaluation afterwards is not counted.

    Parameters
    ----------
    model, task, settings, fabric
        As for :func:`fit`; with several processes, all of them make this call.
    steps : int
        So many are timed, after one that is not.

    Returns
    -------
    dict
        ``parameters``; ``steps``; ``tokens_per_step``, its targets, on average; ``tokens``, in all; ``seconds``.

    Raises
    ------
    OutOfMemory, FloatingPointError
        As :func:`fit` does.
    """
    plan = sorted(task.batches(0)[:settings.steps], key=len)
    if not plan:
        raise ValueError("there are no examples to train on")
    chosen = [plan[(2 * i + 1) * len(plan) // (2 * steps)] for i in range(steps)]
    tokens, seconds = 0, 0.0
    device = fabric.device
    with torch.random.fork_rng([] if device.type == "cpu" else [device],
                               device_type="cuda" if device.type == "cpu" else device.type), \
            _memory_guard(settings, Position(), None):
        learner = Learner(copy.deepcopy(model), settings, fabric)
        learner.module.train()
        for number, indices in enumerate([chosen[-1], *chosen]):
            began = time.perf_counter()
            _, count = _update(learner, task, indices, settings, fabric, 0)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                tokens, seconds = tokens + count, seconds + time.perf_counter() - began
    per_step = tokens / sum(map(len, chosen)) * sum(map(len, plan)) / len(plan)
    return {"parameters": sum(p.numel() for p in model.parameters()), "steps": settings.steps,
            "tokens_per_step": per_step, "tokens": round(per_step * settings.steps),
            "seconds": seconds / steps * settings.steps}


def _seed(settings: Settings, fabric: Fabric) -> None:
    """Seed dropout, in every process with numbers of its own; the model's own draw was made by whoever built it."""
    # The CPU's generator takes the lower 32 bits of a seed only, and other runs have seeds next to this one.
    torch.manual_seed((settings.seed + 1 + 1_000_003 * fabric.global_rank) % 2**63)


@contextmanager
def _memory_guard(settings: Settings, at: Position, state_path: Path | None) -> Iterator[None]:
    """Say what to do where memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if not (isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in text
                or "DefaultCPUAllocator" in text):
            raise
        kept = ""
        if state_path is not None and state_path.exists():
            kept = (f". The state saved last is kept in {state_path}: with a larger accumulate it can be resumed")
        raise OutOfMemory(
            f"out of memory in step {at.step + 1} of {settings.steps} ({text.strip().splitlines()[0] if text else ''}):"
            f" raise accumulate (it is {settings.accumulate}), lower batch_tokens ({settings.batch_tokens}), or choose "
            f"a smaller width, fewer layers, or precision bf16-mixed{kept}") from error


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second Ctrl-C stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event         # signals reach the main thread only
        return

    def handle(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
