"""Kernels against formulas written out by hand, and against what they say of themselves."""

import dataclasses
import itertools
import json
import math
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import pairwise

from kernelbook import attention, kernels
from kernelbook.kernels import (
    EDP,
    L2,
    RBF,
    Constant,
    Cosine,
    Definiteness,
    DirectSum,
    Exponential,
    ExponentiatedIntersection,
    Intersection,
    Interval,
    Kernel,
    L2Squared,
    Linear,
    Polynomial,
    Product,
    Quadratic,
    Scaled,
    Sum,
    Taylor,
    TensorProduct,
)

POSITIVE, CONDITIONAL, NEGATIVE_TYPE, UNKNOWN = Definiteness
INF = math.inf


def points(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------- the zoo, written out a second time

def dot(x, y):
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def dist2(x, y):
    return math.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True))


def least(x, y):
    return math.fsum(a if a < b else b for a, b in zip(x, y, strict=True))


@dataclasses.dataclass
class Case:
    """A kernel, its formula at one pair of points of width d, and what theory says of it (its dimension at d = 3)."""

    kernel: Kernel
    formula: object
    dimension: float
    definiteness: Definiteness
    range: tuple[float, float]


ANY, ABOVE_0 = (-INF, INF), (0, INF)
ZOO = [
    Case(EDP(), lambda x, y, d: math.exp(dot(x, y) / math.sqrt(d)), INF, POSITIVE, ABOVE_0),
    Case(EDP(scale=0.3), lambda x, y, d: math.exp(0.3 * dot(x, y)), INF, POSITIVE, ABOVE_0),
    Case(RBF(), lambda x, y, d: math.exp(-dist2(x, y) / (2 * math.sqrt(d))), INF, POSITIVE, (0, 1)),
    Case(RBF(bandwidth=1.7), lambda x, y, d: math.exp(-dist2(x, y) / (2 * 1.7 * 1.7)), INF, POSITIVE, (0, 1)),
    Case(L2(), lambda x, y, d: math.sqrt(dist2(x, y) / d), INF, NEGATIVE_TYPE, ABOVE_0),
    Case(L2(scale=2), lambda x, y, d: 2 * math.sqrt(dist2(x, y)), INF, NEGATIVE_TYPE, ABOVE_0),
    Case(L2Squared(), lambda x, y, d: dist2(x, y) / math.sqrt(d), 5, NEGATIVE_TYPE, ABOVE_0),
    Case(L2Squared(scale=0.1), lambda x, y, d: 0.1 * dist2(x, y), 5, NEGATIVE_TYPE, ABOVE_0),
    Case(Intersection(), lambda x, y, d: least(x, y) / math.sqrt(d), INF, CONDITIONAL, ANY),
    Case(Intersection(scale=3), lambda x, y, d: 3 * least(x, y), INF, CONDITIONAL, ANY),
    Case(ExponentiatedIntersection(), lambda x, y, d: math.exp(least(x, y) / math.sqrt(d)), INF, POSITIVE, ABOVE_0),
    Case(ExponentiatedIntersection(scale=0.2), lambda x, y, d: math.exp(0.2 * least(x, y)), INF, POSITIVE, ABOVE_0),
    Case(Quadratic(), lambda x, y, d: dot(x, y) ** 2 / d, 6, POSITIVE, ABOVE_0),
    Case(Quadratic(scale=0.7), lambda x, y, d: 0.49 * dot(x, y) ** 2, 6, POSITIVE, ABOVE_0),
    Case(Polynomial(), lambda x, y, d: (dot(x, y) / math.sqrt(d) + 1) ** 3, 20, POSITIVE, ANY),
    Case(Polynomial(degree=2, offset=2), lambda x, y, d: (dot(x, y) / math.sqrt(d) + 2) ** 2, 10, POSITIVE, ABOVE_0),
    Case(Polynomial(offset=0.0, scale=1.5), lambda x, y, d: (1.5 * dot(x, y)) ** 3, 10, POSITIVE, ANY),
    Case(Polynomial(degree=2, offset=-1.0), lambda x, y, d: (dot(x, y) / math.sqrt(d) - 1) ** 2, 10, UNKNOWN, ABOVE_0),
    Case(Taylor(), lambda x, y, d: 1 + (a := dot(x, y) / math.sqrt(d)) + a * a / 2, 10, POSITIVE, (0.5, INF)),
    Case(Taylor(degree=3), lambda x, y, d: 1 + (a := dot(x, y) / d**0.5) + a**2 / 2 + a**3 / 6, 20, POSITIVE, ANY),
    Case(Taylor(degree=0), lambda x, y, d: 1.0, 1, POSITIVE, (1, 1)),
    Case(Taylor(degree=1, scale=2.0), lambda x, y, d: 1 + 2 * dot(x, y), 4, POSITIVE, ANY),
    Case(Linear(), lambda x, y, d: dot(x, y) / math.sqrt(d), 3, POSITIVE, ANY),
    Case(Linear(scale=4), lambda x, y, d: 4 * dot(x, y), 3, POSITIVE, ANY),
    Case(Cosine(), lambda x, y, d: dot(x, y) / math.sqrt(dot(x, x) * dot(y, y)), 3, POSITIVE, (-1, 1)),
    Case(Constant(), lambda x, y, d: 1.0, 1, POSITIVE, (1, 1)),
    Case(Constant(-2.5), lambda x, y, d: -2.5, 1, CONDITIONAL, (-2.5, -2.5)),
    Case(Constant(0.0), lambda x, y, d: 0.0, 0, POSITIVE, (0, 0)),
]
each_case = pytest.mark.parametrize("case", ZOO, ids=lambda c: repr(c.kernel))


