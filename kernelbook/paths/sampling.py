r"""Exact sampling of the posterior of a Bayesian network of attention, at any finite width.

What the theory of large widths replaces by one matrix is a random matrix, the order parameter :math:`U`; given it, the
network is a Gaussian process with the kernel :math:`K(U)`.  Two Markov chains have the exact posterior as their
stationary law:

:func:`sample_weights`
    Gibbs sampling of the weights.  The output is linear in the weights of one layer when those of the others are held
    fixed, so each layer has a Gaussian conditional law, drawn without any approximation.  Every width is allowed.
:func:`sample_order_parameters`
    The weights integrated out: the Gram matrices of the layers are Wishart matrices, of which a posterior of few
    dimensions is left.  Needs :math:`N_l\ge d_l=H_lH_{l+1}\cdots H_L` in every layer, for otherwise the Gram matrices
    have no density; in return successive draws are nearly independent.

Neither has anything to tune.  Chains start from the prior, and the draws come with the diagnostics of Vehtari, Gelman,
Simpson, Carpenter and Bürkner (Bayesian Analysis 16, 2021), as ArviZ computes them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from .action import Architecture, check_problem
from .kernels import combine, path_kernels
from .network import _backward, _scale, architecture, draw_weights
from .theory import Prediction, posterior

__all__ = ["Draws", "sample_order_parameters", "sample_weights"]

LARGEST_R_HAT, SMALLEST_SIZE = 1.01, 100       # the second for each chain; both as Vehtari et al. (2021) advise
ACCEPTANCE = 0.8                               # of trajectories, while their step is tuned


# ------------------------------------------------------------------------- what is drawn

@dataclass(frozen=True)
class Draws:
    r"""Order parameters drawn from the posterior.

    Attributes
    ----------
    U : Tensor
        ``(chains, draws, Pi, Pi)``.
    r_hat : Tensor
        For each entry of :math:`U`, the rank-normalised split :math:`\hat R` of the chains, ``(Pi, Pi)``; 1 if the
        chains agree.
    effective_size : Tensor
        For each entry of :math:`U`, how many independent draws are worth as much, ``(Pi, Pi)``.
    kernels, labels, temperature
        The problem.
    weights : list of Tensor or None
        Of Gibbs sampling the last weights of each chain, in the form of :func:`kernelbook.paths.draw_weights`.
    """

    U: Float[Tensor, "chains draws Pi Pi"]
    r_hat: Float[Tensor, "Pi Pi"]
    effective_size: Float[Tensor, "Pi Pi"]
    kernels: Float[Tensor, "Pi Pi P P"] = field(repr=False)
    labels: Float[Tensor, " P"] = field(repr=False)
    temperature: float
    weights: list[Tensor] | None = field(default=None, repr=False)

    @property
    def converged(self) -> bool:
        r"""Whether all :math:`\hat R` are at most 1.01 and all effective sizes at least 100 for each chain."""
        return bool((self.r_hat <= LARGEST_R_HAT).all() and (self.effective_size >= SMALLEST_SIZE * len(self.U)).all())

    @property
    def mean(self) -> Float[Tensor, "Pi Pi"]:
        """The mean of all draws."""
        return self.U.mean((0, 1))

    def predict(self, cross: Float[Tensor, "Pi Pi P_test P"], diagonal: Float[Tensor, "Pi Pi P_test"], *,
                at_most: int | None = None) -> Prediction:
        r"""Mean and variance of the network's output, the weights' part of it without any sampling error.

        Given :math:`U` both have a closed form.  The mean is their mean over the draws, the variance that of the
        conditional variances plus the variance of the conditional means (Rao and Blackwell).

        Parameters
        ----------
        cross : Tensor
            Kernels between paths of test and training examples.
        diagonal : Tensor
            Kernels between paths of each test example with itself.
        at_most : int, optional
            Use so many of the draws, evenly spread; all unless given.

        Returns
        -------
        Prediction
            Of the output, without the noise of the labels.
        """
        U = self.U.flatten(0, 1)
        if at_most is not None:
            if at_most < 1:
                raise ValueError(f"at_most must be at least 1, not {at_most}")
            U = U[torch.linspace(0, len(U) - 1, min(at_most, len(U))).round().long()]
        parts = [posterior(u, self.kernels, self.labels, cross, diagonal, temperature=self.temperature)
                 for u in U.split(50)]                                  # so many kernels of the test set at once
        means, variances = (torch.cat(part) for part in zip(*parts, strict=True))
        return Prediction(means.mean(0), variances.mean(0) + means.var(0, unbiased=False))


def _cholesky(K: Float[Tensor, "*batch P P"], temperature: float) -> Float[Tensor, "*batch P P"]:
    return torch.linalg.cholesky(K + temperature * torch.eye(K.shape[-1], dtype=K.dtype, device=K.device))


def _draws(function: str, U: list[Tensor], kernels: Tensor, labels: Tensor, temperature: float,
           weights: list[Tensor] | None = None) -> Draws:
    from arviz_stats.base import array_stats  # it loads much of scipy

    U = torch.stack(U, 1)
    rows, columns = torch.tril_indices(*U.shape[-2:])
    entries = U[..., rows, columns].cpu().numpy()

    def symmetric(values) -> Tensor:
        matrix = torch.empty(U.shape[-2:], dtype=torch.float64)
        matrix[rows, columns] = matrix[columns, rows] = torch.as_tensor(values, dtype=torch.float64)
        return matrix

    r_hat, size = (symmetric(f(entries, chain_axis=0, draw_axis=1)) for f in (array_stats.rhat, array_stats.ess))
    draws = Draws(U, r_hat, size, kernels, labels, temperature, weights)
    if not draws.converged:
        warnings.warn(
            f"{function}: the chains have not converged: R-hat is {r_hat.max():.3f} at most (wanted: {LARGEST_R_HAT}), "
            f"and {len(U)} chains of {U.shape[1]} draws are worth {size.min():.0f} independent ones at least (wanted: "
            f"{SMALLEST_SIZE * len(U)}); raise draws and warm_up", ConvergenceWarning, stacklevel=3)
    return draws


def _check_counts(chains: int, warm_up: int, draws: int) -> None:
    if chains < 2 or draws < 4 or warm_up < 0:
        raise ValueError(f"at least 2 chains and 4 draws are needed to tell whether chains agree, and warm_up cannot "
                         f"be negative: not {chains}, {draws} and {warm_up}")


# ------------------------------------------------------------------------- Gibbs sampling of the weights

def sample_weights(
    path_inputs: Float[Tensor, "Pi P N_0"],
    labels: Float[Tensor, " P"],
    *,
    heads: Sequence[int],
    widths: Sequence[int],
    variances: Sequence[float] | None = None,
    temperature: float,
    chains: int = 4,
    warm_up: int = 500,
    draws: int = 1000,
    generator: torch.Generator | None = None,
) -> Draws:
    r"""Draw from the posterior by Gibbs sampling of the weights, a layer at a time; any widths.

    With all other layers fixed, the outputs are :math:`f=\Phi\theta` in the weights :math:`\theta` of one.  Its
    conditional law is drawn by Matheron's rule: with :math:`\tilde\theta` from the prior and noise
    :math:`\varepsilon\sim\mathcal N(0,TI)`,

    .. math:: \theta=\tilde\theta+\sigma^2\Phi^{\mathsf T}\bigl(\sigma^2\Phi\Phi^{\mathsf T}+TI\bigr)^{-1}
       (y-\Phi\tilde\theta-\varepsilon),

    a system of :math:`P` equations, however many weights there are.

    Parameters
    ----------
    path_inputs : Tensor
        Of :func:`kernelbook.paths.path_inputs`.
    labels : Tensor
        :math:`y`.
    heads, widths, variances
        As in :func:`kernelbook.paths.draw_weights`.
    temperature : float
        :math:`T`, the variance of the labels' noise.
    chains : int
        Run side by side, each started from weights of the prior.
    warm_up, draws : int
        Sweeps that are dropped, and kept, in each chain.
    generator : torch.Generator, optional

    Returns
    -------
    Draws
        With the order parameter of each sweep's weights.

    Raises
    ------
    ValueError
        If shapes, sizes or the temperature do not fit.

    Warns
    -----
    ConvergenceWarning
        If the chains have not converged.
    """
    sizes = architecture(heads, widths, variances)
    _check_counts(chains, warm_up, draws)
    kernels = path_kernels(path_inputs, variance=sizes.variances[0])
    check_problem(kernels, labels, temperature, sizes.paths)
    weights = draw_weights(path_inputs.shape[-1], heads=heads, widths=widths, variances=sizes.variances,
                           generator=generator, batch=(chains,), dtype=path_inputs.dtype)
    kept = []
    for sweep in range(warm_up + draws):
        z, rest, above = path_inputs.expand(chains, *path_inputs.shape), sizes.paths, _backward(weights)
        for k, variance in enumerate(sizes.variances):           # what lies above is still that of the last sweep
            rest //= weights[k].shape[-3]
            weights[k], z = _draw_layer(weights[k], z, above[k] / math.sqrt(rest), labels, variance, temperature,
                                        generator)
        if sweep >= warm_up:
            b = _backward(weights)[0]
            kept.append(b @ b.mT)
    return _draws("sample_weights", kept, kernels, labels, temperature, weights)


def _draw_layer(V, z, b, labels, variance, temperature, generator):
    """New weights ``(chains, H, out, in)`` of a layer, and what comes out of it.

    The output is the sum over heads h and paths s from there to the output, ``scale * b[s] @ V[h] @ z[h, s]``.
    """
    scale = _scale(V)
    z = z.reshape(len(z), V.shape[-3], -1, *z.shape[-2:])

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=V.dtype)

    prior = math.sqrt(variance) * normal(*V.shape)
    f = scale * torch.einsum("chsi,chspi->cp", torch.einsum("cso,choi->chsi", b, prior), z)
    gram = scale**2 * torch.einsum("chspi,chsqi->cpq", torch.einsum("cst,chtpi->chspi", b @ b.mT, z), z)
    residual = labels - f - math.sqrt(temperature) * normal(*f.shape)
    alpha = torch.cholesky_solve(residual[..., None], _cholesky(variance * gram, temperature)).squeeze(-1)
    back = torch.einsum("cso,chsi->choi", b, torch.einsum("cp,chspi->chsi", alpha, z))
    V = prior + variance * scale * back
    return V, scale * torch.einsum("choi,chspi->cspo", V, z)


# ------------------------------------------------------------------------- sampling with the weights integrated out

def sample_order_parameters(
    kernels: Float[Tensor, "Pi Pi P P"],
    labels: Float[Tensor, " P"],
    *,
    heads: Sequence[int],
    widths: Sequence[int],
    variances: Sequence[float] | None = None,
    temperature: float,
    chains: int = 4,
    warm_up: int = 500,
    draws: int = 1000,
    generator: torch.Generator | None = None,
) -> Draws:
    r"""Draw from the posterior with all weights integrated out; needs :math:`N_l\ge d_l` in every layer.

    From the output down, :math:`U^{(l)}=F_lF_l^{\mathsf T}` with
    :math:`F_l=\sigma_lN_l^{-1/2}(I_{H_l}\otimes F_{l+1})A_l`, where the :math:`A_l` are lower triangular and, under the
    prior, independent (Bartlett): standard normal below the diagonal, and the :math:`i`-th entry of the diagonal the
    root of a chi-square of :math:`N_l-i+1` degrees of freedom.  In these entries and the logarithms of those of the
    diagonal, the posterior density is

    .. math:: \prod_l\prod_i(A_l)_{ii}^{N_l-i+1}\,e^{-\lVert A_l\rVert^2/2}\;
       \lvert K_T\rvert^{-1/2}e^{-\frac12y^{\mathsf T}K_T^{-1}y},\qquad K_T=K(U^{(1)})+TI .

    It is sampled by Hamiltonian Monte Carlo.  The warm-up fits the covariance of the draws, in whose coordinates the
    density is nearly that of independent standard normal numbers, and tunes the step for an acceptance of 0.8; then
    both are left alone.  A trajectory has a random length, :math:`\pi/2` on average: a quarter of the period of a
    Gaussian, after which a draw hardly depends on the one before.

    Parameters
    ----------
    kernels : Tensor
        Kernels between paths, with :math:`\sigma_0^2` inside: of :func:`kernelbook.paths.path_kernels`.
    labels : Tensor
        :math:`y`.
    heads, widths, variances
        As in :func:`kernelbook.paths.draw_weights`.
    temperature : float
        :math:`T`, the variance of the labels' noise.
    chains : int
        Run side by side, each started from the prior; in the warm-up they share the Gaussian.
    warm_up, draws : int
        Steps that are dropped, and kept, in each chain.
    generator : torch.Generator, optional

    Returns
    -------
    Draws

    Raises
    ------
    ValueError
        If shapes, sizes or the temperature do not fit, or a layer is too narrow.

    Warns
    -----
    ConvergenceWarning
        If the chains have not converged.
    """
    sizes = architecture(heads, widths, variances)
    _check_counts(chains, warm_up, draws)
    check_problem(kernels, labels, temperature, sizes.paths)
    target = _Hierarchy(sizes, kernels, labels, temperature)
    x = target.draw_prior(chains, generator)
    state = x, *target(x)
    if not torch.isfinite(state[1]).all():
        raise FloatingPointError(f"K(U) + {temperature:g} I is not numerically positive definite at an order parameter "
                                 "of the prior; raise the temperature, or use float64")
    step, covariance = 0.5, target.prior_covariance()
    # Each window of the warm-up uses what the last one found: the first ones are still under way to where the
    # posterior is.  The very last only tunes the step.
    for window, share in enumerate((1, 1, 2, 4, 6, 2)):
        factor, seen = torch.linalg.cholesky(covariance), []
        for k in range(warm_up * share // 16):
            state, acceptance = _trajectory(target, state, factor, step, generator)
            step *= math.exp((acceptance - ACCEPTANCE) / math.sqrt(k + 1))
            seen.append(state[0])
        if window < 5 and len(seen) > 1:
            points, dimension = torch.stack(seen).flatten(0, 1), len(covariance)
            # A few draws do not tell a covariance: lean on the prior's, as if it were one draw for each dimension.
            weight = len(points) / (len(points) + dimension)
            covariance = (weight * torch.cov(points.T).reshape(dimension, dimension)
                          + (1 - weight) * target.prior_covariance())
    kept = []
    for _ in range(draws):
        state, _ = _trajectory(target, state, factor, step, generator)
        kept.append(target.order_parameter(state[0]))
    return _draws("sample_order_parameters", kept, kernels, labels, temperature)


class _Hierarchy:
    """The posterior of the Bartlett factors of all layers, as a density of the rows of their entries.

    Of the diagonals' entries a row has the logarithms.
    """

    def __init__(self, sizes: Architecture, kernels: Tensor, labels: Tensor, temperature: float):
        for layer, (N, d) in enumerate(zip(sizes.widths, sizes.sizes, strict=True), start=1):
            if N < d:
                raise ValueError(f"width {N:g} of layer {layer} is smaller than the number of paths from there to the "
                                 f"output, {d}, so that their Gram matrix has no density; use sample_weights")
        self.sizes, self.kernels, self.labels, self.temperature = sizes, kernels, labels, temperature
        self.triangles = [torch.tril_indices(d, d) for d in sizes.sizes]
        self.diagonal = torch.cat([r == c for r, c in self.triangles])
        # The degrees of freedom, N - i + 1 for the i-th entry of a diagonal, counted from 1.
        self.degrees = torch.cat([torch.where(r == c, N - r, 0) for N, (r, c) in
                                  zip(sizes.widths, self.triangles, strict=True)]).to(kernels.dtype)

    def _entries(self, x: Float[Tensor, "chains D"]) -> Float[Tensor, "chains D"]:
        return torch.where(self.diagonal, x.clamp(max=300).exp(), x)      # e^300: far out, and its square is finite

    def _factors(self, entries: Float[Tensor, "chains D"]) -> tuple[list[Tensor], list[Tensor]]:
        """The A_l and the F_l, from the output down; the first F is 1."""
        parts = entries.split([len(r) for r, _ in self.triangles], dim=-1)
        A, F = [], [entries.new_ones(len(entries), 1, 1)]
        layers = zip(parts, self.triangles, self.sizes.sizes, self.sizes.widths, self.sizes.variances[1:],
                     (*self.sizes.heads, 1), strict=True)
        for part, (r, c), d, N, variance, H in reversed(list(layers)):
            A.append(entries.new_zeros(len(entries), d, d))
            A[-1][:, r, c] = part
            A[-1] *= math.sqrt(variance / N)
            F.append((F[-1][:, None] @ A[-1].reshape(len(A[-1]), H, -1, d)).flatten(1, 2))
        return A, F

    def order_parameter(self, x: Float[Tensor, "chains D"]) -> Float[Tensor, "chains Pi Pi"]:
        F = self._factors(self._entries(x))[1][-1]
        return F @ F.mT

    def __call__(self, x: Float[Tensor, "chains D"]) -> tuple[Float[Tensor, " chains"], Float[Tensor, "chains D"]]:
        """The logarithm of the density up to a constant, and its gradient; minus infinity where it cannot be had."""
        entries = self._entries(x)
        A, F = self._factors(entries)
        K = combine(F[-1] @ F[-1].mT, self.kernels)
        K.diagonal(dim1=-2, dim2=-1).add_(self.temperature)
        factor, info = torch.linalg.cholesky_ex(K)
        bad = (info > 0) | ~torch.isfinite(K).all(-1).all(-1)
        if bad.any():
            factor = torch.where(bad[:, None, None], torch.eye(K.shape[-1], dtype=K.dtype), factor)
        alpha = torch.cholesky_solve(self.labels[:, None], factor).squeeze(-1)
        value = (self.degrees * torch.where(self.diagonal, x, 0)).sum(-1) - entries.square().sum(-1) / 2
        value = value - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) - (alpha @ self.labels) / 2

        slope_K = (alpha[:, :, None] * alpha[:, None, :] - torch.cholesky_inverse(factor)) / 2
        paths = self.sizes.paths
        slope_U = slope_K.flatten(1) @ self.kernels.reshape(paths * paths, -1).T / paths
        slope_F, slopes = 2 * slope_U.reshape(-1, paths, paths) @ F[-1], []
        upwards = zip(self.triangles, self.sizes.widths, self.sizes.variances[1:], (*self.sizes.heads, 1), A[::-1],
                      F[-2::-1], strict=True)
        for (r, c), N, variance, H, a, above in upwards:
            d = a.shape[-1]
            slope_F, a = slope_F.reshape(-1, H, d // H, d), a.reshape(-1, H, d // H, d)
            slopes.append(math.sqrt(variance / N) * (above.mT[:, None] @ slope_F).flatten(1, 2)[:, r, c])
            slope_F = (slope_F @ a.mT).sum(1)
        slope = torch.cat(slopes, -1) - entries
        slope = torch.where(self.diagonal, self.degrees + entries * slope, slope)
        return value.masked_fill(bad, -math.inf), slope.masked_fill(bad[:, None], 0.0)

    def draw_prior(self, chains: int, generator: torch.Generator | None) -> Float[Tensor, "chains D"]:
        parts = []
        for N, d, (r, c) in zip(self.sizes.widths, self.sizes.sizes, self.triangles, strict=True):
            G = torch.randn(chains, d, int(N), generator=generator, dtype=self.kernels.dtype)
            parts.append(torch.linalg.cholesky(G @ G.mT)[:, r, c])
        entries = torch.cat(parts, -1)
        return torch.where(self.diagonal, entries.log(), entries)

    def prior_covariance(self) -> Float[Tensor, "D D"]:
        # The logarithm of a chi-square of k degrees has a variance of about 2 / k, its root a fourth of that.
        return torch.diag(torch.where(self.diagonal, 0.5 / self.degrees, 1.0))


def _trajectory(target, state, factor, step, generator):
    """One step of Hamiltonian Monte Carlo in each chain, and how probable its acceptance was on average.

    A state is a point of each chain, with value and slope there; momenta have the inverse of the covariance.
    """
    x, value, slope = state
    length = math.pi * torch.rand((), generator=generator, dtype=x.dtype).item()
    start = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    *new, end = _leapfrog(target, x, slope, start, factor, step, max(1, round(length / step)))
    gain = (new[1] - end.square().sum(-1) / 2) - (value - start.square().sum(-1) / 2)
    probability = torch.nan_to_num(gain, nan=-math.inf).clamp(max=0).exp()
    taken = torch.rand(len(x), generator=generator, dtype=x.dtype) < probability
    state = tuple(torch.where(taken[:, None] if old.ndim == 2 else taken, a, old)
                  for a, old in zip(new, state, strict=True))
    return state, probability.mean().item()


def _leapfrog(target, x, slope, momentum, factor, step, steps):
    """Hamilton's equations in steps: where they lead, value and slope there, and the momentum at the end."""
    momentum = momentum + step / 2 * slope @ factor
    for k in range(steps):
        x = x + step * momentum @ factor.mT
        value, slope = target(x)
        momentum = momentum + (step if k < steps - 1 else step / 2) * slope @ factor
    return x, value, slope, momentum
