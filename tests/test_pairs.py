"""Pairs of function spaces from feature maps: the form and where there is none, norms, what the kernel leaves open."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelbook.features import MultinomialFeatures
from kernelbook.spaces import IncompatiblePairError, RKBSPair, conjugate, lp_norm


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


PHI = f64([[1, 0, 2], [0, 1, -1], [1, 1, 1], [2, -1, 0], [0, 3, 1]])
PSI = f64([[1, -1, 0], [0, 2, 1], [1, 0, 1], [3, 1, -2]])
V = f64([0.3, -1.2, 0.7])
U = f64([1.1, 0.4, -0.4])
EXPONENTS = (1.25, 1.5, 2.0, 3.0, 4.0)


def test_form_from_every_minor():
    """The form is a function of the two functions: every nonsingular minor of the kernel gives the same number."""
    # checks: thm-construction, E1.1
    pair = RKBSPair(PHI, PSI, p=3.0)
    assert pair.compatible and pair.kernel().tolist() == (PHI @ PSI.T).tolist()
    f, g = pair.function_x(V), pair.function_y(U)
    assert abs(pair.form(f, g) + 0.43) < 1e-12
    values = []
    for rows in itertools.combinations(range(5), 3):
        for columns in itertools.combinations(range(4), 3):
            if abs(torch.det(pair.kernel()[list(rows)][:, list(columns)])) > 1e-9:
                values.append(pair.form_from_minor(f, g, rows, columns).item())
            else:
                with pytest.raises(ValueError, match="singular"):
                    pair.form_from_minor(f, g, rows, columns)
    assert len(values) == 36 and max(abs(value + 0.43) for value in values) < 1e-12
    with pytest.raises(ValueError, match="rank of the kernel's matrix, 3"):
        pair.form_from_minor(f, g, [0, 1], [0, 1])


def test_without_density_there_is_no_form():
    """The control: features that span a line give the zero function two values of the form, so there is none."""
    # checks: thm-construction, E1.1
    one = f64([[1.0, 0.0]])
    pair = RKBSPair(one, one)
    e2 = f64([0.0, 1.0])
    assert pair.function_x(e2) == 0 and pair.function_y(e2) == 0
    assert pair.function_x(0 * e2) == 0 and e2 @ e2 == 1 and 0 * e2 @ e2 == 0        # 0 against 1
    assert not pair.compatible and "not compatible" in repr(pair)
    for call in (pair.form, lambda f, g: pair.form_from_minor(f, g, [0], [0])):
        with pytest.raises(IncompatiblePairError) as refused:
            call(pair.function_x(e2), pair.function_y(e2))
        for word in ("A.9", '"RKBS pairs"', "reduced()", "A.10", "1 of 2 dimensions", "(1 point)"):
            assert word in str(refused.value)
    reduced = pair.reduced()
    assert reduced.compatible and reduced.reduced() is reduced and reduced.kernel() == 1
    assert reduced.form(f64([2.0]), f64([5.0])) == 10


@pytest.mark.parametrize("which", ["first", "second"])
def test_one_side_is_enough_to_lose_the_form(which):
    thin = PHI[:2]
    pair = RKBSPair(thin, PSI) if which == "first" else RKBSPair(PSI, thin)
    assert not pair.compatible
    with pytest.raises(IncompatiblePairError, match=f"features of the {which} set .2 points. span 2 of 3"):
        pair.form(pair.kernel()[:, 0], pair.kernel()[0])


@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("reduced", [False, True])
def test_reproduces_on_both_sides(p, reduced):
    # checks: thm-construction, prp-repair
    pair = RKBSPair(PHI[:2], PSI, p).reduced() if reduced else RKBSPair(PHI, PSI, p)
    K = pair.kernel()
    f, g = K @ torch.arange(1.0, 5.0).double(), torch.linspace(-1, 2, len(K), dtype=torch.float64) @ K
    # b(f, kappa(x, .)) = f(x) for every x at once: functions are the leading axis.
    assert torch.allclose(pair.form(f.expand(len(K), -1), K), f, atol=1e-12)
    assert torch.allclose(pair.form(K.T, g.expand(K.shape[1], -1)), g, atol=1e-12)
    # The form is continuous with constant 1, and evaluations are, with the norm of the section.
    assert pair.form(f, g).abs() <= pair.norm_x(f) * pair.norm_y(g) * (1 + 1e-12)
    assert (f.abs() <= pair.norm_y(K) * pair.norm_x(f) * (1 + 1e-12)).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 5), m=st.integers(1, 5), D=st.integers(1, 4),
       p=st.sampled_from(EXPONENTS))
def test_random_pairs(seed, n, m, D, p):
    generator = torch.Generator().manual_seed(seed)
    phi, psi = (torch.randn(k, D, generator=generator, dtype=torch.float64) for k in (n, m))
    pair = RKBSPair(phi, psi, p)
    assert pair.compatible == (n >= D and m >= D)
    v = torch.randn(2, D, generator=generator, dtype=torch.float64)
    f = pair.function_x(v)
    norm = pair.norm_x(f)
    least = pair.coefficients_x(f)
    assert torch.allclose(pair.function_x(least), f, atol=1e-9)
    # v is one of the coefficients that the least norm is taken over
    assert (norm <= lp_norm(v, p) * (1 + 1e-9)).all()
    assert torch.allclose(pair.norm_x(-2 * f), 2 * norm)
    assert pair.norm_x(f.sum(0)) <= norm.sum() * (1 + 1e-9)
    if pair.compatible:
        u = torch.randn(2, D, generator=generator, dtype=torch.float64)
        assert torch.allclose(norm, lp_norm(v, p), rtol=1e-7)               # no infimum
        assert torch.allclose(pair.form(f, pair.function_y(u)), (u * v).sum(-1), atol=1e-6)
    small = pair.reduced()
    a = torch.randn(2, m, generator=generator, dtype=torch.float64)
    section_sum = a @ psi @ phi.T
    assert (small.norm_x(section_sum) >= pair.norm_x(section_sum) * (1 - 1e-9)).all()
    # On the sums of sections the reduced form depends on the kernel alone.
    c = torch.randn(2, n, generator=generator, dtype=torch.float64)
    K = pair.kernel()
    assert torch.allclose(small.form(section_sum, c @ K), ((c @ K) * a).sum(-1), atol=1e-7)


@pytest.mark.parametrize("p", EXPONENTS)
def test_quotient_norms(p):
    r"""Dependent features: one function, many coefficients, and the least norm has a closed form."""
    # Phi = (1, 2) on one point: the least p-norm with v_1 + 2 v_2 = f is |f| / ||(1, 2)||_{p*}.
    pair = RKBSPair(f64([[1.0, 2.0]]), torch.eye(2).double(), p)
    f = f64([[3.0], [-1.0], [0.0]])
    assert torch.allclose(pair.norm_x(f), f[:, 0].abs() / lp_norm(f64([1.0, 2.0]), conjugate(p)))
    other = RKBSPair(torch.eye(2).double(), f64([[1.0, 2.0]]), p)
    assert torch.allclose(other.norm_y(f), f[:, 0].abs() / lp_norm(f64([1.0, 2.0]), p))
    assert torch.allclose(pair.norm_y(pair.function_y(V[:2])), lp_norm(V[:2], conjugate(p)))


def test_norms_of_sections():
    """One kernel, a norm for every exponent."""
    # checks: thm-norm-freedom, E1.4
    features, keys = MultinomialFeatures(degree=60), f64([[0.8]])
    points = torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None]
    expected = {1.5: 1.663767520411, 2.0: 1.377127764336, 3.0: 1.173111850286, 4.0: 1.098003887892}
    for p, norm in expected.items():
        assert abs(lp_norm(features(keys), p) - norm) < 1e-12
    kernel = RKBSPair(features, features, x=points, y=keys).kernel()
    assert torch.allclose(kernel, (0.8 * points).exp(), rtol=1e-14)
    assert abs(expected[2.0] - math.exp(0.32)) < 1e-12
    # Control: weights 1/a! in the place of 1/sqrt(a!), as if the kernel were another one.
    degrees = torch.arange(61).double()
    wrong = keys ** degrees / torch.lgamma(degrees + 1).exp()
    assert all(abs(lp_norm(wrong, p) - norm) > 0.005 for p, norm in expected.items())


def test_rescaling_keeps_the_kernel_and_moves_the_norm():
    # checks: thm-norm-freedom
    t = f64([1.0, 2.0, 5.0])
    first, second = RKBSPair(PHI, PSI), RKBSPair(PHI * t, PSI / t)
    assert torch.allclose(first.kernel(), second.kernel(), atol=1e-14)
    f = first.function_x(V)
    assert abs(first.norm_x(f) - 1.4212670403551895) < 1e-12
    assert abs(second.norm_x(f) - 0.6852736679604725) < 1e-12
    same = RKBSPair(PHI * 1.0, PSI / 1.0)
    assert abs(same.norm_x(f) - first.norm_x(f)) < 1e-14                    # control: no rescaling


def test_rank_deficient_maps():
    """Nine queries on a line, and sixty in the plane, with the features up to degree 6."""
    # checks: thm-edp-pair, E1.3
    features = MultinomialFeatures(degree=6)
    line = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None] * f64([1, 0])
    steps = torch.arange(1, 61).double()
    plane = torch.stack([(steps * 2**0.5) % 1, (steps * 3**0.5) % 1], 1) * 2 - 1
    key = f64([[0.4, 0.7]])
    deficient = RKBSPair(features, features, x=line, y=plane)
    full = RKBSPair(features, features, x=plane, y=plane)
    assert deficient.dimension_x == 7 and full.dimension_x == deficient.dimension_y == 28
    v = torch.zeros(28).double()
    v[[a.tolist() for a in features.exponents(2)].index([0, 1])] = 1
    assert (deficient.function_x(v) == 0).all() and (features(key) @ v).item() == 0.7
    assert not deficient.compatible and full.compatible and (full.function_x(v) != 0).any()
    with pytest.raises(IncompatiblePairError, match="span 7 of 28"):
        deficient.form(deficient.kernel()[:, 0], deficient.kernel()[0])
    assert deficient.reduced().dimension_x == 7


def test_repair_may_shrink_the_space():
    # checks: prp-repair
    e1, e2 = torch.eye(2).double().split(1)
    before = RKBSPair(e1, e2)
    one = torch.ones(1).double()
    assert before.norm_x(one) == 1 and before.dimension_x == 1
    after = before.reduced()
    assert after.dimension_x == after.dimension_y == 0 and after.norm_x(0 * one) == 0
    with pytest.raises(ValueError, match="f is not in the space of the first set"):
        after.norm_x(one)
    assert after.form(0 * one, 0 * one) == 0
    nothing = RKBSPair(0 * e1, e2).reduced()
    assert nothing.kernel() == 0 and nothing.norm_x(0 * one) == 0


def test_repair_may_raise_the_norm():
    # checks: prp-repair
    phi, psi = f64([[1.0, 0.0]]), f64([[1.0, 1.0]])
    pair = RKBSPair(phi, psi)
    one = torch.ones(1).double()
    assert pair.norm_x(one) == 1 and abs(pair.reduced().norm_x(one) - 2**0.5) < 1e-15
    # A Hilbert space and one feature map: nothing changes.
    same = RKBSPair(PHI[:2], PHI[:2])
    f = same.kernel()[:, 0]
    assert abs(same.norm_x(f) - same.reduced().norm_x(f)) < 1e-12
    # With another exponent it does, even then.
    same = RKBSPair(PHI[:2], PHI[:2], p=4.0)
    assert same.reduced().norm_x(f) > same.norm_x(f) + 0.01


def test_tolerance_decides_the_rank():
    nearly = f64([[1.0, 0.0], [1.0, 1e-10]])
    assert RKBSPair(nearly, nearly).compatible
    assert not RKBSPair(nearly, nearly, rtol=1e-8).compatible
    flat, steep = f64([[1.0, 0, 0], [0, 1, 0]]), f64([[1.0, 0, 0], [0, 1e-10, 1]])     # almost orthogonal planes
    assert RKBSPair(flat, steep).reduced().dimension_x == 2
    assert RKBSPair(flat, steep, rtol=1e-8).reduced().dimension_x == 1
    assert RKBSPair(1e-20 * PHI, 1e20 * PSI).compatible                     # it is relative


@pytest.mark.parametrize("make, error, says", [
    (lambda: RKBSPair(PHI, PSI[:, :2]), ValueError, "3 of torch.float64 and 2 of"),
    (lambda: RKBSPair(PHI, PSI.float()), ValueError, "torch.float32"),
    (lambda: RKBSPair(PHI.long(), PSI), TypeError, "double"),
    (lambda: RKBSPair(PHI[0], PSI), ValueError, "matrix"),
    (lambda: RKBSPair([[1.0]], PSI), TypeError, "list"),
    (lambda: RKBSPair(MultinomialFeatures(degree=2), PSI), ValueError, "pass x="),
    (lambda: RKBSPair(PHI, PSI, x=PHI), ValueError, "superfluous"),
    (lambda: RKBSPair(PHI, PSI, p=1.0), ValueError, "p"),
    (lambda: RKBSPair(PHI, PSI).norm_x(V), ValueError, "5 points of the first set"),
    (lambda: RKBSPair(PHI, PSI).norm_y(torch.stack([PSI @ U, f64([1, 0, 0, 0])])), ValueError, "up to 0.0?"),
    (lambda: RKBSPair(PHI, PSI).norm_y(f64([1, 0, 0, 0])), ValueError, "g is not in the space of the second set"),
    (lambda: RKBSPair(PHI, PSI).norm_y(PSI @ U + f64([1e-6, 0, 0, 0])), ValueError, "not in the space"),
])
def test_refusals(make, error, says):
    with pytest.raises(error, match=says):
        make()
