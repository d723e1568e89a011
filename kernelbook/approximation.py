r"""How well kernels of finite rank approximate, which keys can be selected, and what a pattern of attention needs.

Three questions, each with an answer that can be computed:

* *What does rank* :math:`d` *cost?*  The best approximation of a kernel by :math:`\sum_{l\le d}q_l(x)k_l(y)` in mean
  square is its truncated Schmidt expansion (:func:`schmidt`, :func:`best_rank_error`), which for the exponentiated dot
  product of Gaussian vectors has a closed form (:func:`gaussian_singular_values`, :func:`gaussian_mass`).  Its
  functions become networks by :func:`fit_two_layer`.
* *Which keys can be selected?*  A key inside the hull of others never gets more than a certain weight
  (:func:`hull_bound`, :func:`hull_weights`).
* *Which patterns of attention does head dimension* :math:`d` *allow?*  :func:`pattern_rank`, :func:`pattern_factors`.

A *kernel function* here is anything that is called like a :class:`~kernelbook.kernels.Kernel`: with points ``(n, 1)``
and ``(m, 1)`` it gives the matrix ``(n, m)``.  All of it is float64.  Chapter *Approximation and separation*.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linprog
from scipy.special import betaincc, roots_hermitenorm
from torch import Tensor

__all__ = [
    "Uniform", "Gaussian", "Schmidt", "schmidt", "singular_values", "best_rank_error",
    "gaussian_singular_values", "gaussian_mass", "fit_two_layer",
    "HullWeights", "hull_bound", "hull_weights", "pattern_rank", "pattern_factors",
]

KernelFunction = Callable[[Tensor, Tensor], Tensor]


# ------------------------------------------------------------------------- probability measures on the line

@dataclass(frozen=True)
class Uniform:
    """The uniform distribution on an interval.

    Parameters
    ----------
    low, high : float
        Its ends.
    """

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"Uniform: the ends must be finite and low < high, not {self.low!r} and {self.high!r}")

    def quadrature(self, nodes: int) -> tuple[Float[Tensor, "nodes 1"], Float[Tensor, " nodes"]]:
        """Points and weights of the Gauss–Legendre rule; the weights sum to 1."""
        x, w = np.polynomial.legendre.leggauss(_positive(nodes, "nodes"))
        middle, half = (self.low + self.high) / 2, (self.high - self.low) / 2
        return torch.from_numpy(middle + half * x)[:, None], torch.from_numpy(w / 2)


@dataclass(frozen=True)
class Gaussian:
    r"""The normal distribution with mean 0.

    Parameters
    ----------
    sigma : float
        Its standard deviation.
    """

    sigma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"Gaussian: sigma must be a positive number, not {self.sigma!r}")

    def quadrature(self, nodes: int) -> tuple[Float[Tensor, "nodes 1"], Float[Tensor, " nodes"]]:
        """Points and weights of the Gauss–Hermite rule; the weights sum to 1."""
        x, w = roots_hermitenorm(_positive(nodes, "nodes"))
        return torch.from_numpy(self.sigma * x)[:, None], torch.from_numpy(w / w.sum())


# ------------------------------------------------------------------------- best approximations of rank d

@dataclass(frozen=True)
class Schmidt:
    r"""The Schmidt expansion :math:`F(x,y)=\sum_l\sigma_l\,u_l(x)\,v_l(y)` of a kernel function, by quadrature.

    The :math:`u_l` are orthonormal in :math:`L^2(\mu)`, the :math:`v_l` in :math:`L^2(\nu)`, and
    :math:`\sigma_1\ge\sigma_2\ge\dots\ge0`.  Made by :func:`schmidt`.

    Attributes
    ----------
    values : Tensor
        The singular values :math:`\sigma_l`, one a node of the finer rule.
    change : float
        The largest change of a singular value, over :math:`\sigma_1`, when the number of nodes was doubled to that of
        the rule used here.  At rounding level where the rule has converged; large where it has not, or where there is
        nothing to converge to.  Evidence, not a bound: neither rule sees what happens between its points.
    """

    values: Float[Tensor, " nodes"]
    change: float
    _function: KernelFunction = field(repr=False)
    _left: tuple[Tensor, Tensor] = field(repr=False)      # points, and weights times u_l at them
    _right: tuple[Tensor, Tensor] = field(repr=False)

    @property
    def norm(self) -> float:
        r""":math:`\lVert F\rVert_{L^2(\mu\otimes\nu)}=(\sum_l\sigma_l^2)^{1/2}`."""
        return self.error(0)

    def error(self, rank: int) -> float:
        r"""The least error of rank :math:`d` in mean square, :math:`\tau_d(F)=(\sum_{l>d}\sigma_l^2)^{1/2}`.

        No function of rank :math:`d` is closer to :math:`F` in the supremum norm either (``thm-best-rank``).
        """
        return torch.linalg.vector_norm(self.values[_natural(rank, "rank"):]).item()

    def factors(self, rank: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        r"""Functions :math:`q,k` with values in :math:`\mathbb R^d`, of which :math:`q(x)\cdot k(y)` is best of rank d.

        :math:`q_l=\sqrt{\sigma_l}\,u_l` and :math:`k_l=\sqrt{\sigma_l}\,v_l`, continued from the nodes to all points by
        :math:`u_l(x)=\sigma_l^{-1}\int F(x,y)v_l(y)\,d\nu(y)` and likewise :math:`v_l`.

        Parameters
        ----------
        rank : int

        Returns
        -------
        q, k : callable
            Of points ``(n, 1)``, with values ``(n, rank)``.

        Raises
        ------
        ValueError
            If :math:`\sigma_{rank}` is lost in rounding, so that its functions cannot be told.
        """
        seen = int((self.values > 1e-13 * self.values[0]).sum())
        if _natural(rank, "rank") > seen:
            raise ValueError(f"only {seen} singular values stand out from rounding errors, so the functions of rank "
                             f"{rank} cannot be told; ask for rank {seen} at most")
        root = self.values[:rank].sqrt()

        def q(x: Tensor) -> Tensor:
            points, v = self._right
            return self._function(x, points) @ v[:, :rank] / root

        def k(y: Tensor) -> Tensor:
            points, u = self._left
            return self._function(points, y).mT @ u[:, :rank] / root

        return q, k

    def approximation(self, x: Float[Tensor, "n 1"], y: Float[Tensor, "m 1"], rank: int) -> Float[Tensor, "n m"]:
        r"""The best approximation of a rank, :math:`\sum_{l\le d}\sigma_lu_l(x_i)v_l(y_j)`, at any points.

        Raises
        ------
        ValueError
            As :meth:`factors` does.
        """
        q, k = self.factors(rank)
        return q(x) @ k(y).mT


def schmidt(
    function: KernelFunction, mu: Uniform | Gaussian | None = None, nu: Uniform | Gaussian | None = None, *,
    nodes: int = 64,
) -> Schmidt:
    r"""The Schmidt expansion of a kernel function in :math:`L^2(\mu\otimes\nu)`.

    The integral operator becomes the matrix :math:`[\sqrt{w_i}\,F(x_i,y_j)\sqrt{w'_j}]` of a quadrature rule, whose
    singular value decomposition is that of the operator, up to the error of the rule.  The rule is applied with
    ``nodes`` and with twice as many points, and ``change`` reports the difference.

    Parameters
    ----------
    function : Kernel or callable
        Of points ``(n, 1)`` and ``(m, 1)``, giving ``(n, m)``: a kernel, its ``log_gram``, or a function of your own.
    mu, nu : Uniform or Gaussian
        Distributions of the two arguments.  By default uniform on :math:`[-1,1]`, and ``nu`` as ``mu``.
    nodes : int
        Points of the coarser rule in each argument.

    Returns
    -------
    Schmidt

    Raises
    ------
    ValueError
        If the function's values have the wrong shape, or are not all finite.

    References
    ----------
    Schmidt 1907; Eckart and Young 1936; theorem ``thm-best-rank``.
    """
    mu = Uniform() if mu is None else mu
    nu = mu if nu is None else nu
    coarse = torch.linalg.svdvals(_weighted(function, mu, nu, nodes)[0])
    matrix, (x, root_w), (y, root_v) = _weighted(function, mu, nu, 2 * nodes)
    u, values, vh = torch.linalg.svd(matrix)
    top = values[0].item()
    change = (values[:nodes] - coarse).abs().max().item() / top if top > 0 else 0.0
    return Schmidt(values, change, function, (x, root_w[:, None] * u), (y, root_v[:, None] * vh.mT))


def _weighted(function: KernelFunction, mu, nu, nodes: int):
    (x, w), (y, v) = mu.quadrature(nodes), nu.quadrature(nodes)
    values = function(x, y)
    if values.shape != (nodes, nodes):
        raise ValueError(f"the kernel function must give a matrix (n, m) for points (n, 1) and (m, 1), but gave "
                         f"{tuple(values.shape)} for n = m = {nodes}")
    if not values.isfinite().all():
        raise ValueError("the kernel function has values that are not finite at the nodes of the quadrature rule; "
                         "choose a distribution on which it is finite, or fewer nodes")
    root_w, root_v = w.sqrt(), v.sqrt()
    return root_w[:, None] * values * root_v, (x, root_w), (y, root_v)


def _converged(function: KernelFunction, mu, nu, nodes: int, tolerance: float) -> Schmidt:
    expansion = schmidt(function, mu, nu, nodes=nodes)
    if not expansion.change <= tolerance:
        raise ValueError(f"the singular values still change by {expansion.change:.2g} of the largest one when {nodes} "
                         f"nodes become {2 * nodes}, and {tolerance:.2g} is allowed: take more nodes, allow more, or "
                         "see whether the function is square-integrable at all")
    return expansion


def singular_values(
    function: KernelFunction, count: int, mu: Uniform | Gaussian | None = None, nu: Uniform | Gaussian | None = None, *,
    nodes: int = 64, tolerance: float = 1e-9,
) -> Float[Tensor, " count"]:
    r"""The largest singular values :math:`\sigma_1\ge\sigma_2\ge\dots` of a kernel function.

    Parameters
    ----------
    function, mu, nu, nodes
        As for :func:`schmidt`.
    count : int
        How many, at most ``2 * nodes``.
    tolerance : float
        By how much, over :math:`\sigma_1`, a value may change when the number of nodes is doubled.

    Returns
    -------
    Tensor
        ``(count,)``.

    Raises
    ------
    ValueError
        If the rule has not converged to ``tolerance``, or ``count`` is too large.
    """
    if _positive(count, "count") > 2 * nodes:
        raise ValueError(f"{2 * nodes} nodes give {2 * nodes} singular values, not {count}: take more nodes")
    return _converged(function, mu, nu, nodes, tolerance).values[:count]


def best_rank_error(
    function: KernelFunction, rank: int, mu: Uniform | Gaussian | None = None, nu: Uniform | Gaussian | None = None, *,
    nodes: int = 64, tolerance: float = 1e-9,
) -> float:
    r"""The least error of a function of rank :math:`d` in mean square: :math:`\tau_d(F)=(\sum_{l>d}\sigma_l^2)^{1/2}`.

    It bounds the error in the supremum norm from below (``thm-best-rank``).  A result that is not well above
    ``tolerance`` times the largest singular value, or above rounding errors, says only that the error is small.

    Parameters
    ----------
    function, mu, nu, nodes, tolerance
        As for :func:`singular_values`.
    rank : int
        :math:`d`.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If the rule has not converged to ``tolerance``.
    """
    return _converged(function, mu, nu, nodes, tolerance).error(rank)


# ------------------------------------------------------------------------- Gaussian queries and keys

def _mehler(c: float, sigma: float) -> float:
    r = 2 * abs(c) * sigma**2
    if not r < 1:
        raise ValueError("for Gaussian x and y, exp(c x·y) is square-integrable only if 2|c|σ² < 1, but here "
                         f"2|c|σ² = {r:g}; take a smaller c (in attention: a larger d) or a smaller σ")
    return r / (1 + math.sqrt(1 - r * r))              # (1 − √(1−r²))/r without cancellation


def gaussian_singular_values(c: float, sigma: float, count: int) -> Float[Tensor, " count"]:
    r"""Singular values of :math:`e^{cxy}` for independent :math:`x,y\sim\mathcal N(0,\sigma^2)`, in closed form.

    .. math:: \sigma_n=\sqrt{1+w^2}\,w^n\quad(n=0,1,\dots),\qquad
        w=\frac{1-\sqrt{1-r^2}}r,\quad r=2\lvert c\rvert\sigma^2 .

    Parameters
    ----------
    c : float
    sigma : float
        Standard deviation of both arguments.
    count : int
        How many.

    Returns
    -------
    Tensor
        ``(count,)``; the first is that of degree 0.

    Raises
    ------
    ValueError
        If :math:`r\ge1`: then the function is not square-integrable.

    References
    ----------
    Mehler 1866; proposition ``prp-mehler``.
    """
    w = _mehler(c, sigma)
    powers = torch.arange(_positive(count, "count"), dtype=torch.float64)
    return math.sqrt(1 + w * w) * w**powers


def gaussian_mass(d: int, degree: int, *, c: float | None = None, sigma: float = 1.0) -> float:
    r"""The share of :math:`\lVert e^{c\,x\cdot y}\rVert^2` in its best approximation of degree at most :math:`N`.

    For independent :math:`x,y\sim\mathcal N(0,\sigma^2I_d)`, with :math:`w` as in :func:`gaussian_singular_values`,

    .. math:: (1-w^2)^d\sum_{n\le N}\binom{n+d-1}n w^{2n},

    the distribution function of a negative binomial law, so that the incomplete beta function has it without
    cancellation.  The approximation has rank :math:`\binom{N+d}d`.

    Parameters
    ----------
    d : int
        Dimension of queries and keys.
    degree : int
        :math:`N`.
    c : float, optional
        By default :math:`1/\sqrt d`, as in attention; then :math:`d>4` is needed at ``sigma`` 1.
    sigma : float
        Standard deviation of every coordinate.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If :math:`2\lvert c\rvert\sigma^2\ge1`.

    References
    ----------
    Proposition ``prp-mehler``.
    """
    w = _mehler(1 / math.sqrt(_positive(d, "d")) if c is None else c, sigma)
    return float(betaincc(_natural(degree, "degree") + 1, d, w * w))


# ------------------------------------------------------------------------- functions as networks

def fit_two_layer(
    function: Callable[[Tensor], Tensor], width: int, low: float = -1.0, high: float = 1.0,
) -> torch.nn.Module:
    r"""The ReLU network of one hidden layer that interpolates a function at equally spaced points.

    .. math:: x\mapsto f(t_0)+\sum_{j<m}(s_j-s_{j-1})\,\max(x-t_j,0),\qquad
        s_j=\frac{f(t_{j+1})-f(t_j)}{t_{j+1}-t_j},\quad s_{-1}=0,

    with :math:`t_j=low+j\,(high-low)/m`.  On the interval it is linear between neighbouring points, so for a function
    with a continuous second derivative the error is at most :math:`\frac{h^2}8\max\lvert f''\rvert`,
    :math:`h=(high-low)/m`.  Nothing is trained.

    Parameters
    ----------
    function : callable
        Of points ``(n, 1)``, with values ``(n, outputs)``.
    width : int
        :math:`m`, the number of hidden units.
    low, high : float
        Ends of the interval.

    Returns
    -------
    torch.nn.Module
        Linear, ReLU and linear in sequence, in float64; its parameters require no gradient.

    Raises
    ------
    ValueError
        If ``width`` is not positive, the interval is empty, or the function's values have the wrong shape.

    References
    ----------
    Lemma ``lem-app-interpolation``.
    """
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"fit_two_layer needs finite low < high, not {low!r} and {high!r}")
    knots = torch.linspace(low, high, _positive(width, "width") + 1, dtype=torch.float64)
    values = function(knots[:, None])
    if values.ndim != 2 or len(values) != len(knots):
        raise ValueError(f"the function must give values (n, outputs) for points (n, 1), but gave "
                         f"{tuple(values.shape)} for n = {len(knots)}")
    slopes = values.diff(dim=0) / knots.diff()[:, None]
    kinks = slopes.diff(dim=0, prepend=torch.zeros_like(slopes[:1]))
    first = torch.nn.Linear(1, width, dtype=torch.float64)
    second = torch.nn.Linear(width, values.shape[1], dtype=torch.float64)
    net = torch.nn.Sequential(first, torch.nn.ReLU(), second).requires_grad_(False)
    first.weight.fill_(1.0)
    first.bias.copy_(-knots[:-1])
    second.weight.copy_(kinks.mT)
    second.bias.copy_(values[0])
    return net


# ------------------------------------------------------------------------- keys in the hull of others

def hull_bound(theta: Float[Tensor, "*batch m"]) -> Float[Tensor, " *batch"]:
    r"""The weight that a key :math:`k_0=\sum_m\theta_mk_m` can get at most: :math:`1/(1+e^{H(\theta)})`.

    Of dot-product attention, for every query, where the keys :math:`k_m` are present too.
    :math:`H(\theta)=-\sum_m\theta_m\log\theta_m`.

    Parameters
    ----------
    theta : Tensor
        ``(..., m)``: rows of numbers that are at least 0 and sum to 1.

    Returns
    -------
    Tensor
        ``(...)``.

    Raises
    ------
    ValueError
        If a row is not a probability vector.

    References
    ----------
    Theorem ``thm-hull``, part 1, chapter *A zoo of kernels, and their normalisers*.
    """
    theta = torch.as_tensor(theta)
    if not ((theta >= 0).all() and ((theta.sum(-1) - 1).abs() < 1e-8).all()):
        raise ValueError("theta must have entries of at least 0 that sum to 1 along its last axis")
    return (-torch.special.entr(theta).sum(-1)).sigmoid()


@dataclass(frozen=True)
class HullWeights:
    """How a key is a mean of the other keys, and what weight that leaves to it.

    Attributes
    ----------
    inside : bool
        Whether the key lies in the convex hull of the others.
    theta : Tensor or None
        Of all its representations as a convex combination of the others the one with the largest entropy, ``(m,)``,
        with a 0 at the key itself; ``None`` if there is no representation.
    bound : float
        The supremum of its weight over all queries: below 1/2 or equal to it inside; 1 outside.
    """

    inside: bool
    theta: Tensor | None
    bound: float


def hull_weights(keys: Float[Tensor, "m d"], index: int) -> HullWeights:
    r"""The largest weight that dot-product attention can give to one of the keys, over all queries.

    If the key lies in the convex hull of the others, the supremum is :math:`1/(1+e^{H(\theta)})` with the
    representation :math:`\theta` of the largest entropy, by duality,

    .. math:: \inf_q\,\log\sum_{m}e^{q\cdot(k_m-k_0)}=\max\Bigl\{H(\theta):\theta\ge0,\ \sum_m\theta_m=1,\
        \sum_m\theta_mk_m=k_0\Bigr\};

    if it lies outside, some direction of the query separates it, and the supremum is 1.  A linear program finds which
    :math:`\theta_m` can be positive, and Newton's method on the left side finds them.  Distances from the hull, or from
    one of its faces, of less than about 1e-8, relative to the largest difference of two coordinates, cannot be told
    from 0.

    Parameters
    ----------
    keys : Tensor
        ``(m, d)``.
    index : int
        Of the key in question.

    Returns
    -------
    HullWeights

    Raises
    ------
    IndexError
        If there is no such key.
    ValueError
        If the keys are not a finite matrix, or the key lies so close to the hull's boundary that rounding decides.

    References
    ----------
    Theorem ``thm-hull``, parts 2 and 3, chapter *A zoo of kernels, and their normalisers*.
    """
    if keys.ndim != 2 or not keys.isfinite().all():
        raise ValueError(f"keys must be a matrix (m, d) of finite numbers, not of shape {tuple(keys.shape)}")
    if not -len(keys) <= index < len(keys):
        raise IndexError(f"there are {len(keys)} keys, so no key {index}")
    index %= len(keys)
    others = torch.arange(len(keys)) != index
    gaps = keys.double()[others] - keys.double()[index]
    gaps = gaps / gaps.abs().max() if gaps.numel() and gaps.any() else gaps
    n = len(gaps)
    if n == 0:
        return HullWeights(False, None, 1.0)

    # Which θ can be positive: maximise the number of them, over all multiples of θ at once. Where none can, there is
    # no representation.
    eye = np.eye(n)
    program = linprog(np.r_[np.zeros(n), -np.ones(n)], A_ub=np.hstack([-eye, eye]), b_ub=np.zeros(n),
                      A_eq=np.hstack([gaps.mT.numpy(), np.zeros((gaps.shape[1], n))]), b_eq=np.zeros(gaps.shape[1]),
                      bounds=[(0, None)] * n + [(0, 1)] * n)
    if not program.success:
        raise ValueError(f"the linear program for the hull of these keys failed: {program.message}")
    support = torch.from_numpy(program.x[n:] > 0.5)
    if not support.any():
        return HullWeights(False, None, 1.0)
    p = _entropic(gaps[support])
    if (p @ gaps[support]).abs().max() > 1e-9:
        raise ValueError(f"key {index} lies so close to the boundary of the hull of the others that rounding decides "
                         "whether it is inside; move it a little")
    theta = torch.zeros(len(keys), dtype=torch.float64)
    theta[others.nonzero()[support, 0]] = p
    return HullWeights(True, theta, hull_bound(theta).item())


def _entropic(gaps: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """The softmax of ``gaps @ z`` at the z that minimises its log-sum-exp, by Newton's method with halved steps."""
    u, s, _ = torch.linalg.svd(gaps, full_matrices=False)
    a = u[:, s > 1e-12 * s.max()]                        # an orthonormal basis: only directions that move something
    z = a.new_zeros(a.shape[1])
    for _ in range(200):
        p = (a @ z).softmax(0)
        gradient = p @ a
        if gradient.norm() < 1e-15:
            break
        hessian = a.mT @ (p[:, None] * a) - torch.outer(gradient, gradient)
        step = torch.linalg.lstsq(hessian, -gradient).solution
        size, here = 1.0, (a @ z).logsumexp(0)
        while size > 1e-12 and (a @ (z + size * step)).logsumexp(0) > here:
            size /= 2
        z = z + size * step
    return (a @ z).softmax(0)


