r"""Representer problems at :math:`p=4/3` with infinitely many features, and without cutting any of them off.

For :math:`p=2` all one needs of the features is the kernel, a function of two points.  For :math:`p=4/3` the dual
exponent is 4, and :math:`\|A^{\mathsf T}c\|_4^4` needs their products at four points.  For the features
:math:`x^a/\sqrt{a!}` of the exponential of the dot product, that sum has a closed form.
"""

from __future__ import annotations

import numbers
import warnings

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy import special
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted, validate_data

from .solvers import _solve_spd

__all__ = ["tensor_kernel", "TensorKernelRegressor"]

MOST_POINTS = 100


def tensor_kernel(x1: ArrayLike, x2: ArrayLike, x3: ArrayLike, x4: ArrayLike) -> Float[NDArray, "*shape"]:
    r"""The four-point kernel of the features :math:`\Phi_a(x)=x^a/\sqrt{a!}`, summed over all multi-indices.

    .. math::

        \kappa_4(x_1,x_2,x_3,x_4)=\sum_a\prod_{m=1}^4\Phi_a(x_m)=\prod_{l=1}^d{}_0F_1\Bigl(;1;\prod_{m=1}^4x_{m,l}\Bigr),
        \qquad{}_0F_1(;1;t)=\sum_{k\ge0}\frac{t^k}{k!^2},

    which is the Bessel function :math:`I_0(2\sqrt t)` for :math:`t\ge0` and :math:`J_0(2\sqrt{-t})` for :math:`t<0`.

    Parameters
    ----------
    x1, x2, x3, x4 : array_like
        Of shape ``(..., d)``.  Points; leading axes broadcast.

    Returns
    -------
    array
        Of shape ``(...)``.

    References
    ----------
    Salzo and Suykens (2020) on tensor kernels; proved in the book's chapter on the representer theorem.
    """
    t = (np.asarray(x1, dtype=float) * np.asarray(x2, dtype=float)
         * np.asarray(x3, dtype=float) * np.asarray(x4, dtype=float))
    root = 2 * np.sqrt(np.abs(t))
    return np.where(t >= 0, special.i0(root), special.j0(root)).prod(-1)


