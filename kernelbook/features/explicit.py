r"""Feature maps in closed form, one for queries and keys alike, and certificates of what a truncation loses."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import kernels
from ..kernels import Kernel

__all__ = [
    "FeatureMap", "MultinomialFeatures", "PolynomialFeatures", "QuadraticFeatures", "ConstantFeatures",
    "IntersectionFeatures", "ExponentiatedIntersectionFeatures", "of",
    "count", "counts", "truncation_bound", "certified_degree", "tail_norm_bound", "LIMIT",
]

#: The largest number of features that a map makes of one point.
LIMIT = 1_000_000


# ------------------------------------------------------------------------------------------------- counting

def counts(d: int, degree: int) -> list[int]:
    r"""How many monomials of each degree there are in ``d`` variables: :math:`\binom{n+d-1}n`, for n = 0 to ``degree``.

    Parameters
    ----------
    d : int
        Number of variables, at least 1.
    degree : int
        The largest degree, at least 0.

    Returns
    -------
    list of int
        ``degree + 1`` numbers.

    Raises
    ------
    ValueError
        If one of them is no such integer.
    """
    _integer("d", d, 1)
    _integer("degree", degree, 0)
    return [math.comb(n + d - 1, n) for n in range(degree + 1)]


def count(d: int, degree: int) -> int:
    r"""How many monomials of degree at most ``degree`` there are in ``d`` variables: :math:`\binom{N+d}d`.

    Parameters
    ----------
    d : int
        Number of variables, at least 1.
    degree : int
        :math:`N\ge0`.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        If one of them is no such integer.
    """
    _integer("d", d, 1)
    _integer("degree", degree, 0)
    return math.comb(degree + d, d)


# ------------------------------------------------------------------------------------------------- the maps

@dataclass(frozen=True)
class FeatureMap:
    r"""A map :math:`\Phi:\mathbb R^d\to\mathbb R^D` with :math:`\kappa(q,k)=\Phi(q)\cdot\Phi(k)`.

    Derive from it, as a frozen dataclass, and define :meth:`dimension`, :attr:`kernel` and ``_features``.
    """

    def __call__(self, x: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n D"]:
        """The features of each point.

        Parameters
        ----------
        x : Tensor
            Points, ``(..., n, d)``, floating.

        Returns
        -------
        Tensor
            ``(..., n, D)`` with ``D = dimension(d)``.

        Raises
        ------
        TypeError
            If ``x`` is no floating tensor.
        ValueError
            If it does not have the shape ``(..., n, d)``, or the features would be more than ``LIMIT``.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            given = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating tensor of shape (..., n, d), not {given}")
        if x.ndim < 2 or x.shape[-1] == 0:
            raise ValueError(f"x must have shape (..., n, d) with d at least 1, but has shape {tuple(x.shape)}; "
                             "one point is x[None]")
        self._check_dimension(x.shape[-1])
        return self._features(x)

    def dimension(self, d: int) -> int:
        """How many features a point of width ``d`` has.

        Parameters
        ----------
        d : int
            Width of the points.

        Returns
        -------
        int
        """
        raise NotImplementedError(f"{type(self).__name__} derives from FeatureMap and must define dimension(self, d)")

    @property
    def kernel(self) -> Kernel:
        """The kernel whose Gram matrix is ``phi(q) @ phi(k).mT``."""
        raise NotImplementedError(f"{type(self).__name__} derives from FeatureMap and must define its kernel")

    def _features(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} derives from FeatureMap and must define _features(self, x)")

    def _check_dimension(self, d: int) -> None:
        size = self.dimension(d)
        if size > LIMIT:
            raise ValueError(f"{self!r} has {size:,} features at width d = {d}, more than {LIMIT:,}; lower the degree "
                             "or the width, or use the map's kernel, which needs no features")


