r"""What the theory makes of a trained network's attention, and which of its heads can be left out.

Both the network and the theory's mean predictor are linear in the path inputs of an example,

.. math:: f(x)=\sum_\pi c^\pi\cdot\xi^\pi(x),\qquad
   c^\pi=\frac{1}{\sqrt{N_1N_0\Pi}}\,V^{0\mathsf T}w^\pi\quad\text{or}\quad
   c^\pi=\frac{\sigma_0^2}{N_0\Pi}\sum_{\pi'}U_{\pi\pi'}\sum_\mu\alpha_\mu\,\xi^{\pi',\mu},\quad
   \alpha=(K(U)+T)^{-1}y .

So once the path inputs are known, each predictor is a small array ``(Pi, N_0)``, and any number of them, with any heads
left out, is tested by one product of matrices: :func:`accuracy`.  No kernel between test and training examples is
needed.

All variances are 1 here, as they are at the start of training.  Widths are those of the theory, not of the network:
they and the temperature are chosen by accuracy on validation episodes (:func:`choose_theory`), and no function here
that chooses sees a test set.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .diagnostics import head_scores, kernel_alignment, prune_heads, task_alignment
from .kernels import checked_heads, combine, path_inputs, path_kernels, paths_through
from .model import PathNetwork
from .one_shot import Episodes
from .theory import Solution, gp_limit, solve_order_parameters

__all__ = ["TEMPERATURES", "WIDTHS", "Choice", "GridPoint", "PathEpisodes", "accuracy", "choose_theory", "examine",
           "magnitude_scores", "output_scores", "path_episodes", "pruned_networks", "pruned_theories", "random_order",
           "removal_order", "theory_coefficients"]

WIDTHS = (5, 10, 30, 100, 300, 1000)
"""Widths :math:`N` that are tried, all layers' the same."""

TEMPERATURES = (0.003, 0.01, 0.03, 0.1, 0.3, 0.5, 1.0)
"""Temperatures that are tried with each."""

Head = tuple[int, int]


# ------------------------------------------------------------------------- examples as the paths see them

class PathEpisodes(NamedTuple):
    """Path inputs of episodes, ``(Pi, P, N_0)``, and their labels, ``(P,)``; both in float64, on the CPU."""

    inputs: Float[Tensor, "Pi P N_0"]
    labels: Float[Tensor, " P"]


@torch.no_grad()
def path_episodes(network: PathNetwork, episodes: Episodes, *, batch: int = 256) -> PathEpisodes:
    """What the paths of a network make of episodes, with its attention as it is.

    Parameters
    ----------
    network : PathNetwork
        Attention is computed on its device and in its type of number.
    episodes : Episodes
    batch : int
        How many at a time, for the sake of memory.

    Returns
    -------
    PathEpisodes

    Raises
    ------
    ValueError
        If the episodes have not the network's features, or its attention is not column-stochastic: the theory takes
        no other.
    """
    first, parts = next(network.parameters()), []
    for x in episodes.tokens.split(batch):
        omega = [layer.double().cpu() for layer in network.attention(x.to(first))]
        x = x.double().cpu()
        parts.append(path_inputs(x, omega, network.readout(x)))
    return PathEpisodes(torch.cat(parts, 1), episodes.labels.double().cpu())


def accuracy(coefficients: Float[Tensor, "*batch Pi N_0"], episodes: PathEpisodes) -> Float[Tensor, "*batch"]:
    """Shares of right answers of predictors that are linear in the path inputs.

    Parameters
    ----------
    coefficients : Tensor
        ``(..., Pi, N_0)``: of :func:`theory_coefficients` or :meth:`kernelbook.paths.PathNetwork.coefficients`.
    episodes : PathEpisodes

    Returns
    -------
    Tensor
        An output of exactly 0 is no right answer.
    """
    return (_outputs(coefficients, episodes) * episodes.labels > 0).double().mean(-1)


def _outputs(coefficients: Tensor, episodes: PathEpisodes) -> Tensor:
    return torch.einsum("...ci,cpi->...p", coefficients.to(episodes.inputs), episodes.inputs)


