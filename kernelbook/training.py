"""The training loop, and the two files it writes: the state from which it resumes, and the finished model.

One loop serves every task.  It runs under Lightning Fabric, which places the model and chooses the precision.  A run
is a function of its settings and seed: batches are drawn from (seed, epoch) alone, and the state holds the rest
(weights, optimiser, random numbers, position), so a run that was stopped and resumed ends with the weights it would
have had.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from .files import FileError, load_tensors, save_tensors

__all__ = ["Settings", "Task", "Interrupted", "fit", "learning_rate", "save_model", "load_model"]


@dataclass(frozen=True)
class Settings:
    """How a model is trained.

    Parameters
    ----------
    steps : int
        Updates of the weights: the budget of the run, whatever the size of the corpus.
    batch_tokens : int
        Padded tokens a batch, of the longer side.
    learning_rate : float
        At its peak.
    warmup : float
        Part of all steps during which it rises.
    label_smoothing : float
        Part of the target distribution spread over the whole vocabulary.
    weight_decay : float
        Of AdamW, for weight matrices.
    clip : float
        Largest norm of the gradient.
    seed : int
        Of initial weights, dropout and batches.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    steps: int = 1000
    batch_tokens: int = 4096
    learning_rate: float = 1e-3
    warmup: float = 0.1
    label_smoothing: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, what in (
            ("steps", self.steps >= 1, "at least 1"), ("batch_tokens", self.batch_tokens >= 1, "at least 1"),
            ("learning_rate", self.learning_rate > 0, "positive"), ("warmup", 0 <= self.warmup <= 1, "from 0 to 1"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "at least 0 and below 1"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"), ("clip", self.clip > 0, "positive"),
            ("seed", 0 <= self.seed < 2**63, "a non-negative integer"),
        ):
            if not fits:
                raise ValueError(f"{name} must be {what}, not {getattr(self, name)}")


class Task(Protocol):
    """What the loop needs to know of a task."""

    def batches(self, epoch: int) -> list[list[int]]:
        """The training examples of each batch, in order; the same at every call."""

    def loss(self, model: nn.Module, indices: list[int], device: torch.device) -> tuple[Tensor, int]:
        """Mean loss per target of a batch, and the number of targets."""

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Numbers to report after each epoch."""


class Interrupted(RuntimeError):
    """Training was stopped by the user, or by the system's request to end; its state is saved and it can go on."""


def learning_rate(step: int, settings: Settings) -> float:
    r"""Learning rate of a step: linear warm-up, then linear decay to 0.

    .. math:: \eta_t = \eta \min\Bigl(\frac{t+1}{T_w},\; \frac{T-t}{T-T_w}\Bigr), \qquad
              T_w = \max(1, \mathrm{round}(\text{warmup}\cdot T)).

    Parameters
    ----------
    step : int
        :math:`t`, from 0.
    settings : Settings
        With the steps :math:`T`, the peak :math:`\eta` and the warm-up.

    Returns
    -------
    float
    """
    warm = max(1, round(settings.warmup * settings.steps))
    return settings.learning_rate * min((step + 1) / warm, (settings.steps - step) / max(1, settings.steps - warm))


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
    """Train a model; save the state after every epoch, and when interrupted.

    Parameters
    ----------
    model : Module
        Trained in place.
    task : Task
        What it learns.
    settings : Settings
        How.
    fabric : Fabric
        Where: device and precision.
    state_path : Path
        Of the file from which to resume.
    resume : bool
        Whether to go on from that file.
    about : dict, optional
        Plain values that, beside the settings, make the run what it is (its kernel, its data): a state is resumed only
        by the run that agrees with it in all of them.
    report : callable
        Gets a dictionary a step (``step``, ``total``, ``epoch``, ``loss``, ``tokens``) and one an epoch (``history``).

    Returns
    -------
    list of dict
        One an epoch: ``epoch``, ``train_loss``, and what the task's ``validate`` reports.

    Raises
    ------
    Interrupted
        After Ctrl-C or SIGTERM, at the end of the step under way, with the state saved.
    FileError
        If the state cannot be written, or does not belong to this run.
    FloatingPointError
        If the loss is no longer finite.
    """
    torch.manual_seed(settings.seed + 1)        # dropout; the model's own draw was made by whoever built it
    optimiser = torch.optim.AdamW(_groups(model, settings), lr=settings.learning_rate, betas=(0.9, 0.98))
    setup_model, optimiser = fabric.setup(model, optimiser)
    identity = (about or {}) | dataclasses.asdict(settings)
    at = _Position()
    if resume:
        at = _load_state(state_path, model, optimiser, identity)
        fabric.to_device(model)

    def save() -> None:
        _save_state(state_path, model, optimiser, identity, at)

    with _stop_signals() as stop:
        while at.step < settings.steps:
            setup_model.train()
            batches = task.batches(at.epoch)
            for indices in batches[at.batch:][:settings.steps - at.step]:
                value, count = _step(setup_model, task, indices, optimiser, settings, fabric, at.step)
                at.batch, at.step = at.batch + 1, at.step + 1
                at.loss_sum, at.count = at.loss_sum + value * count, at.count + count
                report({"step": at.step, "total": settings.steps, "epoch": at.epoch + 1, "loss": value,
                        "tokens": count})
                if stop.is_set():
                    break
            if at.batch == len(batches) or at.step == settings.steps:
                setup_model.eval()
                with torch.no_grad():
                    found = {"epoch": at.epoch + 1, "step": at.step, "train_loss": at.loss_sum / at.count}
                    found |= task.validate(setup_model, fabric.device)
                if wrong := [key for key, value in found.items() if not math.isfinite(value)]:
                    # Its gradient was not finite though its loss was: the weights are lost, the last state is not.
                    raise FloatingPointError(f"{', '.join(wrong)} not finite after step {at.step} of "
                                             f"{settings.steps}; lower the learning rate")
                at.history.append({key: round(value, 6) for key, value in found.items()})
                at.epoch, at.batch, at.loss_sum, at.count = at.epoch + 1, 0, 0.0, 0
                report({"history": at.history[-1]})
            save()
            if stop.is_set():       # after the last step too: what comes then may take long
                raise Interrupted(f"stopped after step {at.step} of {settings.steps}; the state is in {state_path}")
    return at.history


def _step(model: nn.Module, task: Task, indices: list[int], optimiser: Any, settings: Settings, fabric: Fabric,
          step: int) -> tuple[float, int]:
    """One update; the loss and the number of targets it was a mean of."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(step, settings)
    loss, count = task.loss(model, indices, fabric.device)
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the loss became {value} in step {step + 1} of {settings.steps}; lower the learning rate, or choose a "
            "kernel and normaliser whose weights stay bounded")
    optimiser.zero_grad(set_to_none=True)
    fabric.backward(loss)
    fabric.clip_gradients(model, optimiser, max_norm=settings.clip, error_if_nonfinite=False)
    optimiser.step()
    return value, count


def _groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Matrices decay; biases and the gains of norms do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]


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


# ------------------------------------------------------------------------- the state

@dataclass
class _Position:
    """Where a run stands."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    count: int = 0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)


def _save_state(path: Path, model: nn.Module, optimiser: Any, identity: dict[str, Any], at: _Position) -> None:
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    for i, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{i}.{key}": t for key, t in state.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    save_tensors(path, tensors, {"kind": "state", "settings": identity,
                                 "position": dataclasses.asdict(at)})


