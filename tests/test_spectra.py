"""Diagnostics of Gram matrices against numbers known by other means, and the Mercer criterion with its certificates."""

import math

import mpmath
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kernelbook import kernels, spectra
from kernelbook.kernels import EDP, RBF, Intersection, L2Squared, Polynomial

F64 = torch.float64


def weyl(n: int, d: int, start: int = 1) -> torch.Tensor:
    """Points of [-1, 1]^d that fill it evenly: multiples, modulo 1, of powers of the root of x^(d+1) = x + 1."""
    root = 1.5
    for _ in range(200):
        root = (1 + root) ** (1 / (d + 1))
    alpha = root ** -torch.arange(1, d + 1, dtype=F64)
    return 2 * ((0.5 + torch.arange(start, start + n, dtype=F64)[:, None] * alpha) % 1) - 1


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def matrix(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=F64)


# ------------------------------------------------------------------------- one matrix

def test_asymmetry_is_the_share_of_the_antisymmetric_part():
    S, J = matrix([2, 1], [1, 3]), matrix([0, 2], [-2, 0])
    shares = spectra.asymmetry(torch.stack([S, J, 3 * S + J, torch.zeros(2, 2, dtype=F64)]))
    expected = [0, 1, math.sqrt(8 / (9 * 15 + 8)), 0]
    assert torch.allclose(shares, torch.tensor(expected, dtype=F64), atol=1e-15)
    assert spectra.asymmetry(torch.stack([1e-200 * J, 1e300 * J])).tolist() == [1, 1]       # squares are out of range


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(0, 5), st.integers(0, 5), st.integers(0, 10**6))
def test_inertia_survives_a_change_of_basis_and_an_antisymmetric_part(n, positive, negative, seed):
    """Sylvester's law, on matrices whose signs are known by construction."""
    positive = min(positive, n)
    negative = min(negative, n - positive)
    signs = torch.cat([torch.ones(positive), -torch.ones(negative), torch.zeros(n - positive - negative)]).double()
    change = torch.eye(n, dtype=F64) + 0.3 * torch.tril(randn(seed, n, n), -1)       # unit triangular, so invertible
    skew = randn(seed + 1, n, n)
    K = change @ signs.diag() @ change.T + skew - skew.T
    assert spectra.inertia(K, tol=1e-10) == (positive, negative, n - positive - negative)


def test_inertia_of_a_batch_and_its_tolerance():
    K = torch.stack([matrix([1, 0], [0, -1e-13]), matrix([0, 1], [1, 0])])
    assert [count.tolist() for count in spectra.inertia(K)] == [[1, 1], [1, 1], [0, 0]]
    assert [count.tolist() for count in spectra.inertia(K, tol=1e-12)] == [[1, 1], [0, 1], [1, 0]]


def test_ranks():
    K = torch.diag(torch.tensor([4.0, 4.0, 4.0, 0.0], dtype=F64))
    assert torch.allclose(spectra.effective_rank(torch.stack([K, 0 * K])), torch.tensor([3.0, 0.0], dtype=F64))
    assert spectra.effective_rank(matrix([3, 0, 0], [0, 1, 0])) == pytest.approx(4 / 3 ** 0.75, rel=1e-14)
    assert spectra.numerical_rank(K) == 3
    assert spectra.numerical_rank(torch.diag(torch.tensor([2.0, 1e-3], dtype=F64)), tol=6e-4) == 1      # relative
    assert spectra.numerical_rank(torch.stack([K, 0 * K])).tolist() == [3, 0]


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(0, 10**6))
def test_conditional_eigenvalues_do_not_see_gains(n, seed):
    """c'Kc does not change where u_i + w_j is added to K_ij and the c_i sum to 0."""
    K, u, w = randn(seed, n, n), randn(seed + 1, n, 1), randn(seed + 2, 1, n)
    values = spectra.conditional_eigenvalues(K)
    assert values.shape == (n - 1,)
    assert torch.allclose(values, spectra.conditional_eigenvalues(K + u + w), atol=1e-12)
    centre = torch.eye(n, dtype=F64) - 1 / n
    centred = torch.linalg.eigvalsh(centre @ (K + K.T) / 2 @ centre)
    nonzero = centred[centred.abs().argsort()[1:]].sort().values        # the projection has one 0 more
    assert torch.allclose(values, nonzero, atol=1e-10)


@pytest.mark.parametrize("function", [spectra.asymmetry, spectra.inertia, spectra.conditional_eigenvalues])
def test_square_matrices_only(function):
    with pytest.raises(ValueError, match="square.*not the same points"):
        function(torch.ones(2, 3))


