"""What training changes, the file from which it resumes, and the finished model."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as whole
from torch.distributed.tensor import DTensor

from ..files import FileError, load_tensors, save_tensors
from .machine import gathered, on_first
from .settings import Settings

__all__ = ["save_model", "load_model"]

WHOLE = whole.StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class Position:
    """Where a run stands."""

    epoch: int = 0
    batch: int = 0                  # of the epoch, the next one
    step: int = 0
    loss_sum: float = 0.0           # since the last validation: of the losses of so many targets
    count: int = 0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    best: dict[str, float] | None = None        # of the history, the entry with the lowest validation loss
    waited: int = 0                 # validations since
    stopped: bool = False           # because it waited long enough


class Average:
    r"""The exponential average of weights, without the bias of its beginning.

    .. math:: m_t = m_{t-1} + \frac{1-b}{1-b^t}\,(w_t - m_{t-1}) = \frac{1-b}{1-b^t}\sum_{i=1}^{t} b^{t-i}\,w_i
    """

    def __init__(self, weights: list[nn.Parameter], decay: float) -> None:
        self.weights, self.decay = [_local(w) for w in weights], decay
        self.mean = [w.clone() for w in self.weights]

    @torch.no_grad()
    def update(self, t: int) -> None:
        """Take in the weights of step :math:`t`, from 1."""
        torch._foreach_lerp_(self.mean, self.weights, (1 - self.decay) / (1 - self.decay ** t))

    @torch.no_grad()
    def exchange(self) -> None:
        """Put the average in the place of the weights, and the weights in its own; a second call undoes it."""
        for w, m in zip(self.weights, self.mean, strict=True):
            kept = w.clone()
            w.copy_(m)
            m.copy_(kept)


class Learner:
    """All that training changes: a model, the average and the best of its weights, the optimiser, random numbers.

    Parameters
    ----------
    model : Module
        Trained in place; with FSDP, a copy is, and the first process gets its weights back.
    settings : Settings
        Of the optimiser and the average.
    fabric : Fabric
        Where.

    Attributes
    ----------
    module : Module
        The model as the processes train it together.
    optimiser : Optimizer
        Set up by Fabric.
    """

    def __init__(self, model: nn.Module, settings: Settings, fabric: Fabric) -> None:
        self.model, self.fabric = model, fabric
        self.sharded = isinstance(fabric.strategy, ModelParallelStrategy)
        self.inner = copy.deepcopy(model) if self.sharded else model
        self.module = fabric.setup_module(self.inner)
        fabric.to_device(model)
        weights = list(self.inner.parameters())
        groups = [{"params": [p for p in weights if p.ndim >= 2], "weight_decay": settings.weight_decay},
                  {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0}]     # biases, gains of norms
        self.adamw = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))
        self.optimiser = fabric.setup_optimizers(self.adamw)
        self.average = Average(weights, settings.average) if settings.average else None
        self.best: dict[str, Tensor] | None = None

    @contextmanager
    def result(self) -> Iterator[nn.Module]:
        """The model with the weights that training would end with now: the average, if there is one."""
        if self.average is not None:
            self.average.exchange()
        if self.sharded and (weights := self._weights()):
            self.model.load_state_dict(weights)
        try:
            yield self.model
        finally:
            if self.average is not None:
                self.average.exchange()

    def finish(self, best: bool) -> None:
        """Leave the model with the weights that training ends with."""
        if best:
            _load_weights(self.model, self.best)
        elif self.average is not None or self.sharded:
            with self.result() as model:
                weights = snapshot(model)
            _load_weights(self.model, weights)
        self.model.eval()

    # ---------------------------------------------------------------- the state

    def save(self, path: Path, identity: dict[str, Any], at: Position) -> None:
        """Write the state; every process must call this, and the first one writes."""
        tensors = {}
        if self.sharded or self.fabric.is_global_zero:
            tensors = {f"model.{name}": t for name, t in self._weights().items()}
            tensors |= {f"optimiser.{name}.{key}": t for name, state in self._moments().items()
                        for key, t in state.items()}
            if self.average is not None:
                self.average.exchange()
                tensors |= {f"average.{name}": t.clone() for name, t in self._weights().items()}
                self.average.exchange()
            tensors |= {f"best.{name}": t for name, t in (self.best or {}).items()}
        for name, state in self._random().items():
            tensors[f"random.{name}"] = gathered(self.fabric, state)
        metadata = {"kind": "state", "settings": identity, "position": dataclasses.asdict(at)}
        on_first(self.fabric, lambda: save_tensors(path, tensors, metadata) and None)

    def load(self, path: Path, identity: dict[str, Any]) -> Position:
        """Read what :meth:`save` wrote, in every process."""
        tensors, metadata = load_tensors(path)
        asked = json.loads(json.dumps(identity))        # as it is stored: a tuple is a list there
        there = metadata.get("settings") or {}
        if metadata.get("kind") != "state" or there != asked:
            other = {k: (there.get(k), asked.get(k)) for k in asked | there if there.get(k) != asked.get(k)}
            raise FileError(f"{path} is the state of another run: (there, here) differ in {other}; "
                            "resume with the settings it began with, or begin anew in another folder")

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        try:
            if self.average is not None:
                self._take_weights(part("average."), path)
                self.average.mean = [w.clone() for w in self.average.weights]
            self._take_weights(part("model."), path)
            moments: dict[str, dict[str, Tensor]] = {}
            for name, t in part("optimiser.").items():
                name, _, key = name.rpartition(".")
                moments.setdefault(name, {})[key] = t
            self._take_moments(moments)
            self.best = part("best.") or None
            processes = tensors["random.cpu"].shape[0]
            if processes != self.fabric.world_size:
                raise FileError(f"{path} is the state of {processes} process{'es' * (processes > 1)}, and here are "
                                f"{self.fabric.world_size}; resume with as many devices as it began with")
            for name in self._random():
                _set_random(name, tensors[f"random.{name}"][self.fabric.global_rank].clone(), self.fabric.device)
            return Position(**metadata["position"])
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"{path} lacks a part of the state ({error!r}): it was written by another version of "
                            "kernelbook; begin anew") from error

    def _weights(self) -> dict[str, Tensor]:
        """Of the model, whole; with FSDP every process takes part, and only the first gets them."""
        return whole.get_model_state_dict(self.inner, options=WHOLE) if self.sharded else self.inner.state_dict()

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        """Of the optimiser, by the names of the weights; with FSDP as :meth:`_weights` does."""
        if self.sharded:
            return whole.get_optimizer_state_dict(self.inner, self.adamw, options=WHOLE).get("state", {})
        names = self._names()
        return {names[i]: state for i, state in self.adamw.state_dict()["state"].items()}

    def _take_weights(self, weights: dict[str, Tensor], path: Path) -> None:
        if self.sharded:
            whole.set_model_state_dict(self.inner, weights, options=WHOLE)
        else:
            _load_weights(self.inner, weights, path)

    def _take_moments(self, moments: dict[str, dict[str, Tensor]]) -> None:
        if self.sharded:
            plain = whole.get_optimizer_state_dict(self.inner, self.adamw, options=whole.StateDictOptions(
                full_state_dict=True)) | {"state": moments}
            whole.set_optimizer_state_dict(self.inner, self.adamw, plain, options=WHOLE)
        else:
            number = {name: i for i, name in enumerate(self._names())}
            state = {number[name]: state for name, state in moments.items()}
            self.adamw.load_state_dict(self.adamw.state_dict() | {"state": state})

    def _names(self) -> list[str]:
        """Of the weights, in the order of the optimiser."""
        names = {p: name for name, p in self.inner.named_parameters()}
        return [names[p] for group in self.adamw.param_groups for p in group["params"]]

    def _random(self) -> dict[str, Tensor]:
        """The states of the generators that dropout draws from."""
        device = self.fabric.device
        found = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            found["cuda"] = torch.cuda.get_rng_state(device)
        elif device.type == "mps":
            found["mps"] = torch.mps.get_rng_state()
        return found


def _local(weight: Tensor) -> Tensor:
    """What this process holds of a weight: with FSDP a part."""
    weight = weight.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's weights, on the CPU."""
    return {name: t.detach().to("cpu", copy=True) for name, t in model.state_dict().items()}


