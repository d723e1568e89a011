"""Approximation: closed forms against quadrature, bounds against what they bound, and patterns made and unmade."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernelbook import kernels
from kernelbook.approximation import (
    Gaussian,
    Uniform,
    best_rank_error,
    fit_two_layer,
    gaussian_mass,
    gaussian_singular_values,
    hull_bound,
    hull_weights,
    pattern_factors,
    pattern_rank,
    schmidt,
    singular_values,
)
from kernelbook.attention import weights

EXP = kernels.EDP(scale=1.0)
GRID = torch.linspace(-1, 1, 401, dtype=torch.float64)[:, None]


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def apart(a, b):
    return (a - b).abs().max().item()


# ------------------------------------------------------------------------- best rank-d errors

def test_singular_values_of_the_exponential():
    # checks: thm-best-rank, E6.1
    known = tensor(1.05990740682, 0.354086577030, 0.0445879886389, 3.81499099e-3, 2.42030664e-4)
    expansion = schmidt(EXP)
    assert apart(expansion.values[:5], known) < 1e-10
    assert expansion.change < 1e-13
    assert torch.equal(singular_values(EXP, 5), expansion.values[:5])
    # ‖F‖² = ∬ e^{2xy}/4 = Σ 4^n/((2n)! (2n+1)²): a computation that knows nothing of quadrature
    square = math.fsum(4**n / (math.factorial(2 * n) * (2 * n + 1) ** 2) for n in range(20))
    assert abs(expansion.norm**2 - square) < 1e-13


def test_taylor_is_worse_than_the_best_of_its_rank():
    # checks: thm-best-rank, E6.1
    ratios = []
    for d in (1, 2, 3, 4):
        taylor = kernels.Taylor(degree=d - 1, scale=1.0)
        error = schmidt(lambda x, y, t=taylor: EXP(x, y) - t(x, y)).norm
        ratios.append(error / best_rank_error(EXP, d))
    assert apart(torch.tensor(ratios), torch.tensor([1.0343524870, 2.3955101090, 6.538589952, 19.79313601])) < 1e-6
    wrong = kernels.Taylor(degree=2, scale=1.0)       # control: one degree more has one rank more, and wins at rank 2
    assert schmidt(lambda x, y: EXP(x, y) - wrong(x, y)).norm < best_rank_error(EXP, 2)


@given(st.integers(0, 10_000), st.integers(1, 3))
def test_nothing_of_rank_d_comes_closer(seed, d):
    # checks: thm-best-rank
    F = kernels.RBF(bandwidth=0.7)
    floor = best_rank_error(F, d, Uniform(-1, 2), Uniform(0, 1))
    q, k = schmidt(F, Uniform(-1, 2), Uniform(0, 1)).factors(d)
    change = 0.1 * random(seed, d, d) + torch.eye(d)

    def difference(x, y):
        return F(x, y) - q(x) @ change @ k(y).mT

    assert schmidt(difference, Uniform(-1, 2), Uniform(0, 1)).norm >= floor
    x, y = torch.linspace(-1, 2, 50)[:, None].double(), torch.linspace(0, 1, 50)[:, None].double()
    assert difference(x, y).abs().max() > floor


def test_best_approximation_on_two_intervals():
    mu, nu = Uniform(-1, 2), Uniform(0, 1)
    expansion = schmidt(EXP, mu, nu)
    for d in range(4):
        error = schmidt(lambda x, y, d=d: EXP(x, y) - expansion.approximation(x, y, d), mu, nu).norm
        assert abs(error - expansion.error(d)) < 1e-13
    (x, w), (y, v) = mu.quadrature(20), nu.quadrature(20)
    assert abs(w.sum() - 1) < 1e-14 and abs(w @ x[:, 0] - 0.5) < 1e-14 and abs(v @ y[:, 0] ** 2 - 1 / 3) < 1e-14
    q, k = expansion.factors(3)
    for f, at, weight in ((q(x), x, w), (k(y), y, v)):
        assert apart(f.mT @ (weight[:, None] * f), expansion.values[:3].diag()) < 1e-13      # balanced and orthogonal
        assert f.shape == (len(at), 3)


def test_gaussian_closed_form():
    # checks: prp-mehler, E6.2
    for c, sigma in ((0.3, 1.0), (0.45, 1.0), (1.0, 0.6), (-0.3, 1.0)):
        closed = gaussian_singular_values(c, sigma, 8)
        numeric = schmidt(lambda x, y, c=c: (c * x @ y.mT).exp(), Gaussian(sigma), nodes=100)
        assert numeric.change < 1e-9
        assert apart(numeric.values[:8], closed) < 1e-12
        w = closed[1] / closed[0]
        for d in range(4):
            assert abs(numeric.error(d) / numeric.norm - w**d) < 1e-12
        narrower = gaussian_singular_values(c, 0.9 * sigma, 2)
        assert narrower[1] / narrower[0] < w - 0.05                                     # control
    assert apart(gaussian_singular_values(0.3, 1.0, 6),
                 torch.tensor([10**0.5 / 3 ** (n + 1) for n in range(6)], dtype=torch.float64)) < 1e-12
    with pytest.raises(ValueError, match="square-integrable"):
        gaussian_singular_values(0.5, 1.0, 3)


def test_not_square_integrable_is_noticed():
    # checks: prp-mehler
    diverging = schmidt(kernels.EDP(scale=0.6), Gaussian())          # 2cσ² = 1.2
    assert diverging.change > 0.1
    with pytest.raises(ValueError, match="square-integrable"):
        best_rank_error(kernels.EDP(scale=0.6), 1, Gaussian())
    assert schmidt(kernels.L2(scale=1.0)).change > 1e-6              # a kink: Gauss's rule converges slowly
    with pytest.raises(ValueError, match="more nodes"):
        singular_values(kernels.L2(scale=1.0), 3)


def test_gaussian_mass():
    # checks: prp-mehler
    for n, share in enumerate((0.3531203242579, 0.7177265021282, 0.9089004542925, 0.9767540292114)):
        assert abs(gaussian_mass(64, n) - share) < 1e-12
    assert abs(gaussian_mass(64, 60) - 1) < 1e-12
    assert gaussian_mass(1000, 1500) == 1.0 and gaussian_mass(5000, 20) <= 1.0      # no overflow, and a share
    assert abs(gaussian_mass(2000, 1320, c=0.45) - 0.717748093684) < 1e-10           # nor underflow
    # in two dimensions the singular values are products of those in one
    one = gaussian_singular_values(0.3, 0.9, 40)
    square = (one[:, None] * one).square()
    degree = torch.arange(40)[:, None] + torch.arange(40)
    for n in range(5):
        share = square[degree <= n].sum() / square.sum()
        assert abs(gaussian_mass(2, n, c=0.3, sigma=0.9) - share) < 1e-12
    # the norm: E exp(2x·y/√d) = (1 − 4/d)^{−d/2}, and degree 0 has (1 + w²)^d of it
    w = (1 - math.sqrt(1 - 4 / 64)) * 8 / 2
    assert abs((1 + w * w) ** 64 * (1 - 4 / 64) ** 32 - gaussian_mass(64, 0)) < 1e-12
    with pytest.raises(ValueError, match="larger d"):
        gaussian_mass(4, 1)


# ------------------------------------------------------------------------- networks

def test_two_layer_networks_approach_the_best_kernel():
    # checks: thm-two-layer, E6.3
    expansion = schmidt(EXP)
    q, k = expansion.factors(5)
    best = expansion.approximation(GRID, GRID, 5)
    target, floor = EXP(GRID, GRID), expansion.error(5)
    from_best, from_target = [], []
    for width in (16, 64, 256):
        product = fit_two_layer(q, width)(GRID) @ fit_two_layer(k, width)(GRID).mT
        from_best.append(apart(product, best))
        from_target.append(apart(product, target))
    assert from_best == pytest.approx([8.40e-3, 6.21e-4, 3.76e-5], rel=0.01)
    assert all(13 < a / b < 19 for a, b in itertools.pairwise(from_best))
    assert min(from_target) > floor
    assert abs(from_target[-1] - apart(best, target)) < 1e-8        # wider nets do not go below rank 5


def test_no_network_beats_the_rank():
    # checks: thm-best-rank, E6.3
    (x, w), _ = Uniform().quadrature(64), None
    root = w.sqrt()[:, None]
    F = root * EXP(x, x) * root.mT
    for seed in range(40):
        d, width = 1 + seed % 4, 6
        q = (x @ random(seed, 1, width) + random(seed + 100, width)).relu() @ random(seed + 200, width, d)
        basis, _ = torch.linalg.qr(root * q)
        best_partner = F - basis @ (basis.mT @ F)                    # of all functions k, for these q
        assert torch.linalg.norm(best_partner) > best_rank_error(EXP, d)
        assert torch.linalg.norm(best_partner) > 2 * best_rank_error(EXP, d + 2)      # control: more rank, less error


def test_network_is_the_interpolant():
    net = fit_two_layer(lambda x: torch.cat([x.sin(), x**2], 1), 10, low=-2.0, high=3.0)
    knots = torch.linspace(-2, 3, 11, dtype=torch.float64)[:, None]
    assert apart(net(knots), torch.cat([knots.sin(), knots**2], 1)) < 1e-13
    middle = (knots[1:] + knots[:-1]) / 2
    assert apart(net(middle)[:, 1:], (knots[1:] ** 2 + knots[:-1] ** 2) / 2) < 1e-13
    assert apart(net(middle)[:, 1:], middle**2) == pytest.approx(0.5**2 / 4, rel=1e-9)     # h²/8 · max|f''|
    assert [type(layer).__name__ for layer in net] == ["Linear", "ReLU", "Linear"]
    assert net[0].out_features == 10 and net[2].out_features == 2


# ------------------------------------------------------------------------- rank and log-rank

def test_separation():
    # checks: thm-separation, E6.4
    def affine(x, y):
        return 1 + 0.9 * x @ y.mT

    assert singular_values(EXP.log_gram, 2)[1] < 1e-14
    assert singular_values(affine, 3)[2] < 1e-14
    log = singular_values(lambda x, y: affine(x, y).log(), 7)
    assert abs(log[6] - 5.6254e-5) < 1e-8
    assert singular_values(EXP, 7)[6] > 1e-7
    expansion = schmidt(lambda x, y: affine(x, y).log())
    for d in (1, 2, 3, 5):                                     # the gap for the kernel itself, not for its logarithm
        gap = expansion.error(d) / (10 * (1 + expansion.error(d)))
        assert apart(expansion.approximation(GRID, GRID, d).exp(), affine(GRID, GRID)) > gap
    twice = singular_values(lambda x, y: EXP(x, y).exp(), 7), singular_values(EXP, 7)      # control: in neither class
    assert min(values[6] for values in twice) > 1e-7


# ------------------------------------------------------------------------- the hull

def test_bound_is_attained():
    # checks: thm-hull, E4.2
    theta = tensor(0.5, 0.3, 0.2)
    assert abs(hull_bound(theta) - 0.263151380158) < 1e-9
    others = tensor([1.0, 0.2], [-0.7, 0.9], [0.1, -1.3])
    keys = torch.cat([others, theta[None] @ others])
    found = hull_weights(keys, -1)
    assert found.inside and apart(found.theta[:3], theta) < 1e-12 and found.theta[3] == 0
    queries = 20 * random(0, 4000, 2)
    edp = weights(queries, keys, "edp")[:, 3]
    assert edp.max() < found.bound
    best = torch.linalg.solve(others[:2] - others[2], (theta[:2] / theta[2]).log())      # where κ(q, k_m) ∝ θ_m
    assert abs(weights(best[None] * 2**0.5, keys, "edp")[0, 3] - found.bound) < 1e-12
    assert weights(keys[3:], keys, kernels.RBF(bandwidth=0.05))[0, 3] > 0.999          # control: another kernel


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(3, 9))
def test_supremum_over_queries(seed, d, m):
    keys = random(seed, m, d)
    found = hull_weights(keys, 0)
    queries = torch.cat([random(seed + 1, 500, d) * 3, random(seed + 2, 500, d) * 300]) * d**0.5
    largest = weights(queries, keys, "edp")[:, 0].max()
    if found.inside:
        assert apart(found.theta @ keys, keys[0]) < 1e-9 and found.theta.min() >= 0 and found.theta[0] == 0
        assert largest < found.bound + 1e-12 and found.bound <= 0.5
        # no mixture of two representations has a larger entropy: move along a direction that keeps the mean
        others = torch.cat([keys[1:], torch.ones(m - 1, 1, dtype=torch.float64)], 1)
        free = torch.linalg.svd(others.mT, full_matrices=True)[2][torch.linalg.matrix_rank(others):]
        for direction in free:
            moved = found.theta[1:] + 1e-4 * direction
            assert moved.min() < 0 or hull_bound(moved / moved.sum()) >= found.bound - 1e-12
    else:
        assert found.theta is None and found.bound == 1.0
        if d == 1:
            assert largest > 0.99


def test_hull_by_hand():
    line = tensor([0.0], [1.0], [0.5])
    assert abs(hull_weights(line, 2).bound - 1 / 3) < 1e-14                # the midpoint gets a third at most
    assert hull_weights(line, 0).bound == 1.0
    square = tensor([1, 1], [1, -1], [-1, 1], [-1, -1], [0, 0], [1, 0])
    centre, edge = hull_weights(square[:5], 4), hull_weights(square, 5)
    assert abs(centre.bound - 1 / 5) < 1e-14
    assert apart(edge.theta, tensor(0.5, 0.5, 0, 0, 0, 0)) < 1e-12         # on a face, only the face helps
    assert abs(hull_weights(torch.zeros(4, 2, dtype=torch.float64), 1).bound - 1 / 4) < 1e-14
    assert hull_weights(square[:1], 0).bound == 1.0
    for twins in (1, 3):                                                   # a corner and its copies share
        copies = torch.cat([square[:5], square[:1].expand(twins, 2)])
        assert abs(hull_weights(copies, 0).bound - 1 / (1 + twins)) < 1e-14
    single = random(5, 12, 2).float()
    for i in range(12):
        assert hull_weights(single, i).bound == hull_weights(single.double(), i).bound
    circle = torch.arange(7) * 2 * math.pi / 7
    assert not any(hull_weights(torch.stack([circle.cos(), circle.sin()], 1), i).inside for i in range(7))
    shifted = 1e6 * square + 3e7                                           # neither place nor size matters
    assert abs(hull_weights(shifted[:5], 4).bound - 1 / 5) < 1e-9


def test_hull_refusals():
    with pytest.raises(IndexError, match="no key 3"):
        hull_weights(random(0, 3, 2), 3)
    with pytest.raises(ValueError, match="matrix"):
        hull_weights(random(0, 3), 0)
    with pytest.raises(ValueError, match="sum to 1"):
        hull_bound(tensor(0.5, 0.6))
    triangle = tensor([1, 0], [0, 1], [0, 0])
    for height, inside in ((-0.01, True), (0.0, True), (0.01, False)):
        assert hull_weights(torch.cat([triangle, tensor([0.3, 0.7]) + height]), 3).inside == inside
    with pytest.raises(ValueError, match="boundary"):
        hull_weights(torch.cat([triangle, tensor([0.3, 0.7]) + 1e-10]), 3)


# ------------------------------------------------------------------------- patterns

@given(st.integers(0, 10_000), st.integers(2, 7), st.integers(2, 7), st.integers(1, 4))
def test_patterns_of_a_head_come_back(seed, n, m, d):
    # checks: thm-pattern-rank
    q, k = random(seed, n, d), random(seed + 1, m, d)
    P = weights(q, k, "edp")
    rank = int(pattern_rank(P))
    assert rank == min(n, m - 1, d)
    new_q, new_k = pattern_factors(P, d)
    assert new_q.shape == (n, d) and new_k.shape == (m, d)
    assert apart(weights(new_q, new_k, "edp"), P) < 1e-12


SIX = tensor(
    [0.10854169355104405, 0.15510862458303465, 0.32064108591737484,
     0.016916794808935563, 0.06565762692134502, 0.33313417421826597],
    [0.0595243000098094, 0.05909078953173586, 0.0880488212621319,
     0.18898627976257162, 0.5630880276139373, 0.041261781819814006],
    [0.06723850649907566, 0.046369209993729156, 0.04980282519125753,
     0.07965088408611419, 0.1821862242945926, 0.5747523499352308],
    [0.013469028826855708, 0.35229947095924685, 0.27274500377678795,
     0.325029901023134, 0.010453199525246818, 0.0260033958887287],
    [0.013466644124849545, 0.24469282480131135, 0.1365483878428593,
     0.12125034413683881, 0.1634427832516356, 0.32059901584250544],
    [0.6460502461713543, 0.14936070759977477, 0.060078936245951425,
     0.039751043014922244, 0.04113487813956021, 0.06362418882843691],
)


def test_generic_patterns_need_all_dimensions():
    # checks: thm-pattern-rank, E6.6
    assert pattern_rank(SIX) == 5
    assert apart(weights(*pattern_factors(SIX, 5), "edp"), SIX) < 1e-13
    assert apart(weights(*pattern_factors(SIX, 4, approximate=True), "edp"), SIX) > 0.01
    P = torch.stack([SIX, *random(1, 2, 6, 6).softmax(-1)])
    assert pattern_rank(P).tolist() == [5, 5, 5]
    assert apart(weights(*pattern_factors(P, 5), "edp"), P) < 1e-12
    with pytest.raises(ValueError, match="needs head dimension 5"):
        pattern_factors(P, 4)
    assert apart(weights(*pattern_factors(P, 5, approximate=True), "edp"), P) < 1e-12


def test_hard_patterns_need_few_dimensions():
    # checks: E6.6
    angle = torch.arange(16, dtype=torch.float64) * 2 * math.pi / 16
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    errors = [apart(weights(beta * circle, circle, kernels.EDP(scale=1.0)), torch.eye(16)) for beta in (10, 100, 1000)]
    assert errors[0] == pytest.approx(0.5110925884, rel=1e-8)
    assert errors[1] == pytest.approx(9.879405868e-4, rel=1e-8)
    assert errors[2] < 1e-30
    for r in (2, 8, 15):                                # control: a *kernel matrix* of rank r stays far from I
        M = random(r, 16, r) @ random(r + 1, r, 16)
        M = M @ torch.linalg.pinv(M)                    # the closest matrix with these columns
        assert (M - torch.eye(16)).square().sum() >= 16 - r - 1e-9


def test_nearly_uniform_patterns():
    # checks: thm-pattern-rank
    for m in range(1, 20):
        assert pattern_rank(torch.full((5, m), 1 / m, dtype=torch.float64)) == 0
    for size in (1e-2, 1e-6, 1e-9):
        assert pattern_rank(weights(size * random(0, 6, 2), random(1, 9, 2), "edp")) == 2


def test_pattern_refusals():
    with pytest.raises(ValueError, match="positive"):
        pattern_rank(torch.eye(3))
    with pytest.raises(ValueError, match="sum to 1"):
        pattern_rank(torch.ones(3, 3))
    with pytest.raises(ValueError, match="d must be"):
        pattern_factors(torch.full((3, 3), 1 / 3), 0)


def test_arguments():
    with pytest.raises(ValueError, match="low < high"):
        Uniform(1, 1)
    with pytest.raises(ValueError, match="sigma"):
        Gaussian(0)
    with pytest.raises(ValueError, match="must give a matrix"):
        schmidt(lambda x, y: x + y)
    with pytest.raises(ValueError, match="not finite"):
        schmidt(lambda x, y: (x @ y.mT).log())
    with pytest.raises(ValueError, match="stand out"):
        schmidt(EXP).factors(40)
    with pytest.raises(ValueError, match="128 nodes"):
        singular_values(EXP, 129)
    with pytest.raises(ValueError, match="width"):
        fit_two_layer(torch.sin, 0)
    with pytest.raises(ValueError, match=r"\(n, outputs\)"):
        fit_two_layer(lambda x: x[:, 0], 4)