# ------------------------------------------------------------------------- the theory's predictor

def theory_coefficients(
    U: Float[Tensor, "Pi Pi"],
    kernels: Float[Tensor, "Pi Pi P P"],
    training: PathEpisodes,
    *,
    temperature: float,
) -> Float[Tensor, "Pi N_0"]:
    r"""The mean of :func:`kernelbook.paths.posterior` as what the path inputs are multiplied by.

    Parameters
    ----------
    U : Tensor
        Any order parameter, with heads left out or not.
    kernels : Tensor
        ``path_kernels(training.inputs)``.
    training : PathEpisodes
    temperature : float
        :math:`T`.

    Returns
    -------
    Tensor

    Raises
    ------
    ValueError
        If :math:`K(U)+T` is not positive definite.
    """
    K = combine(U.to(kernels), kernels)
    K.diagonal().add_(temperature)
    factor, info = torch.linalg.cholesky_ex(K)
    if info:
        raise ValueError(f"K(U) + T is not positive definite in float64 at the temperature {temperature!r}")
    alpha = torch.cholesky_solve(training.labels[:, None], factor)[:, 0]
    paths, _, features = training.inputs.shape
    return U.to(kernels) @ (alpha @ training.inputs) / (features * paths)


@dataclass(frozen=True)
class GridPoint:
    """A width and a temperature that were tried.

    Attributes
    ----------
    width, temperature : float
        :math:`N`, infinite for the limit, and :math:`T`.
    accuracy, loss : float
        On the validation episodes: share of right answers of the mean predictor, and its mean squared error.
    solution : kernelbook.paths.Solution
    coefficients : Tensor
        Of the mean predictor, see :func:`theory_coefficients`.
    """

    width: float
    temperature: float
    accuracy: float
    loss: float
    solution: Solution = field(repr=False)
    coefficients: Float[Tensor, "Pi N_0"] = field(repr=False)


@dataclass(frozen=True)
class Choice:
    """What :func:`choose_theory` tried.

    Attributes
    ----------
    grid : tuple of GridPoint
        Width by width.
    """

    grid: tuple[GridPoint, ...]

    @property
    def best(self) -> GridPoint:
        """The point with the highest accuracy on validation episodes; of equal ones, that with the lowest loss."""
        return _best(self.grid)

    @property
    def best_of_each_width(self) -> tuple[GridPoint, ...]:
        """For each width the point that is best by the same rule; a width where no solution converged is left out."""
        widths = [list(points) for _, points in itertools.groupby(self.grid, lambda point: point.width)]
        return tuple(_best(points) for points in widths if any(point.solution.converged for point in points))


def _best(points: Iterable[GridPoint]) -> GridPoint:
    return min((p for p in points if p.solution.converged), key=lambda p: (-p.accuracy, p.loss))


