"""How a model is trained: numbers of the budget, the schedule and the update."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Settings", "SCHEDULES", "learning_rate"]

SCHEDULES = ("linear", "cosine", "inverse-sqrt", "constant")
"""How the learning rate falls after the warm-up: see :func:`learning_rate`."""


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
    schedule : str
        ``"linear"``, ``"cosine"``, ``"inverse-sqrt"`` or ``"constant"``: see :func:`learning_rate`.
    accumulate : int
        Parts into which a batch is split, one after the other, where the whole does not fit into memory.  The update
        is that of the whole batch, up to rounding and the draws of dropout.
    average : float
        Decay :math:`b` of an exponential average of the weights; 0 for none.  It is the average that is
        validated and that training ends with: see :func:`kernelbook.training.fit`.
    patience : int
        Validations in a row without a lower ``valid_loss`` after which training stops; 0 for never.  If it is not 0,
        training ends with the weights of the best validation.
    validate_every : int or None
        Steps between validations; None for one after every epoch.
    save_every : float
        Minutes between saves of the state, beside those after every validation.  It has no influence on the result.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    steps: int = 1000
    batch_tokens: int = 4096
    learning_rate: float = 1e-3
    warmup: float = 0.1
    label_smoothing: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    schedule: str = "linear"
    accumulate: int = 1
    average: float = 0.0
    patience: int = 0
    validate_every: int | None = None
    save_every: float = 5.0

    def __post_init__(self) -> None:
        def whole(name: str, least: int) -> None:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
                raise ValueError(f"{name} must be a whole number, at least {least}, not {value!r}")

        def number(name: str, fits: Callable[[float], bool], what: str) -> None:
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not fits(value):
                raise ValueError(f"{name} must be {what}, not {value!r}")

        for name in ("steps", "batch_tokens", "accumulate"):
            whole(name, 1)
        for name in ("seed", "patience"):
            whole(name, 0)
        if self.validate_every is not None:
            whole("validate_every", 1)
        number("learning_rate", lambda x: 0 < x < math.inf, "positive")
        number("warmup", lambda x: 0 <= x <= 1, "from 0 to 1")
        number("label_smoothing", lambda x: 0 <= x < 1, "at least 0 and below 1")
        number("weight_decay", lambda x: 0 <= x < math.inf, "at least 0")
        number("clip", lambda x: x > 0, "positive")
        number("average", lambda x: 0 <= x < 1, "at least 0 and below 1")
        number("save_every", lambda x: x >= 0, "at least 0, in minutes")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")


def learning_rate(step: int, settings: Settings) -> float:
    r"""Learning rate of a step: a linear warm-up, then a schedule.

    .. math:: \eta_t = \eta \min\Bigl(\frac{t+1}{T_w},\; s_t\Bigr), \qquad
              T_w = \max(1, \mathrm{round}(\text{warmup}\cdot T)),

    where the schedule :math:`s_t` is 1 at :math:`t=T_w` and, with :math:`u=\max(0,t-T_w)/(T-T_w)`,

    * ``"linear"``: :math:`(T-t)/(T-T_w)`, which falls in a straight line towards 0;
    * ``"cosine"``: :math:`(1+\cos\pi u)/2`, which falls towards 0 along half a wave;
    * ``"inverse-sqrt"``: :math:`\sqrt{T_w/\max(t,T_w)}`, which depends on :math:`T` through the warm-up only;
    * ``"constant"``: 1.

    Parameters
    ----------
    step : int
        :math:`t`, from 0.
    settings : Settings
        With the steps :math:`T`, the peak :math:`\eta`, the warm-up and the schedule.

    Returns
    -------
    float
    """
    steps = settings.steps
    warm = max(1, round(settings.warmup * steps))
    if settings.schedule == "linear":
        part = (steps - step) / max(1, steps - warm)
    elif settings.schedule == "cosine":
        part = (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm))) / 2
    elif settings.schedule == "inverse-sqrt":
        part = math.sqrt(warm / max(step, warm))
    else:
        part = 1.0
    return settings.learning_rate * min((step + 1) / warm, part)
