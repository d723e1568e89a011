r"""Pairs of reproducing kernel Banach spaces, built from two feature maps.

Feature maps :math:`\Phi:\mathcal X\to\ell^{p^*}` and :math:`\Psi:\mathcal Y\to\ell^p` give a kernel, two spaces of
functions and a form:

.. math::
   \kappa(x,y)=[\Phi(x),\Psi(y)],\qquad f_v(x)=[\Phi(x),v],\qquad g_u(y)=[u,\Psi(y)],\qquad b(f_v,g_u)=[u,v],

where :math:`[u,v]=\sum_\nu u_\nu v_\nu`.  The norm of :math:`f` is the least :math:`\|v\|_p` with :math:`f_v=f`, that
of :math:`g` the least :math:`\|u\|_{p^*}` with :math:`g_u=g`.  Kernel, spaces and norms always exist; the form does
not.  :class:`RKBSPair` computes all of this on finite sets of points, and refuses the form where it is not one.  The
chapter *Pairs of reproducing kernel Banach spaces* proves what is used here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .geometry import conjugate, lp_norm, quotient_norm

__all__ = ["RKBSPair", "IncompatiblePairError"]

# A function belongs to a space if some coefficients give its values up to this, relative to the largest value.
MEMBERSHIP = 1e-9


class IncompatiblePairError(ValueError):
    """The form of a pair was asked for, but its feature maps do not define one."""


class RKBSPair:
    r"""The pair of function spaces of two feature maps on finite sets of points.

    .. math::
       \mathcal B_X=\{\Phi v\},\ \|f\|=\min\{\|v\|_p:\Phi v=f\},\qquad
       \mathcal B_Y=\{\Psi u\},\ \|g\|=\min\{\|u\|_{p^*}:\Psi u=g\},\qquad b(\Phi v,\Psi u)=u\cdot v .

    Functions are given by their values: ``f`` of shape ``(..., n)`` on the points of the first set, ``g`` of shape
    ``(..., m)`` on those of the second.

    Parameters
    ----------
    phi : Tensor or callable
        Features of the first set, one row a point, ``(n, D)``; or a feature map, to be applied to ``x``.
    psi : Tensor or callable
        Features of the second set, ``(m, D)``; or a feature map, to be applied to ``y``.
    p : float
        Exponent of the norm on the first space; the second has the conjugate exponent.
    x, y : Tensor, optional
        The points, where ``phi`` and ``psi`` are feature maps.
    rtol : float, optional
        Singular values of a matrix below ``rtol`` times its largest one count as zero wherever a rank is decided.  By
        default the matrix's larger side times the machine precision.  Features that are tiny, as those of high degree
        are, may so be taken for dependent ones.

    Attributes
    ----------
    phi, psi : Tensor
        The features.
    dimension_x, dimension_y : int
        Dimensions of the two spaces.
    null_x, null_y : Tensor
        Rows that span the coefficients of the function 0 of the first and of the second space.
    is_reduced : bool
        Whether it came from :meth:`reduced`.

    Raises
    ------
    TypeError
        If the features are no floating tensors of one dtype.
    ValueError
        If they are no matrices with equally many columns, ``p`` is not strictly between 1 and infinity, or points are
        missing or superfluous.

    Notes
    -----
    Source: the construction theorem ``thm-construction`` of the chapter *Pairs of reproducing kernel Banach spaces*.

    Examples
    --------
    >>> import torch
    >>> pair = RKBSPair(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    >>> pair.form(torch.tensor([2.0, 5.0]), pair.kernel()[0])     # the reproducing property at the first point
    tensor(2.)
    """

    def __init__(
        self,
        phi: Float[Tensor, "n D"] | Callable[[Tensor], Tensor],
        psi: Float[Tensor, "m D"] | Callable[[Tensor], Tensor],
        p: float = 2.0,
        *,
        x: Tensor | None = None,
        y: Tensor | None = None,
        rtol: float | None = None,
    ) -> None:
        self.p, self.p_conjugate = p, conjugate(p)
        self.phi, self.psi = _features(phi, x, "phi", "x"), _features(psi, y, "psi", "y")
        if self.phi.shape[1] != self.psi.shape[1] or self.phi.dtype != self.psi.dtype:
            raise ValueError("the two feature maps must have equally many features of one dtype, one column each, "
                             f"not {self.phi.shape[1]} of {self.phi.dtype} and {self.psi.shape[1]} of {self.psi.dtype}")
        self.rtol = rtol
        self.is_reduced = False
        # Orthonormal rows that span the spaces W_1 and W_2 of coefficients: everything, until the pair is reduced.
        self._w1 = self._w2 = torch.eye(self.phi.shape[1], dtype=self.phi.dtype, device=self.phi.device)
        self._prepare()

    def _prepare(self) -> None:
        self._solve_x, self.null_x, self.dimension_x = _invert(self.phi, self._w2, self.rtol)
        self._solve_y, self.null_y, self.dimension_y = _invert(self.psi, self._w1, self.rtol)

    def __repr__(self) -> str:
        (n, features), m = self.phi.shape, len(self.psi)
        kind = "reduced" if self.is_reduced else "compatible" if self.compatible else "not compatible"
        return f"<RKBSPair of {n} and {m} points, {features} features, p = {self.p:g}, {kind}>"

    def kernel(self) -> Float[Tensor, "n m"]:
        r"""The Gram matrix :math:`K_{ij}=\Phi(x_i)\cdot\Psi(y_j)`; its columns and rows are the sections.

        Returns
        -------
        Tensor
            ``(n, m)``.  It depends neither on ``p`` nor on whether the pair is reduced.
        """
        return self.phi @ self.psi.mT

    def function_x(self, v: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch n"]:
        r"""Values of :math:`f_v(x)=[\Phi(x),v]` at the points of the first set.

        Parameters
        ----------
        v : Tensor
            Coefficients, ``(..., D)``.

        Returns
        -------
        Tensor
            ``(..., n)``.
        """
        return v @ self.phi.mT

    def function_y(self, u: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch m"]:
        r"""Values of :math:`g_u(y)=[u,\Psi(y)]` at the points of the second set.

        Parameters
        ----------
        u : Tensor
            Coefficients, ``(..., D)``.

        Returns
        -------
        Tensor
            ``(..., m)``.
        """
        return u @ self.psi.mT

    def coefficients_x(self, f: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch D"]:
        r"""The one :math:`v` of least norm :math:`\|v\|_p` with :math:`f_v=f`.

        Parameters
        ----------
        f : Tensor
            Values of a function of the first space, ``(..., n)``.

        Returns
        -------
        Tensor
            ``(..., D)``.

        Raises
        ------
        ValueError
            If ``f`` has another number of values, or is not in the space.
        """
        return _least(_lift(f, self.phi, self._solve_x, "f", "first"), self.null_x, self.p)

    def coefficients_y(self, g: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch D"]:
        r"""The one :math:`u` of least norm :math:`\|u\|_{p^*}` with :math:`g_u=g`.

        Parameters
        ----------
        g : Tensor
            Values of a function of the second space, ``(..., m)``.

        Returns
        -------
        Tensor
            ``(..., D)``.

        Raises
        ------
        ValueError
            If ``g`` has another number of values, or is not in the space.
        """
        return _least(_lift(g, self.psi, self._solve_y, "g", "second"), self.null_y, self.p_conjugate)

    def norm_x(self, f: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
        r"""The norm :math:`\min\{\|v\|_p:f_v=f\}` of the first space.

        Parameters
        ----------
        f : Tensor
            Values, ``(..., n)``.

        Returns
        -------
        Tensor
            ``(...)``.

        Raises
        ------
        ValueError
            If ``f`` has another number of values, or is not in the space.
        """
        return lp_norm(self.coefficients_x(f), self.p)

    def norm_y(self, g: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch"]:
        r"""The norm :math:`\min\{\|u\|_{p^*}:g_u=g\}` of the second space.

        Parameters
        ----------
        g : Tensor
            Values, ``(..., m)``.

        Returns
        -------
        Tensor
            ``(...)``.

        Raises
        ------
        ValueError
            If ``g`` has another number of values, or is not in the space.
        """
        return lp_norm(self.coefficients_y(g), self.p_conjugate)

    @property
    def compatible(self) -> bool:
        r"""Whether :math:`[u,v]=0` for all :math:`u\in W_1`, :math:`v\in W_2` with :math:`f_v=0` or :math:`g_u=0`.

        Only then is there a form.  Where all coefficients are allowed, it means that the features of each set span all
        of :math:`\mathbb R^D`; a reduced pair is always compatible.
        """
        return self.is_reduced or not (len(self.null_x) or len(self.null_y))

    def check_compatible(self) -> None:
        """Refuse a pair that has no form.

        Raises
        ------
        IncompatiblePairError
            If the pair is not compatible.
        """
        if self.compatible:
            return
        size = self.phi.shape[1]
        sides = ("first", self.phi, self.null_x), ("second", self.psi, self.null_y)
        found = " and ".join(f"the features of the {which} set ({len(points)} point{'s' * (len(points) > 1)}) span "
                             f"{size - len(null)} of {size} dimensions" for which, points, null in sides if len(null))
        witness = ("v with f_v = 0 on the first set, although [u, v] = 1 for some u" if len(self.null_x)
                   else "u with g_u = 0 on the second set, although [u, v] = 1 for some v")
        raise IncompatiblePairError(
            f"the form b(f_v, g_u) = [u, v] is ill defined here: {found}, up to the tolerance of the rank. "
            f"So there is a {witness}: the same two functions would get different values. This is counterexample A.9 "
            'of the chapter "RKBS pairs". The repair, A.10, is pair.reduced(): it keeps the kernel and allows only '
            "coefficients in the spans of the features, which may change the spaces and their norms. Otherwise take "
            "more points, or fewer features.")

    def form(self, f: Float[Tensor, "*batch n"], g: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch"]:
        r"""The bilinear form :math:`b(f_v,g_u)=[u,v]`, from the values of two functions.

        Parameters
        ----------
        f : Tensor
            Values of a function of the first space, ``(..., n)``.
        g : Tensor
            Values of a function of the second space, ``(..., m)``.

        Returns
        -------
        Tensor
            ``(...)``.

        Raises
        ------
        IncompatiblePairError
            If the pair is not compatible: the form would not depend on the functions alone.
        ValueError
            If a function has another number of values, or is not in its space.
        """
        self.check_compatible()
        v = _lift(f, self.phi, self._solve_x, "f", "first")
        u = _lift(g, self.psi, self._solve_y, "g", "second")
        return (u * v).sum(-1)

    def form_from_minor(
        self, f: Float[Tensor, "*batch n"], g: Float[Tensor, "*batch m"], rows: Sequence[int], columns: Sequence[int]
    ) -> Float[Tensor, "*batch"]:
        r"""The form from few values: :math:`b(f,g)=f_I\cdot K_{IJ}^{-\mathsf T}g_J` for a nonsingular minor.

        Parameters
        ----------
        f, g : Tensor
            Values of functions of the two spaces, ``(..., n)`` and ``(..., m)``.
        rows, columns : sequence of int
            :math:`I` and :math:`J`, as many as the rank of the kernel's matrix.

        Returns
        -------
        Tensor
            ``(...)``.

        Raises
        ------
        IncompatiblePairError
            If the pair is not compatible.
        ValueError
            If a function has another number of values or is not in its space, or the minor has another size than the
            rank or is singular.
        """
        self.check_compatible()
        _lift(f, self.phi, self._solve_x, "f", "first")
        _lift(g, self.psi, self._solve_y, "g", "second")
        rows, columns, rank = list(rows), list(columns), self.dimension_x
        if not len(rows) == len(columns) == rank:
            raise ValueError("the minor must have as many rows and columns as the rank of the kernel's matrix, "
                             f"{rank}, not {len(rows)} rows and {len(columns)} columns")
        minor = self.kernel()[rows][:, columns]
        if _rank(torch.linalg.svdvals(minor), minor.shape, self.rtol) < rank:
            raise ValueError(f"the minor of rows {rows} and columns {columns} is singular; take points with "
                             "independent features")
        return (f[..., rows] * torch.linalg.solve(minor.mT, g[..., columns, None])[..., 0]).sum(-1)

    def reduced(self) -> RKBSPair:
        r"""The pair with coefficients :math:`u\in\operatorname{span}\Phi`, :math:`v\in\operatorname{span}\Psi` only.

        It is always compatible and has the same kernel.  Its spaces consist of the linear combinations of sections.
        Where they are smaller than before, or the norm of a function is larger, that is the price.

        Returns
        -------
        RKBSPair
        """
        if self.is_reduced:
            return self
        pair = RKBSPair(self.phi, self.psi, self.p, rtol=self.rtol)
        pair._w1, pair._w2 = _row_space(self.phi, self.rtol), _row_space(self.psi, self.rtol)
        pair.is_reduced = True
        pair._prepare()
        return pair


# ------------------------------------------------------------------------- linear algebra: ranks are decided here

def _features(features: Tensor | Callable[[Tensor], Tensor], points: Tensor | None, name: str, of: str) -> Tensor:
    if not isinstance(features, Tensor):
        if not callable(features):
            raise TypeError(f"{name} must be a matrix of features or a feature map, not {type(features).__name__}")
        if points is None:
            raise ValueError(f"{name} is a feature map, so the points are needed too: pass {of}=...")
        features = features(points)
    elif points is not None:
        raise ValueError(f"{name} holds the features already, so {of} is superfluous; leave it out, or pass a feature "
                         "map")
    if not features.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, not {features.dtype}; convert it with .double()")
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{name} must be a matrix, one row a point and one column a feature, not of shape "
                         f"{tuple(features.shape)}")
    return features


def _rank(values: Tensor, shape: Sequence[int], rtol: float | None) -> int:
    """How many singular values count as nonzero."""
    rtol = max(shape) * torch.finfo(values.dtype).eps if rtol is None else rtol
    return int((values > rtol * values[:1]).sum())


def _row_space(matrix: Tensor, rtol: float | None) -> Tensor:
    _, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return right[:_rank(values, matrix.shape, rtol)]


def _invert(features: Tensor, space: Tensor, rtol: float | None) -> tuple[Tensor, Tensor, int]:
    """From values to coefficients in ``span(space)``: a right inverse, the coefficients that give 0, the rank."""
    restricted = features @ space.mT
    left, values, right = torch.linalg.svd(restricted, full_matrices=True)
    rank = _rank(values, restricted.shape, rtol)
    solve = (left[:, :rank] / values[:rank]) @ right[:rank] @ space
    return solve, right[rank:] @ space, rank


def _lift(f: Tensor, features: Tensor, solve: Tensor, name: str, which: str) -> Tensor:
    """Some coefficients of a function of given values."""
    if f.shape[-1:] != features.shape[:1]:
        raise ValueError(f"{name} must have one value for each of the {len(features)} points of the {which} set, "
                         f"not the shape {tuple(f.shape)}")
    v = f @ solve
    error, largest = (v @ features.mT - f).abs().amax(-1), f.abs().amax(-1)
    if not bool((error <= MEMBERSHIP * largest).all()):
        raise ValueError(f"{name} is not in the space of the {which} set: its features give the values up to "
                         f"{error.max().item():.3g} only, where the largest is {largest.max().item():.3g}")
    return v


def _least(v: Tensor, null: Tensor, p: float) -> Tensor:
    """The element of ``v + span(null)`` of least p-norm."""
    return quotient_norm(v, null, p).minimiser if len(null) else v
