"""Sampling the posterior of attention networks: both chains against densities, moments and laws that are exact."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning

from kernelbook.paths import action, combine, path_diagonal, path_inputs, path_kernels, predict, solve_order_parameters
from kernelbook.paths.hidden_markov import HiddenMarkov, four_paths
from kernelbook.paths.network import _backward, architecture, draw_weights, order_parameter, output_of_paths
from kernelbook.paths.sampling import (
    _draw_layer,
    _draws,
    _Hierarchy,
    _leapfrog,
    sample_order_parameters,
    sample_weights,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def quiet(function, *arguments, **options):
    """Chains too short to be sure that they agree."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return function(*arguments, **options)


@st.composite
def wide_enough(draw):
    heads = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
    least = [math.prod(heads[k:]) for k in range(len(heads) + 1)]
    return {"heads": heads, "widths": tuple(d + draw(st.integers(0, 3)) for d in least),
            "variances": tuple(draw(st.floats(0.3, 3)) for _ in range(len(heads) + 2))}


# ------------------------------------------------------------------------- the density with the weights integrated out

@settings(max_examples=12)
@given(wide_enough(), st.integers(0, 999))
def test_the_density_is_that_of_the_action_and_the_gradient_its_slope(sizes, seed):
    # checks: thm-fw-posterior
    paths = math.prod(sizes["heads"])
    kernels, y = path_kernels(normal(paths, 4, 5, seed=seed), variance=sizes["variances"][0]), normal(4, seed=seed + 1)
    target = _Hierarchy(architecture(**sizes), kernels, y, 0.3)
    x = target.draw_prior(2, generator(seed))
    value, slope = target(x)
    # Minus half of the action, and the change of variables from the measure that congruences leave alone.
    A, F = target._factors(target._entries(x))
    U = [f @ f.mT for f in F[:0:-1]]
    half = [-action([u[k] for u in U], kernels, y, temperature=0.3, **sizes) / 2 for k in range(2)]
    logs = torch.stack([sum((a[k].diagonal() * math.sqrt(N / v)).log() @ -torch.arange(len(a[k]), dtype=torch.float64)
                            for a, N, v in zip(A[::-1], sizes["widths"], sizes["variances"][1:], strict=True))
                        for k in range(2)])
    assert (value - logs - torch.stack(half)).diff().item() == pytest.approx(0, abs=1e-8)
    torch.testing.assert_close(U[0], target.order_parameter(x))
    for k in range(6):
        e = normal(*x.shape, seed=seed + k)
        along = (target(x + 1e-5 * e)[0] - target(x - 1e-5 * e)[0]) / 2e-5
        torch.testing.assert_close(along, (slope * e).sum(-1), rtol=1e-5, atol=1e-5)


def test_a_density_that_cannot_be_had_is_zero_there():
    kernels, y = path_kernels(normal(2, 4, 5)), normal(4)
    target = _Hierarchy(architecture((2,), (3, 2), None), kernels, y, 0.3)
    x = target.draw_prior(3, generator())
    x[1] += 400
    value, slope = target(x)
    assert value.isneginf().tolist() == [False, True, False] and slope.isfinite().all()


def test_trajectories_go_back_the_way_they_came():
    # What makes the acceptance right: reversed, the same steps lead back; and energy is kept to second order.
    target = _Hierarchy(architecture((2, 2), (6, 4, 3), None), path_kernels(normal(4, 5, 4)), normal(5), 0.3)
    x, p = target.draw_prior(3, generator()), normal(3, 14, seed=1)
    value, slope = target(x)
    factor = torch.linalg.cholesky(target.prior_covariance() + 0.02)
    lost = []
    for steps in (10, 20):
        end, end_value, end_slope, q = _leapfrog(target, x, slope, p, factor, 1 / steps, steps)
        assert (end - x).abs().max() > 0.1
        back, _, _, again = _leapfrog(target, end, end_slope, -q, factor, 1 / steps, steps)
        torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(-again, p, rtol=1e-9, atol=1e-9)
        lost.append((end_value - value - (q.square() - p.square()).sum(-1) / 2).abs().max().item())
    assert lost[1] < lost[0] / 3 < 0.1