class TensorKernelRegressor(RegressorMixin, BaseEstimator):
    r"""Least squares with the penalty :math:`\frac{3\alpha}4\|f\|_{4/3}^{4/3}` over all features :math:`x^a/\sqrt{a!}`.

    The dual problem is solved by Newton's method,

    .. math::

        \max_c\ y\cdot c-\frac12\|c\|^2-\frac1{4\alpha^3}\sum_{ijkl}c_ic_jc_kc_l\,\kappa_4(x_i,x_j,x_k,x_l),
        \qquad f(x)=\frac1{\alpha^3}\sum_{ijk}c_ic_jc_k\,\kappa_4(x_i,x_j,x_k,x).

    Its cost grows with the fourth power of the number of points.

    Parameters
    ----------
    alpha : float
        Weight of the penalty, positive.
    tol : float
        Largest duality gap, relative to the objective, that counts as solved.
    max_iter : int
        Most Newton steps.

    Attributes
    ----------
    dual_coef_ : array
        Of shape ``(n,)``.
    norm_ : float
        Of the function, :math:`\|f\|_{4/3}`.
    objective_, duality_gap_ : float
    n_iter_ : int
    """

    def __init__(self, alpha=0.1, tol=1e-10, max_iter=100):
        self.alpha = alpha
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X, y):
        """Solve the problem.

        Parameters
        ----------
        X : array_like
            Of shape ``(n, d)``.
        y : array_like
            Of shape ``(n,)``.

        Returns
        -------
        TensorKernelRegressor

        Raises
        ------
        ValueError
            If the input is not finite, the lengths differ, ``alpha`` is not positive or there are too many points.

        Warns
        -----
        ConvergenceWarning
            If the gap is larger than asked for.
        """
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        if not (isinstance(self.alpha, numbers.Real) and 0 < self.alpha < np.inf):
            raise ValueError(f"the regularisation alpha has to be a finite number > 0, not {self.alpha!r}")
        if len(X) > MOST_POINTS:
            raise ValueError(f"{len(X)} points make {len(X)}**4 values of the four-point kernel; more than "
                             f"{MOST_POINTS} points need explicit features: BanachRegressor(p=4/3, "
                             "features=MultinomialFeatures(...))")
        y = y.astype(float)
        first, second = np.triu_indices(len(X))
        pairs = X[first] * X[second]
        kernel = _pair_kernel(pairs, pairs)
        if not np.isfinite(kernel).all():
            raise ValueError("the four-point kernel overflows at these points, whose entries are as large as "
                             f"{np.abs(X).max():.3g}; scale them to order 1")
        twice = np.where(first == second, 1.0, 2.0)
        scale = self.alpha**-3.0

        def contract(c, kernel=kernel):
            """The matrix with entries sum over k, l of c_k c_l kappa_4(x_i, x_j, x_k, x_l)."""
            matrix = np.empty((len(X), len(X)))
            matrix[first, second] = matrix[second, first] = kernel @ (twice * c[first] * c[second])
            return matrix

        def dual(c, matrix):
            return y @ c - c @ c / 2 - scale / 4 * (c @ matrix @ c)

        # A first guess of the right size: the dual objective is large and negative for larger multiples of y
        fourth = y @ contract(y) @ y
        c, last = y * min(1.0, np.cbrt((y @ y) / (scale * fourth)) if fourth > 0 else 1.0), np.inf
        noise = np.finfo(float).eps * np.sqrt(len(X)) * scale
        size = np.abs(kernel)
        iterations = 0
        with np.errstate(all="ignore"):    # a step that is too long may overflow; it is then shortened
            while True:
                matrix = contract(c)
                f = scale * (matrix @ c)
                fourth = max(c @ matrix @ c, 0.0)             # the fourth power of the dual norm
                # The gap, with what rounding errors of f, of their usual size, can hide of it
                hidden = noise * (contract(np.abs(c), size) @ np.abs(c))
                gap = 0.5 * ((np.abs(f - y + c) + hidden) ** 2).sum()
                objective = 0.5 * ((f - y) ** 2).sum() + 0.75 * scale * fourth
                if gap <= 2 * (hidden @ hidden) or (gap <= self.tol * objective and gap > 0.1 * last):
                    break
                if iterations == self.max_iter:
                    break
                last, iterations = gap, iterations + 1
                residual = y - c - f
                direction = _solve_spd(np.eye(len(c)) + 3 * scale * matrix, residual)
                slope, here = direction @ residual, dual(c, matrix)
                step = 1.0
                while step > 1e-12:
                    new = c + step * direction
                    if dual(new, contract(new)) >= here + 1e-4 * step * slope - 1e-15 * abs(objective):
                        break
                    step /= 2
                else:
                    break
                c = new
        if not gap <= self.tol * objective:
            relative = gap / objective if objective else np.inf
            warnings.warn(f"the duality gap is {gap:.3g}, which is {relative:.3g} of the objective, and "
                          f"{self.tol:.3g} was asked for, after {iterations} Newton steps; scale the points to order "
                          "1, or increase alpha, max_iter or tol.", ConvergenceWarning, stacklevel=2)
        self.X_fit_, self.dual_coef_, self.duality_gap_, self.n_iter_ = X, c, float(gap), iterations
        self.norm_, self.objective_ = float(scale * fourth**0.75), float(objective)
        return self

    def predict(self, X):
        """Values of the function.

        Parameters
        ----------
        X : array_like
            Of shape ``(m, d)``.

        Returns
        -------
        array
            Of shape ``(m,)``.

        Raises
        ------
        ValueError
            If the input is not finite, has another number of columns, or the four-point kernel overflows there.
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        c, points = self.dual_coef_, self.X_fit_
        first, second = np.triu_indices(len(points))
        pairs, weight = points[first] * points[second], c[first] * c[second] * np.where(first == second, 1.0, 2.0)
        with np.errstate(all="ignore"):
            values = self.alpha**-3.0 * np.array([weight @ (_pair_kernel(pairs, points * x) @ c) for x in X])
        if not np.isfinite(values).all():
            raise ValueError("the four-point kernel overflows at these points, whose entries are as large as "
                             f"{np.abs(X).max():.3g}; scale them to order 1")
        return values


def _pair_kernel(a: Float[NDArray, "m d"], b: Float[NDArray, "n d"]) -> Float[NDArray, "m n"]:
    """The four-point kernel where the points have been multiplied two by two."""
    total = np.ones((len(a), len(b)))
    for x, z in zip(a.T, b.T, strict=True):
        total *= tensor_kernel(x[:, None, None], z[None, :, None], 1.0, 1.0)
    return total
