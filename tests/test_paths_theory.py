"""Order parameters at finite width: the solver against the action as written, and the laws that its minima obey."""

import itertools
import math
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning

from kernelbook.paths import (
    Architecture,
    action,
    action_gradients,
    energy,
    entropy,
    gp_limit,
    kernel_alignment,
    large_width,
    noiseless_single_path,
    path_diagonal,
    path_inputs,
    path_kernels,
    posterior,
    predict,
    single_path,
    solve_order_parameters,
    theory,
    virial,
    whitened,
)
from kernelbook.paths.hidden_markov import four_paths, two_paths


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Problem:
    """Path inputs, labels and an architecture; ``kwargs`` are those of the solver."""

    def __init__(self, heads, widths, variances, temperature, seed, P=8, N_0=6):
        self.heads, self.widths, self.variances, self.temperature = heads, widths, variances, temperature
        self.xi = random(seed, math.prod(heads), P, N_0)
        self.y = torch.sign(random(seed + 1, P))
        self.kernels = path_kernels(self.xi, variance=variances[0])

    @property
    def kwargs(self):
        return {name: getattr(self, name) for name in ("heads", "widths", "variances", "temperature")}

    def solve(self, kernels=None, labels=None, **changes):
        settings_ = {"tol": 1e-7, **self.kwargs, **changes}
        solution = solve_order_parameters(self.kernels if kernels is None else kernels,
                                          self.y if labels is None else labels, **settings_)
        assert solution.converged and solution.gradient_norm <= settings_["tol"]
        return solution

    def hierarchy(self, seed):
        """Any positive definite matrices of the right sizes."""
        return [(r := random(seed + d, d, d)) @ r.T + 0.3 * torch.eye(d).double()
                for d in Architecture(self.heads, self.widths, self.variances).sizes]


@st.composite
def problems(draw, heads=((1,), (3,), (1, 2), (2, 2), (3, 2), (2, 1, 2))):
    heads = draw(st.sampled_from(heads))
    numbers = st.floats(0.5, 2.0)
    widths = tuple(draw(st.lists(st.integers(2, 60), min_size=len(heads) + 1, max_size=len(heads) + 1)))
    variances = tuple(draw(st.lists(numbers, min_size=len(heads) + 2, max_size=len(heads) + 2)))
    return Problem(heads, widths, variances, draw(st.sampled_from([0.03, 0.1, 0.5])), draw(st.integers(0, 10_000)))


def rotation(seed, size):
    return torch.linalg.qr(random(seed, size, size))[0].contiguous()


def on_layer(matrix, heads, layer):
    """I x matrix x I, with the matrix on the index of a layer's heads."""
    result = torch.eye(1).double()
    for i, H in enumerate(heads):
        result = torch.kron(result, matrix if i == layer else torch.eye(H).double())
    return result


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


# ------------------------------------------------------------------------- the action and its derivatives

@given(p=problems(), seed=st.integers(0, 1000))
def test_the_action_in_parts(p, seed):
    # checks: thm-fw-posterior
    U = p.hierarchy(seed)
    a = Architecture(p.heads, p.widths, p.variances)
    S = action(U, p.kernels, p.y, **p.kwargs)
    # As in the module's text, with dense matrices and loops over heads.
    N, variances, H = p.widths, p.variances[1:], (*p.heads, 1)
    U_above = [*U[1:], torch.eye(1).double()]
    written = 0.0
    for level, matrix in enumerate(U):
        inner = len(matrix) // H[level]
        u = sum(matrix[h * inner:(h + 1) * inner, h * inner:(h + 1) * inner] for h in range(H[level]))
        written += N[level] * (torch.trace(U_above[level].inverse() @ u) / variances[level] - torch.logdet(matrix)
                               + H[level] * torch.logdet(U_above[level]))
    K_T = sum(U[0][i, j] * p.kernels[i, j] for i in range(a.paths) for j in range(a.paths)) / a.paths
    K_T = K_T + p.temperature * torch.eye(8).double()
    written += torch.logdet(K_T) + p.y @ K_T.inverse() @ p.y
    assert S.item() == pytest.approx(written.item(), rel=1e-10)
    parts = {"heads": p.heads, "variances": p.variances}
    S_entropy = entropy(U, widths=p.widths, **parts)
    total = S_entropy + energy(U[0], p.kernels, p.y, temperature=p.temperature) + a.constant
    assert S_entropy >= 0 and S.item() == pytest.approx(total.item(), rel=1e-10)
    for level, M in enumerate(whitened(U, **parts)):
        prior = variances[level] * torch.kron(torch.eye(H[level]).double(), U_above[level])
        assert torch.logdet(M).item() == pytest.approx((torch.logdet(U[level]) - torch.logdet(prior)).item(), abs=1e-8)
        assert M.trace().item() == pytest.approx(torch.trace(prior.inverse() @ U[level]).item(), rel=1e-9)


