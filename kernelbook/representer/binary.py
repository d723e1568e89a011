r"""Learning on two domains at once: responses :math:`z_{ij}` of pairs :math:`(x_i,y_j)`.

Queries :math:`x_i` and keys :math:`y_j` come from two sets, and so do the functions that are learned.  What a problem
can learn depends on how the two are *coupled*:

additive, :math:`f(x_i)+g(y_j)`
    convex, solved to a certificate, and blind to any interaction (:func:`solve_additive`);
product, :math:`f(x_i)\,g(y_j)`
    an interaction of rank one; not convex, so several starts and an honest report (:func:`solve_product`);
bilinear, :math:`\langle\phi(x_i),T\,\psi(y_j)\rangle`
    logits of attention.  With the trace norm as the penalty convex in :math:`T`; with a bound on the rank, the head
    dimension, it is a problem for the maps of queries and keys (:func:`solve_trace_norm`).

Derivations are in the book's chapter *The binary problem*.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted

from ..features import FeatureMap
from ..kernels import Kernel
from ..spaces.geometry import conjugate
from .losses import Loss, get
from .solvers import power

__all__ = [
    "AdditiveSolution", "LocalMinimum", "PairRegressor", "ProductSolution", "TraceNormSolution",
    "solve_additive", "solve_product", "solve_trace_norm",
]

_FLOOR = 1e-14          # of |u| where a negative power of it is taken
_RANK = 1e-12           # eigenvalues of a Gram matrix below this share of the largest count as 0
_WHOLE = 1e-10          # of the features: nothing to speak of was left out of their coordinates


# ------------------------------------------------------------------------- arguments

def _matrix(a: ArrayLike, name: str) -> NDArray:
    a = np.asarray(a, dtype=np.float64)
    if a.ndim != 2 or 0 in a.shape:
        raise ValueError(f"{name} must be a matrix with at least one row and one column, but has the shape {a.shape}")
    if not np.isfinite(a).all():
        raise ValueError(f"{name} has entries that are not finite numbers")
    return a


def _problem(A_x: ArrayLike, A_y: ArrayLike, z: ArrayLike, loss: str | Loss) -> tuple[NDArray, NDArray, NDArray, Loss]:
    A_x, A_y, z, loss = _matrix(A_x, "A_x"), _matrix(A_y, "A_y"), _matrix(z, "z"), get(loss)
    if z.shape != (len(A_x), len(A_y)):
        raise ValueError(f"z must have one row for each row of A_x and one column for each row of A_y, that is the "
                         f"shape {(len(A_x), len(A_y))}, but has the shape {z.shape}")
    if not loss.smooth:
        raise ValueError(f"the {loss.name} loss has a kink, and the solvers of binary problems use second derivatives; "
                         "take 'squared' or 'logistic'")
    if loss.targets_are_signs and not np.isin(z, (-1, 1)).all():
        raise ValueError(f"the {loss.name} loss needs responses -1 and +1; mend with z = 2 * (z > threshold) - 1")
    return A_x, A_y, z, loss


def _exponent(p: float, name: str) -> float:
    if not 1 < p < np.inf:
        raise ValueError(f"{name} must lie strictly between 1 and infinity, not be {p!r}: at the ends the norm is not "
                         "strictly convex or not differentiable")
    return float(p)


def _strength(alpha: float, name: str) -> float:
    if not 0 < alpha < np.inf:
        raise ValueError(f"{name} must be a positive number, not {alpha!r}: without a penalty a minimiser "
                         "need not exist")
    return float(alpha)


def _warn(solver: str, what: str, value: float, wanted: float) -> None:
    warnings.warn(f"{solver} stopped at a {what} of {value:.3g}, not {wanted:.3g}; raise max_iter or tol, or scale the "
                  "features to comparable size", ConvergenceWarning, stacklevel=3)


# ------------------------------------------------------------------------- additive coupling

@dataclass(frozen=True)
class AdditiveSolution:
    r"""What :func:`solve_additive` found.

    Attributes
    ----------
    weights_x, weights_y : ndarray
        :math:`v` and :math:`w`, ``(D_x,)`` and ``(D_y,)``.
    dual_matrix : ndarray
        :math:`C`, ``(n_x, n_y)``; at the solution :math:`c_{ij}=-\ell'(z_{ij},f_i+g_j)`.
    objective, dual_objective : float
        Of these weights and of this matrix; the minimum lies between the two.
    duality_gap : float
        Their difference, a sum of defects that are never negative.
    iterations : int
    """

    weights_x: Float[NDArray, " D_x"]
    weights_y: Float[NDArray, " D_y"]
    dual_matrix: Float[NDArray, "n_x n_y"]
    objective: float
    dual_objective: float
    duality_gap: float
    iterations: int

    @property
    def dual_coef_x(self) -> Float[NDArray, " n_x"]:
        r"""Coefficients of the queries, the row sums :math:`\xi=C\mathbf 1`."""
        return self.dual_matrix.sum(1)

    @property
    def dual_coef_y(self) -> Float[NDArray, " n_y"]:
        r"""Coefficients of the keys, the column sums :math:`\zeta=C^{\mathsf T}\mathbf 1`."""
        return self.dual_matrix.sum(0)


@dataclass(frozen=True)
class _Side:
    """One side of an additive problem: the conjugate of its penalty, as a function of its dual coefficients."""

    A: NDArray
    p: float
    alpha: float

    def weights(self, coef: NDArray) -> NDArray:
        # The weights at which the penalty has the slope u = A'coef.
        return power(self.A.T @ coef / self.alpha, 1 / (self.p - 1))

    def penalty(self, weights: NDArray) -> float:
        return self.alpha / self.p * (np.abs(weights) ** self.p).sum()

    def conjugate(self, coef: NDArray) -> float:
        return self.alpha / conjugate(self.p) * (np.abs(self.A.T @ coef / self.alpha) ** conjugate(self.p)).sum()

    def curvature(self, coef: NDArray, bound: bool = False) -> NDArray:
        # The second derivative of the conjugate; unbounded at u = 0 if p > 2, hence the floor.  There a Newton step
        # passes 0 and comes back, for ever if p = 3.  With the curvature of the parabola that touches |u|^p* from
        # outside at u and -u, which is 1/(p* - 1) times as large, no step goes too far.
        dual = conjugate(self.p)
        u = np.maximum(np.abs(self.A.T @ coef / self.alpha), _FLOOR)
        factor = 1.0 if bound and dual < 2 else dual - 1
        return (self.A * (u ** (dual - 2) * factor / self.alpha)) @ self.A.T


def solve_additive(
    A_x: ArrayLike,
    A_y: ArrayLike,
    z: ArrayLike,
    *,
    loss: str | Loss = "squared",
    p_x: float = 2.0,
    p_y: float = 2.0,
    alpha_x: float = 1.0,
    alpha_y: float = 1.0,
    tol: float = 1e-12,
    max_iter: int = 200,
) -> AdditiveSolution:
    r"""Solve the binary problem with additive coupling, with a certificate.

    .. math::
       \min_{v,w}\ \sum_{ij}\ell(z_{ij},f_i+g_j)+\frac{\alpha_x}{p_x}\lVert v\rVert_{p_x}^{p_x}
       +\frac{\alpha_y}{p_y}\lVert w\rVert_{p_y}^{p_y},\qquad f=A_xv,\quad g=A_yw .

    Newton's method on the dual, whose variable is one matrix :math:`C`; its row and column sums are the coefficients
    of the two sides.  A step costs a system of :math:`n_x+n_y` equations.  For exponents above 2 the dual has unbounded
    curvature, and large ones (8, say) may need more steps than allowed: mind the gap.

    Parameters
    ----------
    A_x, A_y : array
        Features of queries and of keys, a row each.
    z : array
        Responses; -1 and +1 for the logistic loss.
    loss : str or Loss
        ``"squared"`` or ``"logistic"``.
    p_x, p_y : float
        Exponents, strictly between 1 and infinity.
    alpha_x, alpha_y : float
        Strengths of the penalties, positive.
    tol : float
        The duality gap to reach, relative to 1 + the objective.
    max_iter : int
        Newton steps at most.

    Returns
    -------
    AdditiveSolution

    Raises
    ------
    ValueError
        If shapes, exponents, strengths or responses do not fit.

    Warns
    -----
    ConvergenceWarning
        If the gap was not reached; the solution still says how large it is.

    Notes
    -----
    Chapter *The binary problem*, conservation law.
    """
    A_x, A_y, z, loss = _problem(A_x, A_y, z, loss)
    x = _Side(A_x, _exponent(p_x, "p_x"), _strength(alpha_x, "alpha_x"))
    y = _Side(A_y, _exponent(p_y, "p_y"), _strength(alpha_y, "alpha_y"))
    n_x, n_y = z.shape

    def negative_dual(C):
        return loss.conjugate(-C, z).sum() + x.conjugate(C.sum(1)) + y.conjugate(C.sum(0))

    def at(C):
        v, w = x.weights(C.sum(1)), y.weights(C.sum(0))
        sums = (A_x @ v)[:, None] + A_y @ w
        return v, w, sums, loss.defect(sums, -C, z).sum()

    low, high = loss.domain(z)

    def descend(C, value, gap, gradient, bound):
        """A step and what it reaches: its size, the value, the point, and what belongs to it; None if none helps."""
        # Hessian = diag(D) + M'SM, where M takes row and column sums: Woodbury.
        inverse = 1 / loss.conjugate_hessian(-C, z)
        S = np.zeros((n_x + n_y, n_x + n_y))
        S[:n_x, :n_x], S[n_x:, n_x:] = x.curvature(C.sum(1), bound), y.curvature(C.sum(0), bound)
        MDM = np.block([[np.diag(inverse.sum(1)), inverse], [inverse.T, np.diag(inverse.sum(0))]])
        scaled = inverse * gradient
        s = np.linalg.solve(np.eye(n_x + n_y) + S @ MDM, S @ np.concatenate([scaled.sum(1), scaled.sum(0)]))
        step = inverse * (s[:n_x, None] + s[n_x:]) - scaled

        with np.errstate(divide="ignore", invalid="ignore"):      # stay inside of the domain of the conjugate
            room = np.where(step > 0, (-low - C) / step, np.where(step < 0, (-high - C) / step, np.inf))
        size, slope = min(1.0, 0.99 * room.min()), (gradient * step).sum()
        while size > 1e-12:
            trial = C + size * step
            trial_value, trial_point = negative_dual(trial), at(trial)
            # Near the solution the value no longer moves in double precision, but the gap still does.
            if trial_value <= value + 1e-4 * size * slope or (
                    trial_point[-1] < gap and trial_value <= value + 1e-14 * (1 + abs(value))):
                return size, trial_value, trial, trial_point
            size /= 2
        return None

    C = -loss.gradient(np.zeros_like(z), z)
    with np.errstate(over="ignore"):          # a small p makes the conjugate steep: begin as near to 0 as it asks
        C = min((C / 4**k for k in range(20)), key=negative_dual)
    value, (v, w, sums, gap), last = negative_dual(C), at(C), np.inf
    for iterations in range(max_iter + 1):
        # Newton squares a small error: stop not when the gap is small, but when it is and no longer falls.
        if iterations == max_iter or gap == 0 or (gap <= tol * (1 + abs(value)) and gap > 0.1 * last):
            break
        last = gap
        gradient = sums - loss.conjugate_gradient(-C, z)
        found = None
        for bound in (False, True):           # Newton's step; where it gains little, a careful one as well
            reached = descend(C, value, gap, gradient, bound)
            if reached is not None and (found is None or reached[1] < found[1]):
                found = reached
            if found is not None and found[3][-1] < 0.1 * gap:
                break
        if found is None:
            break
        _, value, C, (v, w, sums, gap) = found
    if gap > max(tol, 1e-9) * (1 + abs(value)):
        _warn("solve_additive", "duality gap", gap, tol * (1 + abs(value)))
    objective = float(loss.value(sums, z).sum() + x.penalty(v) + y.penalty(w))
    return AdditiveSolution(v, w, C, objective, float(-value), float(gap), iterations)


# ------------------------------------------------------------------------- product coupling

@dataclass(frozen=True)
class LocalMinimum:
    r"""One of the points at which :func:`solve_product` came to rest; with :math:`(v,w)` so is :math:`(-v,-w)`.

    Attributes
    ----------
    weights_x, weights_y : ndarray
        :math:`v` and :math:`w`.
    objective : float
    stationarity : float
        The largest entry of the gradient of the objective; 0 at a stationary point.
    imbalance : float
        :math:`\bigl|\alpha_x\lVert v\rVert_{p_x}^{p_x}-\alpha_y\lVert w\rVert_{p_y}^{p_y}\bigr|`; 0 at a stationary
        point.
    found : int
        How many of the starts ended here.
    """

    weights_x: Float[NDArray, " D_x"]
    weights_y: Float[NDArray, " D_y"]
    objective: float
    stationarity: float
    imbalance: float
    found: int


@dataclass(frozen=True)
class ProductSolution:
    r"""What :func:`solve_product` found; the best of it need not be the best there is.

    Attributes
    ----------
    minima : tuple of LocalMinimum
        The distinct points found, best first; the two signs of a pair count as one.
    starts : int
        From how many points the search began.
    lower_bound : float
        No weights have an objective below it; ``-inf`` where theory gives no bound.
    certificate : str
        Why the best point is a global minimum: ``"trace norm"`` (the convex problem without the bound on the rank has
        the same value), ``"truncated SVD"`` (features with equal eigenvalues, squared loss), or ``""``: no reason
        known.
    """

    minima: tuple[LocalMinimum, ...]
    starts: int
    lower_bound: float
    certificate: str

    @property
    def best(self) -> LocalMinimum:
        """The point with the least objective."""
        return self.minima[0]


def _product_parts(A_x, A_y, z, loss, p_x, p_y, alpha_x, alpha_y):
    """Objective and gradient in the weights."""

    def objective(v, w):
        f, g = A_x @ v, A_y @ w
        C = -loss.gradient(np.outer(f, g), z)
        value = (loss.value(np.outer(f, g), z).sum() + alpha_x / p_x * (np.abs(v) ** p_x).sum()
                 + alpha_y / p_y * (np.abs(w) ** p_y).sum())
        return (value, alpha_x * power(v, p_x - 1) - A_x.T @ (C @ g),
                alpha_y * power(w, p_y - 1) - A_y.T @ (C.T @ f))

    return objective


def solve_product(
    A_x: ArrayLike,
    A_y: ArrayLike,
    z: ArrayLike,
    *,
    loss: str | Loss = "squared",
    p_x: float = 2.0,
    p_y: float = 2.0,
    alpha_x: float = 1.0,
    alpha_y: float = 1.0,
    starts: int = 20,
    seed: int = 0,
    tol: float = 1e-6,
    max_iter: int = 5000,
) -> ProductSolution:
    r"""Search for minima of the binary problem with product coupling, which is not convex.

    .. math::
       \min_{v,w}\ \sum_{ij}\ell(z_{ij},f_i\,g_j)+\frac{\alpha_x}{p_x}\lVert v\rVert_{p_x}^{p_x}
       +\frac{\alpha_y}{p_y}\lVert w\rVert_{p_y}^{p_y},\qquad f=A_xv,\quad g=A_yw .

    A quasi-Newton search from each of several random starts, of norms from 0.1 to 100, and all that it found:
    nothing is called a global minimum unless a theorem says so.  A side with :math:`p<2` is searched in its dual
    coefficients :math:`c`, with :math:`v=\varphi_{p^*-1}(A^{\mathsf T}c/\alpha)`, a form that every minimiser has.

    Parameters
    ----------
    A_x, A_y, z, loss, p_x, p_y, alpha_x, alpha_y
        As for :func:`solve_additive`.
    starts : int
        Number of starts.
    seed : int
        Of their generator.
    tol : float
        Largest entry of the gradient at which a point counts as stationary, relative to 1 + the objective.
    max_iter : int
        Steps from each start at most.

    Returns
    -------
    ProductSolution

    Raises
    ------
    ValueError
        If an argument does not fit.

    Warns
    -----
    ConvergenceWarning
        If the best point is not stationary to ``tol``.

    Notes
    -----
    Chapter *The binary problem*, product coupling.
    """
    A_x, A_y, z, loss = _problem(A_x, A_y, z, loss)
    p, alpha = ((_exponent(p_x, "p_x"), _exponent(p_y, "p_y")),
                (_strength(alpha_x, "alpha_x"), _strength(alpha_y, "alpha_y")))
    if starts < 1:
        raise ValueError(f"starts must be at least 1, not {starts!r}")
    A, objective = (A_x, A_y), _product_parts(A_x, A_y, z, loss, *p, *alpha)
    widths = [len(a) if e < 2 else a.shape[1] for a, e in zip(A, p, strict=True)]

    def decode(theta):
        """Weights of both sides, and for each the map that pulls a gradient back to what is searched."""
        out = []
        for part, a, e, s in zip(np.split(theta, widths[:1]), A, p, alpha, strict=True):
            if e < 2:
                u, r = a.T @ part / s, 1 / (e - 1)
                out.append((power(u, r), lambda d, a=a, s=s, u=u, r=r: a @ (r * np.abs(u) ** (r - 1) * d) / s))
            else:
                out.append((part, lambda d: d))
        return out

    def fun(theta):
        (v, pull_x), (w, pull_y) = decode(theta)
        value, d_v, d_w = objective(v, w)
        return value, np.concatenate([pull_x(d_v), pull_y(d_w)])

    rng = np.random.default_rng(seed)
    nothing = loss.value(np.zeros_like(z), z).sum()

    def penalties(v, w):
        return np.array([s * (np.abs(u) ** e).sum() for u, s, e in zip((v, w), alpha, p, strict=True)])

    ends: list[LocalMinimum] = []
    for number in range(starts):
        theta = rng.normal(size=sum(widths))
        # Weights of norms about 0.1, 1, 10 or 100, not the same on both sides: starts of equal norms may lie on the way
        # down to a saddle.  They are homogeneous in what is searched, of degree 1 or 1 / (p - 1).
        lengths = [10.0 ** (number % 4 - 1) * rng.uniform(0.5, 2) / np.linalg.norm(u) for u, _ in decode(theta)]
        theta *= np.repeat([t ** min(e - 1, 1) for t, e in zip(lengths, p, strict=True)], widths)
        found = minimize(fun, theta, jac=True, method="L-BFGS-B",
                         options={"maxiter": max_iter, "maxfun": 2 * max_iter, "ftol": 0.0, "gtol": 1e-9, "maxcor": 30})
        (v, _), (w, _) = decode(found.x)
        value, d_v, d_w = objective(v, w)
        if nothing <= value + 1e-9 and penalties(v, w).sum() <= 1e-8 * (1 + nothing):
            v, w = 0 * v, 0 * w            # a search that shrinks towards 0 never quite gets there
            value, d_v, d_w = objective(v, w)
        sizes = penalties(v, w)
        ends.append(LocalMinimum(v, w, float(value), float(max(np.abs(d_v).max(), np.abs(d_w).max())),
                                 float(abs(sizes[0] - sizes[1])), 1))
    minima = _distinct(ends, A_x, A_y)
    best = minima[0]
    if best.stationarity > tol * (1 + abs(best.objective)):
        _warn("solve_product", "gradient", best.stationarity, tol * (1 + abs(best.objective)))
    return ProductSolution(minima, starts, *_product_certificate(best, A_x, A_y, z, loss, p, alpha))


def _distinct(ends: list[LocalMinimum], A_x: NDArray, A_y: NDArray) -> tuple[LocalMinimum, ...]:
    """Points with the same objective and the same products of values are one, whatever their signs; best first."""
    kept: list[tuple[NDArray, LocalMinimum]] = []
    for end in sorted(ends, key=lambda e: e.objective):
        values = np.outer(A_x @ end.weights_x, A_y @ end.weights_y)
        for i, (other, one) in enumerate(kept):
            if np.abs(values - other).max() <= 1e-3 * max(np.abs(other).max(), 1e-3):
                kept[i] = other, LocalMinimum(one.weights_x, one.weights_y, one.objective, one.stationarity,
                                              one.imbalance, one.found + 1)
                break
        else:
            kept.append((values, end))
    return tuple(one for _, one in kept)


def _product_certificate(best, A_x, A_y, z, loss, p, alpha) -> tuple[float, str]:
    # With p = 2 on both sides, alpha_x|v|² + alpha_y|w|² >= 2 sqrt(alpha_x alpha_y) |v||w|: a trace norm of rank 1.
    if p != (2.0, 2.0):
        return -np.inf, ""
    strength = float(np.sqrt(alpha[0] * alpha[1]))
    (L_x, Q_x), (L_y, Q_y) = _coordinates(A_x), _coordinates(A_y)
    beyond, share = _beyond(A_x, A_y, L_x, L_y, Q_x, Q_y)
    bound = _dual_bound(L_x, L_y, np.outer(A_x @ best.weights_x, A_y @ best.weights_y), z, loss, strength, beyond)[0]
    if best.objective - bound <= 1e-8 * (1 + abs(best.objective)):
        return bound, "trace norm"
    if loss.name == "squared" and _scale(L_x) and _scale(L_y) and share <= _WHOLE:
        exact = _thresholded_svd(L_x, L_y, z, strength, rank=1)[1]
        return exact, "truncated SVD" if best.objective - exact <= 1e-8 * (1 + abs(exact)) else ""
    return bound, ""


# ------------------------------------------------------------------------- bilinear coupling

@dataclass(frozen=True)
class TraceNormSolution:
    r"""What :func:`solve_trace_norm` found: :math:`T=FG^{\mathsf T}` with balanced factors.

    Attributes
    ----------
    factor_x, factor_y : ndarray
        :math:`F` and :math:`G`, ``(D_x, d)`` and ``(D_y, d)``: the maps that make queries and keys.  They are
        determined up to a rotation; only :math:`T` means anything.
    singular_values : ndarray
        Of :math:`T`, ``(d,)``, positive.
    dual_matrix : ndarray
        :math:`C`, ``(n_x, n_y)``, with :math:`\lVert A_x^{\mathsf T}CA_y\rVert\le\alpha`.
    objective, dual_objective : float
        The second is a lower bound of the problem *without* a bound on the rank.
    duality_gap : float
        Their difference.  Near 0, the solution is a global minimum, of the bounded problem as well.
    certificate : str
        ``"duality gap"``, ``"truncated SVD"`` (features with equal eigenvalues, squared loss), or ``""``: a stationary
        point of a problem that is not convex, and perhaps no global minimum.
    iterations : int
    """

    factor_x: Float[NDArray, "D_x d"]
    factor_y: Float[NDArray, "D_y d"]
    singular_values: Float[NDArray, " d"]
    dual_matrix: Float[NDArray, "n_x n_y"]
    objective: float
    dual_objective: float
    duality_gap: float
    certificate: str
    iterations: int

    @property
    def rank(self) -> int:
        """Number of singular values of the form that are not 0: the head dimension in use."""
        return len(self.singular_values)

    @property
    def form(self) -> Float[NDArray, "D_x D_y"]:
        """The matrix :math:`T`."""
        return self.factor_x @ self.factor_y.T


def _coordinates(A: NDArray) -> tuple[NDArray, NDArray]:
    """Coordinates L of the rows of A in an orthonormal basis Q of their span, A = L Q', with L'L diagonal."""
    if A.shape[1] <= len(A):
        gram = A.T @ A
        values, vectors = np.linalg.eigh(gram)
        Q = vectors[:, values > _RANK * values[-1]]
        return A @ Q, Q
    values, vectors = np.linalg.eigh(A @ A.T)
    keep = values > _RANK * values[-1]
    L = vectors[:, keep] * np.sqrt(values[keep])
    return L, A.T @ (vectors[:, keep] / np.sqrt(values[keep]))


def _scale(L: NDArray) -> float:
    """The number c with L'L = c I, or 0 if there is none."""
    if not L.shape[1]:
        return 0.0
    gram = L.T @ L
    c = np.trace(gram) / len(gram)
    return float(c) if np.abs(gram - c * np.eye(len(gram))).max() <= 1e-10 * c else 0.0


