"""The kernel zoo and its normalisers: what the chapter *A zoo of kernels, and their normalisers* states, in numbers."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from kernelbook import attend, kernels
from kernelbook.approximation import hull_weights
from kernelbook.attention import weights
from kernelbook.kernels import (
    EDP,
    L2,
    RBF,
    Cosine,
    Definiteness,
    ExponentiatedIntersection,
    Intersection,
    Kernel,
    L2Squared,
    Linear,
    Polynomial,
    Quadratic,
    Taylor,
)

F64 = torch.float64


def spread(n: int, d: int, start: int = 1) -> torch.Tensor:
    """Points in [-1, 1]^d that fill it evenly and need no random numbers (Roberts' sequence)."""
    root = 1.5
    for _ in range(100):
        root = (1 + root) ** (1 / (d + 1))
    steps = np.outer(np.arange(start, start + n), root ** -np.arange(1.0, d + 1))
    return torch.tensor(2 * ((0.5 + steps) % 1) - 1)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def gaps(kernel: Kernel, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Singular values of the Gram matrix, over the largest."""
    s = torch.linalg.svdvals(kernel(q, k))
    return s / s[0]


def tv(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b).abs().sum(-1) / 2


def f64(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=F64)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


# ------------------------------------------------------------------------- ranks

@dataclass(frozen=True, repr=False)
class PositiveFeatures(Kernel):
    """The kernel of d positive features, elu + 1 of each coordinate."""

    range = kernels.POSITIVE
    definiteness = Definiteness.POSITIVE

    def feature_dimension(self, d):
        return d

    def gram(self, q, k):
        return (torch.nn.functional.elu(q) + 1) @ (torch.nn.functional.elu(k) + 1).mT


Q, K = spread(40, 3), spread(40, 3, start=78)
FINITE = [      # rank at d = 3, and the last singular value that counts, over the first
    (Linear(scale=1.0), 3, 0.7175617192779364),
    (Polynomial(scale=1.0, degree=1), 4, 0.26430840579431614),
    (Cosine(), 3, 0.8631579839113758),
    (Quadratic(scale=1.0), 6, 0.1765881735828537),
    (Polynomial(scale=1.0, degree=2), 10, 0.0324279339150509),
    (Polynomial(scale=1.0, degree=3, offset=0.0), 10, 0.05669719800087182),
    (Polynomial(scale=1.0, degree=3), 20, 0.0014297767284253637),
    (Taylor(scale=1.0, degree=2), 10, 0.02162848881817304),
    (L2Squared(scale=1.0), 5, 0.05338919125844802),
    (PositiveFeatures(), 3, 0.05902263768507872),
]


@pytest.mark.parametrize("kernel, rank, last", FINITE, ids=lambda x: repr(x) if isinstance(x, Kernel) else "")
def test_finite_ranks(kernel, rank, last):
    # checks: prp-zoo-ranks, E3.1
    s = gaps(kernel, Q, K)
    assert s[rank - 1].item() == pytest.approx(last, rel=1e-9) and s[rank - 1] > 1e-4
    assert s[rank] < 1e-13, "one feature more than the kernel has"
    assert kernel.feature_dimension(3) == rank
    # neither a box that lies apart nor another map changes these ranks, ...
    far = gaps(kernel, Q, K @ draw(0, 3, 3) + 3)
    assert far[rank - 1] > 1e-9 and far[rank] < 1e-13
    # ... but queries in a plane, which is no open set, do, unless no feature vanishes there
    flat = Q * f64([1, 1, 0])
    assert (gaps(kernel, flat, K)[rank - 1] < 1e-13) != isinstance(kernel, PositiveFeatures)


INFINITE = [L2(scale=1.0), Intersection(scale=1.0), ExponentiatedIntersection(scale=1.0), (-L2(scale=1.0)).exp()]


@pytest.mark.parametrize("kernel", INFINITE, ids=repr)
def test_kernels_with_a_kink_have_full_rank_on_a_common_line(kernel):
    # checks: prp-zoo-ranks, prp-intersection-collapse
    direction = f64([2, -1, 2]) / 3         # no axis, and coordinates that rise and fall
    line = torch.linspace(-1, 1, 60, dtype=F64)[:, None] * direction + 0.3
    between = line[1:] - (line[1] - line[0]) / 3
    assert kernel.feature_dimension(3) == math.inf
    assert gaps(kernel, line, line)[-1] > 1e-5 and gaps(kernel, line, between)[-1] > 1e-5
    # the control: apart from each other on that line, the same kernels on the same number of points
    separated = gaps(kernel, line, line + 3 * direction)
    assert separated[2] < 1e-13
    smooth = gaps(EDP(scale=1.0), line, line)
    assert smooth[20] < 1e-13, "EDP: nonsingular too, but float64 cannot see it"


def test_smooth_kernels_of_infinite_rank():
    # checks: prp-zoo-ranks
    apart_boxes = Q[:12], K[:12] + 2.5
    for kernel in (EDP(scale=1.0), RBF(bandwidth=1.0), Cosine().exp(), L2(scale=1.0)):
        assert kernel.feature_dimension(3) == math.inf
        for q, k in ((Q[:12], K[:12]), apart_boxes):        # no overlap is needed, L2 with d > 1 included
            assert gaps(kernel, q, k)[-1] > 1e-12, kernel
    gains = 0.5 * (Q[:12].square().sum() + K[:12].square().sum())
    dets = [torch.linalg.slogdet(kernel(Q[:12], K[:12]))[1] for kernel in (EDP(scale=1.0), RBF(bandwidth=1.0))]
    assert (dets[0] - gains - dets[1]).abs() < 1e-9, "the Gaussian kernel is EDP with a gain on either side"
    left, right = torch.linspace(0, 1, 9, dtype=F64)[:, None], torch.linspace(2, 3, 9, dtype=F64)[:, None]
    assert gaps(L2(), left, right)[1] > 0.01 and gaps(L2(), left, right)[2] < 1e-14, "the exception: d = 1"


def test_exponentials_of_the_cosine():
    # checks: prp-zoo-ranks, prp-intersection-collapse
    kernel = (2.0 * Cosine()).exp()
    q, k = f64([-3], [-1], [2], [5]), f64([-2], [1], [4])
    assert gaps(kernel, q, k)[1] > 0.1 and gaps(kernel, q, k)[2] < 1e-15, "rank 2 in one dimension without 0"
    assert gaps(kernel, q, k.abs())[1] < 1e-15, "rank 1 if one side has a single sign"
    with_zero = f64([-1], [0], [1])
    assert gaps(kernel, with_zero, with_zero)[2] > 1e-3
    assert [kernel.feature_dimension(d) for d in (1, 2)] == [3, math.inf]
    assert Cosine().exp().feature_dimension(1) == 3 and EDP().exp().feature_dimension(1) == math.inf
    angles = torch.linspace(0, 1, 6, dtype=F64)
    arc = torch.stack([angles.cos(), angles.sin()], 1)
    assert gaps(kernel, arc, arc.flip(1) * f64([-1, 1]))[-1] > 1e-9, "separated arcs, and still full rank"


# ------------------------------------------------------------------------- definiteness

def least(kernel: Kernel, x: torch.Tensor, centred: bool = False) -> float:
    centre = torch.eye(len(x), dtype=F64) - (1 / len(x) if centred else 0)
    return torch.linalg.eigvalsh(centre @ kernel(x, x) @ centre)[0].item()


def test_intersections():
    # checks: thm-exp-intersection, E3.3
    signed, minimum = spread(30, 3), Intersection(scale=1.0)
    assert least(minimum, signed) == pytest.approx(-29.742905836866406, rel=1e-10)
    assert least(minimum, signed, centred=True) > -1e-12, "conditionally positive definite"
    assert least(minimum, signed.abs()) > 0.01, "positive definite without signs"
    assert least(ExponentiatedIntersection(scale=1.0), signed) == pytest.approx(0.03363663160320314, abs=1e-12)
    assert least(ExponentiatedIntersection(scale=5.0), signed) > 0
    assert least((-minimum).exp(), signed) < -0.1, "the control: the sign matters"
    assert minimum(f64([-1]), f64([-1])).item() == -1

    x = torch.linspace(-1, 1, 7, dtype=F64)[[3, 0, 5, 1, 6, 2, 4]]
    gram = ExponentiatedIntersection()(x[:, None], x[:, None])
    times = x.exp().sort().values
    closed = times[0] * (times[1:] - times[:-1]).prod()
    assert torch.linalg.det(gram).item() == pytest.approx(closed.item(), rel=1e-10)


@given(seed=st.integers(0, 999), d=st.integers(1, 5))
def test_an_exponentiated_intersection_is_a_laplace_kernel_with_gains(seed, d):
    # checks: thm-exp-intersection, cor-gauge-family
    q, k = draw(seed, 5, d), draw(seed + 1, 6, d)
    laplace = (-torch.cdist(q, k, p=1) / (2 * d**0.5)).exp()
    gains = (q.sum(1, keepdim=True) / (2 * d**0.5)).exp() * (k.sum(1) / (2 * d**0.5)).exp()
    torch.testing.assert_close(ExponentiatedIntersection()(q, k), gains * laplace, rtol=1e-12, atol=0)
    brownian = torch.minimum((q[:, None] / d**0.5).exp(), (k / d**0.5).exp()).prod(-1)
    torch.testing.assert_close(ExponentiatedIntersection()(q, k), brownian, rtol=1e-12, atol=0)


def test_collapse_to_rank_one():
    # checks: prp-intersection-collapse, E3.3
    q, k, kernel = Q[:12] + 2.5, K[:12], ExponentiatedIntersection(scale=1.0)
    assert gaps(kernel, q, k)[1] < 1e-15, "queries that exceed all keys see the keys only"
    assert gaps(kernel, q + 0.1 * draw(0, 12, 3).clamp(-1, 1), k)[1] < 1e-15, "and so on an open set"
    w = weights(q, k, kernel)
    assert apart(w, k.sum(1).softmax(0).expand(12, -1)) < 1e-15, "one weighting for all queries"
    assert apart(weights(k, q, kernel), torch.full((12, 12), 1 / 12, dtype=F64)) < 1e-15, "the plain mean"
    assert torch.linalg.slogdet(EDP(scale=1.0)(q, k))[1] / math.log(10) > -18
    assert gaps(EDP(scale=1.0), q, k)[7] > 1e-9 and gaps(kernel, Q[:12], K[:12])[-1] > 1e-5


@given(seed=st.integers(0, 99), d=st.integers(1, 4))
def test_definiteness_of_the_zoo(seed, d):
    # checks: prp-zoo-definite
    x = 1.5 * draw(seed, 15, d)
    for name in kernels.available():
        kernel = kernels.get(name)
        size = 1e-12 * kernel(x, x).abs().max().item() * len(x)
        if kernel.positive_definite:
            assert least(kernel, x) >= -size, name
        if kernel.definiteness is Definiteness.NEGATIVE_TYPE:
            assert least(-kernel, x, centred=True) >= -size and least(kernel, x) < 0 > least(-kernel, x), name
    near = torch.cat([torch.zeros(1, d, dtype=F64), 0.3 * x[:1] / x[0].norm()])
    for degree in (1, 2, 3):        # the control: a negative offset
        assert least(Polynomial(degree=degree, offset=1.0), near) > -1e-12
        assert least(Polynomial(degree=degree, offset=-1.0), near) < -0.01


# ------------------------------------------------------------------------- attention: gauge, hull, sign, perturbation

def lifted(x: torch.Tensor, *columns) -> torch.Tensor:
    """Further coordinates, and the factor that makes up for the larger square root of d."""
    d, wider = x.shape[-1], torch.cat([x, *(torch.as_tensor(c, dtype=F64).expand(len(x), 1) for c in columns)], -1)
    return wider * (wider.shape[-1] / d) ** 0.25


def test_gauge_family():
    # checks: cor-gauge-family, E4.1
    q, k = 2 * spread(6, 3), 2 * spread(9, 3, start=78)
    norms, root = k.square().sum(1, keepdim=True), 3**0.5
    rbf = weights(q, k, "rbf")
    biased = (q @ k.T / root - norms.T / (2 * root)).softmax(-1)
    assert apart(rbf, biased) < 1e-13
    assert apart(rbf, weights(q, k, "edp")) > 0.1, "without the bias"
    assert apart(rbf, (q @ k.T / root + norms.T / (2 * root)).softmax(-1)) > 0.1, "with the wrong sign"
    laplace = (k.sum(1) - torch.cdist(q, k, p=1)) / (2 * root)
    assert apart(weights(q, k, "exponentiated_intersection"), laplace.softmax(-1)) < 1e-13
    # Gaussian attention is dot-product attention one dimension up; with two, the kernels themselves agree
    up = lifted(q, 1.0), lifted(k, -norms / 2)
    assert apart(weights(*up, "edp"), rbf) < 1e-13 and apart(EDP()(*up), RBF()(q, k)) > 0.1
    two = lifted(q, 1.0, -q.square().sum(1, keepdim=True) / 2), lifted(k, -norms / 2, 1.0)
    assert apart(EDP()(*two), RBF()(q, k)) < 1e-13
    # and dot-product attention on bounded keys is Gaussian attention one dimension up
    high = lifted(q, 0.0), lifted(k, (norms.max() - norms).sqrt())
    assert apart(weights(*high, "rbf"), weights(q, k, "edp")) < 1e-13
    unscaled = torch.cat([q, torch.zeros(6, 1, dtype=F64)], 1), torch.cat([k, (norms.max() - norms).sqrt()], 1)
    assert apart(weights(*unscaled, "rbf"), weights(q, k, "edp")) > 0.01, "the root of d + 1 is not that of d"


@pytest.mark.parametrize("d", [1, 2, 4])
def test_the_least_widths(d):
    # checks: cor-gauge-family
    q, k = draw(0, 30, d), 0.3 * draw(1, 30, d) + 2             # keys in a ball that does not contain 0
    for kernel, least in ((EDP(), d), (RBF(), d + 1), (EDP() * RBF(), d + 1)):
        logits = kernel.log_gram(q, k)                          # attention sees them up to a function of the query
        s = torch.linalg.svdvals(logits - logits.mean(1, keepdim=True))
        assert s[least - 1] > 1e-3 * s[0] and s[least] < 1e-13 * s[0], kernel
    s = torch.linalg.svdvals(RBF().log_gram(q, k))              # the kernel itself takes one more
    assert s[d + 1] > 1e-5 * s[0] and s[d + 2] < 1e-13 * s[0]


@given(seed=st.integers(0, 99), d=st.integers(1, 4))
def test_dot_products_as_a_limit_of_distances(seed, d):
    # checks: cor-gauge-family
    q, k = draw(seed, 6, d), draw(seed + 1, 9, d)
    wanted, longest = weights(q, k, "edp"), k.square().sum(1).max().item()
    for eps in (0.3, 0.1, 0.01):        # no further coordinate: the price of a key becomes small, and never 0
        error = tv(weights(q / eps, eps * k, "rbf"), wanted).max().item()
        assert 1e-7 < error <= math.tanh(eps**2 * longest / (8 * d**0.5)) + 1e-12


THETA = f64(0.5, 0.3, 0.2)
CORNERS = f64([1.3, -0.4], [-0.6, 1.1], [-0.9, -1.0])
BOUND = 1 / (1 + math.exp((-THETA * THETA.log()).sum().item()))


def largest(keys: torch.Tensor, starts: int = 3) -> float:
    """The largest weight that any query gives to the last key, found by a search."""
    def negative(x):
        q = torch.tensor(x[None], requires_grad=True)
        value = -weights(q, keys, EDP(scale=1.0))[0, -1].log()
        value.backward()
        return value.item(), q.grad[0].numpy()
    found = [minimize(negative, s, jac=True, method="BFGS", options={"gtol": 1e-12}).fun
             for s in spread(starts, keys.shape[1]).numpy()]
    return math.exp(-min(found))


def test_hull():
    # checks: thm-hull, E4.2
    assert BOUND == pytest.approx(0.263151380158, abs=1e-12)
    keys = torch.cat([CORNERS, THETA[None] @ CORNERS])
    assert largest(keys) == pytest.approx(BOUND, abs=1e-9)
    best = torch.linalg.solve(CORNERS[:2] - CORNERS[2], (THETA[:2] / THETA[2]).log())
    assert weights(best[None], keys, EDP(scale=1.0))[0, 3].item() == pytest.approx(BOUND, abs=1e-12)
    everywhere = torch.cat([size * draw(0, 2000, 2) for size in (0.1, 1.0, 10.0)])
    assert weights(everywhere, keys, EDP(scale=1.0))[:, 3].max() <= BOUND + 1e-12
    assert weights(everywhere, keys, EDP())[:, 3].max() <= BOUND + 1e-12
    # controls: the Gaussian kernel, and a key outside the hull
    assert weights(keys[3:], keys, RBF(bandwidth=0.05))[0, 3] > 1 - 1e-12
    outside = torch.cat([CORNERS, 1.2 * CORNERS[:1]])
    assert weights(100 * CORNERS[:1], outside, EDP(scale=1.0))[0, 3] > 1 - 1e-12


def test_hull_with_several_representations():
    # checks: thm-hull
    square = f64([1, 1], [-1, 1], [-1, -1], [1, -1])
    for inner, entropy in ((f64([0, 0]), math.log(4)), (f64([0.5, 0]), None)):
        keys = torch.cat([square, inner])
        if entropy is None:     # the product of two coordinates has the largest entropy
            a, b = 0.75, 0.5
            entropy = -sum(p * math.log(p) for p in (a, 1 - a)) - sum(p * math.log(p) for p in (b, 1 - b))
        assert largest(keys) == pytest.approx(1 / (1 + math.exp(entropy)), abs=1e-9)
    two_corners = 1 / (1 + math.exp(math.log(2)))
    assert largest(torch.cat([square, f64([0, 0])])) < two_corners - 0.1, "one entropy is a bound, the largest is sharp"

    # a key on a side of the square: the supremum is approached, and not attained
    keys = torch.cat([square, f64([1, 0.5])])
    supremum = 1 / (1 + math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    w = [weights(f64([r, math.log(3) / 2]), keys, EDP(scale=1.0))[0, 4].item() for r in (1, 2, 4, 16)]
    assert w == sorted(w) and w[2] < supremum - 1e-5 and w[3] == pytest.approx(supremum, abs=1e-13)
    assert weights(10 * draw(0, 5000, 2), keys, EDP(scale=1.0))[:, 4].max() <= supremum
    assert hull_weights(keys, 4).bound == pytest.approx(supremum, abs=1e-9)


@given(seed=st.integers(0, 999), d=st.integers(1, 3), m=st.integers(2, 6))
def test_hull_bounds_of_random_mixtures(seed, d, m):
    # checks: thm-hull
    others, theta = draw(seed, m, d), draw(seed + 1, m).square() + 1e-3
    theta = theta / theta.sum()
    keys = torch.cat([others, theta[None] @ others])
    entropy = -(theta * theta.log()).sum().item()
    queries = torch.cat([size * draw(seed + 2, 200, d) for size in (0.3, 3.0, 30.0)])
    assert weights(queries, keys, EDP())[:, -1].max() <= 1 / (1 + math.exp(entropy)) + 1e-12
    best = hull_weights(keys, m)
    assert best.inside and best.bound <= 1 / (1 + math.exp(entropy)) + 1e-9
    spread_of = (theta @ (others - keys[-1:]).square().sum(1)).item()
    for sigma in (0.5, 1.0, 2.0):               # the Gaussian kernel, at a fixed bandwidth
        limit = 1 / (1 + math.exp(entropy - spread_of / (2 * sigma**2)))
        assert weights(queries, keys, RBF(bandwidth=sigma))[:, -1].max() <= limit + 1e-12


def test_signed_weights():
    # checks: prp-signed-lebesgue, prp-zoo-prices, E4.3
    q, k, v = f64([1, 0]), f64([1, 0], [-0.9, 0]), f64([0], [1])
    with pytest.raises(ValueError, match="(?s)signed-sum.*abs-sum.*relu-sum.*exp"):
        attend(q, k, v, "linear")
    w = weights(q, k, "linear", normaliser="signed-sum")
    assert apart(w, f64([10, -9])) < 1e-12 and abs(w.abs().sum().item() - 19) < 1e-12
    assert attend(q, k, v, "linear", normaliser="signed-sum").item() == pytest.approx(-9, abs=1e-12)
    assert weights(q, k, "edp").abs().sum().item() == pytest.approx(1, abs=1e-15), "the control: a positive kernel"

    for wanted in (1e2, 1e4):       # repeat the two keys until the sum is small against the terms
        n = math.ceil(wanted)
        m = math.floor(n / 0.9) + 1
        many = torch.cat([k[:1].expand(n, -1), k[1:].expand(m, -1)])
        assert weights(q, many, "linear", normaliser="signed-sum").abs().sum() > 2 * wanted


@given(seed=st.integers(0, 999))
def test_prices_of_the_normalisers(seed):
    # checks: prp-zoo-prices
    q, k, v = draw(seed, 4, 3), draw(seed + 1, 7, 3), draw(seed + 2, 7, 2)
    gram, ones = Linear()(q, k), torch.ones(7, 1, dtype=F64)
    assert apart(attend(q, k, ones, "linear", normaliser="signed-sum"), ones[:4]) < 1e-9
    absolute = attend(q, k, v, "linear", normaliser="abs-sum")
    assert (absolute.norm(dim=1) <= v.norm(dim=1).max() + 1e-12).all()
    constant = attend(q, k, ones, "linear", normaliser="abs-sum")[:, 0]
    assert apart(constant, gram.sum(1) / gram.abs().sum(1)) < 1e-12
    reproduced = (constant - 1).abs() < 1e-12
    assert torch.equal(reproduced, (gram >= 0).all(1))
    count = attend(q, k, v, "linear", normaliser="count")
    assert apart(count, gram @ v / 7) < 1e-12 and apart(attend(q, 2 * k, v, "linear", normaliser="count"),
                                                         2 * count) < 1e-12
    assert apart(weights(q, k, "quadratic"), weights(-q, k, "quadratic")) == 0
    distance = L2Squared()
    shares = distance(q, k) / distance(q, k).sum(1, keepdim=True)
    assert apart(weights(q, k, -distance, normaliser="signed-sum"), shares) < 1e-12
    order = distance(q, k).argsort(1)
    assert (shares.gather(1, order).diff(dim=1) >= 0).all(), "the weight grows with distance"


def test_ranks_of_the_remedies():
    # checks: prp-zoo-prices
    @dataclass(frozen=True, repr=False)
    class Cut(Kernel):
        range = kernels.NON_NEGATIVE

        def gram(self, q, k):
            return Linear(scale=1.0).gram(q, k).relu()

    q, k = spread(40, 2), spread(40, 2, start=78)
    w = weights(q, k, Linear(scale=1.0), normaliser="relu-sum")
    assert apart(w, weights(q, k, Cut())) == 0
    angles = math.pi * torch.arange(40, dtype=F64)[:, None] / 40        # no key is a multiple of another
    keys = torch.cat([angles.cos(), angles.sin()], 1)
    turned = angles + math.pi * (1 / 2 - 1 / 80)        # query i sees keys i, i + 1, ...: a triangular matrix
    queries = torch.cat([turned.cos(), turned.sin()], 1)
    assert gaps(Linear(), queries, keys)[2] < 1e-14 and gaps(Cut(), queries, keys)[-1] > 1e-6
    assert gaps(Cut(), q[:, :1], k[:, :1])[1] > 0.1 and gaps(Cut(), q[:, :1], k[:, :1])[2] < 1e-15
    farthest = L2Squared(scale=1.0)(q, k).max().item()
    shifted = farthest + 1.0 + -L2Squared(scale=1.0)
    assert shifted(q, k).min() > 0 and gaps(shifted, q, k)[3] > 1e-4 and gaps(shifted, q, k)[4] < 1e-13


def test_perturbed_logits():
    # checks: thm-perturbation, E4.7
    eps, bound = 0.3, math.tanh(0.15)
    assert bound == pytest.approx(0.148885033623, abs=1e-12)
    one, logits, moves = torch.ones(1, 1, dtype=F64), draw(0, 3000, 5), draw(1, 3000, 5)

    def soft(a):    # as weights of the dot product of a query 1 and the keys a
        return weights(one, a[..., None], EDP(scale=1.0))[..., 0, :]

    worst = tv(soft(logits), soft(logits + eps * moves.sign())).max().item()
    assert 0.9 * bound < worst <= bound
    attained = tv(soft(f64([eps / 2, -eps / 2])), soft(f64([-eps / 2, eps / 2])))
    assert attained.item() == pytest.approx(bound, abs=1e-12)
    for m in (3, 6):                                        # for every number of keys
        a = torch.zeros(m, dtype=F64)
        a[0] = math.log(m - 1) - eps
        move = eps * (2 * torch.eye(m, dtype=F64)[0] - 1)
        values = torch.eye(m, 1, dtype=F64)
        assert tv(soft(a), soft(a + move)).item() == pytest.approx(bound, abs=1e-12)
        output = (soft(a + move) - soft(a)) @ values
        assert output.abs().item() == pytest.approx(bound, abs=1e-12), "the diameter of the values is 1"
    assert worst > eps / 4, "half the bound does not hold"
    assert tv(soft(logits), soft(logits + 0.4)).max() < 1e-15, "a shift of all logits moves nothing"


def test_taylor_instead_of_the_exponential():
    # checks: thm-perturbation
    grid = torch.linspace(-1, 1, 2001, dtype=F64)[:, None]
    one = torch.ones(1, 1, dtype=F64)
    for degree, log_error, moved in ((2, 0.307, 0.152), (4, 0.0192, 0.0096), (6, 4.8e-4, 2.4e-4)):
        kernel = Taylor(scale=1.0, degree=degree)
        eps = (kernel.log_gram(grid, one) - grid).abs().max().item()
        assert eps == pytest.approx(log_error, rel=0.01) and math.tanh(eps / 2) == pytest.approx(moved, rel=0.02)
        for keys in itertools.pairwise(spread(20, 6).clamp(-1, 1)):
            k = torch.cat(keys)[:, None]
            assert tv(weights(one, k, kernel), weights(one, k, EDP(scale=1.0))).max() <= math.tanh(eps / 2)