@given(p=problems(), seed=st.integers(0, 1000))
def test_gradients_of_the_action(p, seed):
    U = [u.requires_grad_() for u in p.hierarchy(seed)]
    by_hand = action_gradients([u.detach() for u in U], p.kernels, p.y, **p.kwargs)
    automatic = torch.autograd.grad(action(U, p.kernels, p.y, **p.kwargs), U)
    with torch.no_grad():
        for level, (ours, theirs) in enumerate(zip(by_hand, automatic, strict=True)):
            close(ours, (theirs + theirs.mT) / 2, 1e-8)
            step = 1e-5 * (lambda r: r + r.mT)(random(seed + 7, *ours.shape))
            ends = [action([u + sign * step if i == level else u for i, u in enumerate(U)], p.kernels, p.y, **p.kwargs)
                    for sign in (1, -1)]
            assert ((ends[0] - ends[1]) / 2).item() == pytest.approx((ours * step).sum().item(), rel=1e-5, abs=1e-7)


@given(p=problems(), seed=st.integers(0, 1000))
def test_the_solver_sees_the_same_action(p, seed):
    a = Architecture(p.heads, p.widths, p.variances)
    fast, coordinates = theory._Energy(p.kernels, p.y, p.temperature), theory._Coordinates(a)
    U = p.hierarchy(seed)
    theta = coordinates.unknowns(coordinates.inverse(U, "U"))

    def both(theta):
        triangles = coordinates.triangles(theta)
        roots, lefts = coordinates.roots(triangles)
        value, G = fast(roots[0] @ roots[0].T)
        return coordinates.entropy(triangles) + value, coordinates.gradient(triangles, roots, lefts, G), roots

    value, gradient, roots = both(theta)
    for root, matrix in zip(roots, U, strict=True):
        close(torch.from_numpy(root @ root.T), matrix, 1e-9)
    assert value + a.constant == pytest.approx(action(U, p.kernels, p.y, **p.kwargs).item(), rel=1e-9)
    step = 1e-6 * np.random.default_rng(seed).normal(size=len(theta))
    slope = (both(theta + step)[0] - both(theta - step)[0]) / 2
    assert slope == pytest.approx(gradient @ step, rel=1e-4, abs=1e-8 * abs(value))


# ------------------------------------------------------------------------- what holds at a minimum

@given(p=problems())
def test_a_solution_is_stationary_and_virial(p):
    # checks: prp-fw-minimum, thm-fw-virial
    s = p.solve()
    assert s.action == pytest.approx(action(s.U, p.kernels, p.y, **p.kwargs).item(), rel=1e-12)
    for U, gradient in zip(s.U, action_gradients(s.U, p.kernels, p.y, **p.kwargs), strict=True):
        scale = torch.linalg.cholesky(U)
        assert (scale.T @ gradient @ scale).abs().max() < 1e-4          # free of the units of U
        assert torch.linalg.eigvalsh(U)[0] > 0
    levels, Q = virial(s.U, p.kernels, p.y, **p.kwargs)
    torch.testing.assert_close(levels, Q.expand_as(levels), rtol=1e-5, atol=1e-5)
    other = virial(p.hierarchy(0), p.kernels, p.y, **p.kwargs)          # control: not so elsewhere
    assert (other.levels - other.Q).abs().max() > 0.1
    for step in range(3):                                               # and a minimum, not a saddle
        moved = [U + 1e-2 * torch.linalg.cholesky(U) @ (lambda r: r + r.T)(random(step + d, d, d))
                 @ torch.linalg.cholesky(U).T for d, U in ((len(U), U) for U in s.U)]
        assert action(moved, p.kernels, p.y, **p.kwargs).item() > s.action