def _set_random(name: str, state: Tensor, device: torch.device) -> None:
    if name == "cpu":
        torch.set_rng_state(state)
    elif name == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.mps.set_rng_state(state)


def _load_weights(model: nn.Module, weights: dict[str, Tensor], path: Path | None = None) -> None:
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
    model : Module
        One that a task trains: its configuration is stored too, and the name of its class.
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
    about = {"kind": "model", "class": type(model).__name__, "config": model.config.to_dict()}
    return save_tensors(path, model.state_dict(), about | metadata)


def _config_class(name: str, path: Path) -> type:
    """Of the configuration of a model's class; a file names a class, it does not bring one."""
    if name == "Transformer":
        from ..models import TransformerConfig

        return TransformerConfig
    if name == "PathNetwork":
        from ..paths.model import PathNetworkConfig

        return PathNetworkConfig
    raise FileError(f"{path} holds a model of the class {name!r}, which this version of kernelbook does not know "
                    "(known: Transformer, PathNetwork)")


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
    model : Module
        In evaluation mode: a :class:`kernelbook.models.Transformer`, or a :class:`kernelbook.paths.PathNetwork`.
    metadata : dict

    Raises
    ------
    FileError
        If there is no such file, it is damaged, or it is not a finished model.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "model.safetensors").exists() and (path / "state.safetensors").exists():
            raise FileError(f"{path} holds an unfinished run: finish it with the command that began it and --resume")
        path /= "model.safetensors"
    tensors, metadata = load_tensors(path)
    if metadata.get("kind") != "model":
        raise FileError(f"{path} is not a finished model (kind: {metadata.get('kind')!r}); "
                        "name the model.safetensors of a run, or its folder")
    kind = _config_class(metadata.get("class", "Transformer"), path)        # files were once written without
    try:
        config = kind.from_dict(metadata["config"])
    except (KeyError, TypeError) as error:
        raise FileError(f"the configuration in {path} cannot be read ({error!r}); make the model anew, or with the "
                        "version of kernelbook that wrote it") from error
    model = config.build()
    _load_weights(model, tensors, path)
    return model.to(device).eval(), metadata