# ------------------------------------------------------------------------- one layer of Gibbs sampling

@pytest.mark.parametrize("layer", range(4))
def test_the_law_of_one_layer(layer):
    # Many chains from the same weights: mean and covariance of the new ones are those of a linear Gaussian model.
    heads, widths, variances, temperature, count = (2, 3), (3, 2, 2), (0.7, 1.2, 0.8, 1.5), 0.5, 20_000
    y, xi = 2 * normal(3, seed=1), normal(6, 3, 2)
    weights = draw_weights(2, heads=heads, widths=widths, variances=variances, generator=generator(2))
    shape = weights[layer].shape

    def output(V):
        return output_of_paths([*weights[:layer], V, *weights[layer + 1:]], xi)

    J = torch.autograd.functional.jacobian(output, weights[layer]).flatten(1)
    precision = J.T @ J / temperature + torch.eye(J.shape[1]) / variances[layer]
    mean, covariance = torch.linalg.solve(precision, J.T @ y / temperature), torch.linalg.inv(precision)

    many = [V.expand(count, *V.shape) for V in weights]
    z, rest = xi.expand(count, *xi.shape), 6
    for k in range(layer + 1):
        rest //= shape[0] if k == layer else weights[k].shape[0]
        b = _backward(many)[k] / math.sqrt(rest)
        if k < layer:
            z = torch.einsum("choi,chspi->cspo", many[k], z.reshape(count, weights[k].shape[0], -1, *z.shape[-2:]))
            z = z / math.sqrt(weights[k].shape[0] * weights[k].shape[2])
    V, out = _draw_layer(many[layer], z, b, y, variances[layer], temperature, generator(3))
    drawn = V.flatten(1)
    error = covariance.diagonal().sqrt() / math.sqrt(count)
    assert ((drawn.mean(0) - mean) / error).abs().max() < 4.5
    spread = torch.cov(drawn.T) - covariance
    scale = (torch.outer(covariance.diagonal(), covariance.diagonal()) + covariance**2).sqrt() / math.sqrt(count)
    assert (spread / scale).abs().max() < 4.5
    # What comes out of the layer goes into the next one.
    rest_of_it = [*weights[:layer], V[7], *weights[layer + 1:]]
    end = out[7]
    for W in weights[layer + 1:]:
        end = torch.einsum("hoi,hspi->spo", W, end.reshape(len(W), -1, *end.shape[-2:]))
        end = end / math.sqrt(len(W) * W.shape[2])
    torch.testing.assert_close(end[0, :, 0], output_of_paths(rest_of_it, xi))


# ------------------------------------------------------------------------- both chains against the exact posterior

def by_weighting(sizes, features, kernels, y, temperature, count):
    """The mean order parameter of the posterior, and its error, by weighting draws of the prior with the likelihood."""
    U = order_parameter(draw_weights(features, batch=(count,), generator=generator(9), **sizes))
    law = torch.distributions.MultivariateNormal(torch.zeros_like(y), combine(U, kernels) + temperature
                                                 * torch.eye(len(y), dtype=y.dtype))
    weight = law.log_prob(y).softmax(0)[:, None, None]
    mean = (weight * U).sum(0)
    return mean, (weight**2 * (U - mean) ** 2).sum(0).sqrt()


