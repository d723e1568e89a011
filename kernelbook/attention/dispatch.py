"""One entry to attention: which path computes it, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from jaxtyping import Bool, Float
from torch import Tensor

from ..debugging import check_finite
from ..kernels import Kernel, check_points, get
from . import fused as _fused
from . import linear as _linear
from . import tiled as _tiled
from .call import Call, leading
from .definition import check_mask, check_normaliser, exact

__all__ = ["attend", "explain", "Plan", "PATHS"]


@dataclass(frozen=True)
class Path:
    """A way to compute attention.

    Attributes
    ----------
    does : callable
        Of a :class:`Call`: one phrase on how it is computed, with what.
    refusal : callable
        Of a :class:`Call`: why the path cannot serve it, or None if it can.
    drawback : callable
        Of a :class:`Call` that it can serve: why ``auto`` had better take a later path, or None.
    compute : callable
        The function; it takes the arguments of :func:`attend` but ``path``, checked.
    """

    does: Callable[[Call], str]
    refusal: Callable[[Call], str | None]
    drawback: Callable[[Call], str | None]
    compute: Callable[..., Tensor]


#: The paths, best first: ``auto`` takes the first that neither refuses the call nor has a drawback there.
PATHS: dict[str, Path] = {
    "linear": Path(_linear.does, _linear.refusal, _linear.drawback, _linear.linear),
    "fused": Path(_fused.does, _fused.refusal, _fused.drawback, _fused.fused),
    "tiled": Path(_tiled.does, _tiled.refusal, _tiled.drawback, _tiled.tiled),
    "exact": Path(lambda call: "the definition: the n x m matrix of weights, times the values", lambda call: None,
                  lambda call: None, exact),
}


@dataclass(frozen=True)
class Plan:
    """Which path a call takes, and why; print it.

    Attributes
    ----------
    path : str
        The path taken.
    reason : str
        Why that one.
    refused : dict
        The paths that cannot serve the call, with the reason of each.
    passed_over : dict
        The paths that could serve it, but not as well, with the reason of each.
    """

    path: str
    reason: str
    refused: dict[str, str] = field(default_factory=dict)
    passed_over: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        others = {name: self.refused.get(name) or self.passed_over.get(name) for name in PATHS}
        return "\n".join([f"path {self.path!r}: {self.reason}"]
                         + [f"not {name!r}: {why}" for name, why in others.items() if why])


def _check(q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, mask: Tensor | None, dropout: float,
           normaliser: str) -> None:
    check_points(q, k)
    check_normaliser(kernel, normaliser)
    if not isinstance(v, Tensor) or v.ndim < 2:
        shown = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
        raise ValueError(f"v must be a tensor of shape (..., m, d_v), not {shown}")
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(f"v must have a row for each key, but k is (..., m, d) = {tuple(k.shape)} "
                         f"and v is (..., m, d_v) = {tuple(v.shape)}")
    if v.dtype != q.dtype or v.device != q.device:
        raise TypeError(f"v must have the dtype and device of q and k, {q.dtype} on {q.device}, "
                        f"but is {v.dtype} on {v.device}")
    try:
        batch = leading(q, k, v)
    except RuntimeError:
        raise ValueError(f"the leading axes of q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} "
                         "do not broadcast") from None
    if mask is not None:
        check_mask(mask, (*batch, q.shape[-2], k.shape[-2]), q.device)
    check_dropout(dropout)
    check_finite(q=q, k=k, v=v)


def check_dropout(dropout: float) -> None:
    """Raise unless ``dropout`` is a probability below 1."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be at least 0 and below 1, not {dropout}")


def choose(call: Call, path: str = "auto") -> str:
    """The name of the path for a call; raise if the one asked for cannot serve it."""
    if path == "auto":
        return next(name for name, p in PATHS.items() if p.refusal(call) is None and p.drawback(call) is None)
    if path not in PATHS:
        raise ValueError(f"no path is called {path!r} (known: auto, {', '.join(PATHS)})")
    if (why := PATHS[path].refusal(call)) is not None:
        others = [name for name, p in PATHS.items() if name != path and p.refusal(call) is None]
        raise ValueError(f"path {path!r} cannot serve this call: {why}; use path='auto' (here: {choose(call)!r}) or "
                         f"another that can: {', '.join(others)}")
    return path


