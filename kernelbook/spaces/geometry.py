r"""The geometry of :math:`\ell^p`, :math:`1<p<\infty`: norms, duality maps, convexity and quotients.

A Hilbert space is its own dual: the functional that supports the unit ball at a vector is the vector itself.  In
:math:`\ell^p` a *duality map* takes the place of this identification.  It is homogeneous, inverted by the duality map
of the conjugate exponent :math:`p^*=p/(p-1)`, and additive only for :math:`p=2`; it is what makes the representer
theorem of a Banach space nonlinear.  Statements and proofs are in the chapter *Duality and geometry*.

Vectors lie along the last axis, with any number of axes before it.  Exponents are numbers greater than 1 and finite;
1 and infinity are refused, because there the maps below are not functions.  All norms are scaled by the largest entry
first, so a norm that is a float64 is computed as one even where a power of an entry is not.
"""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy import optimize
from torch import Tensor

__all__ = [
    "conjugate", "lp_norm", "power_map", "duality_map", "norm_gradient", "convexity_gap", "modulus_of_convexity",
    "quotient_norm", "QuotientNorm", "hilbert_matrix", "schur_bound",
]


# ------------------------------------------------------------------------- checks

def _exponent(p: float) -> float:
    if isinstance(p, bool) or not isinstance(p, numbers.Real):
        raise TypeError(f"the exponent p must be a number, got {type(p).__name__}")
    if not 1 < p < math.inf:
        raise ValueError(f"the exponent must satisfy 1 < p < infinity, got p = {p}; at 1 and at infinity the norm is "
                         "neither smooth nor strictly convex (take an exponent near them, such as 1.05 or 20)")
    return float(p)


def _vectors(v: Tensor, name: str = "v") -> Tensor:
    if not isinstance(v, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(v).__name__}; torch.as_tensor makes one")
    if not v.is_floating_point():
        raise TypeError(f"{name} must hold real floating-point numbers, got {v.dtype}; {name}.double() converts it")
    if v.ndim == 0 or v.shape[-1] == 0:
        raise ValueError(f"{name} must have shape (..., D) with D >= 1, got {tuple(v.shape)}")
    return v


def _scale(v: Tensor) -> Tensor:
    # The largest entry of each vector, a constant for differentiation: what is computed with it does not depend on it.
    # Where it is 0 or infinite there is nothing to scale by.
    largest = v.detach().abs().amax(-1, keepdim=True)
    return torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest))


# ------------------------------------------------------------------------- norms and duality maps

def conjugate(p: float) -> float:
    r"""The conjugate exponent :math:`p^*=p/(p-1)`, for which :math:`1/p+1/p^*=1`.

    Parameters
    ----------
    p : float
        An exponent, :math:`1<p<\infty`.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If ``p`` is at most 1, infinite or NaN.
    TypeError
        If ``p`` is not a number.

    References
    ----------
    Chapter *Duality and geometry*.
    """
    p = _exponent(p)
    return p / (p - 1)


def lp_norm(v: Float[Tensor, "*batch D"], p: float) -> Float[Tensor, "*batch"]:
    r"""The norm :math:`\|v\|_p=\bigl(\sum_i|v_i|^p\bigr)^{1/p}` of each vector.

    Its gradient is :func:`norm_gradient`; at 0, where the norm has none, it is given as 0.

    Parameters
    ----------
    v : Tensor
        ``(..., D)``: vectors.
    p : float
        An exponent, :math:`1<p<\infty`.

    Returns
    -------
    Tensor
        ``(...)``.

    Raises
    ------
    ValueError
        If ``p`` is at most 1, infinite or NaN, or ``v`` has no entries.
    TypeError
        If ``v`` is not a floating-point tensor or ``p`` not a number.

    References
    ----------
    Chapter *Duality and geometry*.
    """
    p, v = _exponent(p), _vectors(v)
    scale = _scale(v)
    total = (v / scale).abs().pow(p).sum(-1)
    zero = total == 0
    root = torch.where(zero, torch.ones_like(total), total).pow(1 / p)     # no infinite slope at 0
    return torch.where(zero, total, scale[..., 0] * root)


