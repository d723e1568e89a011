r"""Regularised learning with an :math:`\ell^p` norm on the coefficients, solved with a certificate.

The problem and its dual, for :math:`1<p<\infty`, :math:`p^*=p/(p-1)`, :math:`\alpha>0` and a convex loss:

.. math::

    \min_v\ \sum_i\ell\bigl((Av)_i,y_i\bigr)+\frac\alpha p\|v\|_p^p
    \ =\ \max_c\ -\sum_i\ell^*(-c_i,y_i)-\frac\alpha{p^*}\Bigl\|\frac{A^{\mathsf T}c}\alpha\Bigr\|_{p^*}^{p^*}.

Row ``i`` of ``A`` holds the features of the point ``x_i``, so that ``A v`` are the values of the function with
coefficients ``v``.  Any ``v`` together with any ``c`` at which the right side is finite bounds the error of both: the
difference of the two sides, the *duality gap*, is what :func:`solve` drives to zero and returns.  See the book's
chapter on the representer theorem, which proves all of this.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from sklearn.exceptions import ConvergenceWarning

from ..spaces.geometry import conjugate
from . import losses
from .losses import Loss

__all__ = ["Solution", "solve", "certify"]

SMALLEST = 1e-290          # objectives below lose their digits, and their gaps too


@dataclass(frozen=True)
class Solution:
    r"""An answer, and how good it is.

    Attributes
    ----------
    weights : array
        Coefficients ``v`` of the function, shape ``(D,)``.
    dual_coef : array
        A feasible point ``c`` of the dual problem, shape ``(n,)``.  At the optimum :math:`-c_i` is a slope of the
        loss at the prediction, and :math:`v=\varphi_{p^*-1}(A^{\mathsf T}c/\alpha)`.
    objective, dual_objective : float
        Of the two problems, at ``v`` and at ``c``.
    duality_gap : float
        The difference of the two, computed as a sum of terms that are not negative, so that it keeps its meaning
        below the rounding error of the objectives; what rounding errors of the predictions can hide of it is added.
        No coefficients have an objective smaller by more than this.
    iterations : int
        Linear systems solved.
    """

    weights: Float[NDArray, " D"]
    dual_coef: Float[NDArray, " n"]
    objective: float
    dual_objective: float
    duality_gap: float
    iterations: int


def power(v: Float[NDArray, "*shape"], s: float) -> Float[NDArray, "*shape"]:
    r"""The signed power :math:`\varphi_s(v)=\operatorname{sign}(v)\,|v|^s`, entry by entry."""
    return np.sign(v) * np.abs(v) ** s


@dataclass(frozen=True)
class Problem:
    """The data of :func:`solve`, checked, and the functions that both sides of it are made of."""

    A: Float[NDArray, "n D"]
    y: Float[NDArray, " n"]
    loss: Loss
    p: float
    alpha: float

    @property
    def dual_p(self) -> float:
        return conjugate(self.p)

    def scaled(self, c: NDArray) -> NDArray:
        """The functional of ``c`` over alpha: the signed power p - 1 of the optimal coefficients."""
        return self.A.T @ c / self.alpha

    def weights(self, c: NDArray) -> NDArray:
        """The coefficients that belong to ``c``."""
        return power(self.scaled(c), self.dual_p - 1)

    def box(self) -> tuple[NDArray, NDArray]:
        """The ends of the interval that each dual coefficient has to lie in."""
        lo, hi = self.loss.domain(self.y)
        return -hi, -lo

    def primal(self, v: NDArray) -> float:
        return float(self.loss.value(self.A @ v, self.y).sum() + self.alpha / self.p * (np.abs(v) ** self.p).sum())

    def negative_dual(self, c: NDArray) -> float:
        penalty = self.alpha / self.dual_p * (np.abs(self.scaled(c)) ** self.dual_p).sum()
        return float(self.loss.conjugate(-c, self.y).sum() + penalty)

    def mismatch(self, v: NDArray, c: NDArray) -> float:
        """The part of the gap that the penalty contributes: 0 if and only if v are the coefficients of c."""
        t, p, r = self.scaled(c), self.p, self.dual_p
        norms = np.maximum(np.abs(v) ** p / p + np.abs(t) ** r / r - v * t, 0.0)
        # Where v is the power of t up to rounding the term is of the order of eps², which the subtraction cannot show
        norms[np.abs(v - power(t, r - 1)) <= 4 * np.finfo(float).eps * np.abs(v)] = 0.0
        return self.alpha * float(norms.sum())

    def rounding(self, v: NDArray, c: NDArray) -> float:
        """What rounding errors of predictions and of scaled(c), of their usual size, can hide of the gap.

        Both brackets are convex in these, so their slopes at the ends of the interval of error bound the change.
        """
        (n, D), eps, r = self.A.shape, np.finfo(float).eps, self.dual_p
        size = np.abs(self.A)
        f, f_error = self.A @ v, eps * (1 + math.sqrt(D)) * (size @ np.abs(v))
        t, t_error = self.scaled(c), eps * (1 + math.sqrt(n)) * (size.T @ np.abs(c)) / self.alpha
        slope = np.maximum(np.abs(self.loss.gradient(f + f_error, self.y) + c),
                           np.abs(self.loss.gradient(f - f_error, self.y) + c))
        bend = np.maximum(np.abs(power(t + t_error, r - 1) - v), np.abs(power(t - t_error, r - 1) - v))
        return float(f_error @ slope) + self.alpha * float(t_error @ bend)

    def certify(self, v: NDArray, c: NDArray) -> float:
        gap = float(self.loss.defect(self.A @ v, -c, self.y).sum()) + self.mismatch(v, c) + self.rounding(v, c)
        return math.inf if math.isnan(gap) else gap


def check(A: ArrayLike, y: ArrayLike, loss: str | Loss, p: float, alpha: float) -> Problem:
    """The problem in double precision, or an error that says what is wrong with it."""
    loss = losses.get(loss)
    for name, values in (("features A", A), ("targets y", y)):
        if sparse.issparse(values) or np.iscomplexobj(values):
            raise TypeError(f"the {name} have to be a dense array of real numbers, and are "
                            f"{'sparse: use .toarray()' if sparse.issparse(values) else 'complex'}")
    A, y = np.asarray(A, dtype=float), np.asarray(y, dtype=float)
    if A.ndim != 2 or y.ndim != 1 or len(A) != len(y) or not len(y):
        raise ValueError("expected features A of shape (n, D) and targets y of shape (n,) with n >= 1, one row of A "
                         f"a target, and got the shapes {A.shape} and {y.shape}")
    for name, values in (("features A", A), ("targets y", y)):
        if not np.isfinite(values).all():
            raise ValueError(f"the {name} contain NaN or infinite numbers; remove or impute those entries")
    conjugate(p)                           # raises where the exponent is not between 1 and infinity
    if not (isinstance(alpha, numbers.Real) and 0 < alpha < math.inf):
        raise ValueError(f"the regularisation alpha has to be a finite number > 0, not {alpha!r}; for a function that "
                         "interpolates the data take a small one, such as 1e-6")
    if loss.targets_are_signs and not np.isin(y, (-1.0, 1.0)).all():
        raise ValueError(f"the {loss.name} loss needs targets -1 and +1; BanachClassifier accepts labels of any kind")
    return Problem(A, y, loss, float(p), float(alpha))


def certify(A: ArrayLike, y: ArrayLike, weights: ArrayLike, dual_coef: ArrayLike, *, loss: str | Loss = "squared",
            p: float, alpha: float) -> float:
    r"""The duality gap of any coefficients and any dual point: an upper bound of the error of the objective.

    .. math::

        \sum_i\bigl[\ell(f_i,y_i)+\ell^*(-c_i,y_i)+c_if_i\bigr]
        +\alpha\sum_\nu\Bigl[\frac{|v_\nu|^p}p+\frac{|t_\nu|^{p^*}}{p^*}-v_\nu t_\nu\Bigr],
        \qquad f=Av,\quad t=\frac{A^{\mathsf T}c}\alpha,

    which is primal minus dual objective, since the mixed terms cancel.  Every bracket is at least 0.  To the sum is
    added what rounding errors of ``f`` and ``t`` can hide: second order where losses are smooth, and for losses with
    kinks of the size of a rounding error of the predictions.

    Parameters
    ----------
    A, y, loss, p, alpha
        The problem, as in :func:`solve`.
    weights, dual_coef : array_like
        Of shapes ``(D,)`` and ``(n,)``; from this solver or from any other.

    Returns
    -------
    float
        The gap; infinite if ``dual_coef`` is not feasible.

    Raises
    ------
    ValueError
        If the problem is ill-posed or the shapes do not fit.
    """
    problem = check(A, y, loss, p, alpha)
    v, c = np.asarray(weights, dtype=float), np.asarray(dual_coef, dtype=float)
    if v.shape != problem.A.shape[1:] or c.shape != problem.y.shape:
        raise ValueError(f"expected weights of shape {problem.A.shape[1:]} and dual_coef of shape {problem.y.shape}, "
                         f"and got {v.shape} and {c.shape}")
    return problem.certify(v, c)


def solve(A: ArrayLike, y: ArrayLike, *, loss: str | Loss = "squared", p: float, alpha: float, tol: float = 1e-10,
          max_iter: int = 1000) -> Solution:
    r"""Minimise :math:`\sum_i\ell((Av)_i,y_i)+\frac\alpha p\|v\|_p^p` and return the duality gap.

    Newton's method is used on the side whose exponent is at least 2, because that side is twice differentiable: on
    the dual for :math:`p\le2`, on the primal for :math:`p>2`.  Either way one step solves an ``n`` by ``n`` system.
    A loss with kinks bounds the dual coefficients: the first method then projects onto these bounds, and the second
    solves a sequence of problems with a smoothed loss.

    Parameters
    ----------
    A : array_like
        Features, shape ``(n, D)``; a tensor on the CPU will do.
    y : array_like
        Targets, shape ``(n,)``.
    loss : str or Loss
        ``"squared"``, ``"absolute"``, ``"logistic"`` or ``"hinge"``.
    p : float
        Exponent of the norm, :math:`1<p<\infty`.
    alpha : float
        Weight of the penalty, positive.
    tol : float
        Largest duality gap, relative to the objective, that counts as solved.
    max_iter : int
        Most linear systems to solve.

    Returns
    -------
    Solution

    Raises
    ------
    ValueError
        If shapes do not fit, numbers are not finite, labels are not -1 and +1 where the loss needs them, or ``p``,
        ``alpha`` are out of range.

    Warns
    -----
    ConvergenceWarning
        If the gap is larger than asked for when the method ends; the message names the gap that was reached.
    """
    problem = check(A, y, loss, p, alpha)
    if problem.p <= 2:
        method = _dual_newton if problem.loss.smooth else _interior
    else:
        method = _primal_newton if problem.loss.smooth else _smoothed_newton
    with np.errstate(all="ignore"):        # a step that is too long may overflow; it is then shortened
        v, c, iterations = method(problem, tol, max_iter)
        objective, gap, dual = problem.primal(v), problem.certify(v, c), -problem.negative_dual(c)
    relative = gap / objective if 0 < objective < math.inf else math.inf
    if not gap <= tol * objective < math.inf:
        warnings.warn(f"the duality gap is {gap:.3g}, which is {relative:.3g} of the objective, and {tol:.3g} "
                      f"was asked for, after {iterations} of at most {max_iter} linear systems; the answer is that "
                      "far from optimal at most. Scale the features, or increase alpha, max_iter or tol.",
                      ConvergenceWarning, stacklevel=2)
    elif objective < SMALLEST and problem.y.any():
        warnings.warn(f"the objective {objective:.3g} is too small for double precision, and so the duality gap says "
                      "nothing; scale the targets to order 1.", ConvergenceWarning, stacklevel=2)
    return Solution(v, c, objective, dual, gap, iterations)


class _Best:
    """The best pair so far, and whether it is worth while to go on."""

    def __init__(self, problem: Problem, tol: float, patience: int = 150, polish: bool = True):
        self.problem, self.tol, self.patience, self.polish = problem, tol, patience, polish
        self.gap, self.pair, self.idle = math.inf, None, 0

    def offer(self, v: NDArray, c: NDArray) -> bool:
        """Take a pair; True if the search may end: close enough and no longer falling fast, or not falling at all."""
        gap, last = self.problem.certify(v, c), self.gap
        self.idle = 0 if gap < 0.9 * last else self.idle + 1
        if self.pair is None or gap < last:
            self.gap, self.pair = gap, (v, c)
        close = self.gap <= self.tol * self.problem.primal(self.pair[0])
        return self.gap == 0 or self.idle > self.patience or (close and (gap > 0.1 * last or not self.polish))


def _solve_spd(H: NDArray, rhs: NDArray) -> NDArray:
    """The solution of a system whose matrix is positive semidefinite up to rounding; NaN if something overflowed."""
    scale = 1 / np.sqrt(np.maximum(np.diag(H), np.finfo(float).tiny))      # entries may differ by many orders
    H = H * scale * scale[:, None]
    if not (np.isfinite(H).all() and np.isfinite(scale * rhs).all()):
        return np.full(len(rhs), np.nan)               # no step of that length is accepted, and the search ends
    ridge = 1e-15
    while True:
        try:
            return scale * cho_solve(cho_factor(H + ridge * np.eye(len(H)), lower=True), scale * rhs)
        except LinAlgError:
            ridge *= 100


def _descend(value: Callable[[float], float], slope: float) -> float:
    """A step length of sufficient decrease along a curve with that slope at 0; 0 if there is none."""
    start, step = value(0.0), 1.0
    rounding = 8 * np.finfo(float).eps * abs(start)     # near the optimum a decrease is smaller than this
    while step > 1e-25:        # a direction along which the penalty is nearly flat may be that long
        if value(step) <= start + 1e-4 * step * slope + rounding:
            return step
        step *= 0.5 if step > 1e-3 else 0.1
    return 0.0


def _start(problem: Problem) -> NDArray:
    """A feasible dual point: the targets, scaled as the penalty would have it, and put inside of the bounds."""
    lo, hi = problem.box()
    c = np.where(np.isfinite(lo), 0.5 * np.clip(problem.y, lo, hi), problem.y)
    t, r = np.abs(problem.scaled(c)), problem.dual_p
    if t.any():        # the best multiple of c, were the conjugate of the loss its linear part
        largest = t.max()
        ratio = max(c @ problem.y, 1e-12) / (problem.alpha * largest * ((t / largest) ** r).sum())
        c = c * min(1.0, ratio ** (1 / (r - 1)) / largest)
    return c


def _dual_newton(problem: Problem, tol: float, max_iter: int, start: NDArray | None = None):
    """Newton on the dual, for p <= 2; where a kink of the loss bounds c, projected onto the bounds."""
    A, y, loss, alpha, r = problem.A, problem.y, problem.loss, problem.alpha, problem.dual_p
    lo, hi = problem.box()
    c, best, iterations = _start(problem) if start is None else start, _Best(problem, tol), 0
    while True:
        t = problem.scaled(c)
        v = power(t, r - 1)
        if best.offer(v, c) or iterations >= max_iter:
            break
        iterations += 1
        gradient = A @ v - loss.conjugate_gradient(-c, y)
        held = np.zeros(len(c), dtype=bool)
        if not loss.smooth:        # at a bound, and pushed against it
            near = min(1e-6, np.abs(c - np.clip(c - gradient, lo, hi)).max())
            held = ((c <= lo + near) & (gradient > 0)) | ((c >= hi - near) & (gradient < 0))
        free = np.flatnonzero(~held)
        direction = -np.sign(gradient) * (hi - lo) if held.any() else np.zeros(len(c))
        if len(free):
            B = A[free] * (np.sqrt((r - 1) / alpha) * np.abs(t) ** (r / 2 - 1))
            H = B @ B.T + np.diag(loss.conjugate_hessian(-c, y)[free])
            direction[free] = -_solve_spd(H, gradient[free])
        if loss.smooth:            # the conjugate bends at the ends of the interval: stay inside
            direction = direction * _reach(c, direction, lo, hi, 0.99)

        def move(step, c=c, direction=direction):
            return np.clip(c + step * direction, lo, hi)

        step = _descend(lambda s, move=move: problem.negative_dual(move(s)), float(gradient[free] @ direction[free]))
        if step == 0:
            break
        c = move(step)
    return *best.pair, iterations


def _reach(c: NDArray, direction: NDArray, lo: NDArray, hi: NDArray, fraction: float) -> float:
    """The longest step, at most 1, that leaves this fraction of the way to the nearest bound."""
    with np.errstate(divide="ignore", invalid="ignore"):
        room = np.where(direction > 0, (hi - c) / direction, (lo - c) / direction)
    return min(1.0, fraction * np.min(room, initial=np.inf, where=direction != 0))


def _interior(problem: Problem, tol: float, max_iter: int):
    """A primal-dual interior point method on the bounded dual, for p <= 2 and a loss with kinks.

    The barrier's weight mu falls as fast as the steps succeed.  ``below`` and ``above`` are the multipliers of the
    bounds.  It ends where bounds are as near as rounding; projected Newton steps then take it to full precision.
    """
    A, y, loss, alpha, r = problem.A, problem.y, problem.loss, problem.alpha, problem.dual_p
    lo, hi = problem.box()
    width = hi - lo
    c, best, iterations = np.clip(_start(problem), lo + 0.05 * width, hi - 0.05 * width), _Best(problem, tol), 0
    mu = 0.1 * problem.primal(problem.weights(c)) / len(c)
    below, above = mu / (c - lo), mu / (hi - c)

    def value(c):
        return problem.negative_dual(c) - mu * (np.log(c - lo).sum() + np.log(hi - c).sum())

    while not best.offer(problem.weights(c), c) and iterations < max_iter:
        if best.gap <= 1e-8 * problem.primal(best.pair[0]):
            break
        t = problem.scaled(c)
        gradient = A @ power(t, r - 1) - loss.conjugate_gradient(-c, y)
        while mu > 1e-300:         # the next mu, once this one's problem is solved well enough
            error = max(np.abs(gradient - below + above).max(), np.abs(below * (c - lo) - mu).max(),
                        np.abs(above * (hi - c) - mu).max())
            if error > 10 * mu:
                break
            mu *= min(0.2, mu**0.5)
        B = A * (np.sqrt((r - 1) / alpha) * np.abs(t) ** (r / 2 - 1))
        gradient = gradient - mu / (c - lo) + mu / (hi - c)
        direction = -_solve_spd(B @ B.T + np.diag(below / (c - lo) + above / (hi - c)), gradient)
        direction *= _reach(c, direction, lo, hi, max(0.99, 1 - mu))
        iterations += 1
        step = _descend(lambda s, c=c, d=direction: value(c + s * d), float(gradient @ direction))
        if step == 0:
            break
        new = c + step * direction
        below = _multiplier(below, c - lo, direction, mu, new - lo)
        above = _multiplier(above, hi - c, -direction, mu, hi - new)
        c = new
    c = best.pair[1]
    gradient = A @ problem.weights(c) - loss.conjugate_gradient(-c, y)
    c = np.where(gradient > c - lo, lo, np.where(-gradient > hi - c, hi, c))     # on a bound: multiplier over slack
    v, c, more = _dual_newton(problem, tol, max(max_iter - iterations, 1), c)
    best.offer(v, c)
    return *best.pair, iterations + more


def _multiplier(z: NDArray, slack: NDArray, change: NDArray, mu: float, new_slack: NDArray) -> NDArray:
    """The multiplier of a bound after a step of the slack, kept positive and near to mu over the new slack."""
    step = (mu - z * change) / slack - z
    room = np.where(step < 0, -z / np.where(step < 0, step, -1.0), np.inf)
    z = z + min(1.0, 0.99 * room.min()) * step
    return np.clip(z, 1e-10 * mu / new_slack, 1e10 * mu / new_slack)


def _primal_newton(problem: Problem, tol: float, max_iter: int, loss: Loss | None = None,
                   start: NDArray | None = None, settled: float | None = None):
    """Newton on the primal, for p > 2 and a smooth loss, through an n by n system (Woodbury).

    With ``settled`` it minimises for another loss than the problem's own, until the part of the gap that does not
    depend on the loss is that small.
    """
    A, y, alpha, p, r = problem.A, problem.y, problem.alpha, problem.p, problem.dual_p
    loss = loss or problem.loss
    v = problem.weights(_start(problem)) if start is None else start
    best, iterations = _Best(problem, tol), 0

    def value(w):
        return float(loss.value(A @ w, y).sum() + alpha / p * (np.abs(w) ** p).sum())

    while True:
        f = A @ v
        c = -loss.gradient(f, y)
        t = problem.scaled(c)
        if (best.offer(v, c) if settled is None else problem.mismatch(v, c) <= settled) or iterations >= max_iter:
            break
        iterations += 1
        # Curvature of the penalty at v, but not below that at the coefficients that c asks for: those near zero
        # would leap otherwise.  At the optimum both are equal, so this is Newton's method there.
        size = np.maximum(np.abs(v), np.abs(t) ** (r - 1))
        curvature = alpha * (p - 1) * size ** (p - 2) + np.finfo(float).tiny
        residual = alpha * (t - power(v, p - 1))             # minus the gradient
        root = np.sqrt(loss.hessian(f, y))
        B = root[:, None] * A / np.sqrt(curvature)
        w = _solve_spd(np.eye(len(c)) + B @ B.T, root * (A @ (residual / curvature)))
        direction = (residual - A.T @ (root * w)) / curvature
        slope = -float(residual @ direction)
        step = _descend(lambda s, v=v, d=direction: value(v + s * d), slope)
        if step == 0:
            break
        v = v + step * direction
    return (v, c, iterations) if settled is not None else (*best.pair, iterations)


class _Smoothed(Loss):
    r"""A loss with kinks, smoothed around a dual point: :math:`\max_c\,c(y-f)-\frac\rho2(c-c_0)^2` over its bounds."""

    smooth = True

    def __init__(self, centre: NDArray, rho: float, lo: NDArray, hi: NDArray):
        self.centre, self.rho, self.lo, self.hi = centre, rho, lo, hi

    def dual(self, f, y):
        return np.clip(self.centre + (y - f) / self.rho, self.lo, self.hi)

    def value(self, f, y):
        c = self.dual(f, y)
        return c * (y - f) - self.rho / 2 * (c - self.centre) ** 2

    def gradient(self, f, y):
        return -self.dual(f, y)

    def hessian(self, f, y):
        c = self.centre + (y - f) / self.rho
        return ((c > self.lo) & (c < self.hi)) / self.rho


def _smoothed_newton(problem: Problem, tol: float, max_iter: int):
    """The proximal point method on the dual, for p > 2 and a loss with kinks: each step is smooth in the primal."""
    lo, hi = problem.box()
    c = _start(problem)
    v = problem.weights(c)
    rho = float(np.abs(problem.y - problem.A @ v).mean()) or 1.0
    best, iterations = _Best(problem, tol, patience=20, polish=False), 0
    while not best.offer(v, c) and iterations < max_iter:
        settled = 1e-3 * best.gap
        v, c, used = _primal_newton(problem, tol, min(50, max_iter - iterations), _Smoothed(c, rho, lo, hi), v, settled)
        iterations += max(used, 1)
        if problem.mismatch(v, c) <= settled:
            rho *= 0.2
        else:                  # rounding errors of predictions are divided by rho
            rho *= 3.0
            best.offer(v, c)
            v, c = best.pair
    return *best.pair, iterations