@dataclass(frozen=True)
class _ScaledMap(FeatureMap):
    """Common part of the maps with a ``scale``: the factor of q·k (or of the minimum) in the kernel."""

    def _check_scale(self) -> None:
        scale = self.scale
        if isinstance(scale, bool):
            return
        if not (isinstance(scale, numbers.Real) and math.isfinite(scale) and scale > 0):
            raise ValueError(f"{type(self).__name__}: scale must be True (1/√d, as in attention), False (1) or a "
                             f"positive number, not {scale!r}")
        # True == 1 in Python, but here they differ: 1 is stored as False, so that equal maps are equal.
        object.__setattr__(self, "scale", float(scale) if scale != 1 else False)

    @property
    def _kernel_scale(self) -> float | None:
        return None if self.scale is True else 1.0 if self.scale is False else self.scale

    def _factor(self, d: int) -> float:
        return d ** -0.5 if self.scale is True else 1.0 if self.scale is False else self.scale


@dataclass(frozen=True)
class MultinomialFeatures(_ScaledMap):
    r"""Monomial features up to a degree: :math:`\Phi_\alpha(x)=x^\alpha/\sqrt{\alpha!}`, :math:`|\alpha|\le N`.

    Their inner product is the Taylor polynomial :math:`\sum_{n\le N}(q\cdot k)^n/n!` of the exponentiated dot
    product.  They come in order of their degree, from the constant 1 on; within a degree lexicographically, the
    powers of the first coordinate first.  There may be any number of degrees; :attr:`kernel` exists up to degree 40.

    Parameters
    ----------
    degree : int
        :math:`N\ge0`.
    scale : bool or float
        The factor of :math:`q\cdot k`: 1 if False, :math:`1/\sqrt d` if True (so points are divided by
        :math:`d^{1/4}` first), or a positive number.

    Raises
    ------
    ValueError
        If an argument is none of these.

    References
    ----------
    Chapter *Features and rank*.
    """

    degree: int
    scale: bool | float = False

    def __post_init__(self) -> None:
        _integer("degree", self.degree, 0, type(self).__name__)
        self._check_scale()

    def dimension(self, d: int) -> int:
        return count(d, self.degree)

    @property
    def kernel(self) -> Kernel:
        return kernels.Taylor(scale=self._kernel_scale, degree=self.degree)

    def degrees(self, d: int) -> Int[Tensor, " D"]:
        """The degree of each feature.

        Parameters
        ----------
        d : int
            Width of the points.

        Returns
        -------
        Tensor
            ``(D,)``, int64.

        Raises
        ------
        ValueError
            If the features would be more than ``LIMIT``.
        """
        self._check_dimension(d)
        return torch.repeat_interleave(torch.arange(self.degree + 1), torch.tensor(counts(d, self.degree)))

    def exponents(self, d: int) -> Int[Tensor, "D d"]:
        r"""The multi-index :math:`\alpha` of each feature.

        Parameters
        ----------
        d : int
            Width of the points.

        Returns
        -------
        Tensor
            ``(D, d)``, int64.

        Raises
        ------
        ValueError
            If the features would be more than ``LIMIT``.
        """
        self._check_dimension(d)
        blocks = [torch.zeros(1, d, dtype=torch.int64)]
        for parent, variable, _ in _monomials(d, self.degree):
            block = blocks[-1][parent]
            block[torch.arange(len(variable)), variable] += 1
            blocks.append(block)
        return torch.cat(blocks)

    def _features(self, x: Tensor) -> Tensor:
        return torch.cat(_by_degree(x * math.sqrt(self._factor(x.shape[-1])), self.degree), dim=-1)