def _thresholded_svd(L_x, L_y, z, alpha, rank):
    """The exact minimiser where L'L is a multiple of the identity on both sides, squared loss, and its objective."""
    c = _scale(L_x) * _scale(L_y)
    U, s, Vt = np.linalg.svd(L_x.T @ z @ L_y / c, full_matrices=False)
    s = np.maximum(s - alpha / c, 0.0)
    s[rank:] = 0.0
    M = (U * s) @ Vt
    return M, 0.5 * ((z - L_x @ M @ L_y.T) ** 2).sum() + alpha * s.sum()


def _beyond(A_x, A_y, L_x, L_y, Q_x, Q_y):
    """A bound of what the features left out of the coordinates add to the spectral norm of A_x'CA_y, and their share.

    The share is of the norm of the features.  Directions with singular values below 1e-6 of the largest are left out,
    but a dual point has to be feasible there, too, or it bounds nothing.
    """
    R_x, R_y = A_x - L_x @ Q_x.T, A_y - L_y @ Q_y.T
    inner_x, inner_y = R_x @ R_x.T, R_y @ R_y.T

    def bound(C):                   # Frobenius norms of R_x'CA_y and of L_x'CR_y, by matrices of the number of points
        CA, LC = C @ A_y, L_x.T @ C
        return sum(np.sqrt(max(np.vdot(inner, outer), 0.0)) for inner, outer in
                   ((inner_x, CA @ CA.T), (inner_y, LC.T @ LC)))

    return bound, max(np.linalg.norm(R) / max(np.linalg.norm(A), 1e-300) for R, A in ((R_x, A_x), (R_y, A_y)))


