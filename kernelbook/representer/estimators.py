r"""Representer problems in :math:`\ell^p` as scikit-learn estimators."""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data

from ..features import FeatureMap
from . import losses
from .solvers import solve

__all__ = ["BanachRegressor", "BanachClassifier"]


class _Banach(BaseEstimator):
    """What both estimators share: features, the solver, and what it leaves behind."""

    def __init__(self, p, alpha, features, loss, tol, max_iter):
        self.p = p
        self.alpha = alpha
        self.features = features
        self.loss = loss
        self.tol = tol
        self.max_iter = max_iter

    def _features(self, X):
        if isinstance(self.features, str) and self.features == "precomputed":
            return X
        if isinstance(self.features, FeatureMap):
            return self.features(torch.tensor(X)).numpy()          # a copy: X may be read-only
        raise ValueError(f"features have to be 'precomputed', where the columns of X are the features, or a feature "
                         f"map such as kernelbook.features.MultinomialFeatures(degree=30), not {self.features!r}")

    def _solve(self, X, y):
        solution = solve(self._features(X), y, loss=self.loss, p=self.p, alpha=self.alpha, tol=self.tol,
                         max_iter=self.max_iter)
        self.coef_, self.dual_coef_ = solution.weights, solution.dual_coef
        self.norm_ = float(np.linalg.norm(solution.weights, self.p))
        self.objective_, self.duality_gap_ = solution.objective, solution.duality_gap
        self.n_iter_ = solution.iterations
        return self

    def _values(self, X):
        check_is_fitted(self)
        with np.errstate(all="ignore"):
            values = self._features(validate_data(self, X, dtype=np.float64, reset=False)) @ self.coef_
        if not np.isfinite(values).all():
            raise ValueError(f"the features overflow at these points, whose entries are as large as "
                             f"{np.abs(np.asarray(X, dtype=float)).max():.3g}; scale them to order 1")
        return values


class BanachRegressor(RegressorMixin, _Banach):
    r"""Regression by the function of a space with an :math:`\ell^p` norm that minimises loss plus penalty.

    .. math::

        \min_f\ \sum_i\ell\bigl(f(x_i),y_i\bigr)+\frac\alpha p\|f\|_p^p,\qquad
        f(x)=\sum_\nu v_\nu\Phi_\nu(x),\quad\|f\|_p=\|v\|_p .

    There is no intercept, unless one of the features is constant.

    Parameters
    ----------
    p : float
        Exponent of the norm, :math:`1<p<\infty`; 2 is kernel ridge regression.
    alpha : float
        Weight of the penalty, positive.
    features : "precomputed" or FeatureMap
        The columns of ``X`` themselves, or a map such as :class:`kernelbook.features.MultinomialFeatures`.
    loss : str or Loss
        ``"squared"`` or ``"absolute"``.
    tol : float
        Largest duality gap, relative to the objective, that counts as solved.
    max_iter : int
        Most linear systems to solve.

    Attributes
    ----------
    coef_ : array
        Of shape ``(D,)``.  Coefficients of the features.
    dual_coef_ : array
        Of shape ``(n,)``.  The dual solution; for the squared loss the residuals ``y - f(x)``.
    norm_ : float
        Of the function.
    objective_, duality_gap_ : float
        The least value found, and a bound of its distance from the minimum.
    n_iter_ : int
    """

    def __init__(self, p=1.5, alpha=0.1, features="precomputed", loss="squared", tol=1e-10, max_iter=1000):
        super().__init__(p, alpha, features, loss, tol, max_iter)

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
        BanachRegressor

        Raises
        ------
        ValueError
            If the input is not finite, the lengths differ, or a parameter is out of range; the message says how to
            mend it.

        Warns
        -----
        ConvergenceWarning
            If the duality gap is larger than asked for; the message names it.
        """
        if losses.get(self.loss).targets_are_signs:
            raise ValueError(f"the {losses.get(self.loss).name} loss is one of labels: use BanachClassifier")
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        return self._solve(X, y.astype(float))

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
        """
        return self._values(X)


class BanachClassifier(ClassifierMixin, _Banach):
    """Classification into two classes by the sign of the function that minimises loss plus penalty.

    The problem is that of :class:`BanachRegressor`, with labels -1 and +1 for the two classes in sorted order.
    For more classes wrap it in ``sklearn.multiclass.OneVsRestClassifier``.

    Parameters
    ----------
    p, alpha, features, tol, max_iter
        As in :class:`BanachRegressor`.
    loss : str or Loss
        ``"logistic"``, which gives probabilities, or ``"hinge"``, that of support vector machines.

    Attributes
    ----------
    classes_ : array
        Of shape ``(2,)``.
    coef_, dual_coef_, norm_, objective_, duality_gap_, n_iter_
        As in :class:`BanachRegressor`.
    """

    def __init__(self, p=1.5, alpha=0.1, features="precomputed", loss="logistic", tol=1e-10, max_iter=1000):
        super().__init__(p, alpha, features, loss, tol, max_iter)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def fit(self, X, y):
        """Solve the problem.

        Parameters
        ----------
        X : array_like
            Of shape ``(n, d)``.
        y : array_like
            Of shape ``(n,)``.  Labels of any kind, of two classes.

        Returns
        -------
        BanachClassifier

        Raises
        ------
        ValueError
            If there are not two classes, the input is not finite, or a parameter is out of range.

        Warns
        -----
        ConvergenceWarning
            If the duality gap is larger than asked for; the message names it.
        """
        if not losses.get(self.loss).targets_are_signs:
            raise ValueError(f"the {losses.get(self.loss).name} loss is one of numbers: use BanachRegressor, or the "
                             "loss 'logistic' or 'hinge'")
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        kind = type_of_target(y, input_name="y")
        if kind != "binary":
            raise ValueError(f"Only binary classification is supported. The type of the target is {kind}. For more "
                             "than two classes use sklearn.multiclass.OneVsRestClassifier(BanachClassifier(...)).")
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) != 2:
            raise ValueError(f"the targets hold one class only, {self.classes_[0]!r}; a classifier needs examples "
                             "of two")
        return self._solve(X, 2.0 * index - 1.0)

    def decision_function(self, X):
        """Values of the function: positive for the second class.

        Parameters
        ----------
        X : array_like
            Of shape ``(m, d)``.

        Returns
        -------
        array
            Of shape ``(m,)``.
        """
        return self._values(X)

    def predict(self, X):
        """The class of each point.

        Parameters
        ----------
        X : array_like
            Of shape ``(m, d)``.

        Returns
        -------
        array
            Of shape ``(m,)``.
        """
        positive = self.decision_function(X) > 0
        return self.classes_[positive.astype(int)]

    def _has_probabilities(self):
        if losses.get(self.loss).name == "logistic":
            return True
        raise AttributeError(f"the {losses.get(self.loss).name} loss gives no probabilities; use loss='logistic'")

    @available_if(_has_probabilities)
    def predict_proba(self, X):
        r"""Probabilities of the two classes, :math:`1/(1+e^{\pm f(x)})`; for the logistic loss only.

        Parameters
        ----------
        X : array_like
            Of shape ``(m, d)``.

        Returns
        -------
        array
            Of shape ``(m, 2)``.
        """
        f = self.decision_function(X)
        return np.stack([expit(-f), expit(f)], axis=1)
