r"""Diagnostics of Gram matrices: how symmetric, how definite, of what rank; and when attention is a Mercer kernel.

The first functions look at one matrix :math:`K=[\kappa(q_i,k_j)]`, or at a batch of them, in floating point.
:func:`log_determinant` is for the question that floating point cannot answer, whether a matrix of tiny singular
values is invertible.  :func:`mercer_on_tokens` is about all matrices of one head at once: it decides whether
:math:`\exp(x^{\mathsf T}W_Q^{\mathsf T}W_Ky/\sqrt d)` is symmetric and positive definite on the tokens, and if it is
not, returns two tokens that prove it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from . import kernels
from .kernels import Kernel

__all__ = [
    "Inertia", "LogDeterminant", "MercerVerdict",
    "asymmetry", "inertia", "effective_rank", "numerical_rank", "conditional_eigenvalues",
    "log_determinant", "mercer_on_tokens",
]


# ------------------------------------------------------------------------- one matrix, in floating point

def asymmetry(K: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
    r"""The share of the antisymmetric part, :math:`\lVert\frac12(K-K^{\mathsf T})\rVert_F/\lVert K\rVert_F`.

    0 if :math:`K` is symmetric, 1 if it is antisymmetric; the squares of the shares of the two parts sum to 1.

    Parameters
    ----------
    K : Tensor
        ``(..., n, n)``.

    Returns
    -------
    Tensor
        ``(...)``; 0 for a matrix of zeros.

    Raises
    ------
    TypeError, ValueError
        If ``K`` is not a floating tensor of square matrices, or not finite.
    """
    _check_matrix(K, square=True)
    # The squares in a norm overflow or vanish where the entries are exponentials of large logits.
    largest = K.abs().amax((-2, -1), keepdim=True)
    K = K / torch.where(largest == 0, 1.0, largest)
    whole = torch.linalg.matrix_norm(K)
    return torch.linalg.matrix_norm(K - K.mT) / 2 / torch.where(whole == 0, 1.0, whole)


class Inertia(NamedTuple):
    """How many eigenvalues are positive, negative and zero: integers, or integer tensors ``(...)`` for a batch."""

    positive: int | Tensor
    negative: int | Tensor
    zero: int | Tensor


def inertia(K: Float[Tensor, "*batch n n"], tol: float | None = None) -> Inertia:
    r"""The inertia of :math:`\frac12(K+K^{\mathsf T})`, the part on which alone :math:`c^{\mathsf T}Kc` depends.

    Parameters
    ----------
    K : Tensor
        ``(..., n, n)``.
    tol : float, optional
        Eigenvalues up to ``tol`` times the largest absolute eigenvalue count as zero
        (default: ``n`` times the machine epsilon, the size of their rounding errors).

    Returns
    -------
    Inertia

    Raises
    ------
    TypeError, ValueError
        If ``K`` is not a floating tensor of square matrices, or not finite, or ``tol`` is negative.
    """
    _check_matrix(K, square=True)
    eigenvalues = torch.linalg.eigvalsh(_symmetric_part(K))
    bound = _threshold(tol, K) * eigenvalues.abs().amax(-1, keepdim=True)
    counts = ((eigenvalues > bound).sum(-1), (eigenvalues < -bound).sum(-1), (eigenvalues.abs() <= bound).sum(-1))
    return Inertia(*(int(c) for c in counts)) if K.ndim == 2 else Inertia(*counts)


def effective_rank(K: Float[Tensor, "*batch n m"]) -> Float[Tensor, "*batch"]:
    r"""The exponential of the entropy of the singular values: :math:`e^{H(p)}`, :math:`p_i=\sigma_i/\sum_j\sigma_j`.

    It lies between 1 and the rank, and is the rank if all singular values but the zeros are equal.  Unlike the rank it
    changes little where the matrix does.

    Parameters
    ----------
    K : Tensor
        ``(..., n, m)``.

    Returns
    -------
    Tensor
        ``(...)``; 0 for a matrix of zeros.

    Raises
    ------
    TypeError, ValueError
        If ``K`` is not a floating tensor of matrices, or not finite.

    References
    ----------
    Roy and Vetterli 2007.
    """
    _check_matrix(K)
    singular = torch.linalg.svdvals(K)
    total = singular.sum(-1, keepdim=True)
    entropy = torch.special.entr(singular / torch.where(total == 0, 1.0, total)).sum(-1)
    return torch.where(total[..., 0] == 0, 0.0, entropy.exp())


def numerical_rank(K: Float[Tensor, "*batch n m"], tol: float | None = None) -> int | Tensor:
    r"""The number of singular values above ``tol`` times the largest.

    A statement about floating-point numbers.  It says nothing about the rank of the exact matrix, which may be full:
    see :func:`log_determinant`.

    Parameters
    ----------
    K : Tensor
        ``(..., n, m)``.
    tol : float, optional
        Default: the larger of ``n`` and ``m``, times the machine epsilon.

    Returns
    -------
    int or Tensor
        An integer tensor ``(...)`` for a batch.

    Raises
    ------
    TypeError, ValueError
        If ``K`` is not a floating tensor of matrices, or not finite, or ``tol`` is negative.
    """
    _check_matrix(K)
    singular = torch.linalg.svdvals(K)
    rank = (singular > _threshold(tol, K) * singular[..., :1]).sum(-1)
    return int(rank) if K.ndim == 2 else rank


def conditional_eigenvalues(K: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n_minus_1"]:
    r"""Eigenvalues of the form :math:`c^{\mathsf T}Kc` on the vectors with :math:`\sum_ic_i=0`, in ascending order.

    None is negative if and only if the form is never negative there, as a conditionally positive definite kernel
    requires; none is positive if :math:`\kappa` is of negative type.  They are the eigenvalues of
    :math:`Q^{\mathsf T}\frac12(K+K^{\mathsf T})Q` with the columns of :math:`Q` an orthonormal basis of these vectors.

    Parameters
    ----------
    K : Tensor
        ``(..., n, n)``.

    Returns
    -------
    Tensor
        ``(..., n - 1)``.

    Raises
    ------
    TypeError, ValueError
        If ``K`` is not a floating tensor of square matrices, or not finite.

    References
    ----------
    Schoenberg 1938.
    """
    _check_matrix(K, square=True)
    n = K.shape[-1]
    # The reflection that maps the constant vector to a multiple of e_1; its other columns are the basis.
    v = K.new_full((n,), n ** -0.5)
    v[0] += 1.0
    basis = (torch.eye(n, dtype=K.dtype, device=K.device) - 2 * torch.outer(v, v) / (v @ v))[:, 1:]
    return torch.linalg.eigvalsh(basis.mT @ _symmetric_part(K) @ basis)


def _symmetric_part(K: Tensor) -> Tensor:
    return (K + K.mT) / 2


def _threshold(tol: float | None, K: Tensor) -> float:
    if tol is None:
        return max(K.shape[-2:]) * torch.finfo(K.dtype).eps
    if not tol >= 0:
        raise ValueError(f"tol must be a number that is not negative, or None, not {tol!r}")
    return tol


def _check_matrix(K: Tensor, square: bool = False, name: str = "K") -> None:
    if not isinstance(K, Tensor) or not K.is_floating_point():
        what = f"a tensor of {K.dtype}" if isinstance(K, Tensor) else type(K).__name__
        raise TypeError(f"{name} must be a floating torch.Tensor of matrices, not {what}")
    if K.ndim < 2 or 0 in K.shape[-2:] or (square and K.shape[-2] != K.shape[-1]):
        wanted = "square matrices (..., n, n)" if square else "matrices (..., n, m)"
        hint = "; where queries and keys are not the same points, symmetry and definiteness mean nothing" \
            if square and K.ndim >= 2 and K.shape[-2] != K.shape[-1] else ""
        raise ValueError(f"{name} must hold {wanted}, not empty, but has shape {tuple(K.shape)}{hint}")
    if not K.isfinite().all():
        raise ValueError(f"{name} holds infinite values or NaN; a kernel that overflowed needs smaller points")


# ------------------------------------------------------------------------- determinants, in as many digits as it takes

class LogDeterminant(NamedTuple):
    """A determinant by its sign (1, -1, or 0) and the logarithm of its absolute value.

    ``digits`` is the number of decimal digits with which the same value had come out before they were doubled; for
    the sign 0, the largest number that was tried, or 0 if a repeated point made it needless to try.
    """

    sign: int
    log_abs: float
    digits: int

    @property
    def log10_abs(self) -> float:
        """The logarithm to base 10."""
        return self.log_abs / math.log(10)


def log_determinant(
    kernel: Kernel | str | Callable[[Sequence[Any], Sequence[Any]], Any],
    q: Float[Tensor, "n d"],
    k: Float[Tensor, "n d"],
    *,
    digits: int = 50,
    max_digits: int = 6400,
) -> LogDeterminant:
    r"""The logarithm of :math:`\lvert\det[\kappa(q_i,k_j)]\rvert`, in multiprecision arithmetic.

    The determinant is computed with ``digits`` decimal digits, then with twice as many, and so on, until two results
    in a row have the same sign, not 0, and logarithms that agree to :math:`10^{-12}`, absolutely or relatively.
    That is strong evidence, not a proof: rounding errors are not enclosed.  With a repeated point the determinant is 0.
    Any other zero is believed only if it comes out at every number of digits up to ``max_digits``, because entries
    that are close enough look equal at fewer.

    Parameters
    ----------
    kernel : Kernel, str or callable
        A kernel of the library, or a function ``entry(x, y)`` of two tuples of ``mpmath.mpf``, which must
        compute with mpmath's functions and not with those of ``math``, numpy or torch.
    q, k : Tensor
        ``(n, d)``, equally many queries and keys.  Their floating-point values are taken as exact.
    digits, max_digits : int
        Where to begin, and where to give up.

    Returns
    -------
    LogDeterminant
        With sign 0 and the logarithm minus infinity if a point is repeated, or every elimination ends in exact zeros.

    Raises
    ------
    TypeError
        If there is no multiprecision formula of the kernel, or ``entry`` returns a number of fixed precision.
    ValueError
        If the numbers of queries and keys differ, or their points or an entry are not finite.
    ArithmeticError
        If no two results agree, as where the exact matrix is singular and its entries are rounded.
    """
    import mpmath

    _check_matrix(q, name="q")
    _check_matrix(k, name="k")
    if q.ndim != 2 or k.ndim != 2 or q.shape != k.shape:
        raise ValueError("a determinant needs as many queries as keys, both (n, d), "
                         f"not {tuple(q.shape)} and {tuple(k.shape)}")
    if digits < 15:
        raise ValueError(f"digits must be at least 15, what floating point has, not {digits!r}")
    entry = _entry(kernels.get(kernel)) if isinstance(kernel, (Kernel, str)) else kernel
    if not callable(entry):
        raise TypeError(f"kernel must be a kernel, its name, or a function of two tuples, not {type(kernel).__name__}")

    if any(len(set(map(tuple, x.tolist()))) < len(x) for x in (q, k)):      # two equal rows or columns
        return LogDeterminant(0, -math.inf, 0)

    def evaluate(digits: int) -> tuple[int, Any]:
        with mpmath.workdps(digits):
            rows, columns = ([tuple(map(mpmath.mpf, point)) for point in x.tolist()] for x in (q, k))
            return _eliminate([[_as_mpf(entry(x, y)) for y in columns] for x in rows])

    sign, log_abs = evaluate(digits)
    never_else = sign == 0
    while 2 * digits <= max_digits:
        sign_again, log_again = evaluate(2 * digits)
        if sign == sign_again != 0 and abs(log_abs - log_again) <= 1e-12 * max(1, abs(log_again)):
            return LogDeterminant(sign, float(log_again), digits)
        sign, log_abs, digits = sign_again, log_again, 2 * digits
        never_else = never_else and sign == 0
    if never_else:
        return LogDeterminant(0, -math.inf, digits)
    raise ArithmeticError(f"the determinant has not settled at {digits} digits, where its logarithm to base 10 comes "
                          f"out as {float(log_abs) / math.log(10):.4g}; the matrix may be singular, or max_digits "
                          "(twice the last number that is tried) too small")


def _eliminate(rows: list[list[Any]]) -> tuple[int, Any]:
    """Sign and logarithm of a determinant, by Gaussian elimination with partial pivoting."""
    import mpmath

    # Not mpmath.det, which takes a pivot that is small against the matrix for 0.
    sign, log_abs, n = 1, mpmath.mpf(0), len(rows)
    for j in range(n):
        p = max(range(j, n), key=lambda i: abs(rows[i][j]))
        pivot = rows[p][j]
        if not pivot:
            return 0, -mpmath.inf
        rows[j], rows[p] = rows[p], rows[j]
        sign *= (1 if p == j else -1) * int(mpmath.sign(pivot))
        log_abs += mpmath.log(abs(pivot))
        for i in range(j + 1, n):
            factor = rows[i][j] / pivot
            for col in range(j + 1, n):
                rows[i][col] -= factor * rows[j][col]
    return sign, log_abs


def _as_mpf(value: Any) -> Any:
    import mpmath

    if isinstance(value, mpmath.mpf):
        if not mpmath.isfinite(value):
            raise ValueError(f"the entry function returned {value}; a determinant needs finite entries")
        return value
    if isinstance(value, int):
        return mpmath.mpf(value)
    raise TypeError(f"the entry function returned a {type(value).__name__}, which has a fixed precision; compute with "
                    "mpmath's functions (mpmath.exp in the place of math.exp, numpy.exp or torch.exp), so that it "
                    "returns an mpmath.mpf")


def _entry(kernel: Kernel) -> Callable[[Sequence[Any], Sequence[Any]], Any]:
    """A kernel of the library as a function of tuples of mpmath numbers; tested against the kernel's own definition."""
    import mpmath

    def dot(x, y):
        return mpmath.fdot(x, y)

    def square(x, y):
        return mpmath.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True))

    def least(x, y):
        return mpmath.fsum(min(a, b) for a, b in zip(x, y, strict=True))

    def scale(x):
        # The default 1/sqrt(d) is meant exactly, an explicit scale as the float that it is.
        given = kernel.scale
        return 1 / mpmath.sqrt(len(x)) if given is None else mpmath.mpf(given)

    def precision(x):
        return 1 / mpmath.sqrt(len(x)) if kernel.bandwidth is None else mpmath.mpf(kernel.bandwidth) ** -2

    def cosine(x, y):
        lengths = mpmath.sqrt(dot(x, x) * dot(y, y))
        return dot(x, y) / lengths if lengths else mpmath.mpf(0)

    def parts():
        return _entry(kernel.first), _entry(kernel.second)

    formulas: dict[type[Kernel], Callable[[Any, Any], Any]] = {
        kernels.EDP: lambda x, y: mpmath.exp(dot(x, y) * scale(x)),
        kernels.RBF: lambda x, y: mpmath.exp(-square(x, y) * precision(x) / 2),
        kernels.L2: lambda x, y: mpmath.sqrt(square(x, y)) * scale(x),
        kernels.L2Squared: lambda x, y: square(x, y) * scale(x),
        kernels.Intersection: lambda x, y: least(x, y) * scale(x),
        kernels.ExponentiatedIntersection: lambda x, y: mpmath.exp(least(x, y) * scale(x)),
        kernels.Quadratic: lambda x, y: (dot(x, y) * scale(x)) ** 2,
        kernels.Polynomial: lambda x, y: (dot(x, y) * scale(x) + mpmath.mpf(kernel.offset)) ** kernel.degree,
        kernels.Taylor: lambda x, y: mpmath.fsum((dot(x, y) * scale(x)) ** n / mpmath.factorial(n)
                                                 for n in range(kernel.degree + 1)),
        kernels.Linear: lambda x, y: dot(x, y) * scale(x),
        kernels.Cosine: cosine,
        kernels.Constant: lambda x, y: mpmath.mpf(kernel.value),
        kernels.Sum: lambda x, y: parts()[0](x, y) + parts()[1](x, y),
        kernels.Product: lambda x, y: parts()[0](x, y) * parts()[1](x, y),
        kernels.Exponential: lambda x, y: mpmath.exp(_entry(kernel.base)(x, y)),
        kernels.Scaled: lambda x, y: mpmath.mpf(kernel.factor) * _entry(kernel.base)(x, y),
    }
    # By the exact class: a subclass may define another function.
    if type(kernel) not in formulas:
        raise TypeError(f"{kernel!r} cannot be evaluated in multiprecision: its definition computes with torch. Pass a "
                        "function entry(x, y) of two tuples of mpmath numbers in its place")
    return formulas[type(kernel)]