def choose_theory(
    training: PathEpisodes,
    validation: PathEpisodes,
    *,
    heads: Sequence[int],
    widths: Sequence[float] = WIDTHS,
    temperatures: Sequence[float] = TEMPERATURES,
    kernels: Float[Tensor, "Pi Pi P P"] | None = None,
    tol: float = 1e-4,
    report: Callable[[dict[str, Any]], None] = lambda event: None,
) -> Choice:
    r"""Solve for the order parameters at each width and temperature, and see which predict best.

    Parameters
    ----------
    training, validation : PathEpisodes
        What the theory is given, and what the choice is made by.
    heads : sequence of int
        :math:`(H_1,\dots,H_L)`.
    widths : sequence of float
        :math:`N=N_1=\dots=N_L=N_a`; ``math.inf`` is the limit of :func:`~kernelbook.paths.gp_limit`.
    temperatures : sequence of float
        :math:`T`, all of them with each width.
    kernels : Tensor, optional
        ``path_kernels(training.inputs)``, where they are wanted for something else too.
    tol : float
        As in :func:`~kernelbook.paths.solve_order_parameters`: the action is about ``tol**2 / 2`` above its minimum.
    report : callable
        Gets a dictionary after each solution: ``done``, ``of``, and what was found.

    Returns
    -------
    Choice

    Raises
    ------
    ValueError
        If an argument does not fit.
    RuntimeError
        If none of the solutions converged; one that did not is in the grid, but is never chosen.

    Notes
    -----
    :math:`U` depends on :math:`T`, so every finite width costs a solution for every temperature; an eigendecomposition
    of :math:`K(U)` would give all temperatures at a fixed :math:`U` only.  With 16 paths and 600 training examples one
    takes 1 to 5 s on one core, the longer the narrower, and all of it 1.5 GB, half of that for the kernels.  The
    infinite width costs next to nothing.
    """
    heads, widths, temperatures = checked_heads(heads), tuple(widths), tuple(temperatures)
    if training.inputs.shape[0] != math.prod(heads) or validation.inputs.shape[0] != math.prod(heads):
        raise ValueError(f"the heads {heads} make {math.prod(heads)} paths, but training and validation have the path "
                         f"inputs of {training.inputs.shape[0]} and {validation.inputs.shape[0]}")
    if not widths or not temperatures:
        raise ValueError("give at least one width and one temperature")
    kernels = path_kernels(training.inputs) if kernels is None else kernels
    problem = {"heads": heads, "variances": (1.0,) * (len(heads) + 2)}
    grid: list[GridPoint] = []
    for N, T in itertools.product(widths, temperatures):
        if N == math.inf:
            solution = gp_limit(kernels, training.labels, temperature=T, **problem)
        else:
            solution = solve_order_parameters(kernels, training.labels, widths=(N,) * (len(heads) + 1), temperature=T,
                                              tol=tol, **problem)
        c = theory_coefficients(solution.U[0], kernels, training, temperature=T)
        f = _outputs(c, validation)
        point = GridPoint(N, T, (f * validation.labels > 0).double().mean().item(),
                          (f - validation.labels).square().mean().item(), solution, c)
        grid.append(point)
        report({"done": len(grid), "of": len(widths) * len(temperatures), "width": N, "temperature": T,
                "accuracy": point.accuracy, "loss": point.loss, "converged": solution.converged})
    if not any(point.solution.converged for point in grid):
        raise RuntimeError(f"none of the {len(grid)} solutions reached a gradient norm of {tol:.3g}: raise tol, or try "
                           "higher temperatures")
    return Choice(tuple(grid))


# ------------------------------------------------------------------------- which heads to leave out first

def magnitude_scores(network: PathNetwork) -> list[Float[Tensor, " H"]]:
    r"""The size of the values of each head: the root mean square of the entries of :math:`V^{lh}`.

    It is :math:`\lVert V^{lh}\rVert_F/\sqrt{N_{l+1}N_l}`, of the numbers that are trained, which are standard normal at
    first; the factor :math:`1/\sqrt{H_lN_l}` of the layer is not in it.  Queries and keys are not looked at.

    Parameters
    ----------
    network : PathNetwork

    Returns
    -------
    list of Tensor
        One tensor per layer, ``(H_l,)``.
    """
    return [V.detach().double().cpu().square().mean((1, 2)).sqrt() for V in list(network.weights)[1:-1]]


@torch.no_grad()
def output_scores(network: PathNetwork, episodes: PathEpisodes) -> list[Float[Tensor, " H"]]:
    r"""What each head adds to the output: the root mean square over episodes of the sum over all paths through it.

    .. math:: s(l,h)^2=\frac1P\sum_\mu\Bigl(\sum_{\pi\ni h}c^\pi\cdot\xi^{\pi,\mu}\Bigr)^2

    It is by how much the output changes where the head is replaced by zeros and the others are left as they are.

    Parameters
    ----------
    network : PathNetwork
    episodes : PathEpisodes
        Of :func:`path_episodes` with the same network; training episodes, so that the test set stays unseen.

    Returns
    -------
    list of Tensor
        One tensor per layer, ``(H_l,)``.
    """
    parts = torch.einsum("ci,cpi->cp", network.coefficients().to(episodes.inputs), episodes.inputs)
    heads = network.config.head_counts
    return [torch.stack([parts[paths_through(heads, layer, head)].sum(0).square().mean().sqrt()
                         for head in range(count)]) for layer, count in enumerate(heads)]