def test_every_kernel_has_its_formula_here():
    assert {type(c.kernel) for c in ZOO} == {kernels._CLASSES[name] for name in kernels.available()}


@each_case
@given(seed=st.integers(0, 999), n=st.integers(1, 4), m=st.integers(1, 4), d=st.integers(1, 5), data=st.data())
def test_gram_is_the_formula(case, seed, n, m, d, data):
    q_batch, k_batch = data.draw(st.sampled_from([((), ()), ((2,), ()), ((), (3,)), ((2, 1), (3,)), ((2, 3), (2, 3))]))
    q, k = points(seed, *q_batch, n, d), points(seed + 1, *k_batch, m, d)
    gram = case.kernel(q, k)
    batch = torch.broadcast_shapes(q_batch, k_batch)
    assert gram.shape == (*batch, n, m) and gram.dtype == torch.float64
    q, k = q.expand(*batch, n, d).numpy(), k.expand(*batch, m, d).numpy()
    for at in itertools.product(*map(range, gram.shape)):
        *b, i, j = at
        expected = case.formula(q[(*b, i)].tolist(), k[(*b, j)].tolist(), d)
        # relative to the size of the terms that are added, which may cancel
        assert gram[at].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(seed=st.integers(0, 999), d=st.integers(1, 6))
