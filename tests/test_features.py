"""Feature maps against their kernels and their formulas; certificates against exact and multiprecision values."""

import itertools
import math
from fractions import Fraction

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernelbook import features, kernels
from kernelbook.features import (
    ConstantFeatures,
    ExponentiatedIntersectionFeatures,
    FeatureMap,
    IntersectionFeatures,
    MultinomialFeatures,
    PolynomialFeatures,
    QuadraticFeatures,
    certified_degree,
    tail_norm_bound,
    truncation_bound,
)

INF = math.inf
MAPS = [
    MultinomialFeatures(0), MultinomialFeatures(5), MultinomialFeatures(4, scale=True), MultinomialFeatures(6, 0.3),
    PolynomialFeatures(3), PolynomialFeatures(4, offset=1.5, scale=True), PolynomialFeatures(1, offset=0.2, scale=2.0),
    QuadraticFeatures(), QuadraticFeatures(scale=True), ConstantFeatures(3.0),
]


def points(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


# ------------------------------------------------------------------------- the maps

@pytest.mark.parametrize("phi", MAPS, ids=repr)
@pytest.mark.parametrize("d", [1, 2, 3, 4])
def test_the_inner_product_is_the_kernel(phi, d):
    # checks: thm-edp-features, E2.1
    q, k = points(d, 2, 7, d), points(d + 10, 5, d)
    gram = phi.kernel(q, k)
    assert phi(q).shape == (2, 7, phi.dimension(d)) and phi(k).shape == (5, phi.dimension(d))
    assert apart(phi(q) @ phi(k).mT, gram) < 1e-14 * (1 + gram.abs().max().item())
    assert phi.dimension(d) == phi.kernel.feature_dimension(d)


@pytest.mark.parametrize("phi", MAPS, ids=repr)
def test_of_finds_the_map_again(phi):
    assert features.of(phi.kernel) == phi
    assert phi(points(1, 3, 2).float()).dtype == torch.float32


def test_of_knows_the_linear_kernel():
    q, k = points(1, 4, 3), points(2, 5, 3)
    phi = features.of(kernels.Linear())
    assert phi.dimension(3) == 3 and apart(phi(q) @ phi(k).mT, kernels.Linear()(q, k)) < 1e-15


@pytest.mark.parametrize("d, degree", [(1, 8), (2, 6), (3, 5), (4, 4)])
def test_monomials_by_their_formula(d, degree):
    # checks: thm-edp-features, E2.1
    phi, x = MultinomialFeatures(degree), points(degree, 6, d)
    alpha = phi.exponents(d)
    tuples = [tuple(row) for row in alpha.tolist()]
    expected = [a for a in itertools.product(range(degree + 1), repeat=d) if sum(a) <= degree]
    assert sorted(tuples) == sorted(expected)
    assert tuples == sorted(tuples, key=lambda a: (sum(a), [-i for i in a]))          # graded, then lexicographic
    assert phi.degrees(d).tolist() == [sum(a) for a in tuples]
    factorials = torch.tensor([math.prod(map(math.factorial, a)) for a in tuples], dtype=torch.float64)
    monomials = x[:, None].pow(alpha).prod(-1)
    assert apart(phi(x), monomials / factorials.sqrt()) < 1e-14 * phi(x).abs().max().item()
    # E2.1's control: with 1/alpha! in the place of its root the inner product is another kernel
    wrong = (monomials / factorials) @ (monomials / factorials).mT
    assert degree == 1 or apart(wrong, phi.kernel(x, x)) > 0.1


def test_counts():
    # checks: thm-edp-features, E2.1
    assert features.counts(3, 5) == [1, 3, 6, 10, 15, 21] and features.count(3, 5) == 56
    table = {1: [2, 3, 5, 9], 2: [3, 6, 15, 45], 8: [9, 45, 495, 12870], 64: [65, 2145, 814385, 11969016345]}
    assert {d: [features.count(d, n) for n in (1, 2, 4, 8)] for d in table} == table
    for d in table:
        assert [features.count(d, n) for n in range(9)] == list(itertools.accumulate(features.counts(d, 8)))
    assert MultinomialFeatures(4).degrees(3).bincount().tolist() == features.counts(3, 4)


def test_many_degrees_and_gradients():
    phi, x = MultinomialFeatures(30), points(3, 4, 2).requires_grad_()
    assert isinstance(phi.kernel, kernels.Taylor) and phi.dimension(2) == 496
    assert apart(phi(x) @ phi(x).mT, (x @ x.mT).exp()) < 1e-12
    assert torch.autograd.gradcheck(MultinomialFeatures(4), (x,))
    line, one = torch.linspace(-12, -10, 2001)[:, None].double(), torch.ones(1, 1, dtype=torch.float64)
    taylor = MultinomialFeatures(40).kernel
    assert taylor.range.low == pytest.approx(taylor(line, one).min().item(), rel=1e-5)


def test_equal_maps_are_equal():
    assert MultinomialFeatures(3, scale=1.0) == MultinomialFeatures(3) != MultinomialFeatures(3, scale=True)
    assert IntersectionFeatures([2.0, 1.0, 1.0, 0.0]) == IntersectionFeatures((1.0, 2.0))


# ------------------------------------------------------------------------- Brownian features

def test_intersection_is_exact_at_the_knots_and_short_of_it_elsewhere():
    x, free = points(1, 6, 3).abs(), points(2, 50, 3).abs().clamp(max=1.9)
    phi = IntersectionFeatures([*x.flatten().tolist(), 2.0, 3.5], scale=True)
    assert phi.dimension(3) == 3 * 20
    assert apart(phi(x) @ phi(x).mT, phi.kernel(x, x)) < 1e-14
    assert apart(phi(free) @ phi(x).mT, phi.kernel(free, x)) < 1e-14              # one of the two is enough
    short = phi.kernel(free, free) - phi(free) @ phi(free).mT
    assert 1e-3 < short.max() <= phi.error_bound(3) and short.min() > -1e-14
    assert torch.linalg.eigvalsh(short).min() > -1e-14                           # a Brownian bridge is left


def test_the_error_bound_of_intersection_is_attained():
    phi = IntersectionFeatures([1.0, 3.0])
    x = torch.full((1, 2), 2.0, dtype=torch.float64)
    assert (phi.kernel(x, x) - phi(x) @ phi(x).mT).item() == phi.error_bound(2) == 1.0


@pytest.mark.parametrize("scale", [False, True, 0.5])
def test_exponentiated_intersection_of_signed_points(scale):
    x, free = points(1, 3, 3), points(2, 20, 3).clamp(max=0.5)
    phi = ExponentiatedIntersectionFeatures([*x.flatten().tolist(), 0.5], scale=scale)
    assert phi.dimension(3) == 1000
    assert apart(phi(x) @ phi(x).mT, phi.kernel(x, x)) < 1e-14
    free[:, 1:] = x[0, 1:]
    assert apart(phi(free[:1]) @ phi(x).mT, phi.kernel(free[:1], x)) < 1e-13
    short = phi.kernel(free, free) - phi(free) @ phi(free).mT
    assert short.max() > 1e-3 and short.min() > -1e-14


# ------------------------------------------------------------------------- truncation

TABLE = {(1, 4): 9.948495125711903e-3, (2, 8): 1.7545116290629257e-3, (-4, 8): 0.5118430912699959,
         (8, 16): 11.08326523443504}


def exact_error(a: float, degree: int) -> mpmath.mpf:
    with mpmath.workdps(60):        # term by term, not as a difference: it may be smaller than any digit of e^a
        return mpmath.fsum(mpmath.mpf(a) ** n / mpmath.factorial(n) for n in range(degree + 1, degree + 300))


@pytest.mark.parametrize("a, degree", TABLE)
def test_truncation_table(a, degree):
    # checks: prp-truncation, E2.2
    error, lead = abs(exact_error(a, degree)), abs(a) ** (degree + 1) / math.factorial(degree + 1)
    assert float(error) == pytest.approx(TABLE[a, degree], rel=1e-6)
    # the control: without the factor e^a, the bound of negative numbers fails for positive ones
    assert (error <= lead) == (a < 0)
    assert error <= lead * max(1, math.exp(a))


@given(st.floats(-40, 40), st.integers(0, 40))
def test_truncation_bound_holds(a, degree):
    # checks: prp-truncation, E2.2
    error = abs(exact_error(a, degree))
    bound = truncation_bound(torch.tensor(a, dtype=torch.float64), degree).item()
    assert error <= bound
    assert bound <= 1.001 * abs(a) ** (degree + 1) / math.factorial(degree + 1) * math.exp(max(a, 0)) + 1e-300
    assert 0 <= a or degree + 1 < abs(a) or bound <= 3 * error + 1e-300          # not too large, either
    single = truncation_bound(torch.tensor(a, dtype=torch.float32), degree).item()
    assert abs(exact_error(torch.tensor(a, dtype=torch.float32).item(), degree)) <= single


def test_certified_degrees():
    # checks: prp-truncation, E2.2
    assert certified_degree(2, 1e-6) == 13 and certified_degree(0, 1e-300) == certified_degree(600, 1e300) == 0
    lagrange = {(0.5, 1e-2): 3, (1, 1e-6): 9, (2, 1e-6): 14, (4, 1e-12): 29, (8, 1e-2): 30, (16, 1e-12): 74}
    for (radius, error), expected in lagrange.items():
        least = next(n for n in itertools.count()
                     if radius ** (n + 1) / math.factorial(n + 1) * math.exp(radius) <= error)
        assert least == expected and 0 <= expected - certified_degree(radius, error) <= 10
        n = certified_degree(radius, error)
        assert abs(exact_error(radius, n)) <= error < truncation_bound(float(radius), n - 1)


@pytest.mark.parametrize("r", [0.2, 1.0, 4 / 3, 2.0, 3.0, INF])
def test_tails_of_the_features(r):
    # checks: prp-tail
    x = torch.tensor([[1.0, 0.5], [3.0, -2.0], [0.0, 0.0], [2.0, 2.0]], dtype=torch.float64)
    all_features, degrees = MultinomialFeatures(100)(x), MultinomialFeatures(100).degrees(2)
    for degree in (0, 3, 8, 20):
        tail = torch.linalg.vector_norm(all_features[:, degrees > degree], ord=r, dim=1)
        bound = tail_norm_bound(x, degree, r)
        assert (tail <= bound).all() and bound[2] == 0
        if r == 2:
            assert apart(bound, tail) < 1e-11 * tail.max()
    # the control: the bound of r = 2, where r is smaller, without the number of features
    if r < 2:
        assert (torch.linalg.vector_norm(all_features[:, degrees > 3], ord=r, dim=1) > tail_norm_bound(x, 3, 2))[0]


def test_tail_at_many_widths_needs_no_features():
    x = torch.ones(3, 64, dtype=torch.float64) / 8
    bound = tail_norm_bound(x, 4, 1.5)
    assert bound.shape == (3,) and bound.isfinite().all()
    exact = math.sqrt(math.e - sum(1 / math.factorial(n) for n in range(5)))
    assert tail_norm_bound(x, 4, 2.0)[0].item() == pytest.approx(exact, rel=1e-9)
    assert tail_norm_bound(40 * x, 4, INF)[0] > 1e100


def exact_tail(x, degree):
    """The l^2 norm of what is dropped: the root of what is missing of the exponential of the square."""
    with mpmath.workdps(60):
        square = mpmath.fsum(mpmath.mpf(v) ** 2 for v in x.tolist())
        terms = (square**n / mpmath.factorial(n) for n in range(degree + 1, degree + 400 + int(4 * square)))
        return mpmath.sqrt(mpmath.fsum(terms))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1e-170, 1e-30, 0.5, 3.0, 9.0])
