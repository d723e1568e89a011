r"""Pairs of feature maps, one of queries and one of keys: what a kernel of finite rank needs that is not definite.

.. math:: \kappa(q,k)=\Phi(q)\cdot\Psi(k).

The squared distance, for one, is such a kernel, of rank d + 2, and no map that serves queries and keys alike has it as
its inner product: its values at coinciding points are 0, and it is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..kernels import Kernel
from .explicit import (
    ConstantFeatures,
    FeatureMap,
    MultinomialFeatures,
    PolynomialFeatures,
    QuadraticFeatures,
    _by_degree,
    count,
)
from .given import FeatureKernel

__all__ = ["pair_of", "has_pair"]


@dataclass(frozen=True)
class _Half(FeatureMap):
    """Common part of the maps that are of use with another only."""

    @property
    def kernel(self) -> Kernel:
        raise ValueError(f"{type(self).__name__} is one map of a pair, and has no kernel without the other")


@dataclass(frozen=True)
class _SquaredDistance(_Half):
    r"""(|q|^2, 1, -2 q) or (1, |k|^2, k), times the root of the scale (which is None for 1/√d)."""

    scale: float | None
    of_queries: bool

    def dimension(self, d: int) -> int:
        return d + 2

    def _features(self, x: Tensor) -> Tensor:
        x = x * math.sqrt(x.shape[-1] ** -0.5 if self.scale is None else self.scale)
        square = x.square().sum(-1, keepdim=True)
        parts = (square, torch.ones_like(square), -2 * x) if self.of_queries else (torch.ones_like(square), square, x)
        return torch.cat(parts, -1)


@dataclass(frozen=True)
class _AlternatingPolynomial(_Half):
    """The keys' map of a polynomial with a negative offset: degrees whose coefficient is negative change their sign."""

    degree: int
    offset: float
    scale: float | bool

    def dimension(self, d: int) -> int:
        return count(d, self.degree)

    def _features(self, x: Tensor) -> Tensor:
        positive = PolynomialFeatures(self.degree, -self.offset, self.scale)
        blocks = _by_degree(x * math.sqrt(positive._factor(x.shape[-1])), self.degree)
        return torch.cat([(-1) ** (self.degree - n) * math.sqrt(math.perm(self.degree, n)
                                                                * (-self.offset) ** (self.degree - n)) * block
                          for n, block in enumerate(blocks)], -1)


@dataclass(frozen=True)
class _Unit(_Half):
    """The unit vector of a point; the kernel is the cosine."""

    def dimension(self, d: int) -> int:
        return d

    def _features(self, x: Tensor) -> Tensor:
        return kernels._unit(x)


@dataclass(frozen=True)
class _Times(_Half):
    """A map times a number."""

    base: FeatureMap
    factor: float

    def dimension(self, d: int) -> int:
        return self.base.dimension(d)

    def _features(self, x: Tensor) -> Tensor:
        return self.base._features(x) * self.factor


@dataclass(frozen=True)
class _Both(_Half):
    """The features of one map and those of another; or the products of one of the one and one of the other.

    With a ``split`` the first map sees the coordinates before it only, the second the others.
    """

    first: FeatureMap
    second: FeatureMap
    product: bool
    split: int | None = None

    def dimension(self, d: int) -> int:
        a, b = (d, d) if self.split is None else (self.split, d - self.split)
        a, b = self.first.dimension(a), self.second.dimension(b)
        return a * b if self.product else a + b

    def _features(self, x: Tensor) -> Tensor:
        x, y = (x, x) if self.split is None else (x[..., :self.split], x[..., self.split:])
        x, y = self.first._features(x), self.second._features(y)
        return (x[..., :, None] * y[..., None, :]).flatten(-2) if self.product else torch.cat((x, y), -1)


def _alike(phi: FeatureMap) -> tuple[FeatureMap, FeatureMap]:
    return phi, phi


def _scale(kernel: Kernel) -> float | bool:
    return True if kernel.scale is None else kernel.scale


def _polynomial(kernel: kernels.Polynomial) -> tuple[FeatureMap, FeatureMap]:
    phi = PolynomialFeatures(kernel.degree, abs(kernel.offset), _scale(kernel))
    if kernel.offset >= 0:
        return phi, phi
    return phi, _AlternatingPolynomial(kernel.degree, kernel.offset, phi.scale)