@pytest.mark.parametrize("sizes, narrow", [
    ({"heads": (2, 2), "widths": (5, 3, 1), "variances": (1.3, 0.7, 1.2, 0.9)}, False),
    ({"heads": (2, 2), "widths": (2, 1, 2), "variances": (1.3, 0.7, 1.2, 0.9)}, True),
    ({"heads": (3,), "widths": (4, 2), "variances": (0.8, 1.5, 1.1)}, False),
])
def test_both_chains_have_the_posterior(sizes, narrow):
    # checks: thm-ap-gp, thm-ap-hierarchy
    xi, y, temperature = normal(math.prod(sizes["heads"]), 4, 6), 2 * normal(4, seed=1), 1.0
    kernels = path_kernels(xi, variance=sizes["variances"][0])
    mean, error = by_weighting(sizes, 6, kernels, y, temperature, 100_000)
    options = {"temperature": temperature, "generator": generator(3), **sizes}
    if narrow:
        with pytest.raises(ValueError, match="use sample_weights"):
            sample_order_parameters(kernels, y, **options)
    else:
        draws = quiet(sample_order_parameters, kernels, y, warm_up=160, draws=200, chains=8, **options)
        wrong = (draws.mean - mean) / (error**2 + draws.U.var((0, 1)) / draws.effective_size).sqrt()
        assert wrong.abs().max() < 4 and draws.effective_size.min() > 300
    draws = quiet(sample_weights, xi, y, warm_up=100, draws=200, chains=20, **options)
    wrong = (draws.mean - mean) / (error**2 + draws.U.var((0, 1)) / draws.effective_size).sqrt()
    assert wrong.abs().max() < 4 and draws.effective_size.min() > 300


def test_every_layer_carries_the_same_of_the_data():
    # checks: thm-fw-virial
    # The likelihood knows only the product of all layers, so in the posterior, at any widths, the mean of
    # |V|^2 / sigma^2 exceeds the number of weights by the same amount in each of them: that of a' K a - tr(K_T^-1 K).
    sizes = {"heads": (2, 2), "widths": (2, 3, 2), "variances": (1.3, 0.7, 1.2, 0.9)}
    xi, y, temperature, chains = normal(4, 4, 6), 6 * normal(4, seed=1), 0.5, 3000
    draws = quiet(sample_weights, xi, y, temperature=temperature, chains=chains, warm_up=40, draws=4,
                  generator=generator(4), **sizes)
    K = combine(draws.U[:, -1], draws.kernels)
    K_T = K + temperature * torch.eye(4, dtype=torch.float64)
    alpha = torch.linalg.solve(K_T, y.expand(chains, 4))
    Q = torch.einsum("cp,cpq,cq->c", alpha, K, alpha) - torch.linalg.solve(K_T, K).diagonal(dim1=1, dim2=2).sum(-1)
    assert Q.mean() > 1
    for V, variance in zip(draws.weights, sizes["variances"], strict=True):
        excess = V.square().sum((1, 2, 3)) / variance - V[0].numel() - Q
        assert abs(excess.mean()) < 4 * excess.std() / math.sqrt(chains)

    # The closed form of the prediction against outputs of the sampled networks.
    new = normal(4, 5, 6, seed=8)
    f = output_of_paths(draws.weights, new)
    mean, variance = draws.predict(path_kernels(new, xi, 1.3), path_diagonal(new, 1.3))
    assert ((f.mean(0) - mean) / (f.std(0) / math.sqrt(chains))).abs().max() < 4
    assert (f.var(0) / variance - 1).abs().max() < 0.2
    assert f.var(0).min() > 0.05
    few = draws.predict(path_kernels(new, xi, 1.3), path_diagonal(new, 1.3), at_most=3000)
    assert (few.mean - mean).abs().max() < 0.1 and not torch.equal(few.mean, mean)


# ------------------------------------------------------------------------- what chains say of themselves