def removal_order(scores: Sequence[Float[Tensor, " H"]]) -> list[Head]:
    """Heads in the order in which they are left out, the lowest score first.

    The last head of a layer is never left out, since no path would be left without it: it is passed over.  So there are
    :math:`\\sum_l(H_l-1)` heads in every order, and a single path is left at the end.

    Parameters
    ----------
    scores : sequence of Tensor
        One tensor per layer, ``(H_l,)``; scores of different layers are compared.

    Returns
    -------
    list of pairs
        ``(layer, head)``, both counted from 0; of equal scores the earlier head first.
    """
    ranked = sorted((score, layer, head) for layer, own in enumerate(scores) for head, score in enumerate(own.tolist()))
    left, order = [len(own) for own in scores], []
    for _, layer, head in ranked:
        if left[layer] > 1:
            left[layer] -= 1
            order.append((layer, head))
    return order


def random_order(heads: Sequence[int], *, generator: torch.Generator) -> list[Head]:
    """Heads in a random order, as :func:`removal_order` of scores that are all equally likely.

    Parameters
    ----------
    heads : sequence of int
        :math:`(H_1,\\dots,H_L)`.
    generator : torch.Generator

    Returns
    -------
    list of pairs
        ``(layer, head)``.
    """
    return removal_order([torch.rand(count, generator=generator, dtype=torch.float64)
                          for count in checked_heads(heads)])


def _sets(order: Sequence[Head]) -> list[Sequence[Head]]:
    """Its first 0, 1, ... heads."""
    return [order[:count] for count in range(len(order) + 1)]


@torch.no_grad()
def pruned_networks(network: PathNetwork, removed: Iterable[Sequence[Head]]) -> Float[Tensor, "K Pi N_0"]:
    r"""The trained network with heads left out, each layer's sum divided by the root of how many are left.

    Parameters
    ----------
    network : PathNetwork
    removed : iterable of sequences of pairs
        For each predictor which heads are left out, ``(layer, head)``.

    Returns
    -------
    Tensor
        What the path inputs are multiplied by, in float64; see :meth:`kernelbook.paths.PathNetwork.forward`.

    Raises
    ------
    ValueError
        If there is no such head, or a layer is left without one.
    """
    return torch.stack([network.coefficients(each).double().cpu() for each in removed])


def pruned_theories(
    solution: Solution, training: PathEpisodes, removed: Iterable[Sequence[Head]]
) -> Float[Tensor, "K Pi N_0"]:
    r"""The theory's mean predictor with heads left out.

    Rows and columns of :math:`U` of paths through them are set to zero (:func:`~kernelbook.paths.prune_heads`); the
    factor :math:`1/\Pi` and the temperature stay.  With the kernel that is left, the training labels are fitted anew;
    the order parameters are not solved for again.

    Parameters
    ----------
    solution : kernelbook.paths.Solution
        It carries the kernels and labels of the training episodes.
    training : PathEpisodes
        The same as those.
    removed : iterable of sequences of pairs
        For each predictor which heads are left out, ``(layer, head)``.

    Returns
    -------
    Tensor
        What the path inputs are multiplied by.

    Raises
    ------
    ValueError
        If there is no such head, or a layer is left without one.
    """
    found = []
    for each in removed:
        U = prune_heads(solution.U[0], solution.heads, each)
        if not U.any():
            raise ValueError(f"no path is left without the heads {list(each)}: all those of a layer are among them")
        found.append(theory_coefficients(U, solution.kernels, training, temperature=solution.temperature))
    return torch.stack(found)


# ------------------------------------------------------------------------- all of it, of one network

