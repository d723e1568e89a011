r"""The theory at finite width: order parameters that minimise the action, and what they predict.

The one approximation is to replace the law of the order parameter :math:`U` by its mode.  It becomes exact where
widths and the number of examples grow together, at a fixed number of paths, and its errors fall like one over the
width.

The solver works in coordinates in which the prior is simple.  With lower triangular :math:`B_l`,

.. math:: A_{L+1}=\sigma_aB_{L+1},\qquad A_l=\sigma_l\,(I_{H_l}\otimes A_{l+1})\,B_l,\qquad U^{(l)}=A_lA_l^{\mathsf T},

every hierarchy is positive definite and the prior's part of the action is a sum over the entries of all :math:`B_l`,

.. math:: \sum_lN_l\Bigl[\lVert B_l\rVert_F^2-2\sum_i\ln(B_l)_{ii}-d_l\Bigr],

a convex function of the unknowns :math:`\theta_l`: these are :math:`\sqrt{2N_l}` times the entries of :math:`B_l`,
where of a diagonal entry :math:`b=\ln(1+e^t)` the unknown is :math:`t`, which grows like :math:`b` and falls like
:math:`\ln b`.  At the prior's mean, :math:`B_l=I`, the second derivatives are 0.8 for these and 1 for the others,
whatever the widths.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.linalg import lapack, solve_triangular
from scipy.optimize import LbfgsInvHessProduct, brentq, minimize
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from .action import Architecture, check_problem, energy
from .kernels import combine, paths_through

__all__ = ["Minimum", "Prediction", "Solution", "gp_limit", "large_width", "noiseless_single_path", "posterior",
           "predict", "single_path", "solve_order_parameters"]

_INDEFINITE = ("K(U) + T is not positive definite in float64: either the kernels are not inner products of path "
               "inputs, or U is not positive semidefinite, or the temperature is too small for the size of the kernels")


# ------------------------------------------------------------------------- what is found

@dataclass(frozen=True)
class Minimum:
    """A local minimum of the action, and how well it was found.

    Attributes
    ----------
    U : list of Tensor
        :math:`U^{(1)},\\dots,U^{(L+1)}`, ``(d_l, d_l)``; the first is the order parameter of the paths.
    action : float
        :math:`S`, its constants included.
    entropy, energy : float
        Its parts: what the prior asks for the departure from its mean, never negative, and what the data ask for.
    gradient_norm : float
        Euclidean norm of the action's gradient in the solver's coordinates :math:`\\theta`.
    converged : bool
        Whether that is as small as was asked for.
    starts : tuple of str
        The starts that led here.
    """

    U: list[Tensor] = field(repr=False)
    action: float
    entropy: float
    energy: float
    gradient_norm: float
    converged: bool
    starts: tuple[str, ...]


@dataclass(frozen=True)
class Solution:
    """The order parameters of a problem, with the problem itself.

    Attributes
    ----------
    U, action, entropy, energy, gradient_norm, converged
        Of the lowest minimum: see :class:`Minimum`.
    minima : tuple of Minimum
        All that were found, the lowest first.
    evaluations : int
        Evaluations of the action and its gradient, over all starts.
    kernels, labels, heads, widths, variances, temperature
        The problem.
    """

    U: list[Tensor] = field(repr=False)
    action: float
    entropy: float
    energy: float
    gradient_norm: float
    converged: bool
    minima: tuple[Minimum, ...] = field(repr=False)
    evaluations: int
    kernels: Float[Tensor, "Pi Pi P P"] = field(repr=False)
    labels: Float[Tensor, " P"] = field(repr=False)
    heads: tuple[int, ...]
    widths: tuple[float, ...]
    variances: tuple[float, ...]
    temperature: float

    @property
    def kernel(self) -> Float[Tensor, "P P"]:
        """The kernel of the order parameter, :math:`K(U)`, without the temperature."""
        return combine(self.U[0].to(self.kernels), self.kernels)


class Prediction(NamedTuple):
    """Mean and variance of the network's output, ``(..., P_test)``, without the noise of variance :math:`T`."""

    mean: Float[Tensor, "*batch P_test"]
    variance: Float[Tensor, "*batch P_test"]