def _load_state(path: Path, model: nn.Module, optimiser: Any, identity: dict[str, Any]) -> _Position:
    tensors, metadata = load_tensors(path)
    asked = json.loads(json.dumps(identity))        # as it is stored: a tuple is a list there
    if metadata.get("kind") != "state" or metadata.get("settings") != asked:
        there = metadata.get("settings") or {}
        other = {k: (there.get(k), v) for k, v in asked.items() if there.get(k) != v}
        raise FileError(f"{path} is the state of another run: (there, here) differ in {other}; "
                        "resume with the settings it began with, or begin anew in another folder")

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    _load_weights(model, part("model."), path)
    plain = optimiser.state_dict()
    for name, t in part("optimiser.").items():
        i, key = name.split(".", 1)
        plain["state"].setdefault(int(i), {})[key] = t
    optimiser.load_state_dict(plain)
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return _Position(**metadata["position"])


def _load_weights(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise FileError(f"the weights in {path} are not those of this model: {error}") from None


# ------------------------------------------------------------------------- the finished model

def save_model(path: Path, model: nn.Module, metadata: dict[str, Any]) -> Path:
    """Write a model's weights, with all it takes to use them, as one safetensors file, whole or not at all.

    Parameters
    ----------
    path : Path
        Where to.
    model : Transformer
        Its configuration is stored too.
    metadata : dict
        Plain values: the task, the tokeniser's JSON, the name of the run.

    Returns
    -------
    Path

    Raises
    ------
    FileError
        If it cannot be written.
    """
    return save_tensors(path, model.state_dict(), {"kind": "model", "config": model.config.to_dict()} | metadata)


def load_model(path: Path | str, *, device: torch.device | str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """Read a model that :func:`save_model` wrote.

    Parameters
    ----------
    path : path
        Of the file, or of the folder of a run.
    device : torch.device or str
        Where to put it.

    Returns
    -------
    model : Transformer
        In evaluation mode.
    metadata : dict

    Raises
    ------
    FileError
        If there is no such file, it is damaged, or it is not a finished model.
    """
    from .models import Transformer, TransformerConfig

    path = Path(path)
    if path.is_dir():
        if not (path / "model.safetensors").exists() and (path / "state.safetensors").exists():
            raise FileError(f"{path} holds an unfinished run: finish it with the command that began it and --resume")
        path /= "model.safetensors"
    tensors, metadata = load_tensors(path)
    if metadata.get("kind") != "model":
        raise FileError(f"{path} is not a finished model (kind: {metadata.get('kind')!r}); "
                        "name the model.safetensors of a run, or its folder")
    try:
        config = TransformerConfig.from_dict(metadata["config"])
    except (KeyError, TypeError) as error:
        raise FileError(f"the configuration in {path} cannot be read ({error!r}); make the model anew, or with the "
                        "version of kernelbook that wrote it") from error
    model = Transformer(config)
    _load_weights(model, tensors, path)
    return model.to(device).eval(), metadata
