r"""The action of the order parameters, by its definition.

Weights of all layers are Gaussian, so a network of attention paths is a hierarchy of Gram matrices, read from the
readout down: :math:`U^{(L+1)}=|a|^2/N_a`, and :math:`U^{(l)}`, of size :math:`d_l=H_lH_{l+1}\cdots H_L`, holds the
inner products of all products of weights from the readout to layer :math:`l`.  At any finite widths, exactly,

.. math::
   U^{(l)}\mid U^{(l+1)}\sim\mathcal W_{d_l}\Bigl(N_l,\ \tfrac{\sigma_l^2}{N_l}\,I_{H_l}\otimes U^{(l+1)}\Bigr),
   \qquad l=L+1,\dots,1,

with :math:`U^{(L+2)}=1`, :math:`H_{L+1}=1`, :math:`N_{L+1}=N_a`, :math:`\sigma_{L+1}=\sigma_a`.  Given
:math:`U=U^{(1)}` the network is a Gaussian process with the kernel :math:`K(U)`, so that minus twice the logarithm of
the posterior of the hierarchy is the *action*

.. math::
   S=\sum_{l=1}^{L+1}N_l\Bigl[\sigma_l^{-2}\operatorname{tr}\bigl(U^{(l+1)-1}u^{(l)}\bigr)-\ln\det U^{(l)}
     +H_l\ln\det U^{(l+1)}\Bigr]+\ln\det K_T+y^{\mathsf T}K_T^{-1}y,\qquad K_T=K(U)+TI,

with :math:`u^{(l)}` the sum of the diagonal blocks of :math:`U^{(l)}` over the heads of layer :math:`l`.  (The density
is the one with respect to the measure that congruences leave alone,
:math:`\prod_l|U^{(l)}|^{-(d_l+1)/2}\,dU^{(l)}`.)  Everything here is written to be read and to be differentiated;
:mod:`kernelbook.paths.theory` minimises the same action quickly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .kernels import checked_heads, combine

__all__ = ["Architecture", "Virial", "action", "action_gradients", "energy", "entropy", "virial", "whitened"]


# ------------------------------------------------------------------------- the network's sizes, and arguments

@dataclass(frozen=True)
class Architecture:
    r"""Heads, widths and prior variances of a network of attention paths.

    Parameters
    ----------
    heads : sequence of int
        :math:`(H_1,\dots,H_L)`.
    widths : sequence of float
        :math:`(N_1,\dots,N_L,N_a)`.  The theory knows them as factors only, so they need not be integers.
    variances : sequence of float
        :math:`(\sigma_0^2,\dots,\sigma_L^2,\sigma_a^2)`.  The first is part of the kernels between paths already, and
        no formula here uses it again.

    Raises
    ------
    ValueError
        If a number is not positive, or there are not as many as the layers ask for.
    """

    heads: tuple[int, ...]
    widths: tuple[float, ...]
    variances: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", checked_heads(self.heads))
        for name, length, what in (("widths", len(self.heads) + 1, "(N_1, ..., N_L, N_a)"),
                                   ("variances", len(self.heads) + 2, "(sigma_0^2, ..., sigma_L^2, sigma_a^2)")):
            values = tuple(float(v) for v in getattr(self, name))
            if len(values) != length:
                raise ValueError(f"{name} must be {what}: {length} numbers for {len(self.heads)} layers, "
                                 f"not {len(values)}")
            if not all(0 < v < math.inf for v in values):
                raise ValueError(f"{name} must be positive numbers, not {values}"
                                 + ("; for infinite widths see gp_limit" if math.inf in values else ""))
            object.__setattr__(self, name, values)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the order parameters, :math:`(d_1,\\dots,d_{L+1})`; the first is the number of paths."""
        return tuple(math.prod(self.heads[level:]) for level in range(len(self.heads) + 1))

    @property
    def paths(self) -> int:
        """The number of paths."""
        return math.prod(self.heads)

    @property
    def scale(self) -> float:
        r"""The prior's mean order parameter is this multiple of the identity: :math:`\prod_{l\ge1}\sigma_l^2`."""
        return math.prod(self.variances[1:])

    @property
    def constant(self) -> float:
        r"""What entropy and energy lack of the action: :math:`\sum_lN_ld_l(1-\ln\sigma_l^2)`."""
        return sum(N * d * (1 - math.log(v)) for N, d, v in zip(self.widths, self.sizes, self.variances[1:],
                                                                strict=True))