@given(p=problems(heads=((3,), (2, 2), (3, 2), (2, 1, 2))), seed=st.integers(0, 1000), data=st.data())
def test_heads_of_a_layer_can_be_rotated(p, seed, data):
    # checks: thm-fw-symmetry
    layer = data.draw(st.sampled_from([i for i, H in enumerate(p.heads) if H > 1]))
    s, R = p.solve(), rotation(seed, p.heads[layer])
    if data.draw(st.booleans()):                                        # relabelling is a rotation, too
        R = torch.eye(p.heads[layer]).double().roll(1, 0)
    whole = on_layer(R, p.heads, layer)
    turned = p.solve(path_kernels(torch.einsum("ab,bpn->apn", whole, p.xi), variance=p.variances[0]))
    close(turned.U[0], whole @ s.U[0] @ whole.T, 1e-5)
    assert turned.action == pytest.approx(s.action, rel=1e-10)


def test_paths_cannot_be_rotated_freely():
    # checks: thm-fw-symmetry
    # The control: a rotation that mixes paths across layers is no symmetry.
    p = Problem((2, 2), (5, 8, 12), (1, 1, 1, 1), 0.05, 3)
    s, R = p.solve(), rotation(4, 4)
    assert abs(p.solve(path_kernels(torch.einsum("ab,bpn->apn", R, p.xi))).action - s.action) > 0.1


@given(p=problems(heads=((2,), (2, 2), (3, 2), (2, 1, 2))), data=st.data())
def test_cloning_all_heads_of_a_layer_changes_nothing(p, data):
    # checks: thm-fw-symmetry
    layer = data.draw(st.integers(0, len(p.heads) - 1))
    by_head = p.xi.reshape(*p.heads, *p.xi.shape[1:])
    cloned = torch.cat([by_head, by_head], layer).flatten(0, len(p.heads) - 1)
    heads = tuple(2 * H if i == layer else H for i, H in enumerate(p.heads))
    s, c = p.solve(), p.solve(path_kernels(cloned, variance=p.variances[0]), heads=heads)
    assert c.entropy + c.energy == pytest.approx(s.entropy + s.energy, rel=1e-9)
    close(c.kernel, s.kernel, 1e-5)


def test_cloning_one_head_does_change_something():
    # checks: thm-fw-symmetry
    p = Problem((2, 2), (5, 8, 12), (1, 1, 1, 1), 0.05, 3)
    by_head = p.xi.reshape(2, 2, 8, 6)
    s, c = p.solve(), p.solve(path_kernels(torch.cat([by_head, by_head[:1]]).flatten(0, 1)), heads=(3, 2))
    assert abs(c.entropy + c.energy - s.entropy - s.energy) > 0.1


@given(p=problems(heads=((2,), (2, 2), (3, 2), (2, 3, 1))), data=st.data())
def test_a_dead_head(p, data):
    # checks: thm-fw-symmetry
    layer = data.draw(st.sampled_from([i for i, H in enumerate(p.heads) if H > 1]))
    H, count = p.heads[layer], len(p.heads)
    alive = p.xi.reshape(*p.heads, *p.xi.shape[1:]).narrow(layer, 0, H - 1)
    with_zero = torch.cat([alive, 0 * alive.narrow(layer, 0, 1)], layer).flatten(0, count - 1)
    dead = p.solve(path_kernels(with_zero, variance=p.variances[0]))
    heads = tuple(h - (i == layer) for i, h in enumerate(p.heads))
    without = p.solve(path_kernels(alive.flatten(0, count - 1), variance=p.variances[0] * (H - 1) / H), heads=heads)
    close(dead.kernel, without.kernel, 1e-5)
    assert dead.energy + dead.entropy == pytest.approx(without.energy + without.entropy, rel=1e-9)
    # Its own block is what the prior makes of the level above; nothing links it to the others.
    U, above = dead.U[layer], dead.U[layer + 1]
    inner = len(above)
    close(U[-inner:, -inner:], p.variances[layer + 1] * above, 1e-5)
    assert U[-inner:, :-inner].abs().max() < 1e-5 * U.abs().max()