# ------------------------------------------------------------------------- the Mercer criterion

@dataclass(frozen=True)
class MercerVerdict:
    r"""Whether a head's exponentiated dot product is a Mercer kernel on the tokens, with a proof if it is not.

    Parameters
    ----------
    mercer : bool
        Whether :math:`A=W_Q^{\mathsf T}W_K` is symmetric and has no negative eigenvalue, both up to ``tol``.
    reason : str
        Why, in words and numbers.
    asymmetry : float
        Largest singular value of the antisymmetric part of :math:`A`, over
        :math:`\lVert W_Q\rVert_F\lVert W_K\rVert_F`.
    smallest : float
        Smallest eigenvalue of its symmetric part, over the same.
    tol : float
        What both were compared with.
    points : Tensor or None
        Two tokens :math:`x_1,x_2`, ``(2, m)``, if it is not.
    coefficients : Tensor or None
        Two numbers :math:`c_1,c_2` with :math:`\sum_{ij}c_ic_j\kappa(x_i,x_j)=` ``value``.  They are
        :math:`\pm\kappa(x_i,x_i)^{-1/2}`.
    log_sizes : Tensor or None
        :math:`\log\lvert c_i\rvert`, for where the antisymmetric part is so small that the tokens are long, the kernel
        overflows and ``coefficients`` underflow to 0.
    value : float or None
        The value of the form, negative; computed with as many digits as it takes to be sure of its sign.
    """

    mercer: bool
    reason: str
    asymmetry: float
    smallest: float
    tol: float
    points: Float[Tensor, "2 m"] | None = None
    coefficients: Tensor | None = None
    log_sizes: Tensor | None = None
    value: float | None = None

    def __str__(self) -> str:
        return f"{'Mercer' if self.mercer else 'not Mercer'}: {self.reason}"