def check_problem(kernels: Tensor, labels: Tensor, temperature: float, paths: int) -> None:
    """Refuse kernels, labels or a temperature that are no regression problem on that many paths."""
    if not isinstance(kernels, Tensor) or not kernels.is_floating_point():
        raise TypeError(f"kernels must be a tensor of floating-point numbers, not "
                        f"{kernels.dtype if isinstance(kernels, Tensor) else type(kernels).__name__}")
    if kernels.ndim != 4 or kernels.shape[2] != kernels.shape[3] or kernels.shape[0] != kernels.shape[1]:
        raise ValueError(f"kernels must have the shape (paths, paths, examples, examples), but has "
                         f"{tuple(kernels.shape)}")
    if len(kernels) != paths:
        raise ValueError(f"the heads make {paths} paths, but kernels is for {len(kernels)}")
    examples = kernels.shape[-1]
    if examples == 0:
        raise ValueError("there are no examples; a posterior needs at least one")
    if not isinstance(labels, Tensor) or labels.shape != (examples,):
        raise ValueError(f"labels must be a tensor with one number for each of the {examples} examples, but "
                         f"{f'has the shape {tuple(labels.shape)}' if isinstance(labels, Tensor) else 'is none'}")
    if not torch.isfinite(labels).all():
        raise ValueError("labels has entries that are not finite numbers")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive number, not {temperature!r}")


def _check_levels(U: Sequence[Tensor], architecture: Architecture) -> None:
    shapes, wanted = [tuple(u.shape) for u in U], [(d, d) for d in architecture.sizes]
    if shapes != wanted:
        raise ValueError(f"U must be a list of matrices of the shapes {wanted}, from the paths to the readout, not "
                         f"{shapes}")


def _log_det(matrix: Float[Tensor, "d d"], name: str) -> Float[Tensor, ""]:
    factor, info = torch.linalg.cholesky_ex(matrix)
    if info.item():
        raise ValueError(f"{name} is not positive definite, and the action is infinite there")
    return 2 * factor.diagonal().log().sum()


def _partial_trace(matrix: Float[Tensor, "d d"], heads: int) -> Float[Tensor, "e e"]:
    """The sum of the diagonal blocks, one for each value of the slowest index."""
    inner = len(matrix) // heads
    return matrix.reshape(heads, inner, heads, inner).diagonal(dim1=0, dim2=2).sum(-1)


def _levels(U: Sequence[Tensor], architecture: Architecture):
    """Of each level: N, sigma^2, H, its matrix and the one above it."""
    _check_levels(U, architecture)
    above = [*U[1:], torch.ones_like(U[-1])]
    return zip(architecture.widths, architecture.variances[1:], (*architecture.heads, 1), U, above, strict=True)


# ------------------------------------------------------------------------- the action

def energy(
    U: Float[Tensor, "Pi Pi"],
    kernels: Float[Tensor, "Pi Pi P P"],
    labels: Float[Tensor, " P"],
    *,
    temperature: float,
) -> Float[Tensor, ""]:
    r"""The data's part of the action, :math:`\ln\det K_T+y^{\mathsf T}K_T^{-1}y`.

    Parameters
    ----------
    U : Tensor
        The order parameter of the paths, ``(Pi, Pi)``.
    kernels, labels, temperature
        As for :func:`kernelbook.paths.solve_order_parameters`.

    Returns
    -------
    Tensor
        A scalar, differentiable.
    """
    check_problem(kernels, labels, temperature, len(kernels))
    K = combine(U, kernels)
    K_T = (K + K.mT) / 2 + temperature * torch.eye(len(K), dtype=K.dtype, device=K.device)
    return _log_det(K_T, "K(U) + T") + labels.to(K) @ torch.linalg.solve(K_T, labels.to(K))