@given(p=problems())
def test_duplicate_data_at_twice_the_temperature(p):
    s = p.solve()
    twice = p.solve(path_kernels(torch.cat([p.xi, p.xi], 1), variance=p.variances[0]), torch.cat([p.y, p.y]),
                    temperature=2 * p.temperature)
    close(twice.U[0], s.U[0], 1e-5)
    assert twice.action == pytest.approx(s.action + 16 * math.log(2) + 8 * math.log(p.temperature), rel=1e-9)


@given(p=problems(), c=st.floats(0.5, 2.0), data=st.data())
def test_scaling(p, c, data):
    level = data.draw(st.integers(1, len(p.heads) + 1))
    s = p.solve()
    variances = [v * (c**2 if i == level else 1) for i, v in enumerate(p.variances)]
    scaled = p.solve(labels=c * p.y, temperature=c**2 * p.temperature, variances=variances)
    close(scaled.U[0], c**2 * s.U[0], 1e-5)
    # Of the variances above the kernels only the product counts.
    product = [p.variances[0], *[1.0] * len(p.heads), math.prod(p.variances[1:])]
    close(p.solve(variances=product).U[0], s.U[0], 1e-5)


@given(p=problems(heads=((2,), (2, 2), (2, 1, 2))))
@settings(max_examples=10)
def test_monotone_in_a_common_scale_of_all_widths(p):
    factors = (0.3, 1, 4, 20, 1000)
    found = [p.solve(widths=[factor * N for N in p.widths]) for factor in factors]
    for (narrow, wide), (n, w) in zip(itertools.pairwise(found), itertools.pairwise(factors), strict=True):
        slack = 1e-7 * (1 + abs(wide.energy))
        assert wide.energy >= narrow.energy - slack
        assert wide.entropy / w <= narrow.entropy / n + slack
        assert wide.entropy + wide.energy >= narrow.entropy + narrow.energy - slack
    last = found[-1]
    limit = gp_limit(p.kernels, p.y, heads=p.heads, variances=p.variances, temperature=p.temperature)
    assert last.entropy + last.energy < limit.energy and limit.entropy == 0
    close(last.U[0], limit.U[0], 0.1)


@given(p=problems())
@settings(max_examples=10)
def test_large_width(p):
    # checks: thm-fw-large
    errors = []
    for factor in (1e3, 1e4):
        widths = [factor * N for N in p.widths]
        exact = p.solve(widths=widths).U[0]
        first = large_width(p.kernels, p.y, **{**p.kwargs, "widths": widths})
        limit = Architecture(p.heads, widths, p.variances).scale * torch.eye(len(exact)).double()
        errors.append(((exact - first).norm() / (exact - limit).norm()).item())
    assert errors[1] < 0.2 * errors[0] + 1e-4 and errors[1] < 0.05      # relative to the correction: falls like 1/N


# ------------------------------------------------------------------------- closed forms

@given(layers=st.integers(1, 3), seed=st.integers(0, 1000), data=st.data())
def test_a_single_path_of_any_depth(layers, seed, data):
    # checks: prp-fw-single
    widths = data.draw(st.lists(st.integers(2, 50), min_size=layers + 1, max_size=layers + 1))
    p = Problem((1,) * layers, widths, (0.8, *[1.3] * layers, 0.6), 0.05, seed)
    s = p.solve()
    found = single_path(p.kernels[0, 0], p.y, widths=widths, variances=p.variances, temperature=0.05)
    assert min(abs(s.U[0].item() / U - 1) for U in found) < 1e-6
    # The product, written out.
    k, vectors = torch.linalg.eigh(p.kernels[0, 0])
    q, load = (vectors.T @ p.y) ** 2, s.U[0].item() * k
    Q = (q * load / (load + 0.05) ** 2 - load / (load + 0.05)).sum().item()
    assert s.U[0].item() == pytest.approx(1.3**layers * 0.6 * math.prod(1 + Q / N for N in widths), rel=1e-5)