def mercer_on_tokens(
    W_q: Float[Tensor, "m d"],
    W_k: Float[Tensor, "m d"],
    *,
    scale: float | None = None,
    tol: float | None = None,
) -> MercerVerdict:
    r"""Whether :math:`\kappa(x,y)=\exp(x^{\mathsf T}Ay/\sqrt d)`, :math:`A=W_Q^{\mathsf T}W_K`, is a Mercer kernel.

    On :math:`\mathbb R^m\times\mathbb R^m` it is one, that is, symmetric and positive definite, if and only if
    :math:`A` is symmetric without negative eigenvalues.  If it is not, two tokens violate the inequality
    :math:`\frac12(\kappa(x,y)+\kappa(y,x))\le\sqrt{\kappa(x,x)\kappa(y,y)}`, and they are returned.

    Parameters
    ----------
    W_q, W_k : Tensor
        ``(m, d)``: in code a token is a row and its query ``t @ W_q``, so these are the transposes of the
        :math:`W_Q,W_K` of the text.
    scale : float, optional
        Factor of :math:`q\cdot k` (default :math:`1/\sqrt d`).
    tol : float, optional
        The antisymmetric part of :math:`A` and the negative eigenvalues of the symmetric one are held to be rounding
        errors up to ``tol`` times :math:`\lVert W_Q\rVert_F\lVert W_K\rVert_F`; below 1, as neither is ever larger.
        Default: the mean machine epsilon of the two dtypes, which is what rounding the entries of two matrices can do,
        and for what is computed here, in float64, 4 times the larger of ``m`` and ``d``, times its epsilon.
        Matrices that were computed in lower precision than they are stored in need a larger one.  In bfloat16
        the default is nearly as large as a violation of random heads, which is about ``1/d``.

    Returns
    -------
    MercerVerdict
        A negative verdict is proved by its two tokens, for the maps as they are stored.  A positive one means that no
        violation is larger than ``tol``; ``reason`` says how far the maps are from the criterion.

    Raises
    ------
    TypeError, ValueError
        If the matrices are not finite floating tensors of one shape, the scale is not positive, or ``tol`` is not
        between 0 and 1, or so small that rounding errors were taken for violations.

    References
    ----------
    Chapter *Mercer or not*.
    """
    for name, W in (("W_q", W_q), ("W_k", W_k)):
        _check_matrix(W, name=name)
    if W_q.shape != W_k.shape or W_q.ndim != 2:
        raise ValueError("W_q and W_k must both be (m, d), maps of the same tokens to one width, but are "
                         f"{tuple(W_q.shape)} and {tuple(W_k.shape)}")
    m, d = W_q.shape
    if scale is None:
        scale = d ** -0.5
    elif not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be a positive number or None (1/sqrt(d)), not {scale!r}")
    if tol is None:
        tol = (sum(torch.finfo(W.dtype).eps for W in (W_q, W_k)) / 2
               + 4 * max(m, d) * torch.finfo(torch.float64).eps)
    elif not 0 < tol < 1:
        raise ValueError(f"tol must lie between 0 and 1, or be None, not {tol!r}: symmetry is never exact in floating "
                         "point, and no head violates it by more than 1 in the units of tol")
    W_q, W_k = W_q.detach().double(), W_k.detach().double()

    norms = [_norm(W) for W in (W_q, W_k)]
    if 0 in norms:
        return MercerVerdict(True, "A = 0, so the kernel is the constant 1", 0.0, 0.0, tol)
    A = (W_q / norms[0]) @ (W_k / norms[1]).T   # entries of A carry errors of a few eps in this unit
    # Tokens times this make x'Ay the exponent; factor by factor, since the product of the norms may overflow.
    unit = norms[0] ** -0.5 * norms[1] ** -0.5 * scale ** -0.5
    S, J = _symmetric_part(A), (A - A.T) / 2
    eigenvalues, eigenvectors = torch.linalg.eigh(S)
    smallest, skew = eigenvalues[0].item(), torch.linalg.matrix_norm(J, 2).item()
    numbers = f"smallest eigenvalue {smallest:.3g}, antisymmetric part {skew:.3g}, tolerance {tol:.3g}"
    if smallest >= -tol and skew <= tol:
        exact = "" if smallest >= 0 and skew == 0 else ", up to the tolerance"
        return MercerVerdict(True, f"A is symmetric without negative eigenvalues{exact} ({numbers}, in units of the "
                                   "norms of the maps)", skew, smallest, tol)
    if smallest < -tol:
        why = "A has a negative eigenvalue" if skew <= tol else "the symmetric part of A has a negative eigenvalue"
        # x'Ax = -1 in the exponent: the pair 0, x has off-diagonal 1 and diagonal 1, 1/e.
        x = eigenvectors[:, 0] * unit / (-smallest) ** 0.5
        pairs = iter([torch.stack([torch.zeros_like(x), x])])
    else:
        why = "A is not symmetric"
        pairs = (unit * pair for pair in _skew_pairs(S, J))
    certificate = _best_certificate(pairs, W_q, W_k, scale)
    if certificate is None:
        raise ValueError(f"tol = {tol:.3g} is below the rounding errors of these matrices ({numbers}); raise it")
    pair, log_sizes, value = certificate
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64, device=A.device)
    return MercerVerdict(False, f"{why} ({numbers}, in units of the norms of the maps)", skew, smallest, tol,
                         pair, signs * log_sizes.exp(), log_sizes, value)


