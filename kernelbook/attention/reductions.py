r"""Which attentions are a softmax of inner products: exact reductions to the form of standard attention.

A factor of the kernel that depends on the query alone cancels in the row normalisation (gauge theorem, chapter
*Attention is a kernel smoother*).  So a positive kernel with

.. math:: \log\kappa(q,k)=c\,(q'\cdot k')+b(k)+a(q),

where :math:`q'` is made of :math:`q`, and :math:`k'` and :math:`b` of :math:`k`, attends by
:math:`\operatorname{softmax}_j(c\,q'_i\cdot k'_j+b_j)`, which the fused attention of a library computes.  The Gaussian
kernel is one, with :math:`b(k)=-\lVert k\rVert^2/2\sigma^2`.  So are products of such kernels: their features stand
side by side, and their biases add.  A sum of two exponentials is none.

A kernel of your own becomes one by a function registered for its class::

    @register(Popular)                  # log κ(q, k) = q·k + popularity(k)
    def _(kernel, q, k):
        return SoftmaxForm(q, k, 1.0, kernel.popularity(k))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from .. import features, kernels
from ..kernels import Kernel
from .call import autocasts

__all__ = ["SoftmaxForm", "softmax_form", "has_softmax_form", "register"]


@dataclass(frozen=True)
class SoftmaxForm:
    r"""Queries and keys with :math:`\log\kappa(q,k)=c\,(q'\cdot k')+b(k)`, up to a term of the query alone.

    Attributes
    ----------
    q : Tensor
        :math:`q'`, ``(..., n, d')``.
    k : Tensor
        :math:`k'`, ``(..., m, d')``.  The width may be 0, for a kernel that is a function of the key.
    scale : float
        :math:`c`, of either sign but not 0.
    key_bias : Tensor, optional
        :math:`b`, ``(..., m)``, in at least float32; None stands for zeros.
    """

    q: Float[Tensor, "*batch n width"]
    k: Float[Tensor, "*batch m width"]
    scale: float
    key_bias: Float[Tensor, "*batch m"] | None = None


Form = Callable[[Kernel, Tensor, Tensor], SoftmaxForm]

#: The forms of the logarithm of a kernel, and (inside an exponential) of a kernel itself, by its exact type.
_OF_LOGARITHM: dict[type[Kernel], Form] = {}
_OF_VALUE: dict[type[Kernel], Form] = {}


def register(kernel_class: type[Kernel]) -> Callable[[Form], Form]:
    """Decorator: declare the softmax form of all kernels of a class.

    Parameters
    ----------
    kernel_class : type
        A class derived from :class:`kernelbook.kernels.Kernel`; its subclasses are not included.

    Returns
    -------
    callable
        Decorator of a function of a kernel, checked queries and checked keys that returns a :class:`SoftmaxForm`,
        differentiably.  It must agree with the kernel's ``log_gram`` up to a term for each query.

    Raises
    ------
    TypeError
        If ``kernel_class`` is no class of kernels.
    """
    if not (isinstance(kernel_class, type) and issubclass(kernel_class, Kernel)):
        raise TypeError(f"register takes the class of the kernel, as in @register(MyKernel), not {kernel_class!r}")

    def add(form: Form) -> Form:
        _OF_LOGARITHM[kernel_class] = form
        return form

    return add


def has_softmax_form(kernel: Kernel, d: int) -> bool:
    """Whether the attention by a kernel, of points of width ``d``, is a softmax of inner products.

    Parameters
    ----------
    kernel : Kernel
    d : int

    Returns
    -------
    bool
    """
    kind = type(kernel)
    if kind in _OF_LOGARITHM:
        return True
    if kind is kernels.Exponential:
        return _value_has_form(kernel.base, d)
    if kind is kernels.Constant:
        return kernel.value > 0
    if kind is kernels.Scaled:
        return kernel.factor > 0 and has_softmax_form(kernel.base, d)
    if kind is kernels.Product:
        return has_softmax_form(kernel.first, d) and has_softmax_form(kernel.second, d)
    if kind is kernels.TensorProduct:
        s = kernel.split
        return s < d and has_softmax_form(kernel.first, s) and has_softmax_form(kernel.second, d - s)
    return False


def softmax_form(kernel: Kernel, q: Float[Tensor, "*batch n d"], k: Float[Tensor, "*batch m d"]) -> SoftmaxForm:
    """The softmax form of a kernel at given points; differentiable.

    Where autocast is on, the points are rounded first, so that inner products and biases are of the same points.

    Parameters
    ----------
    kernel : Kernel
        With :func:`has_softmax_form`.
    q, k : Tensor
        Queries ``(..., n, d)`` and keys ``(..., m, d)``, checked.

    Returns
    -------
    SoftmaxForm

    Raises
    ------
    ValueError
        If the kernel has no softmax form.
    """
    if not has_softmax_form(kernel, q.shape[-1]):
        raise ValueError(f"{kernel!r} is not known to be a softmax of inner products at width {q.shape[-1]}; "
                         "has_softmax_form tells, and kernelbook.attention.reductions.register adds a kernel of "
                         "your own")
    device = q.device.type
    if autocasts(device) and q.dtype is torch.float32:
        q, k = (x.to(torch.get_autocast_dtype(device)) for x in (q, k))
    return _of_logarithm(kernel, q, k)


def _of_logarithm(kernel: Kernel, q: Tensor, k: Tensor) -> SoftmaxForm:
    kind = type(kernel)
    if kind in _OF_LOGARITHM:
        return _OF_LOGARITHM[kind](kernel, q, k)
    if kind is kernels.Exponential:
        return _of_value(kernel.base, q, k)
    if kind is kernels.Scaled:                      # a constant factor cancels
        return _of_logarithm(kernel.base, q, k)
    if kind is kernels.Product:
        return _side_by_side(_of_logarithm(kernel.first, q, k), _of_logarithm(kernel.second, q, k))
    if kind is kernels.TensorProduct:
        first, second = kernel._parts(q, k)
        return _side_by_side(_of_logarithm(kernel.first, *first), _of_logarithm(kernel.second, *second))
    return _nothing(q, k)                           # Constant


# ------------------------------------------------------------------------- inside an exponential

#: A feature map may make queries and keys this many times wider; beyond, the n x m array of the definition is cheaper.
_WIDER = 4

_POLYNOMIALS = (kernels.Quadratic, kernels.Polynomial, kernels.Taylor)


def _value_has_form(kernel: Kernel, d: int) -> bool:
    kind = type(kernel)
    if kind in _OF_VALUE:
        return True
    if kind is kernels.Scaled:
        return _value_has_form(kernel.base, d)
    if kind is kernels.Sum:
        return _value_has_form(kernel.first, d) and _value_has_form(kernel.second, d)
    if kind is kernels.DirectSum:
        s = kernel.split
        return s < d and _value_has_form(kernel.first, s) and _value_has_form(kernel.second, d - s)
    return kind in _POLYNOMIALS and getattr(kernel, "offset", 0) >= 0 and kernel.feature_dimension(d) <= _WIDER * d


def _of_value(kernel: Kernel, q: Tensor, k: Tensor) -> SoftmaxForm:
    kind = type(kernel)
    if kind in _OF_VALUE:
        return _OF_VALUE[kind](kernel, q, k)
    if kind is kernels.Scaled:
        form, c = _of_value(kernel.base, q, k), kernel.factor
        return replace(form, scale=c * form.scale, key_bias=None if form.key_bias is None else c * form.key_bias)
    if kind is kernels.Sum:
        return _side_by_side(_of_value(kernel.first, q, k), _of_value(kernel.second, q, k))
    if kind is kernels.DirectSum:
        first, second = kernel._parts(q, k)
        return _side_by_side(_of_value(kernel.first, *first), _of_value(kernel.second, *second))
    phi = features.of(kernel)
    return SoftmaxForm(phi(q), phi(k), 1.0)


# ------------------------------------------------------------------------- pieces

def _side_by_side(a: SoftmaxForm, b: SoftmaxForm) -> SoftmaxForm:
    """The form whose logits are those of ``a`` plus those of ``b``."""
    bias = a.key_bias if b.key_bias is None else b.key_bias if a.key_bias is None else a.key_bias + b.key_bias
    if a.q is b.q and a.k is b.k:
        together = a.scale + b.scale
        return SoftmaxForm(a.q, a.k, together, bias) if together else replace(_nothing(a.q, a.k), key_bias=bias)
    if b.q.shape[-1] == 0:
        return replace(a, key_bias=bias)
    if a.q.shape[-1] == 0:
        return replace(b, key_bias=bias)
    ratio = b.scale / a.scale
    return SoftmaxForm(torch.cat((a.q, b.q if ratio == 1 else b.q * ratio), -1), torch.cat((a.k, b.k), -1), a.scale,
                       bias)


def _nothing(q: Tensor, k: Tensor) -> SoftmaxForm:
    return SoftmaxForm(q[..., :0], k[..., :0], 1.0)


def squared_norms(k: Float[Tensor, "*batch m d"]) -> Float[Tensor, "*batch m"]:
    """The squared norms of the keys, in at least float32: rounded, they would be the logits' largest error."""
    return k.to(torch.promote_types(k.dtype, torch.float32)).square().sum(-1)


def _edp(kernel: kernels.EDP | kernels.Linear, q: Tensor, k: Tensor) -> SoftmaxForm:
    return SoftmaxForm(q, k, q.shape[-1] ** -0.5 if kernel.scale is None else kernel.scale)


def _rbf(kernel: kernels.RBF, q: Tensor, k: Tensor) -> SoftmaxForm:
    precision = kernel.precision(q.shape[-1])
    return SoftmaxForm(q, k, precision, -0.5 * precision * squared_norms(k))


def _l2_squared(kernel: kernels.L2Squared, q: Tensor, k: Tensor) -> SoftmaxForm:
    scale = q.shape[-1] ** -0.5 if kernel.scale is None else kernel.scale
    return SoftmaxForm(q, k, -2 * scale, scale * squared_norms(k))


_OF_LOGARITHM |= {kernels.EDP: _edp, kernels.RBF: _rbf}
_OF_VALUE |= {
    kernels.Linear: _edp,
    kernels.L2Squared: _l2_squared,
    kernels.Cosine: lambda kernel, q, k: SoftmaxForm(kernels._unit(q), kernels._unit(k), 1.0),
    kernels.Constant: lambda kernel, q, k: _nothing(q, k),
}