@pytest.mark.parametrize("load, scale", [(0.4, 1.0), (3.0, 0.7)])
def test_the_cubic(load, scale):
    # checks: prp-fw-single
    P, N = 12, 12 / load
    xi, y = random(5, 1, P, 20), torch.sign(random(6, P))
    C = path_kernels(xi)
    r = (y @ torch.linalg.solve(C[0, 0], y) / P).item()
    U = noiseless_single_path(load=load, alignment=r, scale=scale)
    s = solve_order_parameters(C, y, heads=(1,), widths=(N, N), variances=(1, scale, 1), temperature=1e-8)
    assert s.converged and s.U[0].item() == pytest.approx(U, rel=1e-5)
    v = math.sqrt(U)
    assert v**3 / math.sqrt(scale) - (1 - load) * v**2 - load * r == pytest.approx(0, abs=1e-9 * v**3)
    assert noiseless_single_path(load=0, alignment=r, scale=scale) == pytest.approx(scale)
    assert noiseless_single_path(load=1e9, alignment=r, scale=scale) == pytest.approx(r, rel=1e-6)


@given(heads=st.sampled_from([(2,), (3, 2)]), seed=st.integers(0, 1000))
def test_predictions(heads, seed):
    p = Problem(heads, (7,) * (len(heads) + 1), (1.0,) * (len(heads) + 2), 0.1, seed)
    s, other = p.solve(), random(seed + 5, len(p.xi), 3, 6)
    cross, diagonal = path_kernels(other, p.xi), path_diagonal(other)
    mean, variance = predict(s, cross, diagonal)
    paths = range(len(p.xi))
    features = torch.cat([p.xi, other], 1)                      # one kernel over all points, and dense inverses
    K = sum(s.U[0][a, b] * features[a] @ features[b].T / 6 for a in paths for b in paths) / len(paths)
    inverse = torch.linalg.inv(K[:8, :8] + 0.1 * torch.eye(8).double())
    close(mean, K[8:, :8] @ inverse @ p.y, 1e-9)
    close(variance, (K[8:, 8:] - K[8:, :8] @ inverse @ K[:8, 8:]).diagonal(), 1e-9)
    close(s.kernel, K[:8, :8], 1e-12)
    limit = gp_limit(p.kernels, p.y, heads=heads, variances=p.variances, temperature=0.1)
    both = posterior(torch.stack([s.U[0], limit.U[0]]), p.kernels, p.y, cross, diagonal, temperature=0.1)
    close(both.mean, torch.stack([mean, predict(limit, cross, diagonal).mean]), 1e-12)
    close(both.variance[1], predict(limit, cross, diagonal).variance, 1e-12)


# ------------------------------------------------------------------------- several minima, and no convergence

def test_two_minima_where_the_prior_kernel_is_far_below_the_temperature():
    y = torch.tensor([1.0, -1.0] * 50).double()
    C = 5.6e-5 * torch.eye(100).double()[None, None]
    problem = {"heads": (1, 1), "widths": (10, 10, 10), "variances": (1, 1, 1, 1), "temperature": 0.075}
    s = solve_order_parameters(C, y, **problem)
    assert [m.U[0].item() for m in s.minima] == [s.U[0].item(), pytest.approx(1.458, abs=2e-3)]
    assert s.U[0].item() == pytest.approx(4579.5, abs=1) and s.minima[1].action - s.action == pytest.approx(498, abs=1)
    low, hill, high = single_path(C[0, 0], y, **{k: v for k, v in problem.items() if k != "heads"})
    assert (low, high) == (pytest.approx(s.minima[1].U[0].item()), pytest.approx(s.U[0].item())) and low < hill < high
    again = solve_order_parameters(C, y, **problem, starts=[s.minima[1].U])
    assert "starts[0]" in again.minima[1].starts and again.action == pytest.approx(s.action)


