r"""Spaces of functions for a kernel of two arguments: the geometry of :math:`\ell^p` and pairs of Banach spaces.

:mod:`kernelbook.spaces.geometry`
    norms, duality maps, convexity inequalities and quotients of :math:`\ell^p`, :math:`1<p<\infty`.
:mod:`kernelbook.spaces.pairs`
    two spaces of functions and a bilinear form between them, built from two feature maps.
"""

from .geometry import (
    QuotientNorm,
    conjugate,
    convexity_gap,
    duality_map,
    hilbert_matrix,
    lp_norm,
    modulus_of_convexity,
    norm_gradient,
    power_map,
    quotient_norm,
    schur_bound,
)
from .pairs import IncompatiblePairError, RKBSPair

__all__ = [
    "conjugate", "lp_norm", "power_map", "duality_map", "norm_gradient", "convexity_gap", "modulus_of_convexity",
    "quotient_norm", "QuotientNorm", "hilbert_matrix", "schur_bound",
    "RKBSPair", "IncompatiblePairError",
]