class _PowerMap(torch.autograd.Function):
    # autograd would go through sign and abs, and lose the derivative at 0 where the exponent is 1.

    @staticmethod
    def forward(ctx, v, s):
        ctx.save_for_backward(v)
        ctx.s = s
        return v.sign() * v.abs().pow(s)

    @staticmethod
    def backward(ctx, grad):
        v, = ctx.saved_tensors
        return grad * ctx.s * v.abs().pow(ctx.s - 1), None


def power_map(v: Float[Tensor, "*shape"], s: float) -> Float[Tensor, "*shape"]:
    r"""The signed power :math:`\varphi_s(v)=\operatorname{sign}(v)\,|v|^s` of each entry.

    :math:`\varphi_s` and :math:`\varphi_{1/s}` are inverse to each other; for conjugate exponents
    :math:`(p-1)(p^*-1)=1`.  For :math:`s<1` its derivative at 0 is infinite.

    Parameters
    ----------
    v : Tensor
        Numbers.
    s : float
        A power, positive and finite.

    Returns
    -------
    Tensor
        Of the shape of ``v``.

    Raises
    ------
    ValueError
        If ``s`` is not positive and finite.
    TypeError
        If ``v`` is not a floating-point tensor.

    References
    ----------
    Chapter *Duality and geometry*.
    """
    if not isinstance(v, Tensor) or not v.is_floating_point():
        raise TypeError(f"v must be a tensor of floating-point numbers, got {getattr(v, 'dtype', type(v).__name__)}")
    if isinstance(s, bool) or not isinstance(s, numbers.Real) or not 0 < s < math.inf:
        raise ValueError(f"the power s must be a positive finite number, got {s!r}")
    return _PowerMap.apply(v, float(s))


def duality_map(v: Float[Tensor, "*batch D"], p: float) -> Float[Tensor, "*batch D"]:
    r"""The duality map :math:`J_p(v)=\nabla\tfrac12\|v\|_p^2=\|v\|_p^{2-p}\,\varphi_{p-1}(v)`; :math:`J_p(0)=0`.

    :math:`J_p(v)` is the one functional :math:`w\in\ell^{p^*}` with
    :math:`\langle w,v\rangle=\|w\|_{p^*}\|v\|_p` and :math:`\|w\|_{p^*}=\|v\|_p`.  Its inverse is
    ``duality_map(w, conjugate(p))``.

    In floating-point numbers an entry of :math:`J_p(v)` underflows to 0 where the entry of ``v`` is smaller than the
    largest one by a factor below about :math:`10^{-308/(p-1)}`; the inverse cannot bring it back.

    Parameters
    ----------
    v : Tensor
        ``(..., D)``: vectors of :math:`\ell^p`.
    p : float
        An exponent, :math:`1<p<\infty`.

    Returns
    -------
    Tensor
        ``(..., D)``: vectors of :math:`\ell^{p^*}`.

    Raises
    ------
    ValueError
        If ``p`` is at most 1, infinite or NaN, or ``v`` has no entries.
    TypeError
        If ``v`` is not a floating-point tensor or ``p`` not a number.

    References
    ----------
    Proposition ``prp-duality-map`` of the chapter *Duality and geometry*.
    """
    p, v = _exponent(p), _vectors(v)
    scale = _scale(v)
    u = v / scale
    length = lp_norm(u, p)[..., None]
    length = torch.where(length == 0, torch.ones_like(length), length)
    return scale * length.pow(2 - p) * power_map(u, p - 1)