def test_a_head_that_only_pays_when_it_is_amplified():
    # The task is that of a head whose kernel is small; among multiples of the identity there is one well, near the
    # prior's mean, and the lower minimum is another one.
    generator = torch.Generator().manual_seed(29)
    xi = torch.randn(3, 30, 20, generator=generator, dtype=torch.float64)
    y = torch.sign(xi[2] @ torch.randn(20, generator=generator, dtype=torch.float64))
    xi[2] *= 0.0182
    xi[:2, :, 5:] = 0
    s = solve_order_parameters(path_kernels(xi), y, heads=(1, 3), widths=(4, 4, 4), variances=(1, 1, 1, 1),
                               temperature=0.075)
    assert len(s.minima) == 2 and s.minima[0].starts[0].startswith("head 2 of layer 1 times")
    assert s.U[0][2, 2] > 100 > s.minima[1].U[0][2, 2]
    assert s.minima[1].action - s.action > 1


def test_a_solve_that_does_not_converge_says_so():
    p = Problem((2, 2), (5, 8, 12), (1, 1, 1, 1), 0.01, 3)
    with pytest.warns(ConvergenceWarning, match="gradient norm"):
        s = solve_order_parameters(p.kernels, p.y, **p.kwargs, max_iter=1)
    assert not s.converged and s.gradient_norm > 1e-6 and not s.minima[0].converged
    assert s.action == pytest.approx(action(s.U, p.kernels, p.y, **p.kwargs).item())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert p.solve().action < s.action


P = Problem((2, 2), (5, 8, 12), (1, 1, 1, 1), 0.05, 0)


def solve(kernels=P.kernels, labels=P.y, **changes):
    return solve_order_parameters(kernels, labels, **{**P.kwargs, **changes})


@pytest.mark.parametrize("call, words", [
    (lambda: solve(P.kernels[:, :, :0, :0], P.y[:0]), "no examples"),
    (lambda: solve(temperature=0.0), "temperature must be a positive number"),
    (lambda: solve(temperature=-1.0), "temperature must be a positive number"),
    (lambda: solve(labels=P.y[None]), "one number for each of the 8 examples"),
    (lambda: solve(labels=P.y * math.nan), "labels has entries that are not finite"),
    (lambda: solve(P.kernels[0]), "paths, paths, examples, examples"),
    (lambda: solve(heads=(3, 2)), "the heads make 6 paths, but kernels is for 4"),
    (lambda: solve(heads=(4, 0)), "positive integers"),
    (lambda: solve(widths=(5, 8)), "widths must be .* 3 numbers for 2 layers, not 2"),
    (lambda: solve(widths=(5, 8, math.inf)), "gp_limit"),
    (lambda: solve(variances=(1, 1, 1)), "variances must be .* 4 numbers"),
    (lambda: solve(variances=(1, 1, 0, 1)), "variances must be positive"),
    (lambda: solve(P.kernels * math.inf), "kernels has entries that are not finite"),
    (lambda: solve(P.kernels.mT + random(0, 4, 4, 8, 8)), "transpose"),
    (lambda: solve(-P.kernels), "not positive definite"),
    (lambda: solve(tol=0.0), "tol"),
    (lambda: solve(max_iter=0), "max_iter"),
    (lambda: solve(starts=[P.hierarchy(0)[:2]]), r"starts\[0\] must be a list"),
    (lambda: solve(starts=[[-u for u in P.hierarchy(0)]]), r"starts\[0\]\[2\] is not positive definite"),
    (lambda: action(P.hierarchy(0)[:2], P.kernels, P.y, **P.kwargs), "U must be a list of matrices"),
    (lambda: action([-u for u in P.hierarchy(0)], P.kernels, P.y, **P.kwargs), "not positive definite"),
    (lambda: predict(solve(), P.kernels[..., :5], path_diagonal(P.xi)), "cross must be"),
    (lambda: noiseless_single_path(load=-1, alignment=1), "load"),
])
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_kernels_in_single_precision_are_computed_with_in_double():
    s, exact = solve(P.kernels.float(), P.y.float()), solve()
    mean = predict(s, s.kernels, path_diagonal(P.xi.float())).mean
    assert s.converged and s.U[0].dtype == torch.float64 == mean.dtype
    close(s.U[0], exact.U[0], 1e-5)