def _dual_bound(L_x, L_y, logits, z, loss, alpha, beyond=None):
    """The dual value of the best multiple of the loss derivatives that is feasible, and this multiple."""
    C = -loss.gradient(logits, z)
    norm = np.linalg.norm(L_x.T @ C @ L_y, 2) + (beyond(C) if beyond else 0.0)
    most = 1.0 if norm <= alpha else alpha / norm
    if loss.name == "squared":          # the value is a parabola in the multiple, which may also exceed 1
        most = min(alpha / norm if norm > 0 else 1.0, max((C * z).sum() / max((C * C).sum(), 1e-300), 0.0))
    return float(-loss.conjugate(-most * C, z).sum()), most * C


def solve_trace_norm(
    A_x: ArrayLike,
    A_y: ArrayLike,
    z: ArrayLike,
    *,
    loss: str | Loss = "squared",
    alpha: float = 1.0,
    rank: int | None = None,
    tol: float = 1e-6,
    max_iter: int = 5000,
) -> TraceNormSolution:
    r"""Learn a bilinear form of queries and keys, penalised by its trace norm.

    .. math::
       \min_T\ \sum_{ij}\ell(z_{ij},a_i^{\mathsf T}Tb_j)+\alpha\lVert T\rVert_*
       =\min_{F,G}\ \sum_{ij}\ell(z_{ij},a_i^{\mathsf T}FG^{\mathsf T}b_j)
       +\frac\alpha2\bigl(\lVert F\rVert^2+\lVert G\rVert^2\bigr),

    where :math:`a_i`, :math:`b_j` are the rows of ``A_x`` and ``A_y``, and :math:`F`, :math:`G` have ``rank``
    columns, at most; with ``rank=None`` as many as it takes, and the problem is convex.  With a bound it is searched in
    the factors, by a quasi-Newton method that starts along the leading singular vectors of the gradient at 0.  Without
    a bound, the squared loss is solved by splitting (ADMM): the loss is a diagonal problem in the right coordinates,
    and the trace norm thresholds singular values.  Other losses are searched in the factors, to which columns are added
    where the dual constraint :math:`\lVert A_x^{\mathsf T}CA_y\rVert\le\alpha` fails, until the duality gap closes.

    Parameters
    ----------
    A_x, A_y, z, loss
        As for :func:`solve_additive`.
    alpha : float
        Strength of the penalty, positive.
    rank : int, optional
        The head dimension :math:`d`.
    tol : float
        The duality gap to reach without a bound on the rank, relative to the objective at :math:`T=0`.
    max_iter : int
        Quasi-Newton steps in each round at most.

    Returns
    -------
    TraceNormSolution

    Raises
    ------
    ValueError
        If an argument does not fit.

    Warns
    -----
    ConvergenceWarning
        If there is no bound on the rank and the gap was not reached.

    Notes
    -----
    Chapter *The binary problem*, trace norm; J. Abernethy et al., JMLR 10, 2009.
    """
    A_x, A_y, z, loss = _problem(A_x, A_y, z, loss)
    alpha = _strength(alpha, "alpha")
    if rank is not None and (not isinstance(rank, (int, np.integer)) or rank < 1):
        raise ValueError(f"rank must be a positive integer, or None for no bound, not {rank!r}")
    (L_x, Q_x), (L_y, Q_y) = _coordinates(A_x), _coordinates(A_y)
    most = min(L_x.shape[1], L_y.shape[1])
    most = most if rank is None else min(most, rank)
    scale = loss.value(np.zeros_like(z), z).sum()

    beyond, share = _beyond(A_x, A_y, L_x, L_y, Q_x, Q_y)
    certificate, iterations = "", 0
    if loss.name == "squared" and _scale(L_x) and _scale(L_y) and share <= _WHOLE:
        M, certificate = _thresholded_svd(L_x, L_y, z, alpha, most)[0], "truncated SVD"
        U, s, Vt = np.linalg.svd(M, full_matrices=False)
    elif loss.name == "squared" and rank is None and most:
        U, s, Vt, iterations = _split(L_x, L_y, z, loss, alpha, tol, max_iter)
    else:
        U, s, Vt, iterations = _factored(L_x, L_y, z, loss, alpha, most, rank is not None, tol, max_iter)
    keep = s > 1e-9 * max(s.max(initial=0.0), 1e-300)
    U, s, V = U[:, keep], s[keep], Vt[keep].T
    logits = (L_x @ U * s) @ (L_y @ V).T
    objective = float(loss.value(logits, z).sum() + alpha * s.sum())
    bound, C = _dual_bound(L_x, L_y, logits, z, loss, alpha, beyond)
    gap = max(objective - bound, 0.0)
    if gap <= tol * scale:
        certificate = "duality gap"
    elif rank is None:
        _warn("solve_trace_norm", "duality gap", gap, tol * scale)
    root = np.sqrt(s)
    return TraceNormSolution(Q_x @ (U * root), Q_y @ (V * root), s, C, objective, bound, gap, certificate, iterations)