# ------------------------------------------------------------------------- the data's part, packed

class _Energy:
    """The data's part of the action, with its gradient in U.

    U and K are symmetric, so of the kernels between paths only the pairs of paths in order, and of each the lower
    triangle of the symmetric part, are kept: a quarter of the numbers.  Both passes over them are one matrix-vector
    product.
    """

    def __init__(self, kernels: Tensor, labels: Tensor, temperature: float) -> None:
        self.paths, self.examples = len(kernels), len(labels)
        self.y = labels.detach().cpu().double().numpy()
        self.temperature = temperature
        self.lower = np.tril_indices(self.examples)
        self.pairs = np.tril_indices(self.paths)
        self.packed = np.empty((len(self.pairs[0]), len(self.lower[0])))
        biggest, asymmetry = 0.0, 0.0
        for row, a, b in zip(self.packed, *self.pairs, strict=True):
            block, mirror = (kernels[i].detach().cpu().double().numpy() for i in ((a, b), (b, a)))
            if not (np.isfinite(block).all() and np.isfinite(mirror).all()):
                raise ValueError("kernels has entries that are not finite numbers")
            biggest, asymmetry = max(biggest, abs(block).max()), max(asymmetry, abs(block - mirror.T).max())
            row[:] = ((block + mirror) / 2)[self.lower]
        if asymmetry > torch.finfo(kernels.dtype).eps ** 0.5 * biggest:
            raise ValueError("kernels[a, b] must be the transpose of kernels[b, a], which inner products of the "
                             f"same inputs are; they differ by up to {asymmetry:.3g}")
        self.weights = np.where(self.pairs[0] == self.pairs[1], 1.0, 2.0) / self.paths
        self.twice = np.where(self.lower[0] == self.lower[1], 1.0, 2.0)

    def kernel(self, U: NDArray) -> NDArray:
        """The lower triangle of K(U)."""
        K = np.zeros((self.examples, self.examples))
        K[self.lower] = (self.weights * U[self.pairs]) @ self.packed
        return K

    def __call__(self, U: NDArray) -> tuple[float, NDArray | None]:
        """Value and gradient; infinity and None where K(U) + T is not positive definite in float64."""
        K = self.kernel(U)
        K[np.diag_indices_from(K)] += self.temperature
        factor, info = lapack.dpotrf(K, lower=True, overwrite_a=True)
        if info:
            return math.inf, None
        log_det = 2 * np.log(factor[np.diag_indices_from(factor)]).sum()
        inverse = lapack.dpotri(factor, lower=True)[0]
        residual = inverse[self.lower]
        inverse += np.tril(inverse, -1).T                       # potri leaves the upper triangle at zero
        alpha = inverse @ self.y
        residual -= alpha[self.lower[0]] * alpha[self.lower[1]]
        G = np.empty((self.paths, self.paths))
        G[self.pairs] = self.packed @ (self.twice * residual) / self.paths
        G.T[self.pairs] = G[self.pairs]
        return float(log_det + self.y @ alpha), G


# ------------------------------------------------------------------------- the prior's part, whitened