# ------------------------------------------------------------------------- the task of a hidden Markov chain

def chains(make, heads, seeds=5):
    """Accuracies, order parameters and alignments of a task, over data seeds."""
    rows = []
    for seed in range(seeds):
        random_heads = {"head_seed": seed} if make is four_paths else {}
        train, test = (make(n, seed=seed, test=t, **random_heads) for n, t in ((100, False), (600, True)))
        xi, other = (path_inputs(task.inputs, task.attention, task.readout) for task in (train, test))
        C, unseen = path_kernels(xi), (path_kernels(other, xi), path_diagonal(other))
        problem = {"heads": heads, "variances": (1.0,) * (len(heads) + 2), "temperature": 0.01}
        solutions = [gp_limit(C, train.labels, **problem)] + [
            solve_order_parameters(C, train.labels, widths=(N,) * (len(heads) + 1), **problem) for N in (10, 100, 1000)]
        good = posterior(torch.diag(torch.eye(len(C))[0]).double(), C, train.labels, *unseen, temperature=0.01)
        means = [predict(s, *unseen).mean for s in solutions] + [good.mean]
        rows.append(([(mean.sign() == test.labels).double().mean().item() for mean in means], solutions))
    return np.array([row[0] for row in rows]), [row[1] for row in rows]


@pytest.mark.parametrize("make, heads, denoising, expected", [
    # Mean and deviation over five seeds of an independent computation: infinite width, N = 10, good path alone.
    (four_paths, (2, 2), 2, [(0.829, 0.022), (0.957, 0.005), (0.927, 0.016)]),
    (two_paths, (2, 1), 1, [(0.820, 0.033), (0.940, 0.013)]),
])
def test_narrow_networks_choose_their_paths(make, heads, denoising, expected):
    accuracy, solutions = chains(make, heads)
    for mean, (reference, deviation) in zip(accuracy.mean(0)[[0, 1, 4]], expected, strict=False):
        assert abs(mean - reference) < 2 * deviation
    assert (np.diff(accuracy.mean(0)[[1, 2, 3, 0]]) < 0).all()          # towards the limit of infinite width
    for limit, *finite in solutions:
        linked = [s.U[0][0, denoising].item() for s in finite]
        assert linked[0] < linked[1] < linked[2] < 0                     # the path is subtracted
        assert kernel_alignment(finite[0].kernel, limit.labels) > 1.4 * kernel_alignment(limit.kernel, limit.labels)
        assert (limit.U[0] - torch.eye(len(limit.U[0]))).abs().max() == 0
        if len(limit.U[0]) == 4:
            assert finite[0].U[0].diagonal()[[1, 3]].max() < 1 < finite[0].U[0].diagonal()[[0, 2]].min()


def test_four_paths_take_well_under_a_second():
    task = four_paths(100, seed=0)
    C = path_kernels(path_inputs(task.inputs, task.attention, task.readout))
    seconds = []
    for _ in range(3):
        start = time.process_time()
        s = solve_order_parameters(C, task.labels, heads=(2, 2), widths=(10, 10, 10), variances=(1, 1, 1, 1),
                                   temperature=0.01)
        seconds.append(time.process_time() - start)
    assert s.converged and min(seconds) < 0.5


def test_every_pair_of_paths_counts():
    # Against one number at a time: the packed kernels leave none out.
    p = Problem((2, 2), (5, 8, 12), (1, 1, 1, 1), 0.05, 0)
    fast = theory._Energy(p.kernels, p.y, 0.05)
    for a, b in itertools.product(range(4), repeat=2):
        U = torch.eye(4).double()
        U[a, b] = U[b, a] = 0.3
        assert fast(U.numpy())[0] == pytest.approx(energy(U, p.kernels, p.y, temperature=0.05).item(), rel=1e-12)