def test_scikit_learn_agrees(seed, d):
    q, k = points(seed, 4, d), points(seed + 1, 5, d)
    x, y, root = q.numpy(), k.numpy(), math.sqrt(d)
    for kernel, expected in [
        (Linear(), pairwise.linear_kernel(x, y) / root),
        (Polynomial(), pairwise.polynomial_kernel(x, y, degree=3, gamma=1 / root, coef0=1)),
        (Quadratic(), pairwise.polynomial_kernel(x, y, degree=2, gamma=1 / root, coef0=0)),
        (RBF(), pairwise.rbf_kernel(x, y, gamma=1 / (2 * root))),
        (Cosine(), pairwise.cosine_similarity(x, y)),
        (L2(), pairwise.euclidean_distances(x, y) / root),
        (L2Squared(), pairwise.euclidean_distances(x, y, squared=True) / root),
    ]:
        np.testing.assert_allclose(kernel(q, k).numpy(), expected, rtol=1e-9, atol=1e-12, err_msg=repr(kernel))


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision(case, dtype):
    q, k = points(0, 8, 3).to(dtype), points(1, 9, 3).to(dtype)
    gram, expected = case.kernel(q, k), case.kernel(q.double(), k.double())
    assert gram.dtype == dtype
    assert (gram - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("kernel", [L2(), L2Squared(), RBF()], ids=repr)
def test_distances_do_not_cancel_far_from_the_origin(kernel):
    q, k = points(0, 4, 3), points(1, 5, 3)
    far = 2.0 ** 20        # the sums are rounded to 2**-32, and only to that
    torch.testing.assert_close(kernel(q + far, k + far), kernel(q, k), rtol=1e-7, atol=1e-8)


# ------------------------------------------------------------------------- what a kernel says of itself

def eigenvalues(kernel: Kernel, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the Gram matrix of x, and of its form on the vectors that sum to 0, relative to its largest entry."""
    gram = kernel(x, x)
    assert torch.allclose(gram, gram.T, rtol=1e-12)
    gram = gram / gram.abs().max().clamp_min(1e-300)
    centre = torch.eye(len(x), dtype=x.dtype) - 1 / len(x)
    return torch.linalg.eigvalsh(gram), torch.linalg.eigvalsh(centre @ gram @ centre)


def check_definiteness(kernel: Kernel, x: torch.Tensor) -> None:
    full, centred = eigenvalues(kernel, x)
    tiny = 1e-12 * len(x)
    if kernel.definiteness is POSITIVE:
        assert full.min() >= -tiny
    if kernel.definiteness.conditional:
        assert centred.min() >= -tiny
    if kernel.definiteness is NEGATIVE_TYPE:
        assert centred.max() <= tiny


@each_case
def test_definiteness(case):
    kernel, x = case.kernel, 2 * points(0, 25, 3)
    assert kernel.definiteness is case.definiteness and kernel.positive_definite is (case.definiteness is POSITIVE)
    check_definiteness(kernel, x)
    if not kernel.positive_definite:
        assert eigenvalues(kernel, x)[0].min() < -1e-2, "a certificate that it is not positive definite"


def test_intersection_is_positive_definite_only_without_signs():
    x = points(0, 25, 3)
    assert eigenvalues(Intersection(), x.abs())[0].min() > 0
    assert Intersection()(torch.tensor([[-1.0]]), torch.tensor([[-1.0]])) == -1
    full, centred = eigenvalues(L2Squared(), x)
    assert (full > 1e-12).sum() == 1 and (full < -1e-12).sum() == 4        # E3.4: signature (1, d + 1)
    assert (eigenvalues(L2(), x)[0] > 1e-12).sum() == 1


def check_range(interval: Interval, values: torch.Tensor, rounded: bool = False) -> None:
    slack = 1e-12 * (1 + values.abs())
    assert (values >= interval.low - slack).all() and (values <= interval.high + slack).all()
    if rounded:         # an open end may have been reached
        return
    assert interval.closed_low or (values > interval.low).all()
    assert interval.closed_high or (values < interval.high).all()


@each_case
def test_range(case):
    assert (case.kernel.range.low, case.kernel.range.high) == pytest.approx(case.range, rel=1e-12)
    assert case.kernel.normalisable is (case.range[0] >= 0)
    q, k = points(1, 30, 3), points(2, 30, 3)
    values = torch.cat([case.kernel(size * q, torch.cat((size * k, size * q))) for size in (1.0, 3.0)])
    check_range(case.kernel.range, values)


def test_range_of_even_taylor_polynomials_is_attained():
    line = torch.linspace(-20, 20, 40001, dtype=torch.float64)[:, None]
    one = torch.ones(1, 1, dtype=torch.float64)
    for degree, low in [(2, 0.5), (4, 0.2704), (6, 0.1493), (12, None), (20, None)]:
        kernel = Taylor(degree=degree)
        assert kernel(line, one).min().item() == pytest.approx(kernel.range.low, rel=1e-6)
        assert low is None or kernel.range.low == pytest.approx(low, abs=5e-5)
        assert kernel.normalisable and not Taylor(degree=degree - 1).normalisable


@each_case
def test_feature_dimension_is_the_rank(case):
    rank = case.kernel.feature_dimension(3)
    assert rank == case.dimension and not case.kernel.feature_dimension_is_bound
    if math.isinf(rank):        # nonsingular, far above rounding, at generic points
        s = torch.linalg.svdvals(case.kernel(2 * points(3, 12, 3), 2 * points(4, 12, 3)))
        assert s[-1] / s[0] > 1e-11
    elif rank:
        s = torch.linalg.svdvals(case.kernel(points(3, 40, 3), points(4, 40, 3)))
        assert s[rank - 1] / s[0] > 1e-4 and s[rank] / s[0] < 1e-12


def test_feature_dimension_at_other_widths():
    expected = {"edp": INF, "linear": 64, "cosine": 64, "quadratic": 2080, "l2_squared": 66, "taylor": 2145,
                "polynomial": 47905, "constant": 1}
    assert {name: kernels.get(name).feature_dimension(64) for name in expected} == expected
    assert Taylor(degree=4).feature_dimension(64) == 814385
    assert [Polynomial(degree=3, offset=0.0).feature_dimension(d) for d in (1, 2)] == [1, 4]


# ------------------------------------------------------------------------- combinators

factors = st.floats(0.1, 1.5).flatmap(lambda x: st.sampled_from([x, -x])) | st.sampled_from([-1, 2, 1 / 3])
leaves = st.one_of(
    st.sampled_from([c.kernel for c in ZOO]),
    st.builds(EDP, scale=st.floats(0.1, 1.0)),
    st.builds(RBF, bandwidth=st.floats(0.5, 3.0)),
    st.builds(Taylor, degree=st.integers(0, 4)),
    st.builds(Polynomial, degree=st.integers(1, 3), offset=st.floats(-1, 1)),
    st.builds(Constant, factors),
)


def grow(inner):
    return st.one_of(st.builds(Sum, inner, inner), st.builds(Product, inner, inner), st.builds(Exponential, inner),
                     st.builds(Scaled, inner, factors))


flat = st.recursive(leaves, grow, max_leaves=5)
nested = st.recursive(flat | st.builds(TensorProduct, flat, flat, split=st.integers(1, 2))
                      | st.builds(DirectSum, flat, flat, split=st.integers(1, 2)), grow, max_leaves=3)


def plain(kernel: Kernel, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The value of a combination by tensor arithmetic on the values of its parts."""
    match kernel:
        case Sum(a, b):
            return plain(a, q, k) + plain(b, q, k)
        case Product(a, b):
            return plain(a, q, k) * plain(b, q, k)
        case Exponential(a):
            return torch.exp(plain(a, q, k))
        case Scaled(a, factor):
            return plain(a, q, k) * factor
        case TensorProduct(a, b, s):
            return plain(a, q[..., :s], k[..., :s]) * plain(b, q[..., s:], k[..., s:])
        case DirectSum(a, b, s):
            return plain(a, q[..., :s], k[..., :s]) + plain(b, q[..., s:], k[..., s:])
    return kernel.gram(q, k)


@settings(max_examples=200)
@given(kernel=nested, seed=st.integers(0, 99))
def test_a_combination_is_what_it_says(kernel, seed):
    q, k = points(seed, 9, 3), points(seed + 1, 11, 3)
    values, expected = kernel(q, k), plain(kernel, q, k)
    assume(max(expected.abs().max(), plain(kernel, q, q).abs().max()) < 1e100)
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-10)
    check_range(kernel.range, values, rounded=True)
    if kernel.range.low >= 0 and (values > 1e-300).all():
        torch.testing.assert_close(kernel.log_gram(q, k), values.log(), rtol=1e-9, atol=1e-9)
    check_definiteness(kernel, q)
    assert torch.linalg.matrix_rank(values, rtol=1e-10) <= kernel.feature_dimension(3)


@settings(max_examples=100)
@given(kernel=nested)
def test_a_combination_is_printed_and_stored_whole(kernel):
    assert eval(repr(kernel), vars(kernels)) == kernel
    assert kernels.from_config(json.loads(json.dumps(kernel.to_config()))) == kernel
    assert hash(kernel) == hash(dataclasses.replace(kernel))
    described = kernel.describe(d=3)
    assert repr(kernel) in described and kernel.formula in described and str(kernel.range) in described
    assert kernel._repr_latex_() == rf"$\displaystyle \kappa(q,k)={kernel.latex}$"


def test_operators_make_the_combinators():
    a, b = EDP(), RBF()
    assert a + b == Sum(a, b) and a * b == Product(a, b) and -a == Scaled(a, -1.0) and a.exp() == Exponential(a)
    assert 2 * a == a * 2 == a * np.float64(2) == Scaled(a, 2.0)
    assert a + 1 == Sum(a, Constant(1.0)) and 1 + a == Sum(Constant(1.0), a) and sum([a, b]) == Sum(a, b)
    gain = torch.nn.Parameter(torch.tensor(2.0))       # its gradient would be lost: refused
    for combine in (lambda: a * gain, lambda: gain * a, lambda: a + gain, lambda: a * "2", lambda: a + None):
        with pytest.raises(TypeError):
            combine()
    for factor in (0, INF, math.nan):
        with pytest.raises(ValueError, match="factor"):
            a * factor


def test_schoenberg():
    """The exponential of a conditionally positive definite kernel is positive definite; of others it need not be."""
    x = 2 * points(5, 25, 3)
    for base in (Intersection(), -L2(), -L2Squared(), Constant(-2.5), Intersection() + Linear(), Cosine()):
        assert base.definiteness.conditional and base.exp().definiteness is POSITIVE
        check_definiteness(base.exp(), x)
    assert L2().exp().definiteness is UNKNOWN
    assert eigenvalues(L2().exp(), x)[0].min() < -1e-3
    assert (-Cosine()).exp().definiteness is UNKNOWN
    assert eigenvalues((-Cosine()).exp(), x)[0].min() < -1e-3


def test_definiteness_of_combinations():
    pd, cpd, nt = EDP(), Intersection(), L2()
    assert (pd + cpd).definiteness is CONDITIONAL and (pd + nt).definiteness is UNKNOWN
    assert (pd * pd).definiteness is POSITIVE and (cpd * cpd).definiteness is UNKNOWN
    assert (-nt).definiteness is CONDITIONAL and (-pd).definiteness is (-cpd).definiteness is NEGATIVE_TYPE
    assert TensorProduct(pd, cpd, 1).definiteness is UNKNOWN
    assert DirectSum(pd, cpd, 1).definiteness is CONDITIONAL
    tensor = TensorProduct(Linear(), Quadratic(), split=2)
    assert tensor.feature_dimension(5) == 2 * 6 and not tensor.feature_dimension_is_bound
    assert torch.linalg.matrix_rank(tensor(points(0, 40, 5), points(1, 40, 5)), rtol=1e-10) == 12
    assert (Linear() + Linear()).feature_dimension(3) == 6 and (Linear() + Linear()).feature_dimension_is_bound
    assert (EDP() * Constant(0.0)).feature_dimension(3) == 0
    assert Constant(2.0).exp().feature_dimension(3) == 1


@given(low=st.floats(-3, 3), width=st.floats(0, 4), other=st.floats(-3, 3), span=st.floats(0, 4))
def test_interval_arithmetic_encloses(low, width, other, span):
    a = Interval(low, low + width, True, True)
    b = Interval(other, other + span, True, True)
    for s, t in itertools.product((0, 0.3, 1), repeat=2):
        x, y = low + s * width, other + t * span
        for interval, value in ((a + b, x + y), (a * b, x * y), (a.exp(), math.exp(x))):
            check_range(interval, torch.tensor([value], dtype=torch.float64))


def test_interval_ends():
    above, any_real = Interval(0, INF), Interval(-INF, INF)
    assert str(Interval(-1, INF, True)) == "[−1, ∞)" and str(any_real) == "(−∞, ∞)"
    assert any_real.exp() == above and Interval(0, 1, True, True).exp() == Interval(1, math.e, True, True)
    assert above * Interval(0, INF, True) == Interval(0, INF, True)
    assert any_real * Interval(0, 0, True, True) == Interval(0, 0, True, True)
    huge = Interval(800, 900, True, True).exp() + any_real
    assert (huge.low, huge.high) == (-INF, INF)


@pytest.mark.parametrize("kernel", [
    EDP(), RBF(), ExponentiatedIntersection(), EDP() + 1, sum([EDP(), RBF()]), EDP() * RBF(), 2 * EDP(), Linear().exp(),
    DirectSum(EDP(), RBF(), 2), TensorProduct(EDP(), ExponentiatedIntersection(), 1)], ids=repr)
def test_no_overflow_in_the_logarithmic_domain(kernel):
    assert kernel.exponential
    q, k = 1e3 * points(0, 6, 4), 1e3 * points(1, 7, 4)
    w = attention.weights(q, k, kernel)
    assert w.isfinite().all()
    torch.testing.assert_close(w.sum(-1), torch.ones(6, dtype=torch.float64))
    assert Scaled(EDP(), -1.0).exponential is False and (EDP() + Linear()).exponential is False


# ------------------------------------------------------------------------- gradients

@each_case
def test_gradients(case):
    if isinstance(case.kernel, Constant) or case.kernel == Taylor(degree=0):
        return      # nothing to differentiate
    q, k = points(6, 2, 3).requires_grad_(), points(7, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(case.kernel, (q, k))
    assert isinstance(case.kernel, L2) or torch.autograd.gradgradcheck(case.kernel, (q, k))


def test_gradients_at_kinks():
    """Central differences see the mean of both sides at a kink, and so must the gradient."""
    q = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    k = torch.tensor([[1.0, 3.0, 0.5], [1.0, -2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Intersection(), (q, k))
    assert torch.autograd.gradcheck(ExponentiatedIntersection(), (q, k))
    same = q.detach().clone().requires_grad_()
    for x in torch.autograd.grad(L2()(q, same).sum(), (q, same)):
        assert (x == 0).all()


def test_cosine_of_extreme_vectors():
    """No NaN for the zero vector, no rounding to nothing for short or long ones."""
    k = points(8, 3, 4)
    for zero in (torch.zeros(1, 4, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float16)):
        q = zero.requires_grad_()
        value = Cosine()(q, k.to(q.dtype))
        value.sum().backward()
        assert (value == 0).all() and (q.grad == 0).all()
    for size in (1e-30, 1e30):
        torch.testing.assert_close(Cosine()(size * k.float(), k.float()), Cosine()(k, k).float())


# ------------------------------------------------------------------------- a kernel of the reader's

@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(kernels, "_CLASSES", dict(kernels._CLASSES))


def documented_example() -> dict:
    """The names that the code in the module's documentation defines when it is run."""
    text = kernels.__doc__
    code = text[text.index("    @register"):text.index("It can then be passed")]
    names = {name: getattr(kernels, name) for name in kernels.__all__} | {"dataclass": dataclasses.dataclass}
    exec(textwrap.dedent(code), names | {"__name__": "reader"}, names)
    return names


def test_the_documented_protocol(registry):
    laplace = documented_example()["Laplace"]
    assert "laplace" in kernels.available() and kernels.get("laplace", rate=0.5) == laplace(rate=0.5)
    documented_example()        # as when a cell is run twice
    kernel = kernels.get("laplace", rate=0.5)
    q, k, v = points(0, 4, 3).requires_grad_(), points(1, 5, 3).requires_grad_(), points(2, 5, 2)
    expected = pairwise.laplacian_kernel(q.detach(), k.detach(), gamma=0.5)
    np.testing.assert_allclose(kernel(q, k).detach(), expected, rtol=1e-12)
    out = attention.attend(q, k, v, kernel)
    np.testing.assert_allclose(out.detach(), expected / expected.sum(1, keepdims=True) @ v.numpy(), rtol=1e-12)
    assert torch.autograd.gradcheck(lambda q, k: attention.attend(q, k, v, kernel), (q, k))
    assert torch.equal(out, attention.attend(q, k, v, kernels.from_config(kernel.to_config())))
    check_definiteness(kernel, q.detach())
    assert (kernel * EDP()).positive_definite and attention.weights(1e4 * q, 1e4 * k, kernel + EDP()).isfinite().all()
    module = attention.KernelAttention(6, 2, kernel="laplace")
    assert module(points(3, 4, 1, 6).float(), *[points(4, 5, 1, 6).float()] * 2)[0].isfinite().all()


def test_a_kernel_that_says_nothing_is_treated_with_care(registry):
    class Mine(Kernel):
        def gram(self, q, k):
            return (q.sum(-1)[..., :, None] - k.sum(-1)[..., None, :]).sin()

    q, k, v = points(0, 4, 3), points(1, 5, 3), points(2, 5, 2)
    assert Mine().feature_dimension(3) == INF and not Mine().normalisable and not Mine().positive_definite
    with pytest.raises(ValueError, match="abs-sum"):
        attention.attend(q, k, v, Mine())
    assert attention.attend(q, k, v, Mine(), normaliser="abs-sum").shape == (4, 2)
    assert (2 * Mine() + EDP())(q, k).shape == (4, 5)
    with pytest.raises(ValueError, match="register"):
        Mine().to_config()
    with pytest.raises(ValueError, match="taken"):
        kernels.register("edp")(Mine)
    impostor = type("EDP", (Kernel,), {"__module__": "reader", "__qualname__": "EDP"})
    with pytest.raises(ValueError, match="taken by kernelbook.kernels.EDP"):
        kernels.register("edp")(impostor)
    with pytest.raises(TypeError, match="name"):
        kernels.register(Mine)
    with pytest.raises(TypeError, match="derives from Kernel"):
        kernels.register("mine")(print)
    with pytest.raises(NotImplementedError, match="must define gram"):
        Kernel().gram(q, k)


# ------------------------------------------------------------------------- bad input

def says(*words: str):
    return pytest.raises((TypeError, ValueError), match="(?s)" + "".join(f"(?=.*{word})" for word in words))


Q, K = torch.ones(3, 4), torch.ones(5, 4)


@pytest.mark.parametrize("call, words", [
    (lambda: kernels.get("gauss"), kernels.available()),
    (lambda: kernels.get("Exponentiated-Intersect"), ["did you mean 'exponentiated_intersection'"]),
    (lambda: kernels.get("sum"), ["no kernel", "edp"]),
    (lambda: kernels.get(RBF), ["class RBF", r"RBF\(\.\.\.\)"]),
    (lambda: kernels.get(None), ["name", "NoneType"]),
    (lambda: kernels.get("edp", bandwith=2), ["bandwith", "scale"]),
    (lambda: kernels.get("cosine", scale=2), ["scale", "none"]),
    (lambda: kernels.get(EDP(), scale=2), ["scale", "kernel was given"]),
    (lambda: kernels.get("edp", scale=-1), ["EDP", "scale", "positive", "-1"]),
    (lambda: kernels.get("rbf", bandwidth=0), ["bandwidth", "positive"]),
    (lambda: EDP(scale=math.nan), ["scale"]),
    (lambda: EDP(scale="a"), ["scale", "'a'"]),
    (lambda: RBF(torch.tensor(1.0, requires_grad=True)), ["bandwidth", "number"]),
    (lambda: Taylor(degree=2.0), ["degree", "integer"]),
    (lambda: Taylor(degree=-1), ["degree"]),
    (lambda: Polynomial(degree=0), ["degree"]),
    (lambda: Polynomial(offset=INF), ["offset"]),
    (lambda: Constant(None), ["value"]),
    (lambda: TensorProduct(EDP(), EDP(), split=0), ["split"]),
    (lambda: TensorProduct(EDP(), EDP(), split=4)(Q, K), ["more than 4", "have 4"]),
    (lambda: DirectSum(EDP(), EDP(), split=4).feature_dimension(2), ["more than 4", "have 2"]),
    (lambda: Linear().log_gram(Q, K), ["logarithm", "never negative"]),
    (lambda: kernels.from_config({"kernel": "gauss"}), ["gauss", "import", "edp"]),
    (lambda: kernels.from_config({"degree": 2}), ["'kernel'"]),
    (lambda: kernels.from_config("edp"), ["dictionary"]),
    (lambda: EDP()(Q.numpy(), K), ["q must be a torch.Tensor", "ndarray"]),
    (lambda: EDP()(Q, K.int()), ["k must", "int32", "float"]),
    (lambda: EDP()(Q[0], K), ["q must have shape"]),
    (lambda: EDP()(Q, K[:, :2]), ["width", r"\(3, 4\)", r"\(5, 2\)"]),
    (lambda: EDP()(Q[:, :0], K[:, :0]), ["at least one coordinate"]),
    (lambda: EDP()(Q, K.double()), ["float32", "float64"]),
    (lambda: EDP()(Q, K.to("meta")), ["cpu", "meta"]),
    (lambda: EDP()(Q.expand(2, 3, 4), K.expand(3, 5, 4)), ["leading axes", r"\(2, 3, 4\)"]),
])
def test_bad_input_is_named(call, words):
    with says(*words):
        call()