def _split(L_x, L_y, z, loss, alpha, tol, max_iter):
    """Alternating directions, over-relaxed, for the squared loss: M fits the responses, N has the small trace norm."""
    weight = np.outer((L_x**2).sum(0), (L_y**2).sum(0))          # L'L is diagonal: see _coordinates
    right, scale = L_x.T @ z @ L_y, 0.5 * (z**2).sum()
    rho = np.sqrt(weight.max() * weight.min())
    N, Y = np.zeros_like(weight), np.zeros_like(weight)
    U, s, Vt = np.linalg.svd(N, full_matrices=False)
    for iterations in range(1, max_iter + 1):
        M = (right + rho * (N - Y)) / (weight + rho)
        last, relaxed = N, 1.6 * M - 0.6 * N
        U, s, Vt = np.linalg.svd(relaxed + Y, full_matrices=False)
        s = np.maximum(s - alpha / rho, 0.0)
        N = (U * s) @ Vt
        Y = Y + relaxed - N
        if iterations % 10 == 0:
            logits = L_x @ N @ L_y.T
            objective = 0.5 * ((z - logits) ** 2).sum() + alpha * s.sum()
            if objective - _dual_bound(L_x, L_y, logits, z, loss, alpha)[0] <= tol * scale:
                break
            # Both residuals, each relative to its own scale, should fall alike.
            primal = np.linalg.norm(M - N) / max(np.linalg.norm(M), np.linalg.norm(N))
            dual = np.linalg.norm(N - last) / max(np.linalg.norm(Y), 1e-300)
            factor = float(np.clip(np.sqrt(primal / max(dual, 1e-300)), 0.2, 5.0))
            if not 0.5 < factor < 2:
                rho, Y = rho * factor, Y / factor
    return U, s, Vt, iterations