@dataclass(frozen=True)
class PolynomialFeatures(_ScaledMap):
    r"""Features of the polynomial kernel :math:`(q\cdot k+c)^m`.

    .. math:: \Phi_\alpha(x)=\sqrt{\frac{m!\,c^{m-|\alpha|}}{(m-|\alpha|)!}}\;\frac{x^\alpha}{\sqrt{\alpha!}},
              \qquad|\alpha|\le m,

    and only those with :math:`|\alpha|=m` if :math:`c=0`.

    Parameters
    ----------
    degree : int
        :math:`m\ge1`, at most 170: beyond, :math:`m!` overflows.
    offset : float
        :math:`c\ge0`.
    scale : bool or float
        The factor of :math:`q\cdot k`, as in :class:`MultinomialFeatures`.

    Raises
    ------
    ValueError
        If an argument is none of these.
    """

    degree: int
    offset: float = 0.0
    scale: bool | float = False

    def __post_init__(self) -> None:
        _integer("degree", self.degree, 1, type(self).__name__)
        if self.degree > 170:
            raise ValueError(f"PolynomialFeatures: degree must be at most 170, beyond which its factorial overflows, "
                             f"not {self.degree}; the kernel itself needs no features")
        if not (isinstance(self.offset, numbers.Real) and 0 <= self.offset < math.inf):
            raise ValueError(f"{type(self).__name__}: offset must be a number and not negative, not {self.offset!r}; "
                             "with a negative one queries and keys need different features")
        self._check_scale()

    def dimension(self, d: int) -> int:
        return count(d, self.degree) if self.offset else counts(d, self.degree)[-1]

    @property
    def kernel(self) -> Kernel:
        return kernels.Polynomial(scale=self._kernel_scale, degree=self.degree, offset=self.offset)

    def _features(self, x: Tensor) -> Tensor:
        m, blocks = self.degree, _by_degree(x * math.sqrt(self._factor(x.shape[-1])), self.degree)
        if self.offset == 0:
            return math.sqrt(math.factorial(m)) * blocks[m]
        return torch.cat([math.sqrt(math.perm(m, n) * self.offset ** (m - n)) * block
                          for n, block in enumerate(blocks)], dim=-1)


@dataclass(frozen=True)
class QuadraticFeatures(_ScaledMap):
    r"""Features of the quadratic kernel :math:`(q\cdot k)^2`: all :math:`x_i^2` and :math:`\sqrt2\,x_ix_j`, i < j.

    Parameters
    ----------
    scale : bool or float
        The factor of :math:`q\cdot k`, as in :class:`MultinomialFeatures`.
    """

    scale: bool | float = False

    def __post_init__(self) -> None:
        self._check_scale()

    def dimension(self, d: int) -> int:
        return counts(d, 2)[-1]

    @property
    def kernel(self) -> Kernel:
        return kernels.Quadratic(scale=self._kernel_scale)

    def _features(self, x: Tensor) -> Tensor:
        return PolynomialFeatures(degree=2, scale=self.scale)(x)


@dataclass(frozen=True)
class ConstantFeatures(FeatureMap):
    r"""The one feature :math:`\sqrt c` of the constant kernel.

    Parameters
    ----------
    value : float
        :math:`c>0`.
    """

    value: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.value, numbers.Real) and 0 < self.value < math.inf):
            raise ValueError(f"ConstantFeatures: value must be a positive number, not {self.value!r}")

    def dimension(self, d: int) -> int:
        _integer("d", d, 1)
        return 1

    @property
    def kernel(self) -> Kernel:
        return kernels.Constant(self.value)

    def _features(self, x: Tensor) -> Tensor:
        return x.new_full((*x.shape[:-1], 1), math.sqrt(self.value))


@dataclass(frozen=True)
class _BrownianMap(_ScaledMap):
    """Common part of the two intersection maps: they record a Brownian path at the knots only."""

    knots: tuple[float, ...]
    scale: bool | float = False

    def __post_init__(self) -> None:
        given = self.knots.tolist() if isinstance(self.knots, Tensor) else self.knots
        if not isinstance(given, Sequence) or not all(
                isinstance(t, numbers.Real) and math.isfinite(t) for t in given):
            raise ValueError(f"{type(self).__name__}: knots must be a list of finite numbers, not {self.knots!r}")
        knots = tuple(sorted({float(t) for t in given} - self._without))
        if not knots or not all(map(self._may_be_knot, knots)):
            raise ValueError(f"{type(self).__name__}: there must be at least one {self._wanted} among the knots, "
                             f"and no other kind of number: {self.knots!r}")
        object.__setattr__(self, "knots", knots)
        self._check_scale()

    def _check_points(self, x: Tensor) -> None:
        if (x > self.knots[-1]).any():
            raise ValueError(f"{type(self).__name__}: a coordinate is {x.max().item():g}, beyond the last knot "
                             f"{self.knots[-1]:g}; add a knot at least as large")

    @staticmethod
    def _path(time: Tensor, knots: Tensor) -> Tensor:
        """What the increments of the path between knots contribute to it at a time: ``(..., len(knots))``."""
        start = torch.cat([knots.new_zeros(1), knots[:-1]])
        width = knots - start
        if not (width.isfinite() & (width > 0)).all():
            raise ValueError(f"two knots are too close, or too far from 0, to be told apart in {knots.dtype}: of the "
                             f"{len(width)} gaps between their times the least is {width.min().item():g}; use fewer "
                             "knots, or float64")
        return ((time[..., None] - start) / width).clamp(0, 1) * width.sqrt()