def norm_gradient(v: Float[Tensor, "*batch D"], p: float) -> Float[Tensor, "*batch D"]:
    r"""The gradient of the norm, :math:`\iota(v)=J_p(v)/\|v\|_p=\varphi_{p-1}(v/\|v\|_p)`; 0 at 0 by convention.

    It is the Gateaux derivative: :math:`\|v+\tau h\|_p=\|v\|_p+\tau\langle\iota(v),h\rangle+o(\tau)`.
    For :math:`v\ne0` it has norm 1 in :math:`\ell^{p^*}`.

    Parameters
    ----------
    v : Tensor
        ``(..., D)``: vectors of :math:`\ell^p`.
    p : float
        An exponent, :math:`1<p<\infty`.

    Returns
    -------
    Tensor
        ``(..., D)``: vectors of :math:`\ell^{p^*}`.

    Raises
    ------
    ValueError
        If ``p`` is at most 1, infinite or NaN, or ``v`` has no entries.
    TypeError
        If ``v`` is not a floating-point tensor or ``p`` not a number.

    References
    ----------
    Proposition ``prp-duality-map`` of the chapter *Duality and geometry*.
    """
    p, v = _exponent(p), _vectors(v)
    u = v / _scale(v)
    length = lp_norm(u, p)[..., None]
    return power_map(u / torch.where(length == 0, torch.ones_like(length), length), p - 1)


# ------------------------------------------------------------------------- convexity

def convexity_gap(u: Float[Tensor, "*batch D"], v: Float[Tensor, "*batch D"], p: float) -> Float[Tensor, "*batch"]:
    r"""By how much the midpoint of two vectors is shorter than the convexity inequality of :math:`\ell^p` demands.

    For :math:`p\ge2`, with Clarkson's inequality,

    .. math:: \tfrac12\bigl(\|u\|_p^p+\|v\|_p^p\bigr)-\|\tfrac{u+v}2\|_p^p-\|\tfrac{u-v}2\|_p^p ,

    and for :math:`1<p\le2`, with the 2-convexity inequality,

    .. math:: \tfrac12\bigl(\|u\|_p^2+\|v\|_p^2\bigr)-\|\tfrac{u+v}2\|_p^2-(p-1)\|\tfrac{u-v}2\|_p^2 .

    Neither is ever negative, but for rounding; at :math:`p=2` both are 0, the parallelogram law.

    Parameters
    ----------
    u, v : Tensor
        ``(..., D)``: vectors; leading axes broadcast.
    p : float
        An exponent, :math:`1<p<\infty`.

    Returns
    -------
    Tensor
        ``(...)``.

    Raises
    ------
    ValueError
        If ``p`` is at most 1, infinite or NaN, or the vectors do not have the same length.
    TypeError
        If ``u`` or ``v`` is not a floating-point tensor or ``p`` not a number.

    References
    ----------
    Proposition ``prp-convexity-inequalities`` of the chapter *Duality and geometry*.
    """
    p, u, v = _exponent(p), _vectors(u, "u"), _vectors(v)
    if u.shape[-1] != v.shape[-1]:
        raise ValueError(f"u and v must have the same length D along the last axis, got {u.shape[-1]} and "
                         f"{v.shape[-1]}")
    power, factor = (p, 1.0) if p >= 2 else (2.0, p - 1)
    scale = torch.maximum(_scale(u), _scale(v))
    u, v = u / scale, v / scale
    midpoint, half = (u + v) / 2, (u - v) / 2
    gap = ((lp_norm(u, p).pow(power) + lp_norm(v, p).pow(power)) / 2
           - lp_norm(midpoint, p).pow(power) - factor * lp_norm(half, p).pow(power))
    return scale[..., 0].pow(power) * gap


def modulus_of_convexity(epsilon: float, p: float) -> float:
    r"""How far inside the ball the midpoint of two unit vectors at distance :math:`\varepsilon` must lie, at least.

    :math:`\delta=1-\bigl(1-(\varepsilon/2)^p\bigr)^{1/p}` for :math:`p\ge2`, and
    :math:`\delta=1-\bigl(1-(p-1)(\varepsilon/2)^2\bigr)^{1/2}` for :math:`p\le2`: if :math:`\|u\|_p=\|v\|_p=1` and
    :math:`\|u-v\|_p\ge\varepsilon`, then :math:`\|(u+v)/2\|_p\le1-\delta`.

    Parameters
    ----------
    epsilon : float
        A distance from 0 to 2.
    p : float
        An exponent, :math:`1<p<\infty`.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If ``p`` is at most 1, infinite or NaN, or the distance does not lie between 0 and 2.
    TypeError
        If ``p`` is not a number.

    References
    ----------
    Proposition ``prp-convexity-inequalities`` of the chapter *Duality and geometry*.
    """
    p = _exponent(p)
    if not 0 <= epsilon <= 2:
        raise ValueError(f"two unit vectors have a distance from 0 to 2, got {epsilon}")
    power, factor = (p, 1.0) if p >= 2 else (2.0, p - 1)
    lost = factor * (epsilon / 2) ** power
    return 1.0 if lost == 1 else -math.expm1(math.log1p(-lost) / power)