def _factored(L_x, L_y, z, loss, alpha, most, bounded, tol, max_iter):
    """Quasi-Newton in factors whose number of columns grows as long as the dual constraint asks for it."""
    r_x, r_y, scale = L_x.shape[1], L_y.shape[1], loss.value(np.zeros_like(z), z).sum()
    F, G, total = np.zeros((r_x, 0)), np.zeros((r_y, 0)), 0
    logits, precision = np.zeros_like(z), 1e-1 * tol
    for attempt in range(8):
        U, s, Vt = np.linalg.svd(L_x.T @ -loss.gradient(logits, z) @ L_y, full_matrices=False)
        objective = loss.value(logits, z).sum() + alpha / 2 * ((F**2).sum() + (G**2).sum())
        if objective - _dual_bound(L_x, L_y, logits, z, loss, alpha)[0] <= tol * scale:
            break
        # A new pair of columns along singular vectors beyond the constraint: a little way along it is downhill.
        new = min(int((s > alpha * (1 + 1e-9)).sum()), most - F.shape[1])
        if attempt and bounded:
            break
        precision = precision * 1e-3 if attempt < 3 else 0.0
        step = np.sqrt(np.maximum(s[:new] - alpha, 0)) / (np.linalg.norm(L_x, 2) * np.linalg.norm(L_y, 2))
        F, G = np.hstack([F, U[:, :new] * step]), np.hstack([G, Vt[:new].T * step])
        d = F.shape[1]

        def fun(theta, d=d):
            F, G = theta[:r_x * d].reshape(r_x, d), theta[r_x * d:].reshape(r_y, d)
            X, Y = L_x @ F, L_y @ G
            logits = X @ Y.T
            slope = loss.gradient(logits, z)
            value = loss.value(logits, z).sum() + alpha / 2 * (theta @ theta)
            return value, np.concatenate([(L_x.T @ (slope @ Y) + alpha * F).ravel(),
                                          (L_y.T @ (slope.T @ X) + alpha * G).ravel()])

        found = minimize(fun, np.concatenate([F.ravel(), G.ravel()]), jac=True, method="L-BFGS-B",
                         options={"maxiter": max_iter, "maxfun": 2 * max_iter, "ftol": precision,
                                  "gtol": 1e-12, "maxcor": 20})
        # Balanced factors from the singular values of F G'; columns that died make room for new ones.
        (P, R), (S, W) = (np.linalg.qr(part) for part in
                          (found.x[:r_x * d].reshape(r_x, d), found.x[r_x * d:].reshape(r_y, d)))
        U, s, Vt = np.linalg.svd(R @ W.T)
        keep = s > 1e-10 * s[0]
        F, G = P @ U[:, keep] * np.sqrt(s[keep]), S @ Vt[keep].T * np.sqrt(s[keep])
        logits, total = (L_x @ F) @ (L_y @ G).T, total + found.nit
    s = (F**2).sum(0)
    return F / np.sqrt(s), s, (G / np.sqrt(s)).T, total