@dataclass(frozen=True)
class IntersectionFeatures(_BrownianMap):
    r"""Features of the intersection kernel :math:`\sum_l\min(q_l,k_l)` on points without negative coordinates.

    :math:`\min(a,b)` is the covariance of Brownian motion at the times a and b.  A path known at the knots
    :math:`0=\tau_0<\tau_1<\dots<\tau_m` only, and straight in between, has the increments
    :math:`B_{\tau_i}-B_{\tau_{i-1}}`, independent and of variance :math:`\tau_i-\tau_{i-1}`; hence the features

    .. math:: \Phi_{l,i}(x)=\sqrt{\tau_i-\tau_{i-1}}\;
              \min\Bigl(1,\max\Bigl(0,\frac{x_l-\tau_{i-1}}{\tau_i-\tau_{i-1}}\Bigr)\Bigr).

    Their inner product is the kernel wherever, in each coordinate, q or k is a knot or they do not lie between the
    same two.  Elsewhere it is too small, by at most a quarter of the gap between two knots per coordinate.

    Parameters
    ----------
    knots : sequence of float
        Positive; 0 is always a knot.  No coordinate may exceed the last.
    scale : bool or float
        The factor of the sum: 1 if False, :math:`1/\sqrt d` if True, or a positive number.

    Raises
    ------
    ValueError
        If an argument is none of these; when called, if a coordinate is negative (there the kernel is not positive
        definite, so it has no such features) or beyond the last knot.
    """

    _without, _wanted = frozenset({0.0}), "positive number"

    @staticmethod
    def _may_be_knot(t: float) -> bool:
        return t > 0

    def dimension(self, d: int) -> int:
        _integer("d", d, 1)
        return d * len(self.knots)

    @property
    def kernel(self) -> Kernel:
        """The intersection kernel: exact at the knots, as the class says."""
        return kernels.Intersection(scale=self._kernel_scale)

    def error_bound(self, d: int) -> float:
        """By how much the inner product may fall short of the kernel at width ``d``.

        Parameters
        ----------
        d : int
            Width of the points.

        Returns
        -------
        float
        """
        _integer("d", d, 1)
        gaps = [b - a for a, b in zip((0.0, *self.knots), self.knots, strict=False)]
        return self._factor(d) * d * max(gaps) / 4

    def _features(self, x: Tensor) -> Tensor:
        if (x < 0).any():
            raise ValueError("IntersectionFeatures: a coordinate is negative, and there the intersection kernel is "
                             "not positive definite: min(-1, -1) = -1 is no square; shift the coordinates, or use "
                             "ExponentiatedIntersectionFeatures")
        self._check_points(x)
        features = self._path(x, x.new_tensor(self.knots)) * math.sqrt(self._factor(x.shape[-1]))
        return features.flatten(-2)


@dataclass(frozen=True)
class ExponentiatedIntersectionFeatures(_BrownianMap):
    r"""Features of the exponentiated intersection :math:`\exp\sum_l\min(q_l,k_l)`, for coordinates of either sign.

    In one coordinate :math:`e^{\min(a,b)}=\min(e^a,e^b)`: Brownian covariance at the times :math:`e^a` and
    :math:`e^b`.  The features of several coordinates are the products of one feature of each.

    Parameters
    ----------
    knots : sequence of float
        Where the features are exact, as in :class:`IntersectionFeatures`; they may be negative.  No coordinate may
        exceed the last.
    scale : bool or float
        The factor of the sum: 1 if False, :math:`1/\sqrt d` if True, or a positive number.

    Raises
    ------
    ValueError
        If an argument is none of these; when called, if a coordinate is beyond the last knot, or the
        ``len(knots) ** d`` features are too many.
    """

    _without, _wanted = frozenset(), "number"

    @staticmethod
    def _may_be_knot(t: float) -> bool:
        return True

    def dimension(self, d: int) -> int:
        _integer("d", d, 1)
        return len(self.knots) ** d

    @property
    def kernel(self) -> Kernel:
        """The exponentiated intersection: exact at the knots, as the class says."""
        return kernels.ExponentiatedIntersection(scale=self._kernel_scale)

    def _features(self, x: Tensor) -> Tensor:
        self._check_points(x)
        factor = self._factor(x.shape[-1])
        paths = self._path((factor * x).exp(), (factor * x.new_tensor(self.knots)).exp())
        return functools.reduce(lambda a, b: (a[..., :, None] * b[..., None, :]).flatten(-2), paths.unbind(-2))