def test_the_bound_of_the_tail_is_rounded_up(dtype, size):
    # checks: prp-tail
    for seed, (d, degree) in enumerate(itertools.product((1, 2, 64), (0, 20, 90))):
        x = (points(seed, d).sign() * size / math.sqrt(d)).to(dtype)
        bound, tail = tail_norm_bound(x, degree, 2.0), exact_tail(x, degree)
        assert bound.dtype == dtype and mpmath.mpf(bound.item()) >= tail
        assert bound.item() <= (1 + 4 * torch.finfo(dtype).eps + 1e-10) * tail + torch.finfo(dtype).tiny


def test_the_bound_of_the_tail_ends_for_all_r_and_points():
    # checks: prp-tail
    one, n = torch.ones(1, dtype=torch.float64), torch.arange(4, 4000, dtype=torch.float64)
    for r in (0.01, 0.02):                                      # one coordinate: the sum over n of (n!)^(-r/2)
        exact = torch.logsumexp(-r / 2 * (n + 1).lgamma(), 0) / r
        assert math.log(tail_norm_bound(one, 3, r).item()) == pytest.approx(exact.item(), rel=1e-9)
    assert tail_norm_bound(one, 3, 1e-6) == tail_norm_bound(one, 3, 1e-320) == INF
    assert tail_norm_bound(one, 3, 1e308).item() == pytest.approx(tail_norm_bound(one, 3, INF).item(), rel=1e-9)
    huge = torch.tensor([[1e200], [1e3], [1.0], [0.0]], dtype=torch.float64)
    assert tail_norm_bound(huge, 3, 2.0).isinf().tolist() == [True, True, False, False]
    assert tail_norm_bound(huge[:0], 3, 2.0).shape == (0,)