def plan(call: Call, path: str = "auto") -> Plan:
    """The path for a call, with the reasons; raise if the one asked for cannot serve it."""
    chosen = choose(call, path)
    refused = {name: why for name, p in PATHS.items() if (why := p.refusal(call)) is not None}
    passed_over = {}
    for name, p in PATHS.items():
        if path == "auto" and name == chosen:
            break
        if name != chosen and name not in refused and (why := p.drawback(call)) is not None:
            passed_over[name] = why
    why = "asked for" if path != "auto" else "the first that serves this call and has no drawback here"
    return Plan(chosen, f"{why}; {PATHS[chosen].does(call)}", refused, passed_over)


def explain(
    q: Float[Tensor, "*#batch n d"],
    k: Float[Tensor, "*#batch m d"],
    v: Float[Tensor, "*#batch m d_v"],
    kernel: str | Kernel = "edp",
    *,
    mask: Bool[Tensor, "*#batch #n #m"] | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    normaliser: str = "sum",
    path: str = "auto",
) -> Plan:
    """Which path :func:`attend` takes for the same arguments, and why; nothing is computed.

    Returns
    -------
    Plan

    Raises
    ------
    TypeError
        As :func:`attend` does.
    ValueError
        As :func:`attend` does.
    """
    kernel = get(kernel)
    _check(q, k, v, kernel, mask, dropout, normaliser)
    return plan(Call.of(q, k, v, kernel, mask=mask, causal=causal, dropout=dropout, normaliser=normaliser), path)


def attend(
    q: Float[Tensor, "*#batch n d"],
    k: Float[Tensor, "*#batch m d"],
    v: Float[Tensor, "*#batch m d_v"],
    kernel: str | Kernel = "edp",
    *,
    mask: Bool[Tensor, "*#batch #n #m"] | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    normaliser: str = "sum",
    path: str = "auto",
) -> Float[Tensor, "*batch n d_v"]:
    r"""Attention by a kernel: :math:`o_i=\sum_j w_{ij}v_j` with :math:`w_{ij}=\kappa(q_i,k_j)/N_i`.

    A query that may see no key gets zeros.

    Parameters
    ----------
    q : Tensor
        Queries, ``(..., n, d)``.
    k : Tensor
        Keys, ``(..., m, d)``.
    v : Tensor
        Values, ``(..., m, d_v)``.  The leading axes of all three broadcast.
    kernel : str or Kernel
        A name among :func:`kernelbook.kernels.available`, or a kernel.
    mask : Tensor, optional
        Boolean, broadcasting to ``(..., n, m)``; True where a key may be seen.
    causal : bool
        Whether a query sees only the keys up to its own position, the last query aligned with the last key.
    dropout : float
        Probability with which each weight is set to 0 (and the others scaled up).  It applies whenever it is not 0.
    normaliser : str
        What :math:`N_i` is: one of :data:`kernelbook.attention.NORMALISERS`.
    path : str
        How to compute it: ``"auto"``, or one of :data:`PATHS`; :func:`explain` says which is taken and why.

    Returns
    -------
    Tensor
        ``(..., n, d_v)``.

    Raises
    ------
    TypeError
        If an argument is of the wrong type or dtype.
    ValueError
        If a shape, a name or a device does not fit, the kernel may be negative and ``normaliser`` is ``"sum"``, or
        the path asked for cannot serve the call.
    FloatingPointError
        In debug mode, if an input holds NaN or infinity.

    References
    ----------
    Tsai et al. 2019; chapter *Attention is a kernel smoother*.
    """
    kernel = get(kernel)
    _check(q, k, v, kernel, mask, dropout, normaliser)
    options = {"mask": mask, "causal": causal, "dropout": dropout, "normaliser": normaliser}
    chosen = choose(Call.of(q, k, v, kernel, **options), path)
    return PATHS[chosen].compute(q, k, v, kernel, **options)