def of(kernel: Kernel) -> FeatureMap:
    """The feature map of a kernel of finite feature dimension.

    Parameters
    ----------
    kernel : Kernel
        ``Taylor``, ``Polynomial`` with an offset that is not negative, ``Quadratic``, ``Linear``, or a positive
        ``Constant``.

    Returns
    -------
    FeatureMap
        ``phi`` with ``phi(q) @ phi(k).mT`` equal to ``kernel(q, k)``.

    Raises
    ------
    TypeError
        If ``kernel`` is no kernel.
    ValueError
        If it has infinitely many features, or no map that serves queries and keys alike is known here.
    """
    if not isinstance(kernel, Kernel):
        raise TypeError(f"of takes a kernelbook.kernels.Kernel, not {type(kernel).__name__}; "
                        "kernelbook.kernels.get makes one of a name")
    scale = getattr(kernel, "scale", None)
    scale = True if scale is None else scale
    kind = type(kernel)                         # exactly: a subclass may be another function
    if kind is kernels.Taylor:
        return MultinomialFeatures(kernel.degree, scale)
    if kind is kernels.Polynomial and kernel.offset >= 0:
        return PolynomialFeatures(kernel.degree, kernel.offset, scale)
    if kind is kernels.Quadratic:
        return QuadraticFeatures(scale)
    if kind is kernels.Linear:
        return PolynomialFeatures(1, 0.0, scale)
    if kind is kernels.Constant and kernel.value > 0:
        return ConstantFeatures(kernel.value)
    if kind is kernels.EDP:
        raise ValueError("EDP has infinitely many features; MultinomialFeatures(degree) has those up to a degree, "
                         "and certified_degree(radius, error) says which degree is enough")
    if kind in (kernels.Intersection, kernels.ExponentiatedIntersection):
        raise ValueError(f"{kernel!r} has infinitely many features; {kind.__name__}Features(knots) has those that are "
                         "exact at chosen knots")
    if not kernel.positive_definite:
        raise ValueError(f"{kernel!r} is not known to be positive definite, so no one map need serve queries and keys "
                         "alike; a pair of two different maps may exist")
    raise ValueError(f"no features of {kernel!r} are known here; known are those of Taylor, Polynomial, Quadratic, "
                     "Linear and Constant")


# ------------------------------------------------------------------------------------------------- certificates

def truncation_bound(a: Float[Tensor, "*shape"] | float, degree: int) -> Float[Tensor, "*shape"]:
    r"""A bound of the error :math:`\bigl|e^a-\sum_{n\le N}a^n/n!\bigr|`, for each entry.

    .. math:: \frac{|a|^{N+1}}{(N+1)!}\cdot\begin{cases}1&a\le0\\
              \min\Bigl(e^a,\;\bigl(1-\tfrac a{N+2}\bigr)^{-1}\Bigr)&0<a<N+2\\e^a&a\ge N+2\end{cases}

    It is rounded up, so it holds in floating-point numbers too; of the error by which the polynomial itself is
    computed it says nothing.

    Parameters
    ----------
    a : Tensor or float
        Logits.
    degree : int
        :math:`N\ge0`.

    Returns
    -------
    Tensor
        Of the shape of ``a``; float64 if ``a`` is a number.

    Raises
    ------
    TypeError
        If ``a`` holds integers.
    ValueError
        If ``degree`` is not such an integer.

    References
    ----------
    Chapter *Features and rank*.
    """
    _integer("degree", degree, 0)
    a = torch.as_tensor(a, dtype=None if isinstance(a, Tensor) else torch.float64)
    if not a.is_floating_point():
        raise TypeError(f"a must hold floating-point numbers, not {a.dtype}")
    lead = torch.ones_like(a)
    for n in range(1, degree + 2):                      # as a product: no factorial overflows
        lead = lead * (a.abs() / n)
    return _truncation_bound(a, lead, degree)