@pytest.mark.parametrize("function", [spectra.asymmetry, spectra.inertia, spectra.conditional_eigenvalues,
                                      spectra.effective_rank, spectra.numerical_rank])
def test_what_is_no_finite_matrix_is_refused(function):
    with pytest.raises(TypeError, match="floating"):
        function(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="list"):
        function([[1.0]])
    with pytest.raises(ValueError, match="shape"):
        function(torch.ones(0, 0))
    with pytest.raises(ValueError, match="NaN"):
        function(torch.full((2, 2), math.inf))


def test_a_negative_tolerance_is_refused():
    for function in (spectra.inertia, spectra.numerical_rank):
        with pytest.raises(ValueError, match="tol"):
            function(torch.eye(2), tol=-1.0)


# ------------------------------------------------------------------------- determinants

def test_a_determinant_that_floating_point_takes_for_zero():
    x = torch.linspace(-1, 1, 30, dtype=F64)[:, None]
    det = spectra.log_determinant(EDP(scale=1.0), x, x)
    assert det.sign == 1 and det.log10_abs == pytest.approx(-627.029, abs=1e-2)
    assert spectra.numerical_rank(EDP(scale=1.0)(x, x), tol=1e-14) == 12      # the control: rank 30 is not seen
    # Fewer points, hence a minor of it; its last pivot is far below the precision that the search begins with.
    minor = spectra.log_determinant(EDP(scale=1.0), x[:24] / 1e6, x[:24] / 1e6)
    assert minor.sign == 1 and minor.digits > 100 and minor.log10_abs < -1000


def test_a_vandermonde_determinant():
    """The nodes 1..8 as entries of Python integers: an exact product, and 0 with a node repeated."""
    def power(x, y):
        return x[0] ** int(y[0])

    nodes, exponents = torch.arange(1.0, 9.0)[:, None], torch.arange(8.0)[:, None]
    det = spectra.log_determinant(power, nodes, exponents)
    assert det.sign == 1 and math.exp(det.log_abs) == pytest.approx(125411328000, rel=1e-12)
    assert spectra.log_determinant(power, nodes.flip(0)[[1, 0, *range(2, 8)]], exponents).sign == -1
    nodes[3] = 1.0
    assert spectra.log_determinant(power, nodes, exponents) == (0, -math.inf, 0)
    nodes[3] = -3.0                         # no node is repeated, but in the even powers 3 and -3 are
    assert spectra.log_determinant(power, nodes, 2 * exponents, max_digits=400) == (0, -math.inf, 400)


def test_zeros_of_too_few_digits_are_not_believed():
    """At 50 and at 100 digits every entry is 1."""
    x = 1e-60 * torch.arange(1.0, 4.0, dtype=F64)[:, None]
    det = spectra.log_determinant(EDP(scale=1.0), x, x)
    # The leading term is the product of the two Vandermonde determinants over 0! 1! 2!.
    assert det.sign == 1 and det.log10_abs == pytest.approx(math.log10(2 * 2 / 2) - 360, rel=1e-14)


@pytest.mark.parametrize("name", kernels.available())
def test_multiprecision_formulas_are_those_of_the_kernels(name):
    q, k = randn(0, 2, 3), randn(1, 2, 3)
    base = kernels.get(name)
    for kernel in (base, 0.5 * base + EDP() * Polynomial(degree=2), (-base).exp()):
        entry = spectra._entry(kernel)
        exact = [[float(entry(*(tuple(map(mpmath.mpf, p)) for p in (x, y)))) for y in k.tolist()] for x in q.tolist()]
        assert torch.allclose(kernel(q, k), torch.tensor(exact, dtype=F64), rtol=1e-13, atol=1e-15)


def test_determinant_of_a_kernel_with_options():
    x = weyl(5, 2)
    for kernel in (EDP(scale=0.7), RBF(bandwidth=0.4), kernels.Taylor(degree=4, scale=2.0)):
        expected = torch.linalg.slogdet(kernel(x, x.flip(0)))
        det = spectra.log_determinant(kernel, x, x.flip(0))
        assert det.sign == expected[0] and det.log_abs == pytest.approx(expected[1].item(), rel=1e-9)


def test_a_determinant_that_does_not_settle_is_an_error():
    x = weyl(4, 2)
    with pytest.raises(ArithmeticError, match="settled"):          # rank 2, with entries rounded at every precision
        spectra.log_determinant(kernels.Linear(), x, x, max_digits=400)


