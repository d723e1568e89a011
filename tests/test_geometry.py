"""The geometry of l^p: identities of the duality map, convexity, quotients against their duals, Schur multipliers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import optimize

from kernelbook.spaces import (
    conjugate,
    convexity_gap,
    duality_map,
    hilbert_matrix,
    lp_norm,
    modulus_of_convexity,
    norm_gradient,
    power_map,
    quotient_norm,
    schur_bound,
)

EXPONENTS = (4 / 3, 1.5, 2.0, 3.0, 4.0)
exponents = st.floats(1.1, 10.0)
numbers = st.one_of(st.just(0.0), st.floats(1e-3, 1e3), st.floats(-1e3, -1e-3))
vectors = st.lists(numbers, min_size=1, max_size=8).map(lambda v: torch.tensor(v, dtype=torch.float64))


def points(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------- norms and duality maps

@given(vectors, exponents)
def test_the_norm_is_its_formula(v, p):
    by_hand = math.fsum(abs(x) ** p for x in v.tolist()) ** (1 / p)
    assert lp_norm(v, p).item() == pytest.approx(by_hand, rel=1e-12)
    assert conjugate(conjugate(p)) == pytest.approx(p) and 1 / p + 1 / conjugate(p) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("size", (1e-320, 1e-200, 1e200, 1e307))
@pytest.mark.parametrize("p", (1.05, *EXPONENTS, 100.0))
def test_no_power_over_or_underflows(size, p):
    v = tensor(3.0, -4.0, 0.0)
    close = 1e-3 if size < 1e-300 else 1e-12                     # subnormal numbers have few digits
    for scaled, plain in ((lp_norm(size * v, p), lp_norm(v, p)), (duality_map(size * v, p), duality_map(v, p))):
        assert torch.allclose(scaled / size, plain, rtol=close)
    assert torch.allclose(norm_gradient(size * v, p), norm_gradient(v, p), rtol=close)


def test_the_duality_map_of_an_example():
    # checks: prp-duality-map, E1.6
    v = tensor(0.5, -1.5, 2.0, -0.25, 0.0)
    expected = {
        4 / 3: (3.2384476906583615, [1.737325759737295, -2.5056573304651053, 2.7578327386184336, -1.3789163693092168]),
        1.5: (2.9799305723317406, [1.220641342150048, -2.1142128224229486, 2.441282684300096, -0.8631237704309476]),
        2.0: (2.5617376914898995, [0.5, -1.5, 2.0, -0.25]),
        3.0: (2.2582005280702035, [0.11070761736719775, -0.9963685563047797, 1.771321877875164, -0.0276769043417994]),
        4.0: (2.143972714856517, [0.0271939005482668, -0.7342353148032038, 1.7404096350890756, -0.00339923756853335]),
    }
    for p, (norm, image) in expected.items():
        w = duality_map(v, p)
        assert lp_norm(v, p).item() == pytest.approx(norm, rel=1e-12)
        assert w.tolist() == pytest.approx([*image, 0.0], abs=1e-12)
        assert (w @ v).item() == pytest.approx(norm**2, rel=1e-12)
        assert lp_norm(w, conjugate(p)).item() == pytest.approx(norm, rel=1e-12)
        assert duality_map(w, conjugate(p)).tolist() == pytest.approx(v.tolist(), abs=1e-12)
        # Control: with the power p in the place of p - 1 the identities fail, for p = 2 as well.
        wrong = lp_norm(v, p) ** (2 - p) * power_map(v, p)
        assert abs((wrong @ v).item() - norm**2) > 0.1

    a, b = tensor(1.0, 2.0, -1.0), tensor(0.5, -1.0, 3.0)
    for p, defect in ((1.5, 1.2634220355652663), (2.0, 0.0), (3.0, 1.0954743787023635)):
        found = (duality_map(a + b, p) - duality_map(a, p) - duality_map(b, p)).abs().max().item()
        assert found == pytest.approx(defect, abs=1e-12)


@given(vectors, exponents, st.floats(-5, 5))
def test_identities_of_the_duality_map(v, p, factor):
    # checks: prp-duality-map
    w, norm = duality_map(v, p), lp_norm(v, p).item()
    assert (w @ v).item() == pytest.approx(norm**2, rel=1e-11)
    assert lp_norm(w, conjugate(p)).item() == pytest.approx(norm, rel=1e-11)
    assert torch.allclose(duality_map(factor * v, p), factor * w, rtol=1e-11, atol=1e-300)
    seen = v.abs() > 1e-3 * v.abs().max()                        # the powers of small entries lose digits
    assert torch.allclose(duality_map(w, conjugate(p))[seen], v[seen], rtol=1e-9)
    assert torch.equal(power_map(v, 1.0), v)
    assume(norm > 0)
    assert torch.allclose(norm * norm_gradient(v, p), w, rtol=1e-11, atol=1e-300)


@pytest.mark.parametrize("p", (1.05, *EXPONENTS, 12.0))
def test_derivatives(p):
    v = points(0, 4, 6).requires_grad_()
    gradient, = torch.autograd.grad(lp_norm(v, p).sum(), v)
    assert torch.allclose(gradient, norm_gradient(v, p), rtol=1e-12, atol=1e-14)
    half_square, = torch.autograd.grad((lp_norm(v, p) ** 2).sum() / 2, v)
    assert torch.allclose(half_square, duality_map(v, p), rtol=1e-12, atol=1e-14)
    far = (v.detach().sign() * (v.detach().abs() + 0.3)).requires_grad_()      # from 0, where the second one has a pole
    for f in (lp_norm, duality_map, norm_gradient, lambda x, p: power_map(x, p - 1)):
        assert torch.autograd.gradcheck(lambda x, f=f: f(x, p), far, rtol=1e-4)
    assert torch.autograd.gradgradcheck(lambda x: lp_norm(x, p), far, rtol=1e-4)


def test_zero_and_infinity():
    v = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    for p in EXPONENTS:
        gradient, = torch.autograd.grad(lp_norm(v, p).sum(), v)
        assert not gradient.any() and not duality_map(v, p).any() and not norm_gradient(v, p).any()
        assert lp_norm(tensor(1.0, math.inf), p) == math.inf and lp_norm(tensor(1.0, math.nan), p).isnan()
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    for power, slope in ((1.0, 1.0), (1.5, 0.0), (3.0, 0.0)):
        assert torch.autograd.grad(power_map(x, power).sum(), x)[0].item() == slope


def test_batches_and_types():
    v = points(1, 2, 3, 4)
    for f in (lp_norm, duality_map, norm_gradient):
        one = torch.stack([f(row, 3.0) for row in v.reshape(-1, 4)]).reshape(f(v, 3.0).shape)
        assert torch.equal(f(v, 3.0), one)
        assert f(v.float(), 3.0).dtype == torch.float32
    assert convexity_gap(v, v[0, 0], 3.0).shape == (2, 3)
    assert quotient_norm(v.float(), v[0, :1].float(), 3.0).minimiser.dtype == torch.float32


# ------------------------------------------------------------------------- convexity

@given(st.integers(0, 10**6), exponents, st.floats(-3, 3))
def test_the_convexity_inequalities(seed, p, size):
    # checks: prp-convexity-inequalities
    u, v = points(seed, 2, 20, 5)
    v = v * 10.0**size
    largest = torch.maximum(lp_norm(u, p), lp_norm(v, p)) ** max(p, 2)
    assert (convexity_gap(u, v, p) >= -1e-13 * largest).all()
    u, v = u / lp_norm(u, p)[:, None], v / lp_norm(v, p)[:, None]
    deep = torch.tensor([modulus_of_convexity(x, p) for x in lp_norm(u - v, p).clamp(max=2).tolist()]).double()
    assert (lp_norm((u + v) / 2, p) <= 1 - deep + 1e-13).all()


def test_convexity_where_it_is_sharp_and_where_it_fails():
    # checks: prp-convexity-inequalities
    u, v = points(5, 2, 400, 6)
    assert convexity_gap(u, v, 2.0).abs().max() < 1e-13                        # the parallelogram law
    for p in (1.25, 1.5, 3.0, 4.0, 8.0):
        assert convexity_gap(u, v, p).min() > 1e-3
    # The constant p - 1 and the power p cannot be improved: nearly equal vectors; midpoint and half difference on
    # disjoint coordinates.
    a, b = tensor(1.0, 1.0), tensor(1.01, 0.99)
    gap = convexity_gap(a, b, 1.5).item() / lp_norm((a - b) / 2, 1.5).item() ** 2
    assert 0 <= gap < 1e-4
    assert convexity_gap(tensor(1.0, 1.0), tensor(1.0, -1.0), 3.0).abs() < 1e-14
    # Control: in l^1 the midpoint of two unit vectors may have norm 1, whatever their distance.
    e, f = tensor(1.0, 0.0), tensor(0.0, 1.0)
    assert torch.linalg.vector_norm((e + f) / 2, 1) == 1 and torch.linalg.vector_norm(e - f, 1) == 2
    assert modulus_of_convexity(2.0, 3.0) == 1 and modulus_of_convexity(2.0, 1.01) < 0.01


# ------------------------------------------------------------------------- quotients

@pytest.mark.parametrize("p, expected", ((1.5, 1.3867225487012695), (2.0, 1.1547005383792517),
                                         (3.0, 0.9614997135382723)))
def test_a_quotient_of_one_dimension(p, expected):
    # checks: prp-quotient
    v, N = tensor(2.0, 0.0, 0.0), tensor([1.0, -1.0, 0.0], [0.0, 1.0, -1.0])
    found = quotient_norm(v, N, p)
    assert found.norm.item() == pytest.approx(expected, rel=1e-12)
    assert found.norm.item() == pytest.approx(2 / 3 ** (1 / conjugate(p)), rel=1e-12)    # |<v, w>| / |w|, w = (1, 1, 1)
    assert found.minimiser.tolist() == pytest.approx([2 / 3] * 3, rel=1e-7)
    # Control: the exponent itself in the place of its conjugate gives another number, unless it is 2.
    assert (abs(found.norm.item() - 2 / 3 ** (1 / p)) < 1e-12) == (p == 2)


@pytest.mark.parametrize("p", (1.01, 1.1, *EXPONENTS, 8.0, 40.0))
def test_the_certificate(p):
    # checks: prp-quotient
    v, N = points(2, 4, 9), points(3, 4, 9)
    N = torch.cat([N, N[:1] - 2 * N[1:2]])                                 # dependent rows
    found = quotient_norm(v, N, p)
    assert ((found.norm - found.lower).abs() <= 1e-12 * found.norm).all()
    inside = torch.linalg.lstsq(N.T, (v - found.minimiser).T, driver="gelsd").solution
    assert torch.allclose(inside.T @ N, v - found.minimiser, atol=1e-10)
    assert torch.allclose(lp_norm(found.minimiser, p), found.norm, rtol=1e-13)
    assert torch.allclose(lp_norm(found.functional, conjugate(p)), tensor(1.0), rtol=1e-12)
    assert (found.functional @ N.T).abs().max() < 1e-12
    assert torch.allclose((found.functional * v).sum(-1), found.lower, rtol=1e-12)
    if 1.1 <= p <= 8:                                                      # an independent solver, from SciPy
        start = np.zeros(len(N))
        for row, norm in zip(v.numpy(), found.norm.tolist(), strict=True):
            other = optimize.minimize(lambda t, row=row: np.sum(np.abs(row - t @ N.numpy()) ** p), start, tol=1e-12)
            assert other.fun ** (1 / p) == pytest.approx(norm, rel=1e-6) and other.fun ** (1 / p) > norm * (1 - 1e-12)
    moved = quotient_norm(v + 7 * N[0], N, p)
    assert torch.allclose(moved.norm, found.norm, rtol=1e-11)
    assert (lp_norm(moved.minimiser - found.minimiser, p) <= found.radius + moved.radius).all()


def test_the_quotient_norm_can_be_differentiated():
    # checks: prp-quotient
    v, N = points(2, 2, 5).requires_grad_(), points(3, 2, 5)
    for p in (1.5, 3.0):
        found = quotient_norm(v, N, p)
        gradient, = torch.autograd.grad(found.norm.sum(), v)
        assert torch.allclose(gradient, found.functional, atol=1e-6)
        assert torch.autograd.gradcheck(lambda x, p=p: quotient_norm(x, N, p).norm, v)


def test_degenerate_quotients():
    v = points(4, 3, 4)
    for p in (1.5, 3.0):
        assert torch.allclose(quotient_norm(v, torch.zeros(0, 4), p).norm, lp_norm(v, p), rtol=1e-14)
        assert torch.allclose(quotient_norm(v, torch.zeros(2, 4), p).minimiser, v, rtol=1e-14)
        for N in (torch.eye(4), v):
            nothing = quotient_norm(v, N.double(), p)
            assert not (nothing.norm.any() or nothing.minimiser.any() or nothing.functional.any())
        big = quotient_norm(1e200 * v, 1e-200 * v[:1], p)
        assert torch.allclose(big.norm / 1e200, quotient_norm(v, v[:1], p).norm, rtol=1e-12)


@pytest.mark.parametrize("p", (1.05, 1.5, 4.0, 8.0, 20.0))
def test_entries_of_very_different_size(p):
    # The representer form is an independent answer: J_{p*}(u) is minimal modulo the complement of the rows that u
    # combines.
    features = points(6, 4, 60) * 10.0 ** -torch.linspace(0, 14, 60, dtype=torch.float64)
    u = tensor(1.0, -2.0, 0.5, 1.0) @ features
    v, N = duality_map(u, conjugate(p)), torch.linalg.svd(features)[2][4:]
    found = quotient_norm(v + N.sum(0), N, p)
    assert found.norm.item() == pytest.approx(lp_norm(u, conjugate(p)).item(), rel=1e-11)
    assert torch.allclose(found.minimiser, v, atol=1e-3) and lp_norm(found.minimiser - v, p) <= found.radius


# ------------------------------------------------------------------------- Schur multipliers

def test_the_order_kernel_outgrows_every_hilbert_space():
    # checks: thm-causal-banach, E1.9
    expected = {8: 0.8804407662137059, 32: 1.1483847379671792, 128: 1.5133601882524497, 512: 1.920825138876995,
                1024: 2.1323734976621567}
    bound = {}
    for n in expected:
        H = hilbert_matrix(n)
        order = torch.ones(n, n, dtype=torch.float64).triu()                   # 1 if i <= j
        bound[n] = schur_bound(order, H)
        assert math.pi * bound[n] >= math.log(n) - 1
        if n <= 128:
            assert torch.linalg.matrix_norm(H, 2) < math.pi
            # Controls: a kernel of a Hilbert space has a bounded factorisation, here by 1; and without the signs of
            # Hilbert's matrix the test sees nothing.
            x = torch.linspace(0, 1, n, dtype=torch.float64)
            assert schur_bound(torch.exp(-50 * (x[:, None] - x) ** 2), H) < 1 + 1e-12
            assert schur_bound(order, H.abs()) < 1 and schur_bound(torch.ones_like(H), H) < 1 + 1e-12
    assert bound == pytest.approx(expected, rel=1e-9)
    slope = (bound[1024] - bound[128]) / math.log(8)
    assert slope == pytest.approx(0.2977, abs=5e-5) and abs(slope - 1 / math.pi) < 0.05


# ------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("p", (1, 1.0, 0.5, 0, -2, math.inf, -math.inf, math.nan))
def test_exponents_that_are_refused(p):
    v = points(0, 3)
    for call in (lambda: conjugate(p), lambda: lp_norm(v, p), lambda: duality_map(v, p), lambda: norm_gradient(v, p),
                 lambda: convexity_gap(v, v, p), lambda: quotient_norm(v, v[None], p),
                 lambda: modulus_of_convexity(1.0, p)):
        with pytest.raises(ValueError, match="1 < p < infinity"):
            call()


def test_what_else_is_refused():
    v = points(0, 3)
    for p in (True, "2", None, v):
        with pytest.raises(TypeError, match="p must be a number"):
            lp_norm(v, p)
    for bad, error in (([1.0, 2.0], TypeError), (torch.ones(3, dtype=torch.int64), TypeError), (v[0], ValueError),
                       (v[:0], ValueError), (v + 1j, TypeError)):
        for f in (lp_norm, duality_map, norm_gradient):
            with pytest.raises(error, match="v must"):
                f(bad, 2.0)
    for s in (0, -1, math.nan, math.inf, "1"):
        with pytest.raises(ValueError, match="positive finite"):
            power_map(v, s)
    with pytest.raises(TypeError, match="floating-point"):
        power_map([1.0], 2.0)
    with pytest.raises(ValueError, match="same length"):
        convexity_gap(v, v[:2], 2.0)
    with pytest.raises(ValueError, match="from 0 to 2"):
        modulus_of_convexity(2.5, 2.0)
    for N in (v, v[None, :2], v[None].tolist(), torch.ones(1, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match="N must be"):
            quotient_norm(v, N, 2.0)
    with pytest.raises(ValueError, match="finite"):
        quotient_norm(v * math.nan, v[None], 2.0)
    with pytest.raises(ValueError, match="N.detach"):
        quotient_norm(v, v[None].clone().requires_grad_(), 2.0)
    for n in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="positive integer"):
            hilbert_matrix(n)
    with pytest.raises(ValueError, match="one shape"):
        schur_bound(torch.eye(2), torch.eye(3))
    with pytest.raises(ValueError, match="is 0"):
        schur_bound(torch.eye(2), torch.zeros(2, 2))