def action(
    U: Sequence[Float[Tensor, "d d"]],
    kernels: Float[Tensor, "Pi Pi P P"],
    labels: Float[Tensor, " P"],
    *,
    heads: Sequence[int],
    widths: Sequence[float],
    variances: Sequence[float],
    temperature: float,
) -> Float[Tensor, ""]:
    r"""The action :math:`S` of a hierarchy of order parameters, its constants included, as its module writes it.

    Parameters
    ----------
    U : sequence of Tensor
        :math:`U^{(1)},\dots,U^{(L+1)}`, ``(d_l, d_l)``, symmetric and positive definite.
    kernels, labels, heads, widths, variances, temperature
        As for :func:`kernelbook.paths.solve_order_parameters`.

    Returns
    -------
    Tensor
        A scalar, differentiable.

    Raises
    ------
    ValueError
        If a shape does not fit, or a matrix is not positive definite.
    """
    total = energy(U[0], kernels, labels, temperature=temperature)
    levels = list(_levels(U, Architecture(heads, widths, variances)))
    log_dets = [_log_det(matrix, f"U[{level}]") for level, matrix in enumerate(U)] + [0.0]
    for level, (N, variance, H, matrix, above) in enumerate(levels):
        trace = torch.linalg.solve(above, _partial_trace(matrix, H)).trace() / variance
        total = total + N * (trace - log_dets[level] + H * log_dets[level + 1])
    return total


def whitened(U: Sequence[Float[Tensor, "d d"]], *, heads: Sequence[int], variances: Sequence[float]) -> list[Tensor]:
    r"""What is new at each level, :math:`M_l=(\sigma_l^2\,I_{H_l}\otimes U^{(l+1)})^{-1/2}\,U^{(l)}\,(\cdot)^{-1/2}`.

    Under the prior the :math:`M_l` are independent, :math:`M_l\sim\mathcal W_{d_l}(N_l,I/N_l)`.  The square root is the
    Cholesky factor.

    Parameters
    ----------
    U : sequence of Tensor
        :math:`U^{(1)},\dots,U^{(L+1)}`, ``(d_l, d_l)``.
    heads, variances
        As for :func:`kernelbook.paths.solve_order_parameters`.

    Returns
    -------
    list of Tensor
        ``(d_l, d_l)`` each.
    """
    architecture = Architecture(heads, (1,) * (len(tuple(heads)) + 1), variances)
    result = []
    for _, variance, H, matrix, above in _levels(U, architecture):
        eye = torch.eye(H, dtype=matrix.dtype, device=matrix.device)
        root = torch.kron(eye, torch.linalg.cholesky(above).contiguous())
        half = torch.linalg.solve_triangular(root, matrix, upper=False)
        result.append(torch.linalg.solve_triangular(root, half.mT, upper=False) / variance)
    return result


def entropy(
    U: Sequence[Float[Tensor, "d d"]],
    *,
    heads: Sequence[int],
    widths: Sequence[float],
    variances: Sequence[float],
) -> Float[Tensor, ""]:
    r"""The prior's part of the action, :math:`\sum_lN_l\,[\operatorname{tr}M_l-\ln\det M_l-d_l]\ge0`.

    It vanishes at the prior's mean only.  The action is its sum with :func:`energy` and
    :attr:`Architecture.constant`.

    Parameters
    ----------
    U : sequence of Tensor
        :math:`U^{(1)},\dots,U^{(L+1)}`, ``(d_l, d_l)``.
    heads, widths, variances
        As for :func:`kernelbook.paths.solve_order_parameters`.

    Returns
    -------
    Tensor
        A scalar, differentiable.
    """
    architecture = Architecture(heads, widths, variances)
    matrices = whitened(U, heads=heads, variances=variances)
    return sum(N * (M.trace() - _log_det(M, f"U[{level}]") - len(M))
               for level, (N, M) in enumerate(zip(architecture.widths, matrices, strict=True)))


# ------------------------------------------------------------------------- its derivatives