def test_entries_of_fixed_precision_are_refused():
    x = weyl(3, 1)
    with pytest.raises(ValueError, match="finite entries"):
        spectra.log_determinant(lambda a, b: mpmath.inf, x, x)
    with pytest.raises(TypeError, match="mpmath.exp in the place"):
        spectra.log_determinant(lambda a, b: math.exp(a[0] * b[0]), x, x)

    class Own(EDP):
        def log_gram(self, q, k):
            return 2 * super().log_gram(q, k)

    with pytest.raises(TypeError, match="entry"):                  # not by the formula of its parent
        spectra.log_determinant(Own(), x, x)
    with pytest.raises(TypeError, match="kernel must be"):
        spectra.log_determinant(3, x, x)
    with pytest.raises(ValueError, match="as many queries as keys"):
        spectra.log_determinant("edp", x, x[:2])
    with pytest.raises(ValueError, match="digits"):
        spectra.log_determinant("edp", x, x, digits=5)


# ------------------------------------------------------------------------- the Mercer criterion

def exact_form(verdict, W_q, W_k, scale):
    """The form at the certificate's tokens, with the coefficients +-kappa(x_i, x_i)^(-1/2), again, with 80 digits."""
    with mpmath.workdps(80):
        points, queries, keys = (mpmath.matrix(x.tolist()) for x in (verdict.points, W_q.double(), W_k.double()))
        logit = mpmath.mpf(scale) * (points * queries) * (points * keys).T
        c = [sign * mpmath.exp(-logit[i, i] / 2) for i, sign in enumerate((1, -1))]
        assert [float(mpmath.log(abs(z))) for z in c] == pytest.approx(verdict.log_sizes.tolist(), rel=1e-14, abs=1e-14)
        return sum(c[i] * c[j] * mpmath.exp(logit[i, j]) for i in range(2) for j in range(2))


def symmetrised_gram(A, x):
    K = torch.exp(x @ A @ x.T)
    return (K + K.T) / 2


@pytest.mark.parametrize(("A", "smallest"), [
    (matrix([1, 0], [0, -1]), -46.4980799),
    (matrix([1, 1], [0, 1]), -1.9210646),
    (matrix([0, 1], [-1, 0]), -25.5320977),
])
def test_smallest_eigenvalue_without_the_criterion(A, smallest):
    # checks: thm-mercer, E2.6
    x = 1.5 * weyl(25, 2)
    assert torch.linalg.eigvalsh(symmetrised_gram(A, x))[0].item() == pytest.approx(smallest, rel=1e-6)
    assert not spectra.mercer_on_tokens(torch.eye(2, dtype=F64), A.T.contiguous(), scale=1.0).mercer


def test_twice_the_same_map_is_mercer():
    # checks: thm-mercer, E2.6
    x, W_q = 1.5 * weyl(25, 2), matrix([0.7, 0.2], [-0.4, 0.9])
    A = W_q @ (2 * W_q).T
    K = torch.exp(x @ A @ x.T)
    assert spectra.asymmetry(K) < 1e-15 and torch.linalg.eigvalsh((K + K.T) / 2)[0] > 0
    assert spectra.mercer_on_tokens(W_q, 2 * W_q).mercer and not spectra.mercer_on_tokens(W_q, -2 * W_q).mercer


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 6), d=st.integers(1, 6), seed=st.integers(0, 10**6), size=st.sampled_from([1e-3, 1.0, 1e3]),
       skew=st.sampled_from([0.0, 1e-3, 0.03, 1.0]), signs=st.sampled_from(["semidefinite", "indefinite"]))
def test_every_negative_verdict_is_proved_by_its_tokens(m, d, seed, skew, signs, size):
    # checks: thm-mercer
    low = randn(seed, m, d)                                 # A = low (S + skew J) low', of rank at most d
    S = randn(seed + 1, d, d)
    S = S @ S.T if signs == "semidefinite" else (S + S.T) / 2
    J = randn(seed + 2, d, d)
    W_q, W_k = low * size, low @ (S + skew * (J - J.T)).T
    verdict = spectra.mercer_on_tokens(W_q, W_k)
    A = (W_q @ W_k.T) / (W_q.norm() * W_k.norm())
    margin = max((A - A.T).abs().max().item(), -torch.linalg.eigvalsh((A + A.T) / 2)[0].item())
    assume(margin < 1e-14 or margin > 1e-10)
    assert verdict.mercer == (margin < 1e-14)
    if not verdict.mercer:
        form = float(exact_form(verdict, W_q, W_k, d ** -0.5))
        assert verdict.value < -0.5 and form == pytest.approx(verdict.value, rel=1e-9)
    if not verdict.mercer and verdict.log_sizes.abs().max() < 150:
        # ... and in floating point, by a reader who knows nothing of logarithms
        K, c = EDP()(verdict.points @ W_q, verdict.points @ W_k), verdict.coefficients
        assert (c @ K @ c).item() == pytest.approx(verdict.value, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 5), d=st.integers(1, 5), seed=st.integers(0, 10**6), factor=st.floats(1e-3, 1e3))