# ------------------------------------------------------------------------- an estimator

class PairRegressor(BaseEstimator):
    r"""Responses of pairs of a query and a key, learned with additive or with bilinear coupling.

    An estimator in the manner of scikit-learn, with two sets of points in the place of one: ``fit(X, Y, z)`` takes
    the queries, the keys and the matrix of their responses, ``predict(X, Y)`` gives the matrix for others.

    Parameters
    ----------
    coupling : {"bilinear", "additive"}
        :func:`solve_trace_norm` or :func:`solve_additive`.
    features_x, features_y : "precomputed", FeatureMap or Kernel
        How queries and keys become features, each side in its own way: their rows are features; they are mapped; or
        the features are those of a positive definite kernel, known by its values only (for :math:`p=2`).
    loss : str or Loss
        ``"squared"`` or ``"logistic"``; with the second, responses are -1 and +1 and predictions are logits.
    alpha : float
        Strength of the penalty, of both penalties in the additive case.
    rank : int, optional
        Bound on the rank, for bilinear coupling.
    p_x, p_y : float
        Exponents, for additive coupling.

    Attributes
    ----------
    solution_ : AdditiveSolution or TraceNormSolution
    objective_, duality_gap_ : float

    Raises
    ------
    ValueError
        When fitted, if an argument does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> X, Y = np.eye(2), np.eye(3)
    >>> model = PairRegressor(alpha=1.0).fit(X, Y, [[5.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    >>> model.predict(X, Y).round(6) + 0.0
    array([[4., 0., 0.],
           [0., 2., 0.]])
    """

    def __init__(self, coupling="bilinear", *, features_x="precomputed", features_y="precomputed", loss="squared",
                 alpha=1.0, rank=None, p_x=2.0, p_y=2.0):
        self.coupling = coupling
        self.features_x = features_x
        self.features_y = features_y
        self.loss = loss
        self.alpha = alpha
        self.rank = rank
        self.p_x = p_x
        self.p_y = p_y

    def fit(self, X: ArrayLike, Y: ArrayLike, z: ArrayLike) -> PairRegressor:
        """Learn from all pairs of the rows of ``X`` and of ``Y``."""
        if self.coupling not in ("bilinear", "additive"):
            raise ValueError(f"coupling must be 'bilinear' or 'additive', not {self.coupling!r}")
        additive = self.coupling == "additive"
        if additive and self.rank is not None:
            raise ValueError("rank bounds a bilinear form; an additive model has none: leave rank=None")
        if not additive and (self.p_x, self.p_y) != (2, 2):
            raise ValueError("bilinear coupling is for p_x = p_y = 2; other exponents need coupling='additive'")
        for features, p, name in ((self.features_x, self.p_x, "x"), (self.features_y, self.p_y, "y")):
            if isinstance(features, Kernel) and p != 2:
                raise ValueError(f"the norm with p_{name} = {p} is not determined by a kernel's values; hand over the "
                                 "features, as a FeatureMap or precomputed")
        self._map_x, A_x = _features(self.features_x, X, "features_x")
        self._map_y, A_y = _features(self.features_y, Y, "features_y")
        if additive:
            self.solution_ = solve_additive(A_x, A_y, z, loss=self.loss, p_x=self.p_x, p_y=self.p_y,
                                            alpha_x=self.alpha, alpha_y=self.alpha)
        else:
            self.solution_ = solve_trace_norm(A_x, A_y, z, loss=self.loss, alpha=self.alpha, rank=self.rank)
        self.objective_, self.duality_gap_ = self.solution_.objective, self.solution_.duality_gap
        return self

    def predict(self, X: ArrayLike, Y: ArrayLike) -> Float[NDArray, "n_x n_y"]:
        """Responses, or logits, of all pairs of the rows of ``X`` and of ``Y``."""
        check_is_fitted(self, "solution_")
        A_x, A_y = self._map_x(X), self._map_y(Y)
        if self.coupling == "additive":
            return (A_x @ self.solution_.weights_x)[:, None] + A_y @ self.solution_.weights_y
        return (A_x @ self.solution_.factor_x) @ (A_y @ self.solution_.factor_y).T


def _features(features, points, name):
    """The map from points to features, and the features of the points it is fitted to."""
    if isinstance(features, str) and features == "precomputed":
        return lambda x: _matrix(x, "features"), _matrix(points, "features")
    if not isinstance(features, (FeatureMap, Kernel)):
        raise ValueError(f"{name} must be 'precomputed', a FeatureMap or a Kernel, not {features!r}")

    def tensor(x):
        return torch.as_tensor(_matrix(x, "points"))

    if isinstance(features, FeatureMap):
        return lambda x: features(tensor(x)).numpy(), features(tensor(points)).numpy()
    if not features.positive_definite:
        raise ValueError(f"{name}={features!r} is not known to be positive definite, and only such a kernel has "
                         "features in a Hilbert space")
    known = tensor(points)
    values, vectors = np.linalg.eigh(features(known, known).numpy())
    keep = values > _RANK * values[-1]
    whiten = vectors[:, keep] / np.sqrt(values[keep])
    return lambda x: features(tensor(x), known).numpy() @ whiten, vectors[:, keep] * np.sqrt(values[keep])