def _slope(U: Tensor, kernels: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The derivative of the energy in U, symmetric, and Q of the virial theorem."""
    K = combine(U, kernels)
    K = (K + K.mT) / 2
    inverse = torch.linalg.inv(K + temperature * torch.eye(len(K), dtype=K.dtype, device=K.device))
    alpha = inverse @ labels.to(K)
    residual = inverse - torch.outer(alpha, alpha)
    G = torch.einsum("abij,ij->ab", kernels, residual) / len(kernels)
    return (G + G.mT) / 2, -(residual * K).sum()


def action_gradients(
    U: Sequence[Float[Tensor, "d d"]],
    kernels: Float[Tensor, "Pi Pi P P"],
    labels: Float[Tensor, " P"],
    *,
    heads: Sequence[int],
    widths: Sequence[float],
    variances: Sequence[float],
    temperature: float,
) -> list[Tensor]:
    r"""The derivatives of :func:`action`, symmetric matrices :math:`\partial S/\partial U^{(l)}`.

    .. math::
       \frac{\partial S}{\partial U^{(l)}}=N_l\bigl[\sigma_l^{-2}(I\otimes U^{(l+1)})^{-1}-U^{(l)-1}\bigr]
       +N_{l-1}\bigl[H_{l-1}U^{(l)-1}-\sigma_{l-1}^{-2}U^{(l)-1}u^{(l-1)}U^{(l)-1}\bigr],

    where for :math:`l=1` the second bracket is replaced by
    :math:`G_{\pi\pi'}=\frac1\Pi[\operatorname{tr}(K_T^{-1}C_{\pi\pi'})-\alpha^{\mathsf T}C_{\pi\pi'}\alpha]`,
    symmetrised, with :math:`\alpha=K_T^{-1}y`.

    Parameters
    ----------
    U, kernels, labels, heads, widths, variances, temperature
        As for :func:`action`.

    Returns
    -------
    list of Tensor
        ``(d_l, d_l)`` each.
    """
    check_problem(kernels, labels, temperature, len(U[0]))
    gradients, below = [], None
    for N, variance, H, matrix, above in _levels(U, Architecture(heads, widths, variances)):
        inverse = torch.linalg.inv(matrix)
        if below is None:
            gradient = _slope(matrix, kernels, labels, temperature)[0]
        else:
            N_below, variance_below, H_below, u = below
            gradient = N_below * (H_below * inverse - inverse @ u @ inverse / variance_below)
        eye = torch.eye(H, dtype=matrix.dtype, device=matrix.device)
        gradients.append(gradient + N * (torch.kron(eye, torch.linalg.inv(above).contiguous()) / variance - inverse))
        below = N, variance, H, _partial_trace(matrix, H)
    return gradients


class Virial(NamedTuple):
    r"""What :func:`virial` returns: both sides of the theorem.

    The left sides :math:`N_l(\operatorname{tr}M_l-d_l)`, ``(L + 1,)``; and
    :math:`Q=\alpha^{\mathsf T}K\alpha-\operatorname{tr}(K_T^{-1}K)`, a scalar.
    """

    levels: Float[Tensor, " levels"]
    Q: Float[Tensor, ""]


def virial(
    U: Sequence[Float[Tensor, "d d"]],
    kernels: Float[Tensor, "Pi Pi P P"],
    labels: Float[Tensor, " P"],
    *,
    heads: Sequence[int],
    widths: Sequence[float],
    variances: Sequence[float],
    temperature: float,
) -> Virial:
    r"""Both sides of the virial theorem: where the action is stationary,
    :math:`N_l(\operatorname{tr}M_l-d_l)=Q` for every level :math:`l`, with
    :math:`Q=\alpha^{\mathsf T}K\alpha-\operatorname{tr}(K_T^{-1}K)`.

    The left sides are the derivatives of the entropy in the scale of each level; the right side is minus that of the
    energy, which all levels share.

    Parameters
    ----------
    U, kernels, labels, heads, widths, variances, temperature
        As for :func:`action`.

    Returns
    -------
    Virial
    """
    architecture = Architecture(heads, widths, variances)
    check_problem(kernels, labels, temperature, architecture.paths)
    matrices = whitened(U, heads=heads, variances=variances)
    levels = torch.stack([N * (M.trace() - len(M)) for N, M in zip(architecture.widths, matrices, strict=True)])
    return Virial(levels, _slope(U[0], kernels, labels, temperature)[1])