# ------------------------------------------------------------------------- patterns of attention

def _centred_log(P: Tensor) -> Tensor:
    if P.ndim < 2 or not (P > 0).all():
        raise ValueError("a pattern must be a matrix (..., n, m) of positive numbers: a weight of 0 has no finite "
                         "logit; put a small one in its place")
    if ((P.sum(-1) - 1).abs() > 1e-8).any():
        raise ValueError("the rows of a pattern must sum to 1")
    logits = P.double().log()
    return logits - logits.mean(-1, keepdim=True)


def pattern_rank(P: Float[Tensor, "*batch n m"], *, tolerance: float = 1e-10) -> Int[Tensor, " *batch"]:
    r"""The least head dimension in which a pattern of attention weights can be produced exactly.

    .. math:: \operatorname{rank}\bigl(\log P\,(I-\tfrac1m\mathbf 1\mathbf 1^{\mathsf T})\bigr)

    with the logarithm entry by entry: subtracting the mean of each row undoes what the softmax does not see.

    Parameters
    ----------
    P : Tensor
        ``(..., n, m)``: positive, with rows that sum to 1.
    tolerance : float
        Singular values below this multiple of the largest count as 0, and those that rounding errors of ``P`` explain.

    Returns
    -------
    Tensor
        ``(...)``, integers.

    Raises
    ------
    ValueError
        If an entry is not positive, or a row does not sum to 1.

    References
    ----------
    Theorem ``thm-pattern-rank``.
    """
    logits = _centred_log(P)
    # An entry of P with a relative error of ε has a logarithm with the absolute error ε: a nearly uniform pattern has
    # small centred logits, and that error does not get smaller with them.
    noise = 8 * torch.finfo(torch.float64).eps * math.sqrt(math.prod(P.shape[-2:]))
    values = torch.linalg.svdvals(logits)
    return (values > (tolerance * values[..., :1]).clamp(min=noise)).sum(-1)