def test_chains_that_disagree_say_so():
    kernels, y = path_kernels(normal(2, 3, 4)), normal(3)
    steps = [normal(4, 2, 2, seed=k) for k in range(400)]
    steps = [(s + s.mT) / 2 for s in steps]
    good = _draws("sampling", steps, kernels, y, 0.1)
    assert good.converged and (good.r_hat - 1).abs().max() < 0.01 and good.effective_size.min() > 1000
    torch.testing.assert_close(good.mean, sum(s.mean(0) for s in steps) / 400)
    apart = torch.zeros(4, 2, 2, dtype=torch.float64)
    apart[0, 0, 0] = 3.0
    with pytest.warns(ConvergenceWarning, match="R-hat is 1"):
        bad = _draws("sampling", [s + apart for s in steps], kernels, y, 0.1)
    assert not bad.converged and bad.r_hat[0, 0] > 1.1 and bad.r_hat[1, 1] < 1.01
    slow = list(torch.stack(steps).cumsum(0))
    with pytest.warns(ConvergenceWarning, match="are worth"):
        assert _draws("sampling", slow, kernels, y, 0.1).effective_size.max() < 50


# ------------------------------------------------------------------------- the theory of large widths

def test_the_theory_is_right_up_to_one_over_the_width():
    chain = HiddenMarkov(length=12, features=40)
    training, test = (four_paths(20, seed=1, test=t, chain=chain) for t in (False, True))
    xi, new = (path_inputs(t.inputs, t.attention, t.readout) for t in (training, test))
    kernels, cross, diagonal = path_kernels(xi), path_kernels(new, xi), path_diagonal(new)
    errors = []
    for width in (6, 50):
        sizes = {"heads": (2, 2), "widths": (width,) * 3, "variances": (1.0,) * 4, "temperature": 0.05}
        draws = quiet(sample_order_parameters, kernels, training.labels, warm_up=160, draws=250, chains=6,
                      generator=generator(width), **sizes)
        assert draws.effective_size.min() > 500 and draws.r_hat.max() < 1.03
        solution = solve_order_parameters(kernels, training.labels, **sizes)
        exact, theory = draws.predict(cross, diagonal), predict(solution, cross, diagonal)
        errors.append(((exact.mean - theory.mean).norm() / exact.mean.norm()).item())
        assert torch.corrcoef(torch.stack([exact.mean, theory.mean]))[0, 1] > (0.999 if width == 50 else 0.99)
        assert (theory.variance / exact.variance).mean().item() == pytest.approx(1, abs=4 / width)
    assert errors[1] < errors[0] / 2 and errors[1] < 0.03


# ------------------------------------------------------------------------- refusals

SIZES = {"heads": (2,), "widths": (3, 2), "temperature": 0.1}


@pytest.mark.parametrize("call, words", [
    (lambda xi, y: sample_weights(xi, y[:2], **SIZES), "labels"),
    (lambda xi, y: sample_weights(xi, y, **{**SIZES, "temperature": 0.0}), "temperature"),
    (lambda xi, y: sample_weights(xi, y, **{**SIZES, "widths": (3,)}), "widths"),
    (lambda xi, y: sample_weights(xi, y, **{**SIZES, "heads": (3,)}), "paths"),
    (lambda xi, y: sample_weights(xi, y, chains=1, **SIZES), "at least 2 chains"),
    (lambda xi, y: sample_order_parameters(path_kernels(xi), y, draws=3, **SIZES), "4 draws"),
    (lambda xi, y: sample_order_parameters(path_kernels(xi), y, **{**SIZES, "widths": (1, 2)}), "layer 1 is smaller"),
    (lambda xi, y: sample_order_parameters(path_kernels(xi), y, **{**SIZES, "widths": (3, 2.5)}), "whole numbers"),
    (lambda xi, y: sample_order_parameters(path_kernels(xi), y, **{**SIZES, "variances": (1, 1)}), "variances"),
    (lambda xi, y: sample_order_parameters(path_kernels(xi)[:, :, :2], y, **SIZES), "kernels"),
])
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call(normal(2, 3, 4), normal(3))


def test_a_kernel_too_large_for_its_numbers():
    with pytest.raises(FloatingPointError, match="raise the temperature"):
        sample_order_parameters(path_kernels(1e9 * normal(2, 12, 3)), normal(12), **{**SIZES, "temperature": 1e-6})
