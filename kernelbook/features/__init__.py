r"""Explicit feature maps: lists of numbers of a query and of a key whose inner product is the kernel.

A feature map serves queries and keys alike, so what it stands for is positive definite:
:math:`\kappa(q,k)=\Phi(q)\cdot\Phi(k)`.  A map knows how many features it has at width ``d``, and which kernel it
belongs to; for the exponentiated dot product, which has infinitely many, it is cut off at a degree, and the
functions of this module certify what is lost.

The features of the exponentiated dot product are :math:`\Phi_\alpha(x)=x^\alpha/\sqrt{\alpha!}`, one for each
multi-index :math:`\alpha`: these are the *monomial* features, and :math:`\alpha!=\alpha_1!\cdots\alpha_d!`.
"""

from .explicit import (
    LIMIT,
    ConstantFeatures,
    ExponentiatedIntersectionFeatures,
    FeatureMap,
    IntersectionFeatures,
    MultinomialFeatures,
    PolynomialFeatures,
    QuadraticFeatures,
    certified_degree,
    count,
    counts,
    of,
    tail_norm_bound,
    truncation_bound,
)
from .explicit import _by_degree as _by_degree
from .explicit import _monomials as _monomials
from .given import (
    Elu,
    EluFeatures,
    FeatureKernel,
    Fourier,
    FourierFeatures,
    Positive,
    PositiveFeatures,
    Quadrature,
    QuadratureFeatures,
)
from .pairs import has_pair, pair_of

__all__ = [
    "FeatureMap", "MultinomialFeatures", "PolynomialFeatures", "QuadraticFeatures", "ConstantFeatures",
    "IntersectionFeatures", "ExponentiatedIntersectionFeatures", "of",
    "EluFeatures", "PositiveFeatures", "FourierFeatures", "QuadratureFeatures", "FeatureKernel",
    "Elu", "Positive", "Fourier", "Quadrature",
    "pair_of", "has_pair",
    "count", "counts", "truncation_bound", "certified_degree", "tail_norm_bound", "LIMIT",
]
