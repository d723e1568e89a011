r"""Binary kernels: functions :math:`\kappa(q, k)` of a query and a key, each defined once.

A *binary kernel* takes its two arguments from two sets, the queries and the keys.  Nothing asks it to be
symmetric or definite; where it is, the kernel says so.  The definitions here are the reference that every
faster computation in the library is tested against, so they are written to be read and to be right in
float64, not to be quick.

Each kernel knows what it is:

``range``
    an interval that holds every value;
``normalisable``
    whether its values may be divided by their row sum, which takes a kernel that is never negative;
``feature_dimension(d)``
    the smallest number of features of queries and keys whose inner product is the kernel (its rank) when both
    range over :math:`\mathbb R^d`; infinite for most.  For sums, products and their like it is an upper bound,
    and ``feature_dimension_is_bound`` is true;
``definiteness``
    what is true of it where queries and keys are the *same* points;
``latex``, ``formula``, ``source``
    how to print it, and where it comes from.

**A kernel of your own** is a frozen dataclass that derives from :class:`Kernel` and defines ``gram``; everything else
has a cautious default (any real value, so never row-normalised unless told how; infinite dimension; nothing
known of its definiteness)::

    @register("laplace")
    @dataclass(frozen=True, repr=False)
    class Laplace(Kernel):
        rate: float = 1.0

        range = Interval(0.0, 1.0, closed_high=True)
        definiteness = Definiteness.POSITIVE
        exponential = True                       # log_gram is the natural thing to compute

        def log_gram(self, q, k):
            return -self.rate * (q[..., :, None, :] - k[..., None, :, :]).abs().sum(-1)

        def gram(self, q, k):
            return self.log_gram(q, k).exp()

It can then be passed to :func:`kernelbook.attention.attend`, combined with ``+``, ``*`` and ``.exp()``, named on the
command line once its module is imported, and stored in a checkpoint.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from .rules import LINKS, Rule, apply_link

__all__ = [
    "Kernel", "Interval", "Definiteness", "get", "available", "register", "from_config",
    "EDP", "RBF", "L2", "L2Squared", "Intersection", "ExponentiatedIntersection",
    "Quadratic", "Polynomial", "Taylor", "Linear", "Cosine", "Constant", "Coordinatewise",
    "Sum", "Product", "Exponential", "Scaled", "TensorProduct", "DirectSum",
]


# ------------------------------------------------------------------------- what a kernel says of itself

@dataclass(frozen=True)
class Interval:
    """An interval of the real line that holds every value of a kernel.

    Parameters
    ----------
    low, high : float
        Its ends; either may be infinite.
    closed_low, closed_high : bool
        Whether the end itself belongs to it.  Infinite ends never do.
    """

    low: float
    high: float
    closed_low: bool = False
    closed_high: bool = False

    def __str__(self) -> str:
        def show(x: float) -> str:
            return ("−" if x < 0 else "") + ("∞" if math.isinf(x) else f"{abs(x):g}")

        left, right = "[" if self.closed_low else "(", "]" if self.closed_high else ")"
        return f"{left}{show(self.low)}, {show(self.high)}{right}"

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.high + other.high,
                        self.closed_low and other.closed_low, self.closed_high and other.closed_high)

    def __mul__(self, other: Interval) -> Interval:
        # The extremes of a product lie at ends of the factors; 0 times an infinite end is 0.
        ends = []
        for x, x_closed in ((self.low, self.closed_low), (self.high, self.closed_high)):
            for y, y_closed in ((other.low, other.closed_low), (other.high, other.closed_high)):
                attained = (x_closed and y_closed) or (x == 0 and x_closed) or (y == 0 and y_closed)
                ends.append((0.0 if x == 0 or y == 0 else x * y, attained))
        low, high = min(v for v, _ in ends), max(v for v, _ in ends)
        return Interval(low, high, any(c for v, c in ends if v == low), any(c for v, c in ends if v == high))

    def exp(self) -> Interval:
        """The interval of the exponentials of its points."""
        largest = 709.0     # e to this is still a float64; a lower end beyond it is rounded down, an upper one up
        high = math.exp(self.high) if self.high <= largest else math.inf
        return Interval(math.exp(min(self.low, largest)), high, self.closed_low, self.closed_high and high < math.inf)


class Definiteness(enum.Enum):
    r"""What holds of :math:`\sum_{ij} c_i c_j \kappa(x_i, x_j)` for all points :math:`x_i` and real :math:`c_i`.

    Queries and keys are the same points here, mapped alike.  In a Transformer they are two different linear images
    of the tokens; then the question is another one (chapter *Mercer or not*).
    """

    POSITIVE = "positive definite"                       # never negative
    CONDITIONAL = "conditionally positive definite"      # never negative where the c_i sum to 0
    NEGATIVE_TYPE = "of negative type"                   # never positive where the c_i sum to 0
    UNKNOWN = "not known to be definite"

    @property
    def conditional(self) -> bool:
        return self in (Definiteness.POSITIVE, Definiteness.CONDITIONAL)


ANY_REAL = Interval(-math.inf, math.inf)
NON_NEGATIVE = Interval(0.0, math.inf, closed_low=True)
POSITIVE = Interval(0.0, math.inf)


# ------------------------------------------------------------------------- the base class and the registry

@dataclass(frozen=True, repr=False)
class Kernel:
    r"""A binary kernel :math:`\kappa:\mathbb R^d\times\mathbb R^d\to\mathbb R`.

    Derive from it and define :meth:`gram`; the module's text shows how.
    """

    range = ANY_REAL
    definiteness = Definiteness.UNKNOWN
    feature_dimension_is_bound = False
    exponential = False
    latex = r"\kappa(q, k)"
    formula = "κ(q, k)"
    source = "defined by the reader"
    remark = ""

    def gram(self, q: Float[Tensor, "*batch n d"], k: Float[Tensor, "*batch m d"]) -> Float[Tensor, "*batch n m"]:
        r"""The matrix :math:`[\kappa(q_i, k_j)]_{ij}`, by the definition.

        Parameters
        ----------
        q : Tensor
            Queries, ``(..., n, d)``.
        k : Tensor
            Keys, ``(..., m, d)``.

        Returns
        -------
        Tensor
            ``(..., n, m)``.
        """
        raise NotImplementedError(f"{type(self).__name__} derives from Kernel and must define gram(self, q, k)")

    def log_gram(self, q: Float[Tensor, "*batch n d"], k: Float[Tensor, "*batch m d"]) -> Float[Tensor, "*batch n m"]:
        r"""The matrix :math:`[\log\kappa(q_i, k_j)]_{ij}`, computed without overflow where ``exponential`` is true.

        Raises
        ------
        ValueError
            If the kernel takes negative values.
        """
        if self.range.low < 0:
            raise ValueError(f"{self!r} takes values in {self.range}, so it has no logarithm; "
                             "use a kernel that is never negative")
        return self.gram(q, k).log()

    def feature_dimension(self, d: int) -> float:
        r"""The least number of features, :math:`\sup\operatorname{rank}[\kappa(q_i,k_j)]`, on :math:`\mathbb R^d`.

        Parameters
        ----------
        d : int
            Width of queries and keys.

        Returns
        -------
        float
            An integer, or ``math.inf``.  An upper bound where ``feature_dimension_is_bound``.
        """
        return math.inf

    @property
    def normalisable(self) -> bool:
        """Whether it is never negative, so that dividing by the row sum gives a weighted mean."""
        return self.range.low >= 0

    @property
    def positive_definite(self) -> bool:
        """Whether it is known to be positive definite where queries and keys are the same points."""
        return self.definiteness is Definiteness.POSITIVE

    def __call__(self, q: Float[Tensor, "*batch n d"], k: Float[Tensor, "*batch m d"]) -> Float[Tensor, "*batch n m"]:
        """The Gram matrix of checked arguments; see :meth:`gram`.

        Raises
        ------
        TypeError
            If an argument is not a floating tensor, or they differ in dtype.
        ValueError
            If their shapes do not fit, or they are on different devices.
        """
        check_points(q, k)
        return self.gram(q, k)

    # -- combining
    def __add__(self, other: Kernel | float) -> Kernel:
        if isinstance(other, numbers.Real):
            other = Constant(float(other))
        return Sum(self, other) if isinstance(other, Kernel) else NotImplemented

    def __radd__(self, other: float) -> Kernel:
        if not isinstance(other, numbers.Real):
            return NotImplemented
        return self if other == 0 else Sum(Constant(float(other)), self)       # sum() of a list starts from 0

    def __mul__(self, other: Kernel | float) -> Kernel:
        return Product(self, other) if isinstance(other, Kernel) else self.__rmul__(other)

    def __rmul__(self, other: float) -> Kernel:
        # A tensor is no number here: its gradient would be lost.
        return Scaled(self, float(other)) if isinstance(other, numbers.Real) else NotImplemented

    def __neg__(self) -> Kernel:
        return Scaled(self, -1.0)

    def exp(self) -> Kernel:
        r"""The kernel :math:`e^{\kappa(q,k)}`."""
        return Exponential(self)

    # -- printing and storing
    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                if getattr(self, f.name) != f.default}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.options().items())})"

    def __str__(self) -> str:
        return f"κ(q, k) = {self.formula}"

    def _repr_latex_(self) -> str:
        return rf"$\displaystyle \kappa(q,k)={self.latex}$"

    def describe(self, d: int = 64) -> str:
        """A few lines on what the kernel is, at width ``d``.

        Parameters
        ----------
        d : int
            Width of queries and keys.

        Returns
        -------
        str
        """
        dim = self.feature_dimension(d)
        shown = "infinite" if math.isinf(dim) else f"{dim:,}"
        bound = "at most " if self.feature_dimension_is_bound and not math.isinf(dim) else ""
        rows = [("kernel", repr(self)), ("formula", self.formula), ("range", str(self.range)),
                (f"feature dimension, d = {d}", bound + shown),
                ("on shared inputs", self.definiteness.value),
                ("row-normalisable", "yes" if self.normalisable else "no: it may be negative"),
                ("source", self.source)]
        if self.remark:
            rows.append(("remark", self.remark))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def to_config(self) -> dict[str, Any]:
        """A dictionary of plain values from which :func:`from_config` makes the kernel again.

        Raises
        ------
        ValueError
            If the kernel's class was not registered.
        """
        name = next((n for n, c in _CLASSES.items() if c is type(self)), None)
        if name is None:
            raise ValueError(f"{type(self).__name__} has no name to be stored under; decorate the class with "
                             "@kernelbook.kernels.register('a-name')")
        return {"kernel": name} | {key: v.to_config() if isinstance(v, Kernel) else v
                                   for key, v in self.options().items()}


_CLASSES: dict[str, type[Kernel]] = {}
_COMBINATORS: set[str] = set()
_UNLISTED: list[str] = []       # names that get() knows and available() does not list


def register(name: str, *, listed: bool = True) -> Callable[[type[Kernel]], type[Kernel]]:
    """Class decorator: give a kernel the name by which :func:`get` and the command line find it.

    Parameters
    ----------
    name : str
        A new name, lower case.
    listed : bool
        Whether :func:`available` lists it.

    Raises
    ------
    ValueError
        If another class has the name.
    """
    if not isinstance(name, str):
        raise TypeError(f"register takes the kernel's name, as in @register('laplace'), not {name!r}")

    def add(cls: type[Kernel]) -> type[Kernel]:
        if not (isinstance(cls, type) and issubclass(cls, Kernel)):
            raise TypeError(f"@register({name!r}) decorates a class that derives from Kernel, not {cls!r}")
        # The same class defined anew, as when a notebook cell is run twice, replaces the old one.
        old = _CLASSES.get(name, cls)
        if (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"the kernel name {name!r} is taken by {old.__module__}.{old.__qualname__}; "
                             "choose another")
        _CLASSES[name] = cls
        if not listed and name not in _UNLISTED:
            _UNLISTED.append(name)
        return cls

    return add


def _combinator(name: str) -> Callable[[type[Kernel]], type[Kernel]]:
    _COMBINATORS.add(name)
    return register(name)


def available() -> list[str]:
    """The kernels that :func:`get` makes of a name, in the order of their definition.

    Besides them it knows those given by feature maps (:class:`kernelbook.features.FeatureKernel`), which are mostly
    approximations of these.

    Returns
    -------
    list of str
    """
    return [name for name in _CLASSES if name not in _COMBINATORS and name not in _UNLISTED]


def get(kernel: str | Kernel, **options: Any) -> Kernel:
    """The kernel of that name, with those options; a kernel is returned as it is.

    Parameters
    ----------
    kernel : str or Kernel
        A name among :func:`available`, or of a kernel given by features, or a kernel.
    **options
        The kernel's options, as in ``get("taylor", degree=4)``.

    Returns
    -------
    Kernel

    Raises
    ------
    ValueError
        If the name is unknown (the message lists the known ones), or an option does not fit.
    TypeError
        If ``kernel`` is neither a name nor a kernel.
    """
    if isinstance(kernel, Kernel):
        if options:
            raise ValueError(f"options {sorted(options)} go with a kernel's name, but a kernel was given: {kernel!r}; "
                             "make it with these options instead")
        return kernel
    if isinstance(kernel, type) and issubclass(kernel, Kernel):
        raise TypeError(f"kernel must be a name or a kernel, not the class {kernel.__name__}; make one of it: "
                        f"{kernel.__name__}(...)")
    if not isinstance(kernel, str):
        raise TypeError(f"kernel must be a name or a kernelbook.kernels.Kernel, not {type(kernel).__name__}; "
                        "kernelbook.kernels tells how to write a kernel of your own")
    if kernel not in _CLASSES or kernel in _COMBINATORS:
        near = difflib.get_close_matches(kernel.lower().replace("-", "_"), [*available(), *_UNLISTED], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no kernel is called {kernel!r}{hint} (known: {', '.join(available())}; given by features: "
                         f"{', '.join(_UNLISTED)})")
    cls = _CLASSES[kernel]
    known = [f.name for f in dataclasses.fields(cls)]
    if wrong := sorted(set(options) - set(known)):
        raise ValueError(f"kernel {kernel!r} has no option {', '.join(map(repr, wrong))}; "
                         + (f"it has {', '.join(known)}" if known else "it has none"))
    return cls(**options)


def from_config(config: dict[str, Any]) -> Kernel:
    """The kernel that :meth:`Kernel.to_config` described.

    Parameters
    ----------
    config : dict
        With the key ``"kernel"`` and the options of that kernel.

    Raises
    ------
    ValueError
        If it is no such dictionary, or no such kernel is registered (a reader's own needs its module imported first).
    """
    if not isinstance(config, dict) or "kernel" not in config:
        raise ValueError("a kernel's configuration is a dictionary with the key 'kernel', as Kernel.to_config makes "
                         f"it, not {config!r}")
    config = dict(config)
    name = config.pop("kernel")
    if name not in _CLASSES:
        raise ValueError(f"no kernel is registered as {name!r}; if it is your own, import the module that defines it "
                         f"(known: {', '.join(_CLASSES)})")
    return _CLASSES[name](**{key: from_config(v) if isinstance(v, dict) else v for key, v in config.items()})


def check_points(q: Tensor, k: Tensor) -> None:
    """Raise a clear error unless ``q`` is ``(..., n, d)`` and ``k`` is ``(..., m, d)``, of one dtype and device."""
    for name, x, rows in (("q", q, "n"), ("k", k, "m")):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor of shape (..., {rows}, d), not {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must hold floating-point numbers, not {x.dtype}; convert it with {name}.float()")
        if x.ndim < 2:
            raise ValueError(f"{name} must have shape (..., {rows}, d), but has shape {tuple(x.shape)}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must be of one width d, but q is (..., n, d) = {tuple(q.shape)} "
                         f"and k is (..., m, d) = {tuple(k.shape)}")
    if q.shape[-1] == 0:
        raise ValueError(f"q and k must have at least one coordinate, but have shape {tuple(q.shape)}")
    if q.dtype != k.dtype:
        raise TypeError(f"q and k must be of one dtype, but are {q.dtype} and {k.dtype}")
    if q.device != k.device:
        raise ValueError(f"q and k must be on one device, but are on {q.device} and {k.device}")
    if q.shape[:-2] == k.shape[:-2]:
        return
    try:
        torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    except RuntimeError:
        raise ValueError(f"the leading axes of q {tuple(q.shape)} and k {tuple(k.shape)} do not broadcast") from None


# ------------------------------------------------------------------------- shared pieces

def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _is_number(x: Any) -> bool:
    """Whether ``x`` is a finite number; a tensor is none, since its gradient would be lost on the way."""
    return isinstance(x, numbers.Real) and math.isfinite(x)


def _in_brackets(kernel: Kernel, *binding_less: type[Kernel]) -> str:
    return f"({kernel!r})" if isinstance(kernel, binding_less) else repr(kernel)


def _scale(scale: float | None, d: int) -> float:
    return d ** -0.5 if scale is None else scale


def _dot(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    return (q @ k.transpose(-1, -2)) * _scale(scale, q.shape[-1])


def _differences(q: Tensor, k: Tensor) -> Tensor:
    return q[..., :, None, :] - k[..., None, :, :]


_TEX_DOT = r"q\cdot k"
_TEX_MIN = r"\textstyle\sum_l\min(q_l,k_l)"


def _times(scale: float | None, what: str, tex: bool = False) -> str:
    """``what`` multiplied by the scale, or divided by the square root of d where the scale is the default."""
    if scale is None:
        return what + (r"/\sqrt d" if tex else "/√d")
    return f"{scale:g}" + (r"\," if tex else "·") + what


@dataclass(frozen=True, repr=False)
class _Scaled(Kernel):
    """Common part of the kernels with one positive ``scale``, the factor of q·k or its like (default 1/√d)."""

    scale: float | None = None

    def __post_init__(self) -> None:
        _require(self.scale is None or (_is_number(self.scale) and self.scale > 0),
                 f"{type(self).__name__}: scale must be a positive number or None (1/√d), not {self.scale!r}")


# ------------------------------------------------------------------------- the zoo

@register("edp")
@dataclass(frozen=True, repr=False)
class EDP(_Scaled):
    r"""Exponentiated dot product, the kernel of standard attention: :math:`\exp(q\cdot k/\sqrt d)`.

    Parameters
    ----------
    scale : float, optional
        Factor of :math:`q\cdot k` (default :math:`1/\sqrt d`).

    References
    ----------
    Vaswani et al. 2017; as a kernel: Tsai et al. 2019, Wright and Gonzalez 2021.
    """

    range = POSITIVE
    definiteness = Definiteness.POSITIVE
    exponential = True
    source = "Vaswani et al. 2017; Tsai et al. 2019; Wright and Gonzalez 2021"

    @property
    def formula(self) -> str:
        return f"exp({_times(self.scale, 'q·k')})"

    @property
    def latex(self) -> str:
        return rf"\exp\left({_times(self.scale, _TEX_DOT, tex=True)}\right)"

    def log_gram(self, q, k):
        return _dot(q, k, self.scale)

    def gram(self, q, k):
        return self.log_gram(q, k).exp()


@register("rbf")
@dataclass(frozen=True, repr=False)
class RBF(Kernel):
    r"""Gaussian kernel: :math:`\exp(-\lVert q-k\rVert^2/(2\sigma^2))`, with :math:`\sigma^2=\sqrt d` by default.

    Parameters
    ----------
    bandwidth : float, optional
        :math:`\sigma`, in the units of the queries and keys (default :math:`d^{1/4}`, which makes the kernel
        :math:`\exp(q\cdot k/\sqrt d)` times a function of the query and one of the key).

    References
    ----------
    In attention: Tsai et al. 2019.
    """

    bandwidth: float | None = None

    range = Interval(0.0, 1.0, closed_high=True)
    definiteness = Definiteness.POSITIVE
    exponential = True
    source = "classical; in attention: Tsai et al. 2019"

    def __post_init__(self) -> None:
        _require(self.bandwidth is None or (_is_number(self.bandwidth) and self.bandwidth > 0),
                 f"RBF: bandwidth must be a positive number or None (d^(1/4)), not {self.bandwidth!r}")

    @property
    def formula(self) -> str:
        return "exp(−‖q−k‖²/(2√d))" if self.bandwidth is None else f"exp(−‖q−k‖²/(2·{self.bandwidth:g}²))"

    @property
    def latex(self) -> str:
        width = r"\sqrt d" if self.bandwidth is None else rf"\cdot {self.bandwidth:g}^2"
        return rf"\exp\left(-\frac{{\lVert q-k\rVert^2}}{{2{width}}}\right)"

    def precision(self, d: int) -> float:
        r""":math:`1/\sigma^2` at width ``d``."""
        return d ** -0.5 if self.bandwidth is None else self.bandwidth ** -2

    def log_gram(self, q, k):
        return _differences(q, k).square().sum(-1) * (-0.5 * self.precision(q.shape[-1]))

    def gram(self, q, k):
        return self.log_gram(q, k).exp()


@register("l2")
@dataclass(frozen=True, repr=False)
class L2(_Scaled):
    r"""Euclidean distance as a raw weight: :math:`\lVert q-k\rVert/\sqrt d`.

    The weight *grows* with distance: normalised attention prefers the keys far from the query.

    Parameters
    ----------
    scale : float, optional
        Factor of the distance (default :math:`1/\sqrt d`).

    Notes
    -----
    What some libraries call attention by L2 distance is a softmax of its negative square, that is :class:`RBF`.
    """

    range = NON_NEGATIVE
    definiteness = Definiteness.NEGATIVE_TYPE
    source = "classical"
    remark = "the weight grows with distance"

    @property
    def formula(self) -> str:
        return _times(self.scale, "‖q−k‖")

    @property
    def latex(self) -> str:
        return _times(self.scale, r"\lVert q-k\rVert", tex=True)

    def gram(self, q, k):
        # cdist's gradient at coinciding points is 0, a subgradient; that of sqrt would be infinite.  It makes no
        # n x m x d array, which training feels; it has no half precision of its own, and no second derivative.
        wide = torch.promote_types(q.dtype, torch.float32)
        dist = torch.cdist(q.to(wide), k.to(wide), compute_mode="donot_use_mm_for_euclid_dist")
        return dist.to(q.dtype) * _scale(self.scale, q.shape[-1])


@register("l2_squared")
@dataclass(frozen=True, repr=False)
class L2Squared(_Scaled):
    r"""Squared Euclidean distance as a raw weight: :math:`\lVert q-k\rVert^2/\sqrt d`.

    The weight *grows* with distance: normalised attention prefers the keys far from the query.

    Parameters
    ----------
    scale : float, optional
        Factor of the squared distance (default :math:`1/\sqrt d`).
    """

    range = NON_NEGATIVE
    definiteness = Definiteness.NEGATIVE_TYPE
    source = "classical"
    remark = "the weight grows with distance"

    @property
    def formula(self) -> str:
        return _times(self.scale, "‖q−k‖²")

    @property
    def latex(self) -> str:
        return _times(self.scale, r"\lVert q-k\rVert^2", tex=True)

    def feature_dimension(self, d: int) -> float:
        return d + 2

    def gram(self, q, k):
        return _differences(q, k).square().sum(-1) * _scale(self.scale, q.shape[-1])


@register("intersection")
@dataclass(frozen=True, repr=False)
class Intersection(_Scaled):
    r"""Histogram intersection: :math:`\sum_l\min(q_l,k_l)/\sqrt d`.

    Parameters
    ----------
    scale : float, optional
        Factor of the sum (default :math:`1/\sqrt d`).

    References
    ----------
    Maji, Berg and Malik 2008.
    """

    definiteness = Definiteness.CONDITIONAL
    source = "Maji, Berg and Malik 2008"
    remark = "positive definite on inputs that are never negative, only conditionally so on signed ones"

    @property
    def formula(self) -> str:
        return _times(self.scale, "Σ min(qₗ, kₗ)")

    @property
    def latex(self) -> str:
        return _times(self.scale, r"\textstyle\sum_l\min(q_l,k_l)", tex=True)

    def gram(self, q, k):
        return torch.minimum(q[..., :, None, :], k[..., None, :, :]).sum(-1) * _scale(self.scale, q.shape[-1])


@register("exponentiated_intersection")
@dataclass(frozen=True, repr=False)
class ExponentiatedIntersection(_Scaled):
    r"""Exponentiated intersection: :math:`\exp\bigl(\sum_l\min(q_l,k_l)/\sqrt d\bigr)`.

    Positive definite for signed inputs too, where the intersection itself is not.

    Parameters
    ----------
    scale : float, optional
        Factor of the sum (default :math:`1/\sqrt d`).
    """

    range = POSITIVE
    definiteness = Definiteness.POSITIVE
    exponential = True
    source = "exponential of Intersection"

    @property
    def formula(self) -> str:
        return f"exp({_times(self.scale, 'Σ min(qₗ, kₗ)')})"

    @property
    def latex(self) -> str:
        return rf"\exp\left({_times(self.scale, _TEX_MIN, tex=True)}\right)"

    def log_gram(self, q, k):
        return Intersection(self.scale).gram(q, k)

    def gram(self, q, k):
        return self.log_gram(q, k).exp()


@register("quadratic")
@dataclass(frozen=True, repr=False)
class Quadratic(_Scaled):
    r"""Homogeneous quadratic kernel: :math:`(q\cdot k/\sqrt d)^2`.

    Parameters
    ----------
    scale : float, optional
        Factor of :math:`q\cdot k` (default :math:`1/\sqrt d`).
    """

    range = NON_NEGATIVE
    definiteness = Definiteness.POSITIVE
    source = "classical"
    remark = "even in q: a query and its opposite attend alike; a query orthogonal to every key has no weights"

    @property
    def formula(self) -> str:
        return f"({_times(self.scale, 'q·k')})²"

    @property
    def latex(self) -> str:
        return rf"\left({_times(self.scale, _TEX_DOT, tex=True)}\right)^2"

    def feature_dimension(self, d: int) -> float:
        return d * (d + 1) // 2

    def gram(self, q, k):
        return _dot(q, k, self.scale).square()


@register("polynomial")
@dataclass(frozen=True, repr=False)
class Polynomial(_Scaled):
    r"""Polynomial kernel: :math:`(q\cdot k/\sqrt d+c)^m`.

    Parameters
    ----------
    scale : float, optional
        Factor of :math:`q\cdot k` (default :math:`1/\sqrt d`).
    degree : int
        :math:`m\ge1`.  An odd degree takes negative values.
    offset : float
        :math:`c`.  A negative one costs definiteness.
    """

    degree: int = 3
    offset: float = 1.0

    source = "classical"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(isinstance(self.degree, int) and self.degree >= 1,
                 f"Polynomial: degree must be a positive integer, not {self.degree!r}")
        _require(_is_number(self.offset), f"Polynomial: offset must be a finite number, not {self.offset!r}")

    @property
    def range(self) -> Interval:
        return NON_NEGATIVE if self.degree % 2 == 0 else ANY_REAL

    @property
    def definiteness(self) -> Definiteness:
        return Definiteness.POSITIVE if self.offset >= 0 else Definiteness.UNKNOWN

    @property
    def formula(self) -> str:
        c = f" {'+' if self.offset > 0 else '−'} {abs(self.offset):g}" if self.offset else ""
        return f"({_times(self.scale, 'q·k')}{c})^{self.degree}"

    @property
    def latex(self) -> str:
        c = f"{self.offset:+g}" if self.offset else ""
        return rf"\left({_times(self.scale, _TEX_DOT, tex=True)}{c}\right)^{{{self.degree}}}"

    def feature_dimension(self, d: int) -> float:
        return math.comb(d + self.degree - (self.offset == 0), self.degree)

    def gram(self, q, k):
        return (_dot(q, k, self.scale) + self.offset) ** self.degree


@functools.cache
def _taylor_minimum(degree: int) -> float:
    """The least value of the Taylor polynomial of an even degree."""
    if degree == 0 or degree % 2:
        return 1.0 if degree == 0 else -math.inf

    # The derivative of T_N is T_{N-1}; where it vanishes, T_N is a^N/N!, positive because N is even.
    def polynomial(a: float, n: int) -> float:
        return math.fsum([a ** i / math.factorial(i) for i in range(n + 1)])

    low, high = -float(degree), 0.0         # T_{N-1}, of odd degree, changes sign once, in here
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if polynomial(middle, degree - 1) > 0 else (middle, high)
    return high ** degree / math.factorial(degree)


@register("taylor")
@dataclass(frozen=True, repr=False)
class Taylor(_Scaled):
    r"""Taylor polynomial of the exponentiated dot product: :math:`\sum_{n\le N}(q\cdot k/\sqrt d)^n/n!`.

    Positive for even :math:`N`, with finite feature dimension :math:`\binom{d+N}{N}`: the control that differs from
    :class:`EDP` in little but its dimension.

    Parameters
    ----------
    scale : float, optional
        Factor of :math:`q\cdot k` (default :math:`1/\sqrt d`).
    degree : int
        :math:`N\ge0`.
    """

    degree: int = 2

    definiteness = Definiteness.POSITIVE
    source = "partial sums of EDP; that even ones are positive is proved in the chapter Features and rank"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(isinstance(self.degree, int) and 0 <= self.degree <= 40,
                 f"Taylor: degree must be an integer from 0 to 40, not {self.degree!r}")
        object.__setattr__(self, "_least", _taylor_minimum(self.degree))        # not a field: the degree says it

    @property
    def range(self) -> Interval:
        if self.degree == 0:
            return Interval(1.0, 1.0, closed_low=True, closed_high=True)
        if self.degree % 2:
            return ANY_REAL
        return Interval(self._least, math.inf, closed_low=True)

    @property
    def formula(self) -> str:
        x = _times(self.scale, "q·k")
        shown = [f"({x})^{n}/{n}!" if n > 1 else x if n else "1" for n in range(self.degree + 1)]
        return " + ".join(shown if len(shown) <= 4 else [*shown[:3], "…", shown[-1]])

    @property
    def latex(self) -> str:
        return rf"\sum_{{n=0}}^{{{self.degree}}}\frac1{{n!}}\left({_times(self.scale, _TEX_DOT, tex=True)}\right)^n"

    def feature_dimension(self, d: int) -> float:
        return math.comb(d + self.degree, self.degree)

    def gram(self, q, k):
        x = _dot(q, k, self.scale)
        total = torch.ones_like(x)
        for n in range(self.degree, 0, -1):         # Horner
            total = total * x / n + 1
        return total


@register("linear")
@dataclass(frozen=True, repr=False)
class Linear(_Scaled):
    r"""Linear kernel: :math:`q\cdot k/\sqrt d`.

    Parameters
    ----------
    scale : float, optional
        Factor of :math:`q\cdot k` (default :math:`1/\sqrt d`).
    """

    definiteness = Definiteness.POSITIVE
    source = "classical"

    @property
    def formula(self) -> str:
        return _times(self.scale, "q·k")

    @property
    def latex(self) -> str:
        return _times(self.scale, r"q\cdot k", tex=True)

    def feature_dimension(self, d: int) -> float:
        return d

    def gram(self, q, k):
        return _dot(q, k, self.scale)


@register("cosine")
@dataclass(frozen=True, repr=False)
class Cosine(Kernel):
    r"""Cosine of the angle: :math:`q\cdot k/(\lVert q\rVert\,\lVert k\rVert)`, and 0 where either vector is 0."""

    range = Interval(-1.0, 1.0, closed_low=True, closed_high=True)
    definiteness = Definiteness.POSITIVE
    source = "classical"
    formula = "q·k/(‖q‖‖k‖)"
    latex = r"\frac{q\cdot k}{\lVert q\rVert\,\lVert k\rVert}"

    def feature_dimension(self, d: int) -> float:
        return d

    def gram(self, q, k):
        return _unit(q) @ _unit(k).transpose(-1, -2)


def _unit(x: Tensor) -> Tensor:
    # The largest coordinate becomes 1 first, so that no square underflows or overflows.
    largest = x.detach().abs().amax(-1, keepdim=True)
    zero = largest == 0
    x = x / torch.where(zero, 1.0, largest)
    # The zero vector maps to itself, with gradient 0 rather than NaN: its norm is never differentiated.
    return torch.where(zero, 0.0, x / torch.linalg.vector_norm(torch.where(zero, 1.0, x), dim=-1, keepdim=True))


@register("constant")
@dataclass(frozen=True, repr=False)
class Constant(Kernel):
    r"""The constant :math:`c`, with which attention is the plain mean.

    Parameters
    ----------
    value : float
        :math:`c`.
    """

    value: float = 1.0

    source = "classical"

    def __post_init__(self) -> None:
        _require(_is_number(self.value), f"Constant: value must be a finite number, not {self.value!r}")

    @property
    def exponential(self) -> bool:
        return self.value > 0

    @property
    def range(self) -> Interval:
        return Interval(self.value, self.value, closed_low=True, closed_high=True)

    @property
    def definiteness(self) -> Definiteness:
        # Where the c_i sum to 0 the form vanishes, so a negative constant is still conditionally definite.
        return Definiteness.POSITIVE if self.value >= 0 else Definiteness.CONDITIONAL

    @property
    def formula(self) -> str:
        return f"{self.value:g}"

    latex = formula

    def feature_dimension(self, d: int) -> float:
        return int(self.value != 0)

    def gram(self, q, k):
        shape = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
        return q.new_full((*shape, q.shape[-2], k.shape[-2]), self.value)

    def log_gram(self, q, k):
        if not self.exponential:
            return super().log_gram(q, k)
        return Constant(math.log(self.value)).gram(q, k)


# ------------------------------------------------------------------------- a rule of the reader's

@_combinator("coordinatewise")          # like a combinator it is stored by name, and not made from a name alone
@dataclass(frozen=True, repr=False)
class Coordinatewise(Kernel):
    r"""A kernel given by what it does to each coordinate: :math:`\mathrm{link}\bigl(s\sum_l\rho(q_l,k_l)\bigr)`.

    ``Coordinatewise("min(q, k)")`` is the exponentiated intersection, ``Coordinatewise("(q - k)**2", link="sqrt")`` is
    :math:`d^{-1/4}\lVert q-k\rVert`.  Such a kernel is computed in tiles like the library's own, on a GPU too.

    Parameters
    ----------
    rule : str
        :math:`\rho`, as the text of a :class:`kernelbook.rules.Rule`.
    link : str
        ``"exp"``, ``"identity"`` or ``"sqrt"``; of the *scaled* sum.
    scale : float, optional
        :math:`s`, positive (default :math:`1/\sqrt d`).
    non_negative : bool
        That the kernel is never negative, where the link does not see to it: an assurance that is not checked.

    Raises
    ------
    ValueError
        If ``rule`` is no rule (the message shows where), or an option does not fit.
    """

    rule: str
    link: str = "exp"
    scale: float | None = None
    non_negative: bool = False

    feature_dimension_is_bound = True
    source = "a rule of the reader's"

    def __post_init__(self) -> None:
        _require(self.link in LINKS, f"Coordinatewise: link must be one of {', '.join(LINKS)}, not {self.link!r}")
        _require(self.scale is None or (_is_number(self.scale) and self.scale > 0),
                 f"Coordinatewise: scale must be a positive number or None (1/√d), not {self.scale!r}; "
                 "a sign belongs to the rule")
        object.__setattr__(self, "parsed", Rule(self.rule))     # not a field: the text says it all

    @property
    def range(self) -> Interval:
        if self.link == "exp":
            return POSITIVE
        return NON_NEGATIVE if self.link == "sqrt" or self.non_negative else ANY_REAL

    @property
    def exponential(self) -> bool:
        return self.link == "exp"

    @property
    def formula(self) -> str:
        total = _times(self.scale, f"Σ [{self.rule}]")
        return {"exp": f"exp({total})", "sqrt": f"√({total})", "identity": total}[self.link]

    @property
    def latex(self) -> str:
        total = _times(self.scale, rf"\textstyle\sum_l\texttt{{{self.rule}}}", tex=True)
        return {"exp": rf"\exp\left({total}\right)", "sqrt": rf"\sqrt{{{total}}}", "identity": total}[self.link]

    def _sum(self, q: Tensor, k: Tensor) -> Tensor:
        return self.parsed(q[..., :, None, :], k[..., None, :, :]).sum(-1) * _scale(self.scale, q.shape[-1])

    def log_gram(self, q, k):
        return self._sum(q, k) if self.exponential else super().log_gram(q, k)

    def gram(self, q, k):
        return apply_link(self._sum(q, k), self.link)


# ------------------------------------------------------------------------- combinators

@_combinator("sum")
@dataclass(frozen=True, repr=False)
class Sum(Kernel):
    r"""Sum of two kernels: :math:`\kappa_1(q,k)+\kappa_2(q,k)`.

    Parameters
    ----------
    first, second : Kernel
    """

    first: Kernel
    second: Kernel

    feature_dimension_is_bound = True
    source = "combinator"

    @property
    def range(self) -> Interval:
        return self.first.range + self.second.range

    @property
    def exponential(self) -> bool:
        return self.first.exponential and self.second.exponential

    @property
    def definiteness(self) -> Definiteness:
        a, b = self.first.definiteness, self.second.definiteness
        if a is b:
            return a
        return Definiteness.CONDITIONAL if a.conditional and b.conditional else Definiteness.UNKNOWN

    @property
    def formula(self) -> str:
        return f"{self.first.formula} + {self.second.formula}"

    @property
    def latex(self) -> str:
        return f"{self.first.latex}+{self.second.latex}"

    def __repr__(self) -> str:
        return f"{self.first!r} + {_in_brackets(self.second, Sum)}"

    def feature_dimension(self, d: int) -> float:
        return self.first.feature_dimension(d) + self.second.feature_dimension(d)

    def gram(self, q, k):
        return self.first.gram(q, k) + self.second.gram(q, k)

    def log_gram(self, q, k):
        if not self.exponential:
            return super().log_gram(q, k)
        return torch.logaddexp(self.first.log_gram(q, k), self.second.log_gram(q, k))


@_combinator("product")
@dataclass(frozen=True, repr=False)
class Product(Kernel):
    r"""Pointwise (Schur) product of two kernels: :math:`\kappa_1(q,k)\,\kappa_2(q,k)`.

    Parameters
    ----------
    first, second : Kernel
    """

    first: Kernel
    second: Kernel

    feature_dimension_is_bound = True
    source = "combinator"

    @property
    def range(self) -> Interval:
        return self.first.range * self.second.range

    @property
    def exponential(self) -> bool:
        return self.first.exponential and self.second.exponential

    @property
    def definiteness(self) -> Definiteness:
        both = self.first.positive_definite and self.second.positive_definite      # Schur's product theorem
        return Definiteness.POSITIVE if both else Definiteness.UNKNOWN

    @property
    def formula(self) -> str:
        return f"[{self.first.formula}] · [{self.second.formula}]"

    @property
    def latex(self) -> str:
        return rf"\left[{self.first.latex}\right]\cdot\left[{self.second.latex}\right]"

    def __repr__(self) -> str:
        return f"{_in_brackets(self.first, Sum)} * {_in_brackets(self.second, Sum, Product, Scaled)}"

    def feature_dimension(self, d: int) -> float:
        a, b = self.first.feature_dimension(d), self.second.feature_dimension(d)
        return 0 if 0 in (a, b) else a * b

    def gram(self, q, k):
        return self.first.gram(q, k) * self.second.gram(q, k)

    def log_gram(self, q, k):
        if not self.exponential:
            return super().log_gram(q, k)
        return self.first.log_gram(q, k) + self.second.log_gram(q, k)


@_combinator("exponential")
@dataclass(frozen=True, repr=False)
class Exponential(Kernel):
    r"""Exponential of a kernel: :math:`e^{\kappa(q,k)}`.

    Positive definite if :math:`\kappa` is conditionally so (Schoenberg 1938).

    Parameters
    ----------
    base : Kernel
    """

    base: Kernel

    exponential = True
    feature_dimension_is_bound = True
    source = "combinator; definiteness: Schoenberg 1938"

    @property
    def range(self) -> Interval:
        return self.base.range.exp()

    @property
    def definiteness(self) -> Definiteness:
        return Definiteness.POSITIVE if self.base.definiteness.conditional else Definiteness.UNKNOWN

    @property
    def formula(self) -> str:
        return f"exp({self.base.formula})"

    @property
    def latex(self) -> str:
        return rf"\exp\left({self.base.latex}\right)"

    def __repr__(self) -> str:
        return f"{_in_brackets(self.base, Sum, Product, Scaled)}.exp()"

    def feature_dimension(self, d: int) -> float:
        if self.base.range.low == self.base.range.high:
            return 1
        base = self.base
        while isinstance(base, Scaled):
            base = base.base
        if d == 1 and isinstance(base, Cosine):
            return 3        # it depends on two signs, each -1, 0 or 1; without zero vectors, 2 features are enough
        return math.inf

    def log_gram(self, q, k):
        return self.base.gram(q, k)

    def gram(self, q, k):
        return self.log_gram(q, k).exp()


@_combinator("scaled")
@dataclass(frozen=True, repr=False)
class Scaled(Kernel):
    r"""A kernel times a number: :math:`c\,\kappa(q,k)`.

    Parameters
    ----------
    base : Kernel
    factor : float
        :math:`c`, finite and not 0.
    """

    base: Kernel
    factor: float

    source = "combinator"

    def __post_init__(self) -> None:
        _require(_is_number(self.factor) and self.factor != 0,
                 f"Scaled: factor must be a finite number and not 0, not {self.factor!r}")

    @property
    def feature_dimension_is_bound(self) -> bool:
        return self.base.feature_dimension_is_bound

    @property
    def range(self) -> Interval:
        return self.base.range * Interval(self.factor, self.factor, True, True)

    @property
    def exponential(self) -> bool:
        return self.base.exponential and self.factor > 0

    @property
    def definiteness(self) -> Definiteness:
        if self.factor > 0:
            return self.base.definiteness
        if self.base.definiteness.conditional:
            return Definiteness.NEGATIVE_TYPE
        negative_type = self.base.definiteness is Definiteness.NEGATIVE_TYPE
        return Definiteness.CONDITIONAL if negative_type else Definiteness.UNKNOWN

    @property
    def formula(self) -> str:
        return f"{'−' if self.factor == -1 else f'{self.factor:g}·'}[{self.base.formula}]"

    @property
    def latex(self) -> str:
        return rf"{'-' if self.factor == -1 else f'{self.factor:g}'}\left[{self.base.latex}\right]"

    def __repr__(self) -> str:
        inner = _in_brackets(self.base, Sum, Product, Scaled)
        factor = f"{self.factor:g}" if float(f"{self.factor:g}") == self.factor else f"{float(self.factor)!r}"
        return f"-{inner}" if self.factor == -1 else f"{factor} * {inner}"

    def feature_dimension(self, d: int) -> float:
        return self.base.feature_dimension(d)

    def gram(self, q, k):
        return self.factor * self.base.gram(q, k)

    def log_gram(self, q, k):
        if not self.exponential:
            return super().log_gram(q, k)
        return self.base.log_gram(q, k) + math.log(self.factor)


@dataclass(frozen=True, repr=False)
class _ProductSpace(Kernel):
    """Common part of the kernels on a product of two spaces: the first ``split`` coordinates, and the rest."""

    first: Kernel
    second: Kernel
    split: int

    source = "combinator; content and position: Tsai et al. 2019"
    same_space: ClassVar[type[Kernel]]      # the combinator of two kernels on one space, whose properties these share

    @property
    def range(self) -> Interval:
        return self.same_space(self.first, self.second).range

    @property
    def exponential(self) -> bool:
        return self.same_space(self.first, self.second).exponential

    @property
    def definiteness(self) -> Definiteness:
        return self.same_space(self.first, self.second).definiteness

    def __post_init__(self) -> None:
        _require(isinstance(self.split, int) and self.split >= 1,
                 f"{type(self).__name__}: split must be a positive integer, not {self.split!r}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.first!r}, {self.second!r}, split={self.split})"

    def _second_width(self, d: int) -> int:
        _require(self.split < d, f"{self!r} gives its first kernel {self.split} coordinates and its second the rest, "
                                 f"so queries and keys need more than {self.split}, but have {d}")
        return d - self.split

    def _parts(self, q: Tensor, k: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        self._second_width(q.shape[-1])
        s = self.split
        return (q[..., :s], k[..., :s]), (q[..., s:], k[..., s:])


@_combinator("tensor_product")
@dataclass(frozen=True, repr=False)
class TensorProduct(_ProductSpace):
    r"""Product kernel on a product space: :math:`\kappa_1(q_{\le s},k_{\le s})\,\kappa_2(q_{>s},k_{>s})`.

    Content and position as two factors, say.  A default scale :math:`1/\sqrt d` in a factor counts that factor's
    own coordinates.

    Parameters
    ----------
    first, second : Kernel
        Of the first ``split`` coordinates, and of the rest.
    split : int
    """

    same_space = Product

    @property
    def feature_dimension_is_bound(self) -> bool:
        return self.first.feature_dimension_is_bound or self.second.feature_dimension_is_bound

    @property
    def formula(self) -> str:
        return f"[{self.first.formula}](1…{self.split}) · [{self.second.formula}]({self.split + 1}…d)"

    @property
    def latex(self) -> str:
        return (rf"\left[{self.first.latex}\right]_{{1\ldots {self.split}}}\cdot"
                rf"\left[{self.second.latex}\right]_{{{self.split + 1}\ldots d}}")

    def feature_dimension(self, d: int) -> float:
        # Unlike the product at one point, the tensor product's rank is the product of the ranks.
        a, b = self.first.feature_dimension(self.split), self.second.feature_dimension(self._second_width(d))
        return 0 if 0 in (a, b) else a * b

    def gram(self, q, k):
        (q1, k1), (q2, k2) = self._parts(q, k)
        return self.first.gram(q1, k1) * self.second.gram(q2, k2)

    def log_gram(self, q, k):
        if not self.exponential:
            return super().log_gram(q, k)
        (q1, k1), (q2, k2) = self._parts(q, k)
        return self.first.log_gram(q1, k1) + self.second.log_gram(q2, k2)


@_combinator("direct_sum")
@dataclass(frozen=True, repr=False)
class DirectSum(_ProductSpace):
    r"""Sum kernel on a product space: :math:`\kappa_1(q_{\le s},k_{\le s})+\kappa_2(q_{>s},k_{>s})`.

    Parameters
    ----------
    first, second : Kernel
        Of the first ``split`` coordinates, and of the rest.
    split : int
    """

    same_space = Sum
    feature_dimension_is_bound = True

    @property
    def formula(self) -> str:
        return f"[{self.first.formula}](1…{self.split}) + [{self.second.formula}]({self.split + 1}…d)"

    @property
    def latex(self) -> str:
        return (rf"\left[{self.first.latex}\right]_{{1\ldots {self.split}}}+"
                rf"\left[{self.second.latex}\right]_{{{self.split + 1}\ldots d}}")

    def feature_dimension(self, d: int) -> float:
        return self.first.feature_dimension(self.split) + self.second.feature_dimension(self._second_width(d))

    def gram(self, q, k):
        (q1, k1), (q2, k2) = self._parts(q, k)
        return self.first.gram(q1, k1) + self.second.gram(q2, k2)

    def log_gram(self, q, k):
        if not self.exponential:
            return super().log_gram(q, k)
        (q1, k1), (q2, k2) = self._parts(q, k)
        return torch.logaddexp(self.first.log_gram(q1, k1), self.second.log_gram(q2, k2))