def test_mercer_heads_have_mercer_matrices(m, d, seed, factor):
    # checks: thm-mercer
    W = randn(seed, m, d)
    verdict = spectra.mercer_on_tokens(W, factor * W)       # products that are rounded, not exactly symmetric
    assert verdict.mercer and verdict.points is None and verdict.value is None
    x = weyl(8, m) / (factor * (W @ W.T).norm()) ** 0.5
    K = EDP()(x @ W, factor * x @ W)
    assert spectra.asymmetry(K) < 1e-13 and spectra.inertia(K, tol=1e-12).negative == 0


@pytest.mark.parametrize("skew", [0.3, 0.1, 1e-2, 1e-4, 1e-8])
def test_a_positive_definite_symmetric_part_is_not_enough(skew):
    # checks: thm-mercer
    A = matrix([1, skew], [-skew, 1])
    verdict = spectra.mercer_on_tokens(torch.eye(2, dtype=F64), A.T.contiguous(), scale=1.0)
    assert not verdict.mercer and verdict.value < -0.5 and "not symmetric" in verdict.reason
    assert exact_form(verdict, torch.eye(2, dtype=F64), A.T, 1.0) < -0.5
    # The price of a small antisymmetric part: long tokens, whose kernel overflows although the certificate does not.
    assert (verdict.log_sizes.abs().max() > 300) == (skew < 0.05)


@pytest.mark.parametrize("skew", [1e-2, 1e-6, 1e-10])
def test_zeros_of_a_wide_head_are_not_taken_for_violations(skew):
    """S has zeros in exact arithmetic, and rounding errors there; the tokens must not use them."""
    # checks: thm-mercer
    W, P = randn(6, 40, 8), torch.diag(torch.arange(8, dtype=F64))
    P[6, 7], P[7, 6] = skew, -skew
    verdict = spectra.mercer_on_tokens(W, W @ P)
    assert not verdict.mercer and verdict.value < -0.5 and "not symmetric" in verdict.reason
    assert float(exact_form(verdict, W, W @ P, 8 ** -0.5)) == pytest.approx(verdict.value, rel=1e-9)