def test_the_first_call_in_inference_mode_spoils_nothing():
    features._monomials.cache_clear()
    with torch.inference_mode():
        MultinomialFeatures(3)(points(1, 2, 5))
    x = points(2, 2, 5).requires_grad_()
    MultinomialFeatures(3)(x).sum().backward()
    assert x.grad.isfinite().all()


# ------------------------------------------------------------------------- rank: exact and in floating point

def test_vandermonde_determinant():
    # checks: thm-edp-rank, E2.3
    def determinant(rows):
        rows, value = [list(map(Fraction, row)) for row in rows], Fraction(1)
        for i in range(len(rows)):
            pivot = next((r for r in range(i, len(rows)) if rows[r][i]), None)
            if pivot is None:
                return Fraction(0)
            if pivot != i:
                rows[i], rows[pivot], value = rows[pivot], rows[i], -value
            value *= rows[i][i]
            for r in range(i + 1, len(rows)):
                factor = rows[r][i] / rows[i][i]
                rows[r] = [x - factor * y for x, y in zip(rows[r], rows[i], strict=True)]
        return value

    # queries log 1, ..., log 8 and keys 0, ..., 7: e^(q k) is an integer
    assert determinant([[a**j for j in range(8)] for a in range(1, 9)]) == 125411328000
    assert determinant([[a**j for j in range(8)] for a in (1, 2, 3, 4, 5, 6, 7, 7)]) == 0
    q = torch.arange(1, 9, dtype=torch.float64).log()[:, None]
    k = torch.arange(8, dtype=torch.float64)[:, None]
    gram = kernels.EDP(scale=1.0)(q, k)
    assert apart(gram, gram.round()) < 1e-8 and torch.linalg.det(gram).item() == pytest.approx(125411328000, rel=1e-6)