# ------------------------------------------------------------------------- quotients

_CERTIFIED = 1e-11        # how far apart upper and lower bound of a quotient norm may be, relative to the upper


class QuotientNorm(NamedTuple):
    r"""What :func:`quotient_norm` finds, with its certificate.

    * ``norm``, ``(...)``: length of the shortest vector found in each coset :math:`v+N`; an upper bound.
    * ``minimiser``, ``(..., D)``: that vector.
    * ``functional``, ``(..., D)``: a vector of :math:`\ell^{p^*}` of norm 1 that vanishes on :math:`N`; the gradient of
      the quotient norm (0 where the coset is :math:`N`).
    * ``lower``, ``(...)``: its value at :math:`v`; no vector of the coset is shorter.
    * ``radius``, ``(...)``: no farther than this, in :math:`\ell^p`, lies the true minimiser; pessimistic for large
      exponents.
    """

    norm: Tensor
    minimiser: Tensor
    functional: Tensor
    lower: Tensor
    radius: Tensor


def quotient_norm(v: Float[Tensor, "*batch D"], N: Float[Tensor, "k D"], p: float) -> QuotientNorm:
    r"""The quotient norm :math:`\min\{\|v-n\|_p:n\in N\}` of vectors, modulo the span :math:`N` of given rows.

    With a certificate: for each :math:`w\in\ell^{p^*}` of norm 1 that vanishes on :math:`N`,
    :math:`\langle w,v\rangle\le\|v-n\|_p`, and the best :math:`w` reaches the minimum.  The error of the minimiser
    follows from the two numbers by the convexity inequality.

    Newton's method, on whichever of the two problems has its exponent above 2 and so two derivatives.  The norm can be
    differentiated with respect to ``v``; what else is returned is constant.

    Parameters
    ----------
    v : Tensor
        ``(..., D)``: vectors.
    N : Tensor
        ``(k, D)``: rows that span the subspace; they may be dependent (their rank is decided at machine precision),
        and ``k`` may be 0.
    p : float
        An exponent, :math:`1<p<\infty`.

    Returns
    -------
    QuotientNorm
        Fields ``norm``, ``minimiser``, ``functional``, ``lower`` and ``radius``.

    Raises
    ------
    ValueError
        If ``p`` is at most 1, infinite or NaN, the shapes do not fit, or an entry is not finite.
    TypeError
        If ``v`` or ``N`` is not a floating-point tensor or ``p`` not a number.
    RuntimeError
        If the upper and the lower bound differ by more than 1e-11 of the upper when no step improves them.  It may
        happen for exponents below 1.1 or above 20 if entries differ by many orders of magnitude.

    References
    ----------
    Proposition ``prp-quotient`` of the chapter *Duality and geometry*.
    """
    p, v = _exponent(p), _vectors(v)
    if not isinstance(N, Tensor) or not N.is_floating_point() or N.ndim != 2 or N.shape[1] != v.shape[-1]:
        shape = tuple(N.shape) if isinstance(N, Tensor) else type(N).__name__
        raise ValueError(f"N must be a floating-point tensor of shape (k, {v.shape[-1]}), whose rows span the subspace "
                         f"and are as long as v, got {shape}")
    if N.requires_grad:
        raise ValueError("the quotient norm is differentiated with respect to v only; pass N.detach()")
    if not (v.isfinite().all() and N.isfinite().all()):
        raise ValueError("v and N must be finite")
    within, across = _split(N.detach().double().cpu().numpy())
    rows = v.detach().double().cpu().numpy().reshape(-1, v.shape[-1])
    found = [_shortest(row, within, across, p) for row in rows]
    shortest, functional = (torch.as_tensor(np.reshape([f[i] for f in found], v.shape), dtype=v.dtype, device=v.device)
                            for i in (0, 1))
    lower, radius = (torch.as_tensor(np.reshape([f[i] for f in found], v.shape[:-1]), dtype=v.dtype, device=v.device)
                     for i in (2, 3))
    return QuotientNorm(lp_norm(v - (v.detach() - shortest), p), shortest, functional, lower, radius)