def examine(
    network: PathNetwork,
    training: Episodes,
    validation: Episodes,
    tests: Iterable[tuple[str, Episodes]],
    *,
    widths: Sequence[float] = WIDTHS,
    temperatures: Sequence[float] = TEMPERATURES,
    random_orders: int = 10,
    components: int = 50,
    generator: torch.Generator,
    report: Callable[[dict[str, Any]], None] = lambda event: None,
) -> dict[str, Any]:
    """Everything that is wanted of a trained network without its weights, as plain numbers.

    Parameters
    ----------
    network : PathNetwork
    training, validation : Episodes
        What the theory and the scores of heads are given, and what width and temperature are chosen by.
    tests : iterable of pairs
        Names of test sets and their episodes; one set at a time is kept in memory.
    widths, temperatures : sequence of float
        As in :func:`choose_theory`.
    random_orders : int
        How many random orders of heads.
    components : int
        Of how many principal components the overlaps with the labels are kept.
    generator : torch.Generator
        Of the random orders.
    report : callable
        As in :func:`choose_theory`.

    Returns
    -------
    dict
        Only strings, numbers, lists and dictionaries; numbers have six significant digits.

        ``heads``, ``widths``
            Of the network.
        ``episodes``
            How many: ``training``, ``valid``, and of each test set.
        ``network``, ``theory``, ``infinite_width``
            Predictors: ``accuracy`` on each set, ``valid`` among them; of the latter two the chosen ``temperature``,
            ``overlaps`` (:func:`~kernelbook.paths.task_alignment`) and ``alignment``
            (:func:`~kernelbook.paths.kernel_alignment`) of their kernels on the training episodes; of the first two
            the order parameter ``U``; and of the theory the chosen ``width``.
        ``diagonal``, ``levelled``, ``apart``, ``permuted``, ``network_kernel``
            Predictors at other order parameters, with ``accuracy``, and the ``temperature`` that is best on the
            validation episodes: that of the theory with all entries off the diagonal erased; the same with its diagonal
            levelled to 1, so that only correlations are left; that of a theory whose paths cannot interact, with
            kernels between different paths erased before it is solved for; that of the theory of permuted labels; and
            that of the network.
        ``grid``
            All that was tried, on the validation episodes; where ``width`` is none, it is infinite.
        ``by_width``
            Of each width the temperature that is best on the validation episodes, with ``accuracy`` as before.
        ``orders``
            By name, ``theory``, ``magnitude``, ``output`` and ``random``, a list (of one, but for the last): ``order``
            in which heads are left out, the ``scores`` that it is by, and after 0, 1, ... heads the accuracies of
            ``network`` and ``theory`` on each set.
        ``single``
            For each head, ``head``, the same two with this one head left out; a layer's only head is not among them.

    Raises
    ------
    ValueError
        If an argument does not fit.
    RuntimeError
        As :func:`choose_theory`.
    """
    heads = network.config.head_counts
    train = path_episodes(network, training)
    kernels = path_kernels(train.inputs)
    sets, own = [("valid", validation)], path_episodes(network, validation)
    given = {"heads": heads, "temperatures": temperatures, "kernels": kernels, "report": report}
    limit = choose_theory(train, own, widths=[math.inf], **given)
    choice = choose_theory(train, own, widths=widths, **given)
    solution, infinite = choice.best.solution, limit.best.solution

    scores = {"theory": head_scores(solution.U[0], heads), "magnitude": magnitude_scores(network),
              "output": output_scores(network, train)}
    orders = {name: [removal_order(score)] for name, score in scores.items()}
    orders["random"] = [random_order(heads, generator=generator) for _ in range(random_orders)]
    single = [[(layer, head)] for layer, count in enumerate(heads) for head in range(count) if count > 1]
    removed = [[], *single, *(part for each in orders.values() for order in each for part in _sets(order))]
    places = list(dict.fromkeys(map(frozenset, removed)))               # each set of heads once, in whatever order
    ways = [sorted(place) for place in places]
    trained = network.order_parameter()
    fixed = _controls(solution, generator) | {"network_kernel": trained}
    ridge = {name: _temper(U, kernels, train, own, temperatures) for name, U in fixed.items()}
    predictors = torch.cat([pruned_networks(network, ways), pruned_theories(solution, train, ways),
                            torch.stack([p.coefficients for p in (*limit.best_of_each_width,
                                                                  *choice.best_of_each_width)]),
                            torch.stack([c for _, c in ridge.values()])])
    found: dict[str, list[float]] = {}
    counts = {"training": len(training)}
    for name, episodes in itertools.chain(sets, tests):
        if name in counts:
            raise ValueError(f"two sets of episodes are called {name!r}")
        counts[name] = len(episodes)
        found[name] = accuracy(predictors, own if name == "valid" else path_episodes(network, episodes)).tolist()

    def of(index: int) -> dict[str, float]:
        return {name: values[index] for name, values in found.items()}

    def without(sets: Sequence[Sequence[Head]]) -> dict[str, Any]:
        at = [places.index(frozenset(each)) for each in sets]
        return {who: {name: [values[shift + i] for i in at] for name, values in found.items()}
                for who, shift in (("network", 0), ("theory", len(places)))}

    def kernel(of: Solution) -> dict[str, Any]:
        K = of.kernel
        return {"alignment": kernel_alignment(K, of.labels),
                "overlaps": task_alignment(K, of.labels).overlaps[:components].tolist()}

    best, after = choice.best, 2 * len(places)
    last = len(predictors) - len(ridge)
    return _plain({
        "heads": heads, "widths": network.config.widths, "episodes": counts,
        "network": {"accuracy": of(0), "U": trained.tolist()},
        "theory": {"width": best.width, "temperature": best.temperature, "accuracy": of(len(places)),
                   "U": solution.U[0].tolist(), **kernel(solution)},
        "infinite_width": {"temperature": limit.best.temperature, "accuracy": of(after), **kernel(infinite)},
        **{name: {"temperature": T, "accuracy": of(last + i)} for i, (name, (T, _)) in enumerate(ridge.items())},
        "grid": [{"width": p.width, "temperature": p.temperature, "accuracy": p.accuracy, "loss": p.loss,
                  "gradient_norm": p.solution.gradient_norm, "converged": p.solution.converged,
                  "evaluations": p.solution.evaluations} for p in (*limit.grid, *choice.grid)],
        "by_width": [{"width": p.width, "temperature": p.temperature, "accuracy": of(after + 1 + i)}
                     for i, p in enumerate(choice.best_of_each_width)],
        "orders": {name: [{"order": order, **({"scores": [s.tolist() for s in scores[name]]} if name in scores else {}),
                           **without(_sets(order))} for order in each] for name, each in orders.items()},
        "single": [{"head": way[0], **{who: {name: v[0] for name, v in on.items()}
                                       for who, on in without([way]).items()}} for way in single],
    })


