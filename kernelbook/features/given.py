r"""Kernels that are given by a feature map: :math:`\kappa(q,k)=\Phi(q)\cdot\Phi(k)` by definition.

Some of them were invented for linear-time attention, as elu + 1 was; others estimate a kernel of infinite dimension,
from random draws or from the nodes of a quadrature rule.  An estimate is a kernel in its own right, with finitely many
features: how near it is to the kernel that it is an estimate of is another question.

Each map has a kernel with the same options, a :class:`~kernelbook.features.FeatureKernel`, which
:func:`kernelbook.kernels.get` makes of its name: ``"elu"``, ``"positive_features"``, ``"fourier_features"``,
``"quadrature_features"``.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..kernels import POSITIVE, Definiteness, Interval, Kernel, register
from .explicit import FeatureMap, _integer, _kept

__all__ = ["FeatureKernel", "Elu", "Positive", "Fourier", "Quadrature",
           "EluFeatures", "PositiveFeatures", "FourierFeatures", "QuadratureFeatures"]


# ------------------------------------------------------------------------------------------------- the maps

@dataclass(frozen=True)
class _GivenMap(FeatureMap):
    """Common part of the maps whose kernel has no other definition."""

    _kernel: ClassVar[type[FeatureKernel]]

    @property
    def kernel(self) -> FeatureKernel:
        return self._kernel(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})


@dataclass(frozen=True)
class EluFeatures(_GivenMap):
    r"""The features :math:`\Phi_l(x)=\operatorname{elu}(x_l)+1`: :math:`x_l+1` if positive, else :math:`e^{x_l}`.

    References
    ----------
    Katharopoulos et al. 2020.
    """

    def dimension(self, d: int) -> int:
        _integer("d", d, 1)
        return d

    def _features(self, x: Tensor) -> Tensor:
        # Not elu(x) + 1, which loses e^x where it is small.
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


@dataclass(frozen=True)
class _NodeMap(_GivenMap):
    """Common part of the maps made of functions :math:`e^{w_i\\cdot x}` or :math:`e^{\\mathrm i w_i\\cdot x}`."""

    count: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        _integer("count", self.count, 1, type(self).__name__)
        _integer("seed", self.seed, 0, type(self).__name__)

    def dimension(self, d: int) -> int:
        _integer("d", d, 1)
        return self.count


@dataclass(frozen=True)
class _PositiveMap(_NodeMap):
    """Common part of the maps with positive features for the exponentiated dot product."""

    def _nodes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Nodes ``(D, d)``, and the logarithms of the roots of their weights, ``(D)`` or one number."""
        raise NotImplementedError

    def log(self, x: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n D"]:
        """The logarithms of the features, in at least single precision.

        Parameters
        ----------
        x : Tensor
            Points, ``(..., n, d)``.

        Returns
        -------
        Tensor
            ``(..., n, D)``.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x * math.sqrt(x.shape[-1] ** -0.5 if self.scale is None else self.scale)
        nodes, log_roots = self._nodes(x)
        return x @ nodes.mT - x.square().sum(-1, keepdim=True) / 2 + log_roots

    def _features(self, x: Tensor) -> Tensor:
        return self.log(x).exp().to(x.dtype)


@dataclass(frozen=True)
class PositiveFeatures(_PositiveMap):
    r"""Positive random features of the exponentiated dot product.

    .. math:: \Phi_i(x)=\frac1{\sqrt m}\exp\Bigl(w_i\cdot\tilde x-\tfrac12\lVert\tilde x\rVert^2\Bigr),
              \qquad\tilde x=\sqrt s\,x,\quad w_i\sim N(0,I_d).

    The mean of :math:`\Phi(q)\cdot\Phi(k)` over the draws is :math:`e^{s\,q\cdot k}`.  With independent
    :math:`w_i` its variance, relative to the square of that, is :math:`(e^{\lVert\tilde q+\tilde k\rVert^2}-1)/m`: it
    grows exponentially with the points.  Orthogonal :math:`w_i` (in blocks of d, each still standard normal) have the
    same mean, and a smaller variance.

    Parameters
    ----------
    count : int
        :math:`m`, the number of features.
    seed : int
        Of the draw, which is a function of ``count``, the width and the seed.
    orthogonal : bool
        Whether the :math:`w_i` are orthogonal, in blocks of d.
    scale : float, optional
        :math:`s` (default :math:`1/\sqrt d`).

    References
    ----------
    Choromanski et al. 2021.
    """

    orthogonal: bool = True
    scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _boolean("orthogonal", self.orthogonal, self)
        _positive_or_none("scale", self.scale, self, "1/√d")

    def _nodes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        draw = _draw(self.count, x.shape[-1], self.seed, self.orthogonal)
        return draw.to(x), x.new_full((), -0.5 * math.log(self.count))


@dataclass(frozen=True)
class QuadratureFeatures(_PositiveMap):
    r"""Positive features of the exponentiated dot product at the nodes of a quadrature rule.

    .. math:: \Phi_i(x)=\sqrt{c_i}\exp\Bigl(w_i\cdot\tilde x-\tfrac12\lVert\tilde x\rVert^2\Bigr),
              \qquad\tilde x=\sqrt s\,x,

    where the rule with nodes :math:`w_i` and weights :math:`c_i` approximates the mean over :math:`N(0,I_d)`.

    Parameters
    ----------
    count : int
        Number of nodes.
    seed : int
        Of the scrambling of Sobol's sequence; the Gauss-Hermite rule has no use for it.
    rule : str
        ``"sobol"``: the first points of a scrambled Sobol sequence, mapped to the normal distribution, with equal
        weights; for any width.  ``"gauss-hermite"``: the grid of Gauss-Hermite nodes, :math:`r` on each axis, so
        ``count`` must be :math:`r^d`; the error falls faster than any power of :math:`r`, but only small widths can
        have it.
    scale : float, optional
        :math:`s` (default :math:`1/\sqrt d`).

    Raises
    ------
    ValueError
        If an argument is none of these; when called, if ``count`` is no grid at that width.

    References
    ----------
    Dao, De Sa and Ré 2017, who have trigonometric features in mind.
    """

    rule: str = "sobol"
    scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule not in ("sobol", "gauss-hermite"):
            raise ValueError(f"{type(self).__name__}: rule must be 'sobol' or 'gauss-hermite', not {self.rule!r}")
        _positive_or_none("scale", self.scale, self, "1/√d")

    def dimension(self, d: int) -> int:
        super().dimension(d)
        if self.rule == "gauss-hermite" and _root(self.count, d) ** d != self.count:
            r = int(self.count ** (1 / d))
            raise ValueError(f"{self!r}: a Gauss-Hermite grid at width d = {d} has r**{d} nodes, such as "
                             f"{max(r, 1) ** d:,} or {(max(r, 1) + 1) ** d:,}, not {self.count:,}; "
                             "rule='sobol' takes any count")
        return self.count

    def _nodes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        d = x.shape[-1]
        if self.rule == "sobol":
            return _sobol(self.count, d, self.seed).to(x), x.new_full((), -0.5 * math.log(self.count))
        nodes, log_roots = _gauss_hermite(_root(self.count, d), d)
        return nodes.to(x), log_roots.to(x)


@dataclass(frozen=True)
class FourierFeatures(_NodeMap):
    r"""Random trigonometric features of the Gaussian kernel; their inner products may be negative.

    .. math:: \Phi(x)=\sqrt{\tfrac2m}\,\bigl(\cos\tfrac{w_i\cdot x}\sigma,\;
              \sin\tfrac{w_i\cdot x}\sigma\bigr)_{i\le m/2},\qquad w_i\sim N(0,I_d),

    so that :math:`\Phi(q)\cdot\Phi(k)=\frac2m\sum_i\cos(w_i\cdot(q-k)/\sigma)`.  Its mean over the draws is
    :math:`e^{-r^2/2}` with :math:`r=\lVert q-k\rVert/\sigma`, and, with independent :math:`w_i`, its variance
    :math:`(1-e^{-r^2})^2/m`.

    Parameters
    ----------
    count : int
        :math:`m`, the number of features: even.
    seed : int
        Of the draw, which is a function of ``count``, the width and the seed.
    orthogonal : bool
        Whether the :math:`w_i` are orthogonal, in blocks of d.
    bandwidth : float, optional
        :math:`\sigma` (default :math:`d^{1/4}`, as for :class:`kernelbook.kernels.RBF`).

    References
    ----------
    Rahimi and Recht 2007; orthogonal: Yu et al. 2016.
    """

    orthogonal: bool = True
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count % 2:
            raise ValueError(f"{type(self).__name__}: count must be even, a cosine and a sine for each frequency, "
                             f"not {self.count}")
        _boolean("orthogonal", self.orthogonal, self)
        _positive_or_none("bandwidth", self.bandwidth, self, "d^(1/4)")

    def frequencies(self, x: Float[Tensor, "*batch n d"]) -> Float[Tensor, "D/2 d"]:
        r"""The frequencies :math:`w_i/\sigma`, in the width, dtype and device of points.

        Parameters
        ----------
        x : Tensor
            Points, ``(..., n, d)``.

        Returns
        -------
        Tensor
            ``(count / 2, d)``.
        """
        d = x.shape[-1]
        draw = _draw(self.count // 2, d, self.seed, self.orthogonal).to(x)
        return draw * (d ** -0.25 if self.bandwidth is None else 1 / self.bandwidth)

    def _features(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        angles = wide @ self.frequencies(wide).mT
        return (torch.cat((angles.cos(), angles.sin()), -1) * math.sqrt(2 / self.count)).to(x.dtype)


# ------------------------------------------------------------------------------------------------- their kernels

@dataclass(frozen=True, repr=False)
class FeatureKernel(Kernel):
    r"""A kernel given by its feature map: :math:`\kappa(q,k)=\Phi(q)\cdot\Phi(k)`.

    Derive from it, as a frozen dataclass with the options of the map, and say which one: ``_map``.
    """

    definiteness = Definiteness.POSITIVE
    latex = r"\Phi(q)\cdot\Phi(k)"
    _map: ClassVar[type[FeatureMap]]

    def __post_init__(self) -> None:
        made = self._map(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        object.__setattr__(self, "_made", made)

    @property
    def map(self) -> FeatureMap:
        """The feature map, with the options of the kernel."""
        return self._made

    def feature_dimension(self, d: int) -> float:
        return self.map.dimension(d)

    def gram(self, q, k):
        phi = self.map
        return phi(q) @ phi(k).transpose(-1, -2)


@register("elu", listed=False)
@dataclass(frozen=True, repr=False)
class Elu(FeatureKernel):
    r"""The kernel :math:`\sum_l(\operatorname{elu}(q_l)+1)(\operatorname{elu}(k_l)+1)`, of
    :class:`~kernelbook.features.EluFeatures`.

    References
    ----------
    Katharopoulos et al. 2020.
    """

    range = POSITIVE
    formula = "Σ (elu(qₗ)+1)(elu(kₗ)+1)"
    latex = r"\textstyle\sum_l(\operatorname{elu}(q_l)+1)(\operatorname{elu}(k_l)+1)"
    source = "Katharopoulos et al. 2020"
    _map = EluFeatures


@dataclass(frozen=True, repr=False)
class _PositiveKernel(FeatureKernel):
    """Common part of the kernels of positive features, which are known by their logarithms."""

    range = POSITIVE
    exponential = True

    def log_gram(self, q, k):
        logs = self.map.log(q), self.map.log(k)
        # Each row and column is divided by its largest feature.  What is left may still be too small for a number
        # where a query and a key share no feature; that is rounded up to the least normal one.
        top_q, top_k = (x.detach().amax(-1, keepdim=True) for x in logs)
        left = (logs[0] - top_q).exp() @ (logs[1] - top_k).exp().transpose(-1, -2)
        left = left.clamp_min(torch.finfo(left.dtype).tiny)
        return (left.log() + top_q + top_k.transpose(-1, -2)).to(q.dtype)


@register("positive_features", listed=False)
@dataclass(frozen=True, repr=False)
class Positive(_PositiveKernel):
    r"""The kernel of :class:`~kernelbook.features.PositiveFeatures`, an estimate of :math:`e^{s\,q\cdot k}`.

    Parameters
    ----------
    count, seed, orthogonal, scale
        Of the map.

    References
    ----------
    Choromanski et al. 2021.
    """

    count: int = 256
    seed: int = 0
    orthogonal: bool = True
    scale: float | None = None

    formula = "Σ exp(wᵢ·q̃ − ‖q̃‖²/2) exp(wᵢ·k̃ − ‖k̃‖²/2)/m"
    latex = (r"\textstyle\frac1m\sum_i e^{w_i\cdot\tilde q-\lVert\tilde q\rVert^2/2}\,"
             r"e^{w_i\cdot\tilde k-\lVert\tilde k\rVert^2/2}")
    source = "Choromanski et al. 2021"
    remark = "an estimate of exp(s q·k), from m random features"
    _map = PositiveFeatures


@register("fourier_features", listed=False)
@dataclass(frozen=True, repr=False)
class Fourier(FeatureKernel):
    r"""The kernel of :class:`~kernelbook.features.FourierFeatures`, an estimate of the Gaussian that may be negative.

    Parameters
    ----------
    count, seed, orthogonal, bandwidth
        Of the map.

    References
    ----------
    Rahimi and Recht 2007.
    """

    count: int = 256
    seed: int = 0
    orthogonal: bool = True
    bandwidth: float | None = None

    range = Interval(-1.0, 1.0, closed_low=True, closed_high=True)
    formula = "Σ cos(wᵢ·(q−k)/σ)·2/m"
    latex = r"\textstyle\frac2m\sum_i\cos(w_i\cdot(q-k)/\sigma)"
    source = "Rahimi and Recht 2007"
    remark = "an estimate of the Gaussian kernel, from m random features"
    _map = FourierFeatures


@register("quadrature_features", listed=False)
@dataclass(frozen=True, repr=False)
class Quadrature(_PositiveKernel):
    r"""The kernel of :class:`~kernelbook.features.QuadratureFeatures`, an approximation of :math:`e^{s\,q\cdot k}`.

    Parameters
    ----------
    count, seed, rule, scale
        Of the map.

    References
    ----------
    Dao, De Sa and Ré 2017.
    """

    count: int = 256
    seed: int = 0
    rule: str = "sobol"
    scale: float | None = None

    formula = "Σ cᵢ exp(wᵢ·q̃ − ‖q̃‖²/2) exp(wᵢ·k̃ − ‖k̃‖²/2)"
    latex = (r"\textstyle\sum_i c_i\,e^{w_i\cdot\tilde q-\lVert\tilde q\rVert^2/2}\,"
             r"e^{w_i\cdot\tilde k-\lVert\tilde k\rVert^2/2}")
    source = "positive features at quadrature nodes, after Dao, De Sa and Ré 2017"
    remark = "an approximation of exp(s q·k), from the nodes of a quadrature rule"
    _map = QuadratureFeatures


EluFeatures._kernel, PositiveFeatures._kernel = Elu, Positive
FourierFeatures._kernel, QuadratureFeatures._kernel = Fourier, Quadrature


# ------------------------------------------------------------------------------------------------- details

def _boolean(name: str, value: bool, owner: FeatureMap) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{type(owner).__name__}: {name} must be True or False, not {value!r}")


def _positive_or_none(name: str, value: float | None, owner: FeatureMap, default: str) -> None:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if value is not None and not (number and 0 < value < math.inf):
        raise ValueError(f"{type(owner).__name__}: {name} must be a positive number or None ({default}), not {value!r}")


def _root(count: int, d: int) -> int:
    """The integer nearest to the root of order d."""
    return round(count ** (1 / d))


@_kept
def _draw(count: int, d: int, seed: int, orthogonal: bool) -> Tensor:
    """Standard normal vectors, ``(count, d)``; orthogonal ones in blocks of d, with independent lengths."""
    generator = torch.Generator().manual_seed(seed)
    if not orthogonal:
        return torch.randn(count, d, generator=generator, dtype=torch.float64)
    blocks = -(-count // d)
    directions, triangle = torch.linalg.qr(torch.randn(blocks, d, d, generator=generator, dtype=torch.float64))
    # With these signs the directions are uniformly distributed (the factorisation fixes them otherwise).
    directions = directions * triangle.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    lengths = torch.randn(blocks, d, d, generator=generator, dtype=torch.float64).norm(dim=-1, keepdim=True)
    return (directions.mT * lengths).flatten(0, 1)[:count].clone()


@_kept
def _sobol(count: int, d: int, seed: int) -> Tensor:
    """Points of a scrambled Sobol sequence, mapped to the normal distribution, ``(count, d)``."""
    if d > torch.quasirandom.SobolEngine.MAXDIM:
        raise ValueError(f"Sobol's sequence is known up to width {torch.quasirandom.SobolEngine.MAXDIM:,}, not {d:,}; "
                         "PositiveFeatures draws at random")
    uniform = torch.quasirandom.SobolEngine(d, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    # They are multiples of 2**-30, 0 included: the middle of their cells keeps them inside.
    return math.sqrt(2) * torch.erfinv(2 * (uniform + 2.0 ** -31) - 1)


@_kept
def _gauss_hermite(r: int, d: int) -> tuple[Tensor, Tensor]:
    """The grid of r nodes on each axis, ``(r**d, d)``, and the logarithms of the roots of its weights."""
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(r))
    logs = (weights.log() - weights.sum().log()) / 2
    grid = torch.cartesian_prod(*[torch.arange(r)] * d).reshape(r ** d, d)
    return nodes[grid], logs[grid].sum(-1)