def _constant(kernel: kernels.Constant) -> tuple[FeatureMap, FeatureMap]:
    phi = ConstantFeatures(abs(kernel.value) or 1.0)
    return phi, phi if kernel.value > 0 else _Times(phi, -1.0 if kernel.value else 0.0)


def _scaled(kernel: kernels.Scaled) -> tuple[FeatureMap, FeatureMap]:
    phi, psi = pair_of(kernel.base)
    return phi, _Times(psi, kernel.factor)


def _combined(product: bool):
    def pair(kernel: Kernel) -> tuple[FeatureMap, FeatureMap]:
        (phi1, psi1), (phi2, psi2) = pair_of(kernel.first), pair_of(kernel.second)
        split = getattr(kernel, "split", None)
        return _Both(phi1, phi2, product, split), _Both(psi1, psi2, product, split)
    return pair


# By exact type: a subclass may be another function.
_PAIRS = {
    kernels.Taylor: lambda kernel: _alike(MultinomialFeatures(kernel.degree, _scale(kernel))),
    kernels.Quadratic: lambda kernel: _alike(QuadraticFeatures(_scale(kernel))),
    kernels.Linear: lambda kernel: _alike(PolynomialFeatures(1, 0.0, _scale(kernel))),
    kernels.Polynomial: _polynomial,
    kernels.Constant: _constant,
    kernels.Cosine: lambda kernel: _alike(_Unit()),
    kernels.L2Squared: lambda kernel: (_SquaredDistance(kernel.scale, True), _SquaredDistance(kernel.scale, False)),
}
_COMBINED = {
    kernels.Scaled: _scaled,
    kernels.Sum: _combined(False), kernels.DirectSum: _combined(False),
    kernels.Product: _combined(True), kernels.TensorProduct: _combined(True),
}


def has_pair(kernel: Kernel) -> bool:
    """Whether :func:`pair_of` knows the features of a kernel.

    Parameters
    ----------
    kernel : Kernel

    Returns
    -------
    bool
    """
    kind = type(kernel)
    if kind is kernels.Scaled:
        return has_pair(kernel.base)
    if kind in _COMBINED:
        return has_pair(kernel.first) and has_pair(kernel.second)
    return kind in _PAIRS or isinstance(kernel, FeatureKernel)


def pair_of(kernel: Kernel) -> tuple[FeatureMap, FeatureMap]:
    r"""Two feature maps, of queries and of keys, whose inner product is a kernel of finite rank.

    Sums of kernels join the features, products multiply each of the one with each of the other; for kernels of two
    parts of the coordinates (:class:`~kernelbook.kernels.DirectSum`, :class:`~kernelbook.kernels.TensorProduct`)
    likewise.

    Parameters
    ----------
    kernel : Kernel
        ``Taylor``, ``Polynomial`` with any offset, ``Quadratic``, ``Linear``, ``Cosine``, ``Constant``, ``L2Squared``,
        a :class:`~kernelbook.features.FeatureKernel`, or a sum, product, multiple, direct sum or tensor product of
        such.

    Returns
    -------
    phi, psi : FeatureMap
        With ``phi(q) @ psi(k).mT`` equal to ``kernel(q, k)``.  They are one map where one serves both.

    Raises
    ------
    TypeError
        If ``kernel`` is no kernel.
    ValueError
        If it has infinitely many features, or none are known here.
    """
    if not isinstance(kernel, Kernel):
        raise TypeError(f"pair_of takes a kernelbook.kernels.Kernel, not {type(kernel).__name__}; "
                        "kernelbook.kernels.get makes one of a name")
    if isinstance(kernel, FeatureKernel):
        return kernel.map, kernel.map
    make = _PAIRS.get(type(kernel)) or _COMBINED.get(type(kernel))
    if make is None:
        known = ", ".join(kind.__name__ for kind in (*_PAIRS, FeatureKernel, *_COMBINED))
        raise ValueError(f"no finite features of {kernel!r} are known here; known are those of {known} (the last ones "
                         "of such kernels); for an estimate take 'positive_features' (of EDP) or 'fourier_features' "
                         "(of RBF)")
    return make(kernel)