def _truncation_bound(a: Tensor, lead: Tensor, degree: int) -> Tensor:
    """The bound, from the first term that is dropped."""
    geometric = torch.where(a < degree + 2, 1 / (1 - a / (degree + 2)).clamp_min(torch.finfo(a.dtype).tiny), math.inf)
    bound = lead * torch.where(a > 0, torch.minimum(a.exp(), geometric), 1.0)
    limits = torch.finfo(a.dtype)
    bound = bound * (1 + 4 * (degree + 4) * limits.eps)
    # What underflowed is positive still; and twice that, as below `tiny` numbers may be flushed to 0 on the way.
    return torch.where(a == 0, 0.0, bound.clamp_min(2 * limits.tiny))


def certified_degree(radius: float, error: float) -> int:
    r"""The least degree N for which :func:`truncation_bound` is at most ``error`` for all :math:`|a|\le` ``radius``.

    Parameters
    ----------
    radius : float
        A bound of the logits, from 0 to 600 (beyond, the exponential overflows).
    error : float
        Positive, at least 4.5e-308: smaller bounds are rounded up to that.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        If the arguments are not such numbers.
    """
    if not (isinstance(radius, numbers.Real) and 0 <= radius <= 600):
        raise ValueError(f"radius must be a number from 0 to 600, beyond which exp overflows, not {radius!r}")
    least = 2 * torch.finfo(torch.float64).tiny
    if not (isinstance(error, numbers.Real) and error >= least):
        raise ValueError(f"error must be a positive number, at least {least:.4g} (no bound is smaller), not {error!r}")
    a = torch.tensor(float(radius), dtype=torch.float64)            # the bound grows with |a|, and is larger at +|a|
    degree, lead = 0, a
    while _truncation_bound(a, lead, degree) > error:
        degree += 1
        lead = lead * (a / (degree + 1))
    return degree


