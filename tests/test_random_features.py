"""Kernels given by feature maps: their formulas, their moments over the draws, and that the library knows them."""

import dataclasses
import math

import pytest
import torch

from kernelbook import attend, cli, features, kernels
from kernelbook.features import EluFeatures, FeatureKernel, FourierFeatures, PositiveFeatures, QuadratureFeatures

MAPS = [EluFeatures(), PositiveFeatures(6), PositiveFeatures(7, 3, orthogonal=False, scale=0.4), FourierFeatures(6),
        FourierFeatures(8, 2, orthogonal=False, bandwidth=1.3), QuadratureFeatures(5),
        QuadratureFeatures(8, 1, scale=1.0), QuadratureFeatures(8, rule="gauss-hermite")]
NAMES = {"elu": EluFeatures, "positive_features": PositiveFeatures, "fourier_features": FourierFeatures,
         "quadrature_features": QuadratureFeatures}


def points(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------- maps and their kernels

@pytest.mark.parametrize("phi", MAPS, ids=repr)
def test_the_inner_product_is_the_kernel(phi):
    q, k = points(1, 2, 9, 3), points(2, 8, 3)
    gram = phi(q) @ phi(k).mT
    torch.testing.assert_close(gram, phi.kernel(q, k), rtol=1e-14, atol=1e-14)
    assert phi(q).shape[-1] == phi.dimension(3) == phi.kernel.feature_dimension(3)
    if phi.kernel.exponential:
        torch.testing.assert_close(phi.kernel.log_gram(q, k), gram.log(), rtol=1e-12, atol=1e-12)
    assert phi.kernel.map == phi and features.pair_of(phi.kernel) == (phi, phi)
    assert phi(q.float()).dtype == torch.float32 and phi(q.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(phi(q.float()).double(), phi(q.float().double()), rtol=1e-5, atol=1e-6)
    x = points(3, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(phi, (x,)) and torch.autograd.gradcheck(phi.kernel.gram, (x, points(5, 3, 3)))


@pytest.mark.parametrize("phi", MAPS, ids=repr)
def test_what_the_kernels_say_of_themselves(phi):
    kernel, x = phi.kernel, points(4, 40, 3)
    gram = kernel(x, x)
    low, high = kernel.range.low, kernel.range.high
    assert gram.min() >= low - 1e-14 and gram.max() <= high + 1e-14 and kernel.normalisable == (low >= 0)
    assert kernel.positive_definite and torch.linalg.eigvalsh(gram).min() > -1e-10 * gram.max()
    singular = torch.linalg.svdvals(kernel(x, points(5, 40, 3)))
    rank = kernel.feature_dimension(3)
    assert singular[rank - 1] > 1e-13 * singular[0] and singular[rank] < 1e-14 * singular[0]
    assert str(rank) in kernel.describe(3) and kernel.formula in str(kernel)


@pytest.mark.parametrize("phi", MAPS, ids=repr)
def test_the_library_knows_them_by_name(phi):
    kernel = phi.kernel
    assert kernels.from_config(kernel.to_config()) == kernel and isinstance(kernel, FeatureKernel)
    name = kernel.to_config()["kernel"]
    assert NAMES[name] is type(phi) and name not in kernels.available()
    options = {f.name: getattr(phi, f.name) for f in dataclasses.fields(phi)}
    assert kernels.get(name, **options) == kernel
    assert cli._kernel(name, [f"{key}={value}" for key, value in kernel.options().items()]) == kernel
    with pytest.raises(ValueError, match=f"did you mean '{name}'(?s:.*)given by features: .*{name}"):
        kernels.get(name.upper())


def test_elu_features():
    x = torch.tensor([[-700.0, -40.0, -1.0, 0.0, 2.5]], dtype=torch.float64)
    expected = torch.tensor([[math.exp(-700), math.exp(-40), math.exp(-1), 1.0, 3.5]], dtype=torch.float64)
    torch.testing.assert_close(EluFeatures()(x), expected, rtol=1e-15, atol=0)
    x = torch.zeros(1, 1, requires_grad=True)
    assert torch.autograd.grad(EluFeatures()(x).sum(), x)[0].item() == 1        # not 2: both pieces meet there


def test_formulas():
    x, d = points(1, 4, 3), 3
    phi = PositiveFeatures(5, seed=2, scale=0.7)
    w = phi._nodes(x)[0]
    y = math.sqrt(0.7) * x
    expected = torch.stack([(y @ w[i] - (y * y).sum(-1) / 2).exp() / math.sqrt(5) for i in range(5)], -1)
    torch.testing.assert_close(phi(x), expected, rtol=1e-13, atol=0)
    phi = FourierFeatures(6)
    w = phi.frequencies(x)
    expected = (x[:, None] - x[None]) @ w.mT
    torch.testing.assert_close(phi.kernel(x, x), expected.cos().mean(-1), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(w * d ** 0.25, FourierFeatures(6, bandwidth=1.0).frequencies(x))


# ------------------------------------------------------------------------- the draws

def test_a_draw_is_a_function_of_its_options():
    x = points(1, 3, 4)
    for make in (PositiveFeatures, FourierFeatures, QuadratureFeatures):
        torch.manual_seed(1)
        state = torch.random.get_rng_state()
        first = make(6, seed=5)(x)
        features.given._draw.cache_clear(), features.given._sobol.cache_clear()
        torch.manual_seed(2)
        assert torch.equal(make(6, seed=5)(x), first)
        assert (make(6, seed=6)(x) - first).abs().max() > 1e-3
        torch.manual_seed(1)
        make(8)(x)
        assert torch.equal(torch.random.get_rng_state(), state)         # torch's own generator is left alone


def test_orthogonal_draws():
    d, w = 5, features.given._draw(13, 5, 0, True)
    for block in w.split(d):
        gram = block @ block.mT
        assert (gram - gram.diagonal().diag()).abs().max() < 1e-13
    w = features.given._draw(100_000, d, 0, True)
    assert w.mean(0).abs().max() < 0.015 and (w.mT @ w / len(w) - torch.eye(d)).abs().max() < 0.02
    assert (w.square().sum(-1).var() - 2 * d).abs() < 0.3       # chi-squared, as the lengths of normal vectors
    assert (w.pow(4).mean(0) - 3).abs().max() < 0.15
    w = features.given._draw(64, d, 0, False)[:d]
    assert (w @ w.mT).triu(1).abs().max() > 0.1


def estimates(phi, q, k, size: int) -> torch.Tensor:
    """What each block of ``size`` nodes of a draw makes of the kernel at one query and one key."""
    if isinstance(phi, FourierFeatures):
        cos, sin = (phi(q) * phi(k) * phi.count / 2).chunk(2, -1)
        return (cos + sin).reshape(-1, size).mean(-1)
    return (phi(q) * phi(k) * phi.count).reshape(-1, size).mean(-1)


@pytest.mark.parametrize("seed", range(3))
def test_positive_features_are_unbiased_with_the_variance_of_theory(seed):
    q, k = 0.4 * points(seed, 1, 4), 0.4 * points(seed + 9, 1, 4)
    exact, excess = (q @ k.mT).exp().item(), (q + k).square().sum().exp().item() - 1
    single = estimates(PositiveFeatures(400_000, seed, orthogonal=False, scale=1.0), q, k, 1)
    error = exact * math.sqrt(excess / len(single))
    assert abs(single.mean().item() - exact) < 4 * error
    assert single.var().item() / exact ** 2 == pytest.approx(excess, rel=0.1)
    blocks = estimates(PositiveFeatures(400_000, seed, scale=1.0), q, k, 4)         # of d orthogonal directions each
    assert abs(blocks.mean().item() - exact) < 4 * error
    assert blocks.var().item() / exact ** 2 < 0.98 * excess / 4
    # the control: without -|x|^2/2 the mean is another one
    assert abs(single.mean().item() * ((q.square().sum() + k.square().sum()) / 2).exp().item() - exact) > 20 * error


@pytest.mark.parametrize("seed", range(3))
def test_fourier_features_are_unbiased_with_the_variance_of_theory(seed):
    q, k = 0.6 * points(seed, 1, 4), 0.6 * points(seed + 9, 1, 4)
    square = (q - k).square().sum().item()
    exact, variance = math.exp(-square / 2), (1 - math.exp(-square)) ** 2 / 2
    single = estimates(FourierFeatures(400_000, seed, orthogonal=False, bandwidth=1.0), q, k, 1)
    error = math.sqrt(variance / len(single))
    assert abs(single.mean().item() - exact) < 4 * error
    assert single.var().item() == pytest.approx(variance, rel=0.05)
    blocks = estimates(FourierFeatures(400_000, seed, bandwidth=1.0), q, k, 4)
    assert abs(blocks.mean().item() - exact) < 4 * error and blocks.var().item() < 0.98 * variance / 4


def test_quadrature_rules():
    x, y = points(1, 20, 2), points(2, 20, 2)
    exact = kernels.EDP()(x, y)
    errors = [(QuadratureFeatures(r * r, rule="gauss-hermite").kernel(x, y) / exact - 1).abs().max().item()
              for r in (4, 8, 16, 32)]
    assert errors[0] > 0.01 and errors[3] < 1e-12
    assert all(b < a ** 1.5 for a, b in zip(errors[:2], errors[1:3], strict=True))      # faster than any power of r
    for rule in ("gauss-hermite", "sobol"):
        zero = torch.zeros(1, 2, dtype=torch.float64)
        assert QuadratureFeatures(16, rule=rule).kernel(zero, zero).item() == pytest.approx(1, rel=1e-14)
    x, y = points(3, 30, 8) / 2, points(4, 30, 8) / 2
    exact = kernels.EDP()(x, y)

    def error(make, **options):
        seeds = [(make(256, seed, **options).kernel(x, y) / exact - 1).square().mean() for seed in range(8)]
        return torch.stack(seeds).mean().sqrt().item()

    assert error(QuadratureFeatures) < 0.8 * error(PositiveFeatures) < 0.8 * error(PositiveFeatures, orthogonal=False)


# ------------------------------------------------------------------------- long points

@pytest.mark.parametrize("name", ["positive_features", "quadrature_features"])
@pytest.mark.parametrize("causal", [False, True])
def test_long_points_do_not_make_weights_vanish(name, causal):
    """The kernel is below the least number, but a factor of each row and one of all keys cancel."""
    kernel = kernels.get(name, count=64, scale=1.0)
    q, k, v = (points(seed, 3, 5, 4) for seed in range(3))
    q, k = (36 * x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    assert (kernel(q, k) == 0).all()
    exact, linear = (attend(q, k, v, kernel, causal=causal, path=path) for path in ("exact", "linear"))
    assert exact.isfinite().all() and (exact != 0).all()
    torch.testing.assert_close(linear, exact, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------- bad options

@pytest.mark.parametrize("call, words", [
    (lambda: PositiveFeatures(0), ["count", "at least 1"]),
    (lambda: PositiveFeatures(4, seed=-1), ["seed", "at least 0"]),
    (lambda: PositiveFeatures(4, orthogonal="yes"), ["orthogonal", "True or False"]),
    (lambda: PositiveFeatures(4, scale=0), ["scale", "positive", "1/√d"]),
    (lambda: FourierFeatures(5), ["even", "cosine"]),
    (lambda: FourierFeatures(4, bandwidth=-1.0), ["bandwidth", "-1.0"]),
    (lambda: QuadratureFeatures(4, rule="halton"), ["halton", "sobol", "gauss-hermite"]),
    (lambda: QuadratureFeatures(10, rule="gauss-hermite")(torch.ones(2, 2)), ["grid", "9", "16", "sobol"]),
    (lambda: kernels.get("positive_features", count=2.5), ["count", "2.5"]),
    (lambda: kernels.get("elu", count=2), ["elu", "no option 'count'"]),
])
def test_errors_say_what_would_help(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value