def _split(N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal columns that span the rows of N, and columns that span their complement."""
    size = N.shape[1]
    if not N.any():
        return np.zeros((size, 0)), np.eye(size)
    _, s, vh = np.linalg.svd(N / np.abs(N).max())
    rank = int((s > max(N.shape) * np.finfo(float).eps * s[0]).sum())
    return vh[:rank].T, vh[rank:].T


def _norm(v: np.ndarray, p: float) -> float:
    scale = np.abs(v).max()
    return float(scale * np.sum((np.abs(v) / scale) ** p) ** (1 / p)) if scale else 0.0


def _phi(v: np.ndarray, s: float) -> np.ndarray:
    return np.sign(v) * np.abs(v) ** s


def _newton(a: np.ndarray, M: np.ndarray, b: np.ndarray, s: float, t: np.ndarray) -> np.ndarray:
    """Minimise :math:`|a + M t|_s^s / s - b·t` over t, for s >= 2 and orthonormal columns M."""
    def slope(length, t, step):
        with np.errstate(over="ignore", invalid="ignore"):
            return step @ (M.T @ _phi(a + M @ (t + length * step), s - 1) - b)

    best, best_error = t, math.inf
    for _ in range(200):
        r = a + M @ t
        gradient = M.T @ _phi(r, s - 1) - b
        error = np.linalg.norm(gradient)
        if error < best_error:
            best, best_error, stalled = t, error, 0
        elif (stalled := stalled + 1) == 5:                  # rounding is all that is left
            break
        # Where entries of r vanish, so does curvature; least squares then takes the shortest of all Newton steps.
        if b.any():
            hessian = (s - 1) * (M.T * np.abs(r) ** (s - 2)) @ M
            step = np.linalg.lstsq(hessian, -gradient, rcond=1e-15)[0]
        else:                   # the same step without squaring: entries of very different size keep their digits
            root = np.abs(r) ** (s / 2 - 1)
            step = np.linalg.lstsq(root[:, None] * M, -_phi(r, s / 2) / (s - 1), rcond=1e-12)[0]
        if not gradient @ step < 0:
            break
        # The slope along the step increases: go to its zero, which near vanishing entries lies beyond the step's end.
        end = 1.0
        while slope(end, t, step) < 0 and end < s:
            end *= 2
        while not math.isfinite(slope(end, t, step)):
            end /= 2
        if slope(end, t, step) > 0:
            end = optimize.brentq(slope, 0.0, end, args=(t, step), xtol=1e-14, rtol=1e-12)
        t = t + end * step
    return best


def _shortest(v, within, across, p):
    """The shortest vector of v + N, a norming functional, its value at v and the radius of uncertainty."""
    residual = across @ (across.T @ v)                      # the answer for p = 2
    # Where only rounding keeps it from 0, v lies in N.
    if np.abs(residual).max() <= 8 * len(v) * np.finfo(float).eps * np.abs(v).max():
        return np.zeros_like(v), np.zeros_like(v), 0.0, 0.0
    scale = np.abs(residual).max()
    a = residual / scale
    conj = p / (p - 1)
    # From exponent 2 to the one wanted in steps, each from where the last one ended.
    above = max(p, conj)
    path = [2.0**k for k in range(1, 64) if 2.0**k < above] + [above]
    if not within.shape[1]:
        shortest, functional = a, _phi(a, p - 1)
    elif p >= 2:
        shortest = functional = a
        for s in path:
            # Small entries of the minimiser grow with the exponent, so the last minimiser may have too little curvature
            # to start from; the one that the last functional suggests has more.
            guess = _phi(functional, 1 / (s - 1))
            guess *= functional @ a / (functional @ guess)
            t = min((within.T @ (r - a) for r in (guess, shortest)), key=lambda t, s=s: _norm(a + within @ t, s))
            shortest = a + within @ _newton(a, within, np.zeros_like(t), s, t)
            functional = across @ (across.T @ _phi(shortest / _norm(shortest, s), s - 1))
    else:
        # The dual problem: minimise |w|^s/s - <w, a> over w that vanish on N.  Then phi_{s-1}(w) is the minimiser.
        functional = a
        for s in path:
            w = functional / np.abs(functional).max()
            w *= (w @ a / np.sum(np.abs(w) ** s)) ** (1 / (s - 1))
            functional = across @ _newton(np.zeros_like(a), across, across.T @ a, s, across.T @ w)
        shortest = a + within @ (within.T @ (_phi(functional, conj - 1) - a))
    functional = functional / _norm(functional, conj)
    upper, lower = _norm(shortest, p), float(functional @ a)
    if not upper - lower <= _CERTIFIED * upper:
        raise RuntimeError(f"the quotient norm lies between {lower * scale} and {upper * scale}, and no step of "
                           f"the solver brings the two together; exponents nearer to 2 are easier (p = {p})")
    # The midpoint of the vector found and the true minimiser is no shorter than the minimum: the convexity inequality
    # bounds their distance.  The bounds themselves are known up to rounding only.
    excess = max(upper - lower, len(v) * np.finfo(float).eps * upper) / upper
    power, factor = (p, 1.0) if p >= 2 else (2.0, p - 1)
    radius = 2 * upper * (-math.expm1(power * math.log1p(-excess)) / (2 * factor)) ** (1 / power)
    return scale * shortest, functional, scale * lower, scale * radius


# ------------------------------------------------------------------------- Schur multipliers

def hilbert_matrix(n: int) -> Float[Tensor, "n n"]:
    r"""The matrix of Hilbert's inequality, :math:`H_{ij}=1/(i-j)` off the diagonal and 0 on it; its norm is at most pi.

    Parameters
    ----------
    n : int
        Number of rows and columns, at least 1.

    Returns
    -------
    Tensor
        ``(n, n)``.

    Raises
    ------
    ValueError
        If ``n`` is not a positive integer.

    References
    ----------
    Theorem ``thm-causal-banach`` of the chapter *Duality and geometry*.
    """
    if isinstance(n, bool) or not isinstance(n, numbers.Integral) or n < 1:
        raise ValueError(f"n must be a positive integer, got {n!r}")
    i = torch.arange(n, dtype=torch.float64)
    difference = i[:, None] - i
    return torch.where(difference == 0, 0.0, 1 / torch.where(difference == 0, 1.0, difference))


def schur_bound(matrix: Float[Tensor, "n m"], test: Float[Tensor, "n m"]) -> float:
    r"""A lower bound :math:`\|A\circ X\|/\|X\|` on the factorisation norm :math:`\gamma_2(A)`.

    :math:`\gamma_2(A)` is the least :math:`\max_i\|u_i\|\max_j\|v_j\|` among all vectors of a Hilbert space with
    :math:`A_{ij}=\langle u_i,v_j\rangle`.  The norms in the bound are largest singular values, and
    :math:`\circ` multiplies entry by entry.

    Parameters
    ----------
    matrix : Tensor
        ``(n, m)``: the matrix :math:`A` to be factored, such as the Gram matrix of a kernel.
    test : Tensor
        ``(n, m)``: any matrix :math:`X\ne0`; the bound is as good as its choice.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If the two are not matrices of one shape, or the test matrix is 0.

    References
    ----------
    Theorem ``thm-causal-banach`` of the chapter *Duality and geometry*.
    """
    if matrix.ndim != 2 or matrix.shape != test.shape:
        raise ValueError(f"matrix and test must be matrices of one shape, got {tuple(matrix.shape)} and "
                         f"{tuple(test.shape)}")
    size = torch.linalg.matrix_norm(test, 2).item()
    if size == 0:
        raise ValueError("the test matrix is 0 and bounds nothing; hilbert_matrix(n) is a useful one")
    return torch.linalg.matrix_norm(matrix * test, 2).item() / size
