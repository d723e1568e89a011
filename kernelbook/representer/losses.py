r"""Losses :math:`\ell(f,y)` of a prediction and a target, with the convex conjugates that certificates are made of.

The *conjugate* is taken in the prediction: :math:`\ell^*(s,y)=\sup_f\,sf-\ell(f,y)`.  It is finite for ``s`` in the
interval ``domain(y)``.  For every prediction and every slope, Fenchel and Young say
:math:`\ell(f,y)+\ell^*(s,y)-sf\ge0`, and equality holds if and only if ``s`` is a slope (subgradient) of the loss at
``f``; :meth:`Loss.defect` is that difference, and a duality gap is a sum of such differences.

Derivations are in the book's chapter on the representer theorem.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.special import expit, xlog1py, xlogy

__all__ = ["Loss", "SquaredLoss", "AbsoluteLoss", "LogisticLoss", "HingeLoss", "get"]

Values = Float[NDArray, "*shape"]


class Loss:
    """What the solvers know of a loss; predictions, targets and slopes are arrays that broadcast.

    Attributes
    ----------
    name : str
        By which :func:`get` finds it.
    smooth : bool
        Whether the derivative is Lipschitz continuous: then ``hessian`` is there.
    targets_are_signs : bool
        Whether the targets have to be -1 and +1.
    """

    name: str
    smooth: bool
    targets_are_signs = False

    def value(self, f: Values, y: Values) -> Values:
        r"""The loss :math:`\ell(f,y)`."""
        raise NotImplementedError

    def gradient(self, f: Values, y: Values) -> Values:
        r"""A derivative :math:`\partial\ell(f,y)/\partial f`; at a kink, a subgradient."""
        raise NotImplementedError

    def hessian(self, f: Values, y: Values) -> Values:
        r"""The second derivative in ``f``, of a smooth loss."""
        raise NotImplementedError(f"the {self.name} loss has no second derivative at its kink")

    def domain(self, y: Values) -> tuple[Values, Values]:
        """The ends of the closed interval of slopes at which the conjugate is finite."""
        raise NotImplementedError

    def conjugate(self, s: Values, y: Values) -> Values:
        r"""The conjugate :math:`\ell^*(s,y)`; infinite outside of the domain."""
        lo, hi = self.domain(y)
        inside = (s >= lo) & (s <= hi)
        return np.where(inside, self._conjugate(np.clip(s, lo, hi), y), np.inf)

    def _conjugate(self, s: Values, y: Values) -> Values:
        return s * y                       # of the two losses that are linear between kinks

    def conjugate_gradient(self, s: Values, y: Values) -> Values:
        """The derivative of the conjugate in ``s``: a prediction at which the loss has slope ``s``."""
        return y + np.zeros_like(s)

    def conjugate_hessian(self, s: Values, y: Values) -> Values:
        """The second derivative of the conjugate in ``s``."""
        return np.zeros(np.broadcast_shapes(np.shape(s), np.shape(y)))

    def defect(self, f: Values, s: Values, y: Values) -> Values:
        r"""The difference :math:`\ell(f,y)+\ell^*(s,y)-sf\ge0`.

        It is 0 where ``s`` is a slope at ``f``.
        """
        return np.maximum(self.value(f, y) + self.conjugate(s, y) - s * f, 0.0)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class SquaredLoss(Loss):
    r"""Half the squared error, :math:`\tfrac12(f-y)^2`, with conjugate :math:`\tfrac12s^2+sy`."""

    name, smooth = "squared", True

    def value(self, f, y):
        return 0.5 * (f - y) ** 2

    def gradient(self, f, y):
        return f - y

    def hessian(self, f, y):
        return np.ones(np.broadcast_shapes(np.shape(f), np.shape(y)))

    def domain(self, y):
        return np.full(np.shape(y), -np.inf), np.full(np.shape(y), np.inf)

    def _conjugate(self, s, y):
        return 0.5 * s**2 + s * y

    def conjugate_gradient(self, s, y):
        return s + y

    def conjugate_hessian(self, s, y):
        return self.hessian(s, y)

    def defect(self, f, s, y):
        return 0.5 * (f - y - s) ** 2      # the same number, without cancellation


class AbsoluteLoss(Loss):
    r"""The absolute error, :math:`|f-y|`, with conjugate :math:`sy` on :math:`|s|\le1`."""

    name, smooth = "absolute", False

    def value(self, f, y):
        return np.abs(f - y)

    def gradient(self, f, y):
        return np.sign(f - y)

    def domain(self, y):
        return np.full(np.shape(y), -1.0), np.ones(np.shape(y))

    def defect(self, f, s, y):
        error = f - y                      # for its own digits: no cancellation
        return np.where(np.abs(s) <= 1, np.abs(error) - s * error, np.inf)


class LogisticLoss(Loss):
    r"""The logistic loss :math:`\log(1+e^{-yf})` of a label :math:`y=\pm1`.

    With :math:`\tau=-ys`, its conjugate is :math:`\tau\log\tau+(1-\tau)\log(1-\tau)` on :math:`0\le\tau\le1`.
    """

    name, smooth = "logistic", True
    targets_are_signs = True

    def value(self, f, y):
        return np.logaddexp(0.0, -y * f)

    def gradient(self, f, y):
        return -y * expit(-y * f)

    def hessian(self, f, y):
        return expit(f) * expit(-f) + 0.0 * y

    def domain(self, y):
        return np.minimum(-y, 0.0), np.maximum(-y, 0.0)

    def _conjugate(self, s, y):
        tau = np.abs(s)
        return xlogy(tau, tau) + xlog1py(1 - tau, -tau)

    def conjugate_gradient(self, s, y):
        tau = np.abs(s)
        with np.errstate(divide="ignore"):
            return -y * (np.log(tau) - np.log1p(-tau))

    def conjugate_hessian(self, s, y):
        tau = np.abs(s)
        with np.errstate(divide="ignore"):
            return 1 / (tau * (1 - tau)) + 0.0 * y


class HingeLoss(Loss):
    r"""The hinge loss :math:`\max(0,1-yf)` of a label :math:`y=\pm1`.

    Its conjugate is :math:`sy` on :math:`0\le-ys\le1`.
    """

    name, smooth = "hinge", False
    targets_are_signs = True

    def value(self, f, y):
        return np.maximum(0.0, 1 - y * f)

    def gradient(self, f, y):
        return np.where(y * f < 1, -y, 0.0)

    def domain(self, y):
        return np.minimum(-y, 0.0), np.maximum(-y, 0.0)

    def defect(self, f, s, y):
        tau, margin = -y * s, 1 - y * f
        return np.where((tau >= 0) & (tau <= 1), np.maximum(margin, 0.0) - tau * margin, np.inf)


_LOSSES = {loss.name: loss for loss in (SquaredLoss(), AbsoluteLoss(), LogisticLoss(), HingeLoss())}


def get(loss: str | Loss) -> Loss:
    """The loss of that name; a loss is handed back as it is.

    Parameters
    ----------
    loss : str or Loss
        ``"squared"``, ``"absolute"``, ``"logistic"`` or ``"hinge"``.

    Returns
    -------
    Loss

    Raises
    ------
    ValueError
        If no loss has that name; the message lists those there are.
    """
    if isinstance(loss, Loss):
        return loss
    if not isinstance(loss, str) or loss not in _LOSSES:
        raise ValueError(f"there is no loss {loss!r}; choose one of {', '.join(map(repr, _LOSSES))}, "
                         "or hand over an instance of kernelbook.representer.Loss")
    return _LOSSES[loss]