class _Coordinates:
    """From the unknowns to the hierarchy, and from its gradient back to theirs."""

    def __init__(self, architecture: Architecture) -> None:
        self.heads = (*architecture.heads, 1)
        self.deviations = [math.sqrt(v) for v in architecture.variances[1:]]
        self.widths, self.sizes = architecture.widths, architecture.sizes
        self.lower = [np.tril_indices(d) for d in self.sizes]
        self.ends = np.cumsum([0, *(len(rows) for rows, _ in self.lower)])
        self.on_diagonal = [rows == columns for rows, columns in self.lower]

    def triangles(self, theta: NDArray) -> list[NDArray]:
        """The matrices B, top level last."""
        matrices = []
        for level, d in enumerate(self.sizes):
            entries = theta[self.ends[level]:self.ends[level + 1]] / math.sqrt(2 * self.widths[level])
            entries[self.on_diagonal[level]] = np.logaddexp(0, entries[self.on_diagonal[level]])
            B = np.zeros((d, d))
            B[self.lower[level]] = entries
            matrices.append(B)
        return matrices

    def unknowns(self, triangles: list[NDArray]) -> NDArray:
        """The inverse of :meth:`triangles`."""
        parts = []
        for level, B in enumerate(triangles):
            entries = B[self.lower[level]]
            b = entries[self.on_diagonal[level]]
            entries[self.on_diagonal[level]] = b + np.log(-np.expm1(-b))
            parts.append(entries * math.sqrt(2 * self.widths[level]))
        return np.concatenate(parts)

    def inverse(self, U: Sequence[Tensor], name: str) -> list[NDArray]:
        """The matrices B of a hierarchy."""
        if [tuple(u.shape) for u in U] != [(d, d) for d in self.sizes]:
            raise ValueError(f"{name} must be a list of matrices of the sizes {self.sizes}, from the paths to the "
                             f"readout, but has the shapes {[tuple(u.shape) for u in U]}")
        A, triangles = np.ones((1, 1)), []
        for level in reversed(range(len(self.sizes))):
            try:
                above, A = A, np.linalg.cholesky(U[level].detach().cpu().double().numpy())
            except np.linalg.LinAlgError:
                raise ValueError(f"{name}[{level}] is not positive definite") from None
            left = self.deviations[level] * np.kron(np.eye(self.heads[level]), above)
            triangles.insert(0, np.linalg.solve(left, A))
        return triangles

    def roots(self, triangles: list[NDArray]) -> tuple[list[NDArray], list[NDArray]]:
        """The factors A of the hierarchy, and what each is made of: sigma (I x A of the level above)."""
        A, roots, lefts = np.ones((1, 1)), [], []
        for level in reversed(range(len(self.sizes))):
            left = self.deviations[level] * np.kron(np.eye(self.heads[level]), A)
            A = left @ triangles[level]
            roots.insert(0, A)
            lefts.insert(0, left)
        return roots, lefts

    def entropy(self, triangles: list[NDArray]) -> float:
        return float(sum(N * ((B * B).sum() - 2 * np.log(B.diagonal()).sum() - len(B))
                         for N, B in zip(self.widths, triangles, strict=True)))

    def gradient(self, triangles: list[NDArray], roots: list[NDArray], lefts: list[NDArray], G: NDArray) -> NDArray:
        """The gradient in the unknowns of the entropy and of an energy whose gradient in U is G."""
        parts, slope = [], 2 * G @ roots[0]                     # the energy's gradient in A, level by level upwards
        for level, (B, left) in enumerate(zip(triangles, lefts, strict=True)):
            N, H = self.widths[level], self.heads[level]
            entries, diagonal = (left.T @ slope + 2 * N * B)[self.lower[level]], self.on_diagonal[level]
            b = B.diagonal()
            entries[diagonal] = (entries[diagonal] - 2 * N / b) * -np.expm1(-b)
            parts.append(entries / math.sqrt(2 * N))
            inner = len(B) // H
            blocks = (slope @ B.T).reshape(H, inner, H, inner)
            slope = self.deviations[level] * np.einsum("hihj->ij", blocks)
        return np.concatenate(parts)


# ------------------------------------------------------------------------- starts