def _norm(W: Tensor) -> float:
    """The Frobenius norm, of entries of any size."""
    largest = W.abs().max().item()
    return largest * torch.linalg.matrix_norm(W / largest).item() if largest else 0.0


def _skew_pairs(S: Tensor, J: Tensor) -> Iterator[Tensor]:
    r"""Pairs of points :math:`x,\,x+h` that should have :math:`h^{\mathsf T}Sh<2\log\cosh(x^{\mathsf T}Jh)`."""
    # In coordinates where S is the identity, the plane in which J is largest, nu, holds the two directions p and q:
    # x = alpha p, h = beta q gives h'Sh = beta^2 and x'Jh = alpha beta nu.  S may be singular, so that a multiple of
    # the identity is added; the smaller, the longer the points, but the smaller the numbers in the exponent, until
    # the zeros of S are so magnified that rounding errors in J are all that is left of it.
    eigenvalues, vectors = torch.linalg.eigh(S)
    eigenvalues = eigenvalues.clamp(min=0)
    skew = torch.linalg.matrix_norm(J, 2).item()
    added = max(eigenvalues[-1].item(), skew)
    while added > 1e-12 * skew:
        root = vectors * (eigenvalues + added).rsqrt() @ vectors.T
        U, singular, Vh = torch.linalg.svd(root @ J @ root)
        x = root @ U[:, 0] * (1.5 / singular[0])
        yield torch.stack([x, x + root @ Vh[0] * 1.2])
        added /= 100