def test_a_nonsingular_matrix_of_float_rank_twelve():
    # checks: prp-float-rank, E2.4
    x = torch.linspace(-1, 1, 30, dtype=torch.float64)
    gram = kernels.EDP()(x[:, None], x[:, None])
    s = torch.linalg.svdvals(gram)
    assert 11 <= (s > 1e-14 * s[0]).sum() <= 15                # the control: counting in float does not give 30
    assert torch.linalg.matrix_rank(gram) < 16
    assert s[:5].tolist() == pytest.approx([32.07554667, 11.45165302, 1.52270323, 0.13801365, 0.00920082673], rel=1e-7)
    for n in range(9):
        assert s[n + 1] <= 30 * truncation_bound(1.0, n)
    with mpmath.workdps(700):
        matrix = mpmath.matrix([[mpmath.exp(mpmath.mpf(a) * b) for b in x.tolist()] for a in x.tolist()])
        assert float(mpmath.log10(abs(mpmath.det(matrix)))) == pytest.approx(-627.029, abs=1e-2)


@pytest.mark.parametrize("d", [1, 2])
def test_generic_matrices_are_nonsingular(d):
    # checks: thm-edp-rank
    def log_determinant(q, k):
        with mpmath.workdps(150):
            rows = [[mpmath.exp(mpmath.fsum(mpmath.mpf(a) * b for a, b in zip(x, y, strict=True))) for y in k.tolist()]
                    for x in q.tolist()]
            size = abs(mpmath.det(mpmath.matrix(rows)))
            return float(mpmath.log10(size)) if size else -INF

    q, k = points(1, 12, d), points(2, 12, d)
    assert log_determinant(q, k) > -90
    q[3] = q[7]                                                 # the control: a query twice
    assert log_determinant(q, k) < -120