def _starts(energy: _Energy, architecture: Architecture) -> list[tuple[str, list[NDArray]]]:
    """Where to begin: the bottoms of the action's wells on curves through the prior's mean, as matrices B with names.

    One curve are the multiples of the identity; all its wells count.  Each head has a curve of its own, on which the
    paths through it are amplified; wells on it count that the prior's mean does not lie in.  All levels bear their
    share of a multiple, as that is much cheaper: the matrices B are diagonal, with squares that are given here for all
    points of a curve.  One eigendecomposition gives the energy on a whole curve.
    """
    s, widths, heads, sizes = architecture.scale, architecture.widths, architecture.heads, architecture.sizes

    def curve(name, squares, multiples, line, outside):
        """The bottoms of all wells but one on a curve of U = s (1 - line) + s * multiple * line."""
        K, D = energy.kernel(s * np.diag(1 - line)), energy.kernel(s * np.diag(line))
        K[np.diag_indices_from(K)] += energy.temperature
        factor, info = lapack.dpotrf(K, lower=True)
        if info:
            raise ValueError(_INDEFINITE)
        D += np.tril(D, -1).T
        half = solve_triangular(factor, D, lower=True)
        values, vectors = np.linalg.eigh(solve_triangular(factor, half.T, lower=True))
        loads = (vectors.T @ solve_triangular(factor, energy.y, lower=True)) ** 2
        grown = 1 + multiples[:, None] * np.maximum(values, 0)
        profile = np.log(grown).sum(1) + (loads / grown).sum(1)
        profile += sum(N * (part - np.log(part) - 1).sum(1) for N, part in zip(widths, squares, strict=True))
        padded = np.concatenate([[np.inf], profile, [np.inf]])
        bottoms = np.flatnonzero((profile < padded[:-2]) & (profile <= padded[2:]))
        if outside is not None:                                           # of the well that this point lies in
            before, after = bottoms[bottoms <= outside], bottoms[bottoms >= outside]
            bottoms = bottoms[bottoms != (before[-1] if padded[outside] < profile[outside] else after[0])]
        return [(f"{name} times {multiples[i]:.3g}", [np.diag(np.sqrt(part[i])) for part in squares]) for i in bottoms]

    # For a product of the levels' squares, which is all that the energy sees, the entropy is least where
    # N_l d_l (square - 1) is the same at all levels: this number runs through the grid.
    strength = np.multiply(widths, sizes)
    grid = strength.min() * np.concatenate([np.logspace(-12, -1e-6, 400) - 1, [0.0], np.logspace(-6, 12, 600)])
    squares = [1 + np.repeat(grid[:, None] / k, d, 1) for k, d in zip(strength, sizes, strict=True)]
    multiples = math.prod(part[:, 0] for part in squares)
    starts = curve("all paths", squares, multiples, np.ones(energy.paths), None)

    # Levels below a head know it as an index; at its own level the other heads undo what the levels above do to all.
    levels, share = len(sizes), np.logspace(-12, 12, 961)[:, None] ** (1 / len(sizes))
    for layer, H in enumerate(heads):
        for head in range(H if H > 1 else 0):                             # a single head is that of all paths
            squares = []
            for level, d in enumerate(sizes):
                if level > layer:
                    squares.append(np.repeat(share, d, 1))
                else:
                    through = paths_through(heads[level:], layer - level, head).numpy()
                    others = share ** -(levels - 1 - layer) if level == layer else np.ones_like(share)
                    squares.append(np.where(through, share, others))
            line = paths_through(heads, layer, head).double().numpy()
            starts += curve(f"head {head} of layer {layer}", squares, share[:, 0] ** levels, line, len(share) // 2)
    return starts


# ------------------------------------------------------------------------- the solver

def _descend(objective, start: NDArray, tol: float, max_iter: int) -> tuple[NDArray, float]:
    """A stationary point by a quasi-Newton method, and the norm of the gradient there.

    Line searches end where differences of the action drown in rounding, often at gradients of about 1e-6.  Gradients
    are still good there.  So the search ends early, and the curvatures that it has learned are put to steps that ask
    for a small gradient and for nothing else; where those fail, it goes on.
    """
    last = objective(start)[0]
    if last == math.inf:
        raise ValueError(_INDEFINITE)

    def guarded(theta):                  # a step so long that rounding makes K(U) + T indefinite is refused, not taken
        nonlocal last
        value, gradient = objective(theta)
        if gradient is None:
            return last + 1e3 * (1 + abs(last)), np.zeros_like(theta)
        last = value
        return value, gradient

    best = start
    for target in (1e-3, 1e-5, 0.0):
        found = minimize(guarded, best, jac=True, method="L-BFGS-B",
                         options={"maxiter": max_iter, "maxfun": 2 * max_iter, "maxcor": 30, "ftol": 0.0,
                                  "gtol": max(target, 0.1 * tol) / math.sqrt(len(start))})
        max_iter -= found.nit
        best, norm = _polish(objective, found, 0.1 * tol, min(max_iter, 30))
        if norm <= tol or max_iter <= 0:
            break
    return best, norm


def _polish(objective, found, tol: float, max_iter: int) -> tuple[NDArray, float]:
    """The best of some full quasi-Newton steps, by the norm of the gradient, from the end of a search.

    Of those that do not climb: a small gradient alone would do for a saddle, too.
    """
    theta, (value, gradient) = found.x, objective(found.x)
    best, norm, most = theta, np.linalg.norm(gradient), value + 1e-10 * (1 + abs(value))
    steps, changes = list(found.hess_inv.sk), list(found.hess_inv.yk)
    for _ in range(max_iter):
        if norm <= tol:
            break
        pairs = (np.reshape(vectors, (-1, len(theta))) for vectors in (steps, changes))
        step = -LbfgsInvHessProduct(*pairs).matvec(gradient)
        value, new = objective(theta + step)
        if new is None or value > most or not np.linalg.norm(new) < 100 * norm:
            break
        if step @ (new - gradient) > 0:
            steps.append(step)
            changes.append(new - gradient)
        theta, gradient = theta + step, new
        if np.linalg.norm(gradient) < norm:
            best, norm = theta, np.linalg.norm(gradient)
    return best, norm


def solve_order_parameters(
    kernels: Float[Tensor, "Pi Pi P P"],
    labels: Float[Tensor, " P"],
    *,
    heads: Sequence[int],
    widths: Sequence[float],
    variances: Sequence[float],
    temperature: float,
    starts: Sequence[Sequence[Float[Tensor, "d d"]]] = (),
    tol: float = 1e-6,
    max_iter: int = 2000,
) -> Solution:
    r"""The order parameters :math:`U^{(1)},\dots,U^{(L+1)}` that minimise the :func:`~kernelbook.paths.action`.

    The action is not convex: where the kernel of some paths, at its prior scale, is much smaller than the temperature,
    there may be a minimum near the prior's mean, which leaves them alone, and another one far away, which amplifies
    them.  The action is therefore minimised from several starts: the bottom of each well that it has among multiples
    of the identity; the bottom of each further well where the paths through one head are amplified; and ``starts``.
    The lowest minimum is the solution, and all are handed back.  (That it is the lowest of all is not certain.)

    Parameters
    ----------
    kernels : Tensor
        Kernels between paths, ``(Pi, Pi, P, P)``, from :func:`~kernelbook.paths.path_kernels`; :math:`\sigma_0^2` is
        part of them.
    labels : Tensor
        :math:`y`, ``(P,)``.
    heads : sequence of int
        :math:`(H_1,\dots,H_L)`; their product is the number of paths.
    widths : sequence of float
        :math:`(N_1,\dots,N_L,N_a)`.
    variances : sequence of float
        :math:`(\sigma_0^2,\dots,\sigma_L^2,\sigma_a^2)`.
    temperature : float
        :math:`T`, the variance of the noise, positive.
    starts : sequence of list of Tensor, optional
        Further points to start from, each a list like ``Solution.U``; the solution at another width, for one.
    tol : float
        The Euclidean norm of the gradient to reach, in the coordinates :math:`\theta` of
        :mod:`kernelbook.paths.theory`.  They are scaled so that the action is then about ``tol**2 / 2`` above its
        minimum.
    max_iter : int
        Quasi-Newton steps from each start at most.

    Returns
    -------
    Solution
        In float64, whatever the type of ``kernels``.

    Raises
    ------
    ValueError
        If an argument does not fit, or :math:`K(U)+T` is not positive definite in float64.

    Warns
    -----
    ConvergenceWarning
        If the gradient at the lowest point is above ``tol``; then ``converged`` is false.

    Notes
    -----
    An evaluation costs :math:`O(P^3+\Pi^2P^2)`, and the solver keeps :math:`\Pi^2P^2/4` numbers besides ``kernels``.
    """
    architecture = Architecture(heads, widths, variances)
    check_problem(kernels, labels, temperature, architecture.paths)
    if not 0 < tol < math.inf:
        raise ValueError(f"tol must be a positive number, not {tol!r}")
    if isinstance(max_iter, bool) or not isinstance(max_iter, int) or max_iter < 1:
        raise ValueError(f"max_iter must be a positive integer, not {max_iter!r}")
    energy, coordinates = _Energy(kernels, labels, temperature), _Coordinates(architecture)
    evaluations = 0

    def objective(theta):
        nonlocal evaluations
        evaluations += 1
        triangles = coordinates.triangles(theta)
        roots, lefts = coordinates.roots(triangles)
        E, G = energy(roots[0] @ roots[0].T)
        if G is None:
            return math.inf, None
        return coordinates.entropy(triangles) + E, coordinates.gradient(triangles, roots, lefts, G)

    first = _starts(energy, architecture)
    first += [(f"starts[{i}]", coordinates.inverse(U, f"starts[{i}]")) for i, U in enumerate(starts)]
    minima: list[Minimum] = []
    for name, triangles in first:
        theta, norm = _descend(objective, coordinates.unknowns(triangles), tol, max_iter)
        triangles = coordinates.triangles(theta)
        roots, _ = coordinates.roots(triangles)
        S_entropy, S_energy = coordinates.entropy(triangles), energy(roots[0] @ roots[0].T)[0]
        U = [torch.from_numpy(A @ A.T) for A in roots]
        minima.append(Minimum(U, S_entropy + S_energy + architecture.constant, S_entropy, S_energy, float(norm),
                              bool(norm <= tol), (name,)))
    minima = _distinct(minima)
    best = minima[0]
    if not best.converged:
        warnings.warn(f"solve_order_parameters stopped at a gradient norm of {best.gradient_norm:.3g}, not {tol:.3g}: "
                      "do not rely on U; raise max_iter, or tol where rounding is the limit (a temperature far below "
                      "the kernels)", ConvergenceWarning, stacklevel=2)
    return Solution(best.U, best.action, best.entropy, best.energy, best.gradient_norm, best.converged, tuple(minima),
                    evaluations, kernels, labels, architecture.heads, architecture.widths, architecture.variances,
                    float(temperature))


def _distinct(minima: list[Minimum]) -> list[Minimum]:
    """The minima, lowest first, those that are the same point once."""
    kept: list[Minimum] = []
    for minimum in sorted(minima, key=lambda m: (m.action, m.gradient_norm)):
        for i, other in enumerate(kept):
            if all(torch.allclose(u, v, rtol=1e-3, atol=1e-3 * v.abs().max().item())
                   for u, v in zip(minimum.U, other.U, strict=True)):
                better = min(minimum, other, key=lambda m: m.gradient_norm)
                kept[i] = replace(better, starts=other.starts + minimum.starts)
                break
        else:
            kept.append(minimum)
    return kept


# ------------------------------------------------------------------------- predictions

def posterior(
    U: Float[Tensor, "*batch Pi Pi"],
    kernels: Float[Tensor, "Pi Pi P P"],
    labels: Float[Tensor, " P"],
    cross: Float[Tensor, "Pi Pi P_test P"],
    diagonal: Float[Tensor, "Pi Pi P_test"],
    *,
    temperature: float,
) -> Prediction:
    r"""The posterior of the Gaussian process whose kernel is :math:`K(U)`, for any order parameter.

    .. math:: k^{\mathsf T}K_T^{-1}y,\qquad k(x,x)-k^{\mathsf T}K_T^{-1}k,\qquad k_\mu=K(U)(x_\mu,x).

    Parameters
    ----------
    U : Tensor
        Order parameters, ``(..., Pi, Pi)``: of a solution, of samples, or with heads taken out.
    kernels, labels, temperature
        As for :func:`solve_order_parameters`.
    cross : Tensor
        Kernels between paths of test and of training examples, ``(Pi, Pi, P_test, P)``.
    diagonal : Tensor
        Kernels between paths of each test example with itself, ``(Pi, Pi, P_test)``.

    Returns
    -------
    Prediction
        Mean and variance, ``(..., P_test)``, in float64.

    Raises
    ------
    ValueError
        If an argument does not fit, or :math:`K(U)+T` is not positive definite.
    """
    check_problem(kernels, labels, temperature, len(kernels))
    paths, examples = len(kernels), len(labels)
    tests = diagonal.shape[-1]
    if diagonal.shape != (paths, paths, tests) or cross.shape != (paths, paths, tests, examples):
        raise ValueError(f"cross must be (paths, paths, tests, examples) and diagonal (paths, paths, tests), with "
                         f"{paths} paths and {examples} examples, but they have the shapes {tuple(cross.shape)} and "
                         f"{tuple(diagonal.shape)}")
    U = U.to(kernels)
    K, k, own = (combine(U, part).double() for part in (kernels, cross, diagonal))
    factor, info = torch.linalg.cholesky_ex(K + temperature * torch.eye(examples, dtype=K.dtype, device=K.device))
    if info.any():
        raise ValueError(_INDEFINITE)
    alpha = torch.cholesky_solve(labels.to(K)[:, None].expand(*factor.shape[:-1], 1), factor)
    explained = torch.linalg.solve_triangular(factor, k.mT, upper=False)
    return Prediction((k @ alpha).squeeze(-1), own - (explained**2).sum(-2))


def predict(
    solution: Solution,
    cross: Float[Tensor, "Pi Pi P_test P"],
    diagonal: Float[Tensor, "Pi Pi P_test"],
) -> Prediction:
    """What a solution says of test examples: the :func:`posterior` at its order parameter.

    Parameters
    ----------
    solution : Solution
        Of :func:`solve_order_parameters` or :func:`gp_limit`.
    cross : Tensor
        Kernels between paths of test and of training examples, ``(Pi, Pi, P_test, P)``:
        ``path_kernels(test, training, variance)``.
    diagonal : Tensor
        Kernels between paths of each test example with itself, ``(Pi, Pi, P_test)``: ``path_diagonal(test, variance)``.

    Returns
    -------
    Prediction
        Mean and variance, ``(P_test,)``.
    """
    return posterior(solution.U[0], solution.kernels, solution.labels, cross, diagonal,
                     temperature=solution.temperature)


# ------------------------------------------------------------------------- closed forms

def gp_limit(
    kernels: Float[Tensor, "Pi Pi P P"],
    labels: Float[Tensor, " P"],
    *,
    heads: Sequence[int],
    variances: Sequence[float],
    temperature: float,
) -> Solution:
    r"""The limit of infinite width: every :math:`U^{(l)}` is its prior mean, :math:`U=\prod_{l\ge1}\sigma_l^2\,I`.

    Kernels between different paths drop out, and all paths count alike, whatever the data.

    Parameters
    ----------
    kernels, labels, heads, variances, temperature
        As for :func:`solve_order_parameters`.

    Returns
    -------
    Solution
        With infinite widths.  Its entropy is 0; its action is infinite, as the constants are, and without them it is
        the energy.
    """
    architecture = Architecture(heads, (1,) * (len(tuple(heads)) + 1), variances)
    check_problem(kernels, labels, temperature, architecture.paths)
    tops = np.cumprod(architecture.variances[:0:-1])[::-1]
    U = [torch.eye(d, dtype=torch.float64) * float(top) for d, top in zip(architecture.sizes, tops, strict=True)]
    value = energy(U[0].to(kernels), kernels, labels, temperature=temperature).item()
    return Solution(U, math.inf, 0.0, value, 0.0, True, (), 0, kernels, labels, architecture.heads,
                    (math.inf,) * len(U), architecture.variances, float(temperature))


def large_width(
    kernels: Float[Tensor, "Pi Pi P P"],
    labels: Float[Tensor, " P"],
    *,
    heads: Sequence[int],
    widths: Sequence[float],
    variances: Sequence[float],
    temperature: float,
) -> Float[Tensor, "Pi Pi"]:
    r"""The order parameter to first order in one over the widths.

    .. math::
       U=sI-s\sum_{l=1}^{L+1}\frac1{N_l}\,I_{H_1\cdots H_{l-1}}\otimes
       \operatorname{ptr}_{1\dots l-1}\bigl(s\,G(sI)\bigr)+O(N^{-2}),\qquad s=\prod_{l\ge1}\sigma_l^2,

    where :math:`G` is the energy's derivative and :math:`\operatorname{ptr}_{1\dots l-1}` sums over the heads of the
    layers before :math:`l`: layers further up share their correction among more paths.

    Parameters
    ----------
    kernels, labels, heads, widths, variances, temperature
        As for :func:`solve_order_parameters`.

    Returns
    -------
    Tensor
        ``(Pi, Pi)``; positive definite for large widths only.
    """
    architecture = Architecture(heads, widths, variances)
    check_problem(kernels, labels, temperature, architecture.paths)
    s, paths = architecture.scale, architecture.paths
    _, G = _Energy(kernels, labels, temperature)(s * np.eye(paths))
    U = s * np.eye(paths)
    for N, d in zip(architecture.widths, architecture.sizes, strict=True):
        outer = paths // d
        summed = np.einsum("aiaj->ij", (s * G).reshape(outer, d, outer, d))
        U -= s / N * np.kron(np.eye(outer), summed)
    return torch.from_numpy(U)


def single_path(
    kernel: Float[Tensor, "P P"],
    labels: Float[Tensor, " P"],
    *,
    widths: Sequence[float],
    variances: Sequence[float],
    temperature: float,
) -> list[float]:
    r"""All order parameters of a single path (one head in each layer) at which the action is stationary.

    They solve

    .. math:: U=s\prod_{l=1}^{L+1}\Bigl(1+\frac{Q(U)}{N_l}\Bigr),\qquad
       Q(U)=\sum_i\Bigl[\frac{q_i\,Uk_i}{(Uk_i+T)^2}-\frac{Uk_i}{Uk_i+T}\Bigr],

    with the eigenvalues :math:`k_i` of the kernel and :math:`q_i=(v_i\cdot y)^2` for its eigenvectors.

    Parameters
    ----------
    kernel : Tensor
        ``(P, P)``, with :math:`\sigma_0^2`.
    labels, widths, variances, temperature
        As for :func:`solve_order_parameters`; the number of layers is that of the widths less one.

    Returns
    -------
    list of float
        In ascending order.  Minima and maxima alternate, and the first is a minimum.
    """
    architecture = Architecture((1,) * (len(tuple(widths)) - 1), widths, variances)
    check_problem(kernel[None, None], labels, temperature, 1)
    k, vectors = np.linalg.eigh(kernel.detach().cpu().double().numpy())
    q = (vectors.T @ labels.detach().cpu().double().numpy()) ** 2
    N = np.array(architecture.widths)

    def Q(U):
        load = U * np.maximum(k, 0)
        return (q * load / (load + temperature) ** 2 - load / (load + temperature)).sum()

    def excess(log_U):                  # the logarithm keeps its sign where a factor of the product is not positive
        factors = 1 + Q(math.exp(log_U)) / N
        return log_U - math.log(architecture.scale) - np.log(np.maximum(factors, 1e-300)).sum()

    # Q lies between -P and the maximum over U of its first sum, which is below |y|^2/(4T).
    low = math.log(architecture.scale) - 60.0
    high = math.log(architecture.scale) + np.log1p((q.sum() / (4 * temperature)) / N).sum() + 1.0
    grid = np.linspace(low, high, 4001)
    values = [excess(x) for x in grid]
    return [math.exp(brentq(excess, a, b, xtol=1e-14, rtol=1e-14)) for a, b, u, v in
            zip(grid, grid[1:], values, values[1:], strict=False) if (u < 0) != (v < 0)]


def noiseless_single_path(*, load: float, alignment: float, scale: float = 1.0) -> float:
    r"""The order parameter of one path, one layer and two equal widths, without noise: the root of a cubic.

    With :math:`v=\sqrt U`, :math:`\alpha=P/N` and :math:`r=y^{\mathsf T}C^{-1}y/P`,

    .. math:: \frac{v^3}{\sqrt s}-(1-\alpha)\,v^2-\alpha r=0,

    which has one positive root.  For :math:`\alpha\to0` it gives :math:`U=s`, the limit of infinite width; for
    :math:`\alpha\to\infty` :math:`U=r`, the multiple of the kernel that maximises the evidence.

    Parameters
    ----------
    load : float
        :math:`\alpha`, not negative.
    alignment : float
        :math:`r`, positive.
    scale : float
        :math:`s=\sigma_1^2\sigma_a^2`.

    Returns
    -------
    float
        :math:`U`.
    """
    if not (0 <= load < math.inf and 0 < alignment < math.inf and 0 < scale < math.inf):
        raise ValueError(f"load must not be negative, alignment and scale must be positive, not {load!r}, "
                         f"{alignment!r}, {scale!r}")
    roots = np.roots([scale**-0.5, load - 1, 0.0, -load * alignment])
    return float(roots[abs(roots.imag) <= 1e-9 * abs(roots)].real.max() ** 2)