def tail_norm_bound(x: Float[Tensor, "*shape d"], degree: int, r: float) -> Float[Tensor, "*shape"]:
    r"""A bound of the :math:`\ell^r` norm of the monomial features of degree above N, which a truncation drops.

    With :math:`D_n=\binom{n+d-1}n`, it is the power 1/r of the sum over :math:`n>N` of

    .. math:: \sum_{|\alpha|=n}|\Phi_\alpha(x)|^r\le D_n^{\max(0,\,1-r/2)}
              \Bigl(\frac{\lVert x\rVert^{2n}}{n!}\Bigr)^{r/2},

    with equality at :math:`r=2`; for infinite r, the largest :math:`\lVert x\rVert^n/\sqrt{n!}` with :math:`n>N`.
    It is rounded up, also in the type of ``x``, and infinite where it exceeds the largest number of that type.

    Parameters
    ----------
    x : Tensor
        Points, ``(..., d)``, as they enter the monomials: already divided by :math:`d^{1/4}` if that is meant.
    degree : int
        :math:`N\ge0`.
    r : float
        Positive; may be infinite.

    Returns
    -------
    Tensor
        ``(...)``.

    Raises
    ------
    TypeError
        If ``x`` is no floating tensor.
    ValueError
        If ``degree`` or ``r`` is not such a number, ``x`` has no coordinates, or one that is not finite.

    References
    ----------
    Chapter *Features and rank*.
    """
    _integer("degree", degree, 0)
    if not (isinstance(r, numbers.Real) and r > 0):
        raise ValueError(f"r must be a positive number or math.inf, not {r!r}")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating tensor of shape (..., d), not {given}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape (..., d) with d at least 1, but has shape {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError("x must be finite; the norm of its features is not, otherwise")
    d, r = x.shape[-1], max(float(r), 1e-300)                   # there the norm is infinite, but at 0
    excess = max(0.0, 1 / r - 1 / 2)

    largest = x.double().abs().amax(-1)
    zero = largest == 0                                         # no tail; 1 is put in its place until the end
    size = torch.where(zero, 1.0, largest)                      # taken out, so that no square over- or underflows
    log_square = 2 * size.log() + torch.where(zero, 1.0, (x.double() / size[..., None]).square().sum(-1)).log()

    def log_norm(n: int, log_square):
        """Logarithm of the bound for the norm of degree n."""
        return (n * log_square - math.lgamma(n + 1)) / 2 + excess * math.log(math.comb(n + d - 1, n))

    def log_quotient(n: int, log_square):
        """The one of degree n + 1 less the one of degree n; it falls with n and grows with the point."""
        return (log_square - math.log(n + 1)) / 2 + excess * math.log((n + d) / (n + 1))

    top, n, highest, terms = log_square.max().item() if log_square.numel() else 0.0, degree, -math.inf, []
    while True:
        n += 1
        terms.append(log_norm(n, log_square))
        last, quotient = log_norm(n, top), log_quotient(n, top)
        highest = max(highest, last)
        # Wherever the sum is broken off, the bound holds; if 10,000 degrees are not enough, it is loose or infinite.
        if n >= degree + 10_000 or quotient < 0 and r * (last - highest) - math.log(-math.expm1(r * quotient)) < -40:
            break
    quotient = log_quotient(n, log_square)
    # What follows is at most a geometric series, wherever the sum was broken off.
    gap = -torch.expm1(r * quotient)
    rest = torch.where(quotient < 0, terms[-1] + quotient - gap.log() / r, math.inf)
    logs = torch.stack([*terms, rest])
    log_bound = logs.amax(0)
    if not math.isinf(r):
        log_bound = torch.where(log_bound.isinf(), math.inf,
                                log_bound + ((logs - log_bound) * r).exp().sum(0).log() / r)
    # Rounding: of log_square, n times; of the other parts; of the sum; and of the result, in the type of x.
    rounding = (n * (d + 8 + 4 * size.log().abs()) + math.lgamma(n + 1) + excess * math.log(math.comb(n + d - 1, n))
                + log_bound.abs() + len(logs) / r)
    limits = torch.finfo(x.dtype)
    bound = (log_bound + 4 * torch.finfo(torch.float64).eps * rounding).exp() * (1 + 2 * limits.eps)
    return torch.where(zero, 0.0, bound.to(x.dtype).clamp_min(limits.tiny))     # what underflowed is positive still


# ------------------------------------------------------------------------------------------------- details

def _integer(name: str, value: int, least: int, owner: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{owner + ': ' if owner else ''}{name} must be an integer, at least {least}, not {value!r}")


def _kept(make):
    """Cache tensors that are made of numbers; outside the inference mode, and on the CPU, whoever comes first."""
    @functools.lru_cache(maxsize=32)
    def made(*arguments):
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            return make(*arguments)

    @functools.wraps(make)
    def kept(*arguments):
        return made(*arguments)

    kept.cache_clear = made.cache_clear
    # To the compiler they are constants.  (torch.compiler.assume_constant_result says no more, but imports it.)
    kept._dynamo_marked_constant = True
    return kept


@_kept
def _monomials(d: int, degree: int) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
    """For degrees 1, 2, ...: each monomial's parent in the degree below, the variable it adds, and its power.

    A monomial is a product of variables in the order of their numbers, so a parent is multiplied by its last
    variable or a later one only, and each monomial is made once.
    """
    last, power, tables = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), []
    for _ in range(degree):
        children = d - last
        parent = torch.repeat_interleave(torch.arange(len(last)), children)
        first = (children.cumsum(0) - children)[parent]
        variable = last[parent] + torch.arange(len(parent)) - first
        power = torch.where(variable == last[parent], power[parent] + 1, 1)
        last = variable
        tables.append((parent, variable, power))
    return tuple(tables)


def _by_degree(x: Tensor, degree: int) -> list[Tensor]:
    r"""The features :math:`x^\alpha/\sqrt{\alpha!}`, one tensor for each degree."""
    blocks = [torch.ones_like(x[..., :1])]
    for parent, variable, power in _monomials(x.shape[-1], degree):
        parent, variable = parent.to(x.device), variable.to(x.device)
        # one factor x_i / sqrt(a_i) at a time: all that arises on the way are features
        blocks.append(blocks[-1][..., parent] * x[..., variable] / power.to(x).sqrt())
    return blocks