def pattern_factors(
    P: Float[Tensor, "*batch n m"], d: int, *, approximate: bool = False,
) -> tuple[Float[Tensor, "*batch n d"], Float[Tensor, "*batch m d"]]:
    r"""Queries and keys in dimension :math:`d` whose attention weights, of logits :math:`q\cdot k/\sqrt d`, are ``P``.

    From the singular value decomposition :math:`U\Sigma V^{\mathsf T}` of the centred logarithm of ``P``:
    :math:`q=d^{1/4}U\Sigma^{1/2}` and :math:`k=d^{1/4}V\Sigma^{1/2}`, cut to :math:`d` columns.

    Parameters
    ----------
    P : Tensor
        ``(..., n, m)``: positive, with rows that sum to 1.
    d : int
        Head dimension.
    approximate : bool
        Where :math:`d` is smaller than :func:`pattern_rank`: whether to return the factors of the centred logits that
        are closest in mean square.

    Returns
    -------
    q, k : Tensor
        ``(..., n, d)`` and ``(..., m, d)``.

    Raises
    ------
    ValueError
        If :math:`d` is too small and ``approximate`` is false, or ``P`` is not a positive pattern.
    """
    needed = int(pattern_rank(P).max()) if P.numel() else 0
    if _positive(d, "d") < needed and not approximate:
        raise ValueError(f"this pattern needs head dimension {needed}, and d = {d} is less; take d = {needed}, or "
                         "approximate=True for the closest logits of rank d")
    logits = _centred_log(P)
    u, s, vh = torch.linalg.svd(logits, full_matrices=False)
    root = d**0.25 * s[..., :d].sqrt()
    q, k = u[..., :d] * root[..., None, :], vh.mT[..., :d] * root[..., None, :]
    missing = d - q.shape[-1]
    return torch.nn.functional.pad(q, (0, missing)), torch.nn.functional.pad(k, (0, missing))


# ------------------------------------------------------------------------- arguments

def _natural(value: int, name: str, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
    return value


def _positive(value: int, name: str) -> int:
    return _natural(value, name, least=1)