def _best_certificate(
    pairs: Iterator[Tensor], W_q: Tensor, W_k: Tensor, scale: float
) -> tuple[Tensor, Tensor, float] | None:
    r"""Of the pairs of points that violate the inequality, the one at which the kernel's logarithms are smallest.

    With the coefficients :math:`\pm\kappa(x_i,x_i)^{-1/2}` the form is
    :math:`2-(\kappa(x,y)+\kappa(y,x))/\sqrt{\kappa(x,x)\kappa(y,y)}`.  The points and maps are taken as exact, and the
    exponents, which nearly cancel, are computed with 40 digits more than they have before the point.
    """
    import mpmath

    maps = [[list(map(mpmath.mpf, column)) for column in W.T.tolist()] for W in (W_q, W_k)]
    best = None
    for pair in pairs:
        largest = (pair @ W_q).abs().max().item() * (pair @ W_k).abs().max().item() * scale
        with mpmath.workdps(40 + max(0, math.ceil(math.log10(max(largest, 1.0))))):
            points = [list(map(mpmath.mpf, x)) for x in pair.tolist()]
            q, k = ([[mpmath.fdot(x, column) for column in W] for x in points] for W in maps)
            logit = [[mpmath.fdot(a, b) * mpmath.mpf(scale) for b in k] for a in q]
            half = (logit[0][0] + logit[1][1]) / 2
            value = 2 - mpmath.exp(logit[0][1] - half) - mpmath.exp(logit[1][0] - half)
        if not value < -0.1:
            if best is not None:                # beyond this only rounding errors
                break
            continue
        log_sizes = torch.tensor([float(-logit[i][i] / 2) for i in range(2)], dtype=torch.float64, device=pair.device)
        if best is None or log_sizes.abs().max() < 0.99 * best[1].abs().max():
            best = pair, log_sizes, float(value)
        if log_sizes.abs().max() < 150:         # the kernel at these points is far from overflow
            break
    return best