# ------------------------------------------------------------------------- positivity

def test_even_partial_sums_are_positive_and_odd_ones_are_not():
    # checks: prp-even-taylor
    line, one = torch.linspace(-40, 10, 500001)[:, None].double(), torch.ones(1, 1, dtype=torch.float64)
    minima = {n: MultinomialFeatures(n).kernel(line, one).min().item() for n in range(1, 7)}
    assert minima == pytest.approx({1: -39.0, 2: 0.5, 3: -9905.666667, 4: 0.270394767, 5: -756572.3333, 6: 0.149324844},
                                   rel=1e-6)
    assert all((minima[n] > 0) == (n % 2 == 0) for n in minima)


# ------------------------------------------------------------------------- refusals

X = points(1, 4, 2)


@pytest.mark.parametrize("call, words", [
    (lambda: MultinomialFeatures(8)(points(1, 2, 64)), ["11,969,016,345", "1,000,000", "lower", "kernel"]),
    (lambda: MultinomialFeatures(8).exponents(64), ["11,969,016,345"]),
    (lambda: ExponentiatedIntersectionFeatures(range(10))(points(1, 2, 8)), ["100,000,000"]),
    (lambda: MultinomialFeatures(-1), ["degree", "at least 0"]),
    (lambda: MultinomialFeatures(2.0), ["degree", "integer"]),
    (lambda: MultinomialFeatures(2, scale=-1), ["scale", "-1"]),
    (lambda: PolynomialFeatures(2, offset=-1.0), ["offset", "different features"]),
    (lambda: PolynomialFeatures(0), ["degree", "at least 1"]),
    (lambda: PolynomialFeatures(171), ["at most 170", "kernel"]),
    (lambda: IntersectionFeatures([1.0, 1.0 + 1e-9])(X.float().abs().clamp(max=1)), ["too close", "float64"]),
    (lambda: ExponentiatedIntersectionFeatures([0.0, 800.0])(X), ["too far from 0"]),
    (lambda: ConstantFeatures(0.0), ["positive"]),
    (lambda: IntersectionFeatures([1.0, 3.0])(X), ["negative", "Exponentiated"]),
    (lambda: IntersectionFeatures([0.1])(X.abs()), ["beyond the last knot", "add a knot"]),
    (lambda: IntersectionFeatures([]), ["at least one"]),
    (lambda: IntersectionFeatures([-1.0, 1.0]), ["positive number"]),
    (lambda: IntersectionFeatures([math.nan]), ["finite"]),
    (lambda: features.of(kernels.EDP()), ["infinitely many", "MultinomialFeatures", "certified_degree"]),
    (lambda: features.of(kernels.Intersection()), ["infinitely many", "IntersectionFeatures", "knots"]),
    (lambda: features.of(kernels.L2Squared()), ["not known to be positive definite", "two different maps"]),
    (lambda: features.of(kernels.Cosine()), ["no features", "Taylor"]),
    (lambda: features.of("edp"), ["str", "kernels.get"]),
    (lambda: FeatureMap()(X), ["dimension"]),
    (lambda: MultinomialFeatures(2)(X[0]), ["shape"]),
    (lambda: MultinomialFeatures(2)(X.int()), ["int32"]),
    (lambda: truncation_bound(1.0, -1), ["degree"]),
    (lambda: truncation_bound(torch.tensor(1), 2), ["int64"]),
    (lambda: MultinomialFeatures(2)([[1.0]]), ["list", "(..., n, d)"]),
    (lambda: certified_degree(-1.0, 0.1), ["radius"]),
    (lambda: certified_degree(1.0, 0.0), ["error", "positive"]),
    (lambda: certified_degree(1.0, 1e-308), ["error", "at least"]),
    (lambda: tail_norm_bound(X, 3, 0.0), ["r must be"]),
    (lambda: tail_norm_bound(X.int(), 3, 1.0), ["int32"]),
    (lambda: tail_norm_bound(X[:, :0], 3, 1.0), ["d at least 1"]),
    (lambda: tail_norm_bound(X / 0, 3, 1.0), ["finite"]),
    (lambda: features.count(0, 3), ["d must be"]),
])
def test_errors_say_what_would_help(call, words):
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value