def test_violations_within_the_tolerance_are_not_reported():
    W = randn(3, 4, 4)
    nearly = W + 1e-9 * randn(4, 4, 4)
    assert not spectra.mercer_on_tokens(W, nearly).mercer
    verdict = spectra.mercer_on_tokens(W, nearly, tol=1e-8)
    assert verdict.mercer and "up to the tolerance" in verdict.reason and 0 < verdict.asymmetry < 1e-8
    assert spectra.mercer_on_tokens(W.float(), (0.1 * W * 3).float()).mercer     # float32 has coarser rounding errors
    assert not spectra.mercer_on_tokens(W.float().double(), (0.1 * W * 3).float().double()).mercer
    with pytest.raises(ValueError, match="rounding errors"):
        spectra.mercer_on_tokens(randn(5, 40, 2), 0.3 * randn(5, 40, 2), tol=1e-18)
    with pytest.raises(ValueError, match="tol must lie between"):
        spectra.mercer_on_tokens(W, nearly, tol=1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_wide_random_heads_are_refuted_in_every_precision(dtype):
    # checks: prp-mer-generic
    W_q, W_k = (randn(seed, 256, 32).to(dtype) for seed in (7, 8))
    assert not spectra.mercer_on_tokens(W_q, W_k).mercer
    assert spectra.mercer_on_tokens(W_q, (0.3 * W_q.double()).to(dtype)).mercer


@pytest.mark.parametrize(("first", "second"), [(1e-200, 1e-200), (1e200, 1e200), (1e-300, 1e300), (1e-200, 1.0)])
def test_maps_of_any_size(first, second):
    """The products and squares of their entries may leave the range of floating point."""
    # checks: thm-mercer
    W, skew = randn(3, 4, 3), matrix([1, 0.1, 0], [-0.1, 1, 0], [0, 0, 1])
    assert spectra.mercer_on_tokens(first * W, second * 0.3 * W).mercer
    for P, reason in ((skew, "not symmetric"), (-skew, "negative eigenvalue")):
        verdict = spectra.mercer_on_tokens(first * W, second * W @ P)
        assert not verdict.mercer and verdict.value < -0.5 and reason in verdict.reason
        assert float(exact_form(verdict, first * W, second * W @ P, 3 ** -0.5)) == pytest.approx(verdict.value)


def test_maps_that_vanish_give_the_constant_kernel():
    verdict = spectra.mercer_on_tokens(torch.zeros(3, 2), torch.ones(3, 2))
    assert verdict.mercer and str(verdict).startswith("Mercer: A = 0")


def test_what_are_no_maps_of_tokens_is_refused():
    W = torch.ones(3, 2)
    with pytest.raises(ValueError, match="both be"):
        spectra.mercer_on_tokens(W, W.T)
    with pytest.raises(ValueError, match="NaN"):
        spectra.mercer_on_tokens(W, W * math.nan)
    with pytest.raises(ValueError, match="scale"):
        spectra.mercer_on_tokens(W, W, scale=-1.0)
    with pytest.raises(ValueError, match="tol"):
        spectra.mercer_on_tokens(W, W, tol=0.0)


# ------------------------------------------------------------------------- the zoo on shared points

def elu(x):
    return torch.where(x > 0, x + 1, x.exp())


GRAMS = {                                   # name: (Gram matrix at points x, inertia, conditionally definite)
    "linear": (lambda x: kernels.Linear()(x, x), (3, 0), True),
    "quadratic": (lambda x: kernels.Quadratic()(x, x), (6, 0), True),
    "quadratic with offset": (lambda x: Polynomial(degree=2)(x, x), (10, 0), True),
    "cubic": (lambda x: Polynomial(degree=3, offset=0.0)(x, x), (10, 0), True),
    "cosine": (lambda x: kernels.Cosine()(x, x), (3, 0), True),
    "edp": (lambda x: EDP()(x, x), (25, 0), True),
    "rbf": (lambda x: RBF()(x, x), (25, 0), True),
    "taylor 2": (lambda x: kernels.Taylor(degree=2)(x, x), (10, 0), True),
    "exponentiated intersection": (lambda x: kernels.ExponentiatedIntersection()(x, x), (25, 0), True),
    "exponential of minus the distance": (lambda x: (-kernels.L2(scale=1.0)).exp()(x, x), (25, 0), True),
    "elu + 1": (lambda x: elu(x) @ elu(x).T, (3, 0), True),
    "minus squared distance": (lambda x: -L2Squared()(x, x), (4, 1), True),
    "minus distance": (lambda x: -kernels.L2()(x, x), (24, 1), True),
    "intersection": (lambda x: Intersection()(x, x), (24, 1), True),
    "minus cosine": (lambda x: -kernels.Cosine()(x, x), (0, 3), False),      # the control
}


@pytest.mark.parametrize("name", GRAMS)
def test_signatures_on_shared_points(name):
    # checks: prp-distance-signature
    gram, signature, conditional = GRAMS[name]
    K = gram(weyl(25, 3, start=6))
    assert spectra.inertia(K, tol=1e-11)[:2] == signature
    assert (spectra.conditional_eigenvalues(K).min() > -1e-11) == conditional


def test_smallest_eigenvalues_on_shared_points():
    x = weyl(25, 3, start=6)
    for kernel, smallest in ((EDP(), 1.688387608e-4), (RBF(), 1.243473613e-4), (-L2Squared(scale=1.0), -50.93476850222),
                             (-kernels.L2(scale=1.0), -32.61215019985)):
        assert torch.linalg.eigvalsh(kernel(x, x))[0].item() == pytest.approx(smallest, rel=1e-6)


def test_gaussian_kernel_on_tokens():
    # checks: prp-rbf-mercer
    x, W = weyl(25, 3), matrix([0.9, 0.2, 0.0], [-0.3, 1.1, 0.4], [0.1, -0.2, 0.8])
    reflection = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=F64))
    same, scaled, reflected = (RBF()(x @ W, x @ V) for V in (W, 2 * W, W @ reflection))
    assert spectra.asymmetry(same) == 0 and torch.linalg.eigvalsh(same)[0] > 1e-5
    assert spectra.asymmetry(scaled) > 0.1
    assert spectra.asymmetry(reflected) < 1e-15 and torch.linalg.eigvalsh(reflected)[0] < -0.1