def _controls(theory: Solution, generator: torch.Generator) -> dict[str, Tensor]:
    """Order parameters that keep a part of what the theory has found, at its widths and temperature."""
    U, kernels, labels = theory.U[0], theory.kernels, theory.labels
    scale = U.diag().rsqrt()
    found = {"diagonal": U.diag().diag(), "levelled": scale[:, None] * U * scale}
    alone = torch.eye(len(U)).to(kernels)[:, :, None, None]
    shuffled = labels[torch.randperm(len(labels), generator=generator)]
    for name, C, y in (("apart", kernels * alone, labels), ("permuted", kernels, shuffled)):
        solution = solve_order_parameters(C, y, heads=theory.heads, widths=theory.widths, variances=theory.variances,
                                          temperature=theory.temperature, tol=1e-4)
        if not solution.converged:
            raise RuntimeError(f"the order parameter of the control {name!r} only reached a gradient norm of "
                               f"{solution.gradient_norm:.3g}; choose among higher temperatures")
        found[name] = solution.U[0]
    return found


def _temper(
    U: Tensor, kernels: Tensor, training: PathEpisodes, validation: PathEpisodes, temperatures: Sequence[float]
) -> tuple[float, Tensor]:
    """The temperature with the highest accuracy on validation episodes at a given order parameter; its predictor."""
    found = torch.stack([theory_coefficients(U, kernels, training, temperature=T) for T in temperatures])
    at = int(accuracy(found, validation).argmax())
    return temperatures[at], found[at]


def _plain(value: Any) -> Any:
    """The same of strings, numbers, lists and dictionaries that JSON knows: infinity is None."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
