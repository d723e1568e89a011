"""Heads, masks and depth: what the chapter *Heads, masks, depth* states, in numbers."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelbook import KernelAttention, attend, kernels
from kernelbook.attention import weights
from kernelbook.features import ExponentiatedIntersectionFeatures, MultinomialFeatures, QuadraticFeatures
from kernelbook.kernels import RBF, Linear, Quadratic, Taylor
from kernelbook.representer import BanachRegressor
from kernelbook.spaces import norm_gradient
from kernelbook.spectra import asymmetry, inertia, log_determinant, numerical_rank

F64 = torch.float64


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def rank(K: torch.Tensor) -> int:
    return numerical_rank(K, 1e-10)


def exact_rank(rows: list[list[Fraction]]) -> int:
    """By elimination in rational numbers."""
    rows, r = [row[:] for row in rows], 0
    for c in range(len(rows[0])):
        pivot = next((i for i in range(r, len(rows)) if rows[i][c]), None)
        if pivot is None:
            continue
        rows[r], rows[pivot] = rows[pivot], rows[r]
        for i in range(r + 1, len(rows)):
            f = rows[i][c] / rows[r][c]
            rows[i] = [x - f * y for x, y in zip(rows[i], rows[r], strict=True)]
        r += 1
    return r


# ------------------------------------------------------------------------- heads

@pytest.mark.parametrize("kernel", ["edp", "rbf", "quadratic"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_layer_is_one_kernel_with_matrices_as_values(kernel, masked):
    # checks: prp-heads
    D, H, n = 12, 3, 7
    layer = KernelAttention(D, H, bias=False, batch_first=True, kernel=kernel, dtype=F64)
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(draw(i, *parameter.shape) / D ** 0.5)
    t, S = draw(7, n, D), draw(8, n, D)
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1) if masked else None
    with torch.no_grad():
        out = layer(t[None], S[None], S[None], attn_mask=hidden)[0][0]
    W_q, W_k, W_v = (W.detach().split(D // H) for W in layer.in_proj_weight.chunk(3))
    W_o = layer.out_proj.weight.detach().split(D // H, dim=1)

    def said(order):
        G = sum(weights(t @ W_q[h].T, S @ W_k[h].T, kernel, mask=None if hidden is None else ~hidden)[..., None, None]
                * (W_o[c] @ W_v[c]) for h, c in enumerate(order))
        return torch.einsum("nmxy,my->nx", G, S)

    assert apart(said(range(H)), out) < 1e-12
    assert apart(said([1, 2, 0]), out) > 0.05, "the matrices belong to their heads"


def test_ranks_of_sums_of_heads():
    # checks: prp-heads, prp-hmd-linear
    t, s = draw(0, 60, 4), draw(1, 60, 4)
    W_q, W_k = draw(2, 3, 4, 2), draw(3, 3, 4, 2)
    for kernel, ranks in ((Linear(), [2, 4, 4]), (Quadratic(), [3, 6, 9])):
        K = kernel(t @ W_q, s @ W_k)
        assert [rank(K[:h].sum(0)) for h in (1, 2, 3)] == ranks
        assert rank(K[0] - 2 * K[1]) == ranks[1]                # any factors but 0
        shared = kernel(t @ W_q[:1], s @ W_k)                    # stacked queries of rank 2 only
        assert rank(shared.sum(0)) == (2 if kernel == Linear() else 3)
    # the constant is a feature of both heads, and counts once
    K = Taylor(degree=2)(t @ W_q, s @ W_k)
    assert rank(K[0]) == 6 and rank(K[:2].sum(0)) == 11


@pytest.mark.parametrize("D, H, d", [(3, 1, 2), (3, 2, 2), (8, 3, 2), (6, 4, 2), (5, 5, 1)])
def test_linear_heads_reach_the_smaller_of_two_numbers(D, H, d):
    # checks: prp-hmd-linear
    W_q, W_k = draw(D, H, d, D), draw(H, H, d, D)
    A = (W_q.mT @ W_k).sum(0)
    assert rank(A) == min(H * d, D)
    t, s = draw(5, 40, D), draw(6, 40, D)
    K = Linear(scale=1.0)(t @ W_q.mT, s @ W_k.mT).sum(0)
    assert apart(K, t @ A @ s.T) < 1e-11 and rank(K) == rank(A)


def test_the_matrix_of_all_blocks():
    # checks: prp-heads
    t, s, D = draw(0, 20, 6), draw(1, 20, 6), 6
    W_q, W_k = draw(2, 3, 6, 2), draw(3, 3, 6, 2)
    C = draw(4, 3, 6, 1) @ draw(5, 3, 1, 6)                      # of rank 1
    for normaliser in ("none", "sum"):
        w = weights(t @ W_q, s @ W_k, "quadratic", normaliser=normaliser)
        blocks = torch.einsum("hnm,hxy->nxmy", w, C).reshape(20 * D, 20 * D)
        assert rank(blocks) == 3 * 3 * 1
    w = weights(t @ W_q, s @ W_k, "edp")
    assert rank(torch.einsum("hnm,hxy->nxmy", w, C).reshape(20 * D, 20 * D)) > 3 * 3


# ------------------------------------------------------------------------- measures

@settings(deadline=None, max_examples=30)
@given(a=st.integers(0, 12), b=st.integers(1, 12), kernel=st.sampled_from(["edp", "rbf", "taylor", "constant"]),
       seed=st.integers(0, 1000))
def test_mixing_two_contexts(a, b, kernel, seed):
    # checks: prp-measure
    q, k0, k1, v0, v1 = draw(seed, 4, 3), draw(seed + 1, 5, 3), draw(seed + 2, 3, 3), draw(9, 5, 2), draw(8, 3, 2)

    def output(a, b):
        return attend(q, torch.cat([k0] * a + [k1] * b), torch.cat([v0] * a + [v1] * b), kernel)

    z0, z1 = (kernels.get(kernel)(q, k).sum(1, keepdim=True) for k in (k0, k1))
    theta = b * z1 / (a * z0 + b * z1)
    assert apart(output(a, b), (1 - theta) * output(1, 0) + theta * output(0, 1)) < 1e-12
    assert apart(output(3 * a, 3 * b), output(a, b)) < 1e-12
    if a:
        assert apart(output(a, b), output(1, 0) + output(0, 1)) > 1e-3, "it is not additive"
    affine = b * len(k1) / (a * len(k0) + b * len(k1))
    if kernel == "constant":
        assert apart(theta, torch.full_like(theta, affine)) < 1e-12
    elif a:
        assert apart(theta, torch.full_like(theta, affine)) > 1e-4


def test_influence_of_one_more_key():
    # checks: prp-measure
    q, k, v = draw(0, 4, 3), draw(1, 6, 3), draw(2, 6, 2)
    before, K = attend(q, k[:5], v[:5]), kernels.get("edp")(q, k)
    influence = K[:, 5:] / K[:, :5].sum(1, keepdim=True) * (v[5:] - before)
    errors = []
    for copies in (10, 100, 1000):
        after = attend(q, torch.cat([k[:5]] * copies + [k[5:]]), torch.cat([v[:5]] * copies + [v[5:]]))
        errors.append(apart(copies * (after - before), influence))
    assert errors[2] < 1e-2 * influence.abs().max()
    assert errors[0] / errors[1] > 5 and errors[1] / errors[2] > 8, "the error falls like 1/copies"


# ------------------------------------------------------------------------- masks

def rational(n: int, step: int) -> list[Fraction]:
    """Different numbers in (-1, 1) with the denominator 101."""
    return [Fraction(2 * (step * i % 101) - 101, 101) for i in range(1, n + 1)]


def test_a_masked_kernel_of_rank_two_exactly():
    # checks: prp-masks, E7.7
    n, q, k = 24, rational(24, 37), rational(24, 23)
    K = [[1 + x * y for y in k] for x in q]
    M = [[K[i][j] if j <= i else Fraction(0) for j in range(n)] for i in range(n)]
    assert min(map(min, K)) > 0
    assert exact_rank(K) == 2 and exact_rank(M) == n
    for a in range(2, n):                                        # corners of at least two rows and columns
        assert exact_rank([row[:a] for row in M[a - 1:]]) == 2
    for a, b in itertools.product(range(1, n + 1, 3), repeat=2):
        found = exact_rank([row[:b] for row in M[a - 1:]])
        assert found == min(n + 1 - a, b, 2 + max(0, b - a))
    # without the order: every third diagonal hidden, all over the matrix
    other = [[K[i][j] if (i + j) % 3 else Fraction(0) for j in range(n)] for i in range(n)]
    assert exact_rank([row[:12] for row in other[12:]]) > 2
    # one zero on the diagonal, and the determinant is 0
    k[7] = -1 / q[7]
    zero = [[1 + q[i] * k[j] if j <= i else Fraction(0) for j in range(n)] for i in range(n)]
    assert exact_rank(zero) == n - 1


def test_normalised_masked_weights_are_semiseparable_too():
    # checks: prp-masks
    n, q, k = 24, draw(0, 24, 2), draw(1, 24, 2)
    P = weights(q, k, "taylor", causal=True)
    assert rank(P) == n
    assert [rank(P[a:, :a]) for a in range(6, n - 5)] == [6] * (n - 11)
    diagonal = P.diagonal().log().sum()
    assert torch.linalg.slogdet(P).logabsdet == pytest.approx(diagonal.item(), rel=1e-12)
    assert rank(weights(q, k, "taylor")) == 6


def recurrent(q, k, v, phi):
    h, z = torch.zeros(v.shape[1], phi.dimension(k.shape[1]), dtype=F64), 0.0
    plain, normalised = [], []
    for asks, answers, value in zip(phi(q), phi(k), v, strict=True):
        h, z = h + value[:, None] * answers, z + answers
        plain.append(h @ asks)
        normalised.append(h @ asks / (z @ asks))
    return torch.stack(plain), torch.stack(normalised)


PHI = [MultinomialFeatures(2, scale=True), MultinomialFeatures(4), QuadraticFeatures(scale=True),
       ExponentiatedIntersectionFeatures((-2.0, -1.0, 0.0, 0.5, 2.0))]


@pytest.mark.parametrize("phi", PHI, ids=lambda phi: type(phi).__name__)
@pytest.mark.parametrize("n", [1, 2, 33])
def test_causal_attention_is_a_recurrence(phi, n):
    # checks: prp-hmd-state
    q, k, v = draw(n, n, 2), draw(n + 1, n, 2), draw(n + 2, n, 3)
    if isinstance(phi, ExponentiatedIntersectionFeatures):       # exact at its knots
        knots = torch.tensor(phi.knots, dtype=F64)
        q, k = (knots[(x.abs() * 97).long() % len(knots)] for x in (q, k))
    plain, normalised = recurrent(q, k, v, phi)
    expected = attend(q, k, v, phi.kernel, causal=True, normaliser="none")
    assert apart(plain, expected) < 1e-10 * max(1.0, expected.abs().max().item())
    assert apart(normalised, attend(q, k, v, phi.kernel, causal=True)) < 1e-9
    if n > 2:
        assert apart(normalised, attend(q, k, v, phi.kernel)) > 0.05, "without the mask it is another function"


def realise(M):
    n, steps, U = len(M), [], torch.zeros(len(M), 0, dtype=F64)
    for a in range(n):
        new = torch.cat([U[1:], M[a + 1:, a:a + 1]], 1)
        left, s, _ = torch.linalg.svd(new, full_matrices=False)
        basis = left[:, s > 1e-10 * M.abs().max()]
        steps.append((U[0], M[a, a], basis.mT @ new))
        U = basis
    return steps


@pytest.mark.parametrize("name", ["taylor", "order", "window", "random", "zero", "edp"])
def test_the_least_memory(name):
    # checks: prp-hmd-state
    n, q, k = 20, draw(0, 20, 2), draw(1, 20, 2)
    back = torch.arange(n)[:, None] - torch.arange(n)
    M = {"taylor": weights(q, k, "taylor", causal=True), "order": torch.ones(n, n, dtype=F64).tril(),
         "window": weights(q, k, "edp", mask=(back >= 0) & (back < 5)), "random": draw(2, n, n).tril(),
         "zero": torch.eye(n, dtype=F64), "edp": weights(3 * q, 3 * k, "edp", causal=True)}[name]
    steps, x = realise(M), draw(3, n)
    h, outputs = torch.zeros(0, dtype=F64), []
    for (c, e, step), value in zip(steps, x, strict=True):
        outputs.append(c @ h + e * value)
        h = step @ torch.cat([h, value[None]])
    assert apart(torch.stack(outputs), M @ x) < 1e-9
    sizes = [len(step) for *_, step in steps[:-1]]
    # the threshold of the construction is absolute, and so is this one
    assert sizes == [int((torch.linalg.svdvals(M[a:, :a]) > 1e-10 * M.abs().max()).sum()) for a in range(1, n)]
    expected = {"taylor": 6, "order": 1, "window": 4, "random": n // 2, "zero": 0}.get(name)
    assert expected is None or max(sizes) == expected
    if name == "edp":                    # a statement about exact numbers
        assert log_determinant("edp", 3 * q[10:], 3 * k[:10]).sign != 0


def test_no_smaller_memory_will_do():
    # checks: prp-hmd-state
    n, a = 20, 10
    P = weights(draw(0, n, 2), draw(1, n, 2), "taylor", causal=True)
    U, s, Vh = torch.linalg.svd(P[a:, :a])
    x = torch.zeros(n, dtype=F64)
    x[:a] = Vh[5]                        # the past that five numbers, the best five, forget
    kept = (U[:, :5] * s[:5]) @ Vh[:5] @ x[:a]
    assert apart((P @ x)[a:], kept) > 1e-4
    assert apart((P @ x)[a:], (U[:, :6] * s[:6]) @ Vh[:6] @ x[:a]) < 1e-13


# ------------------------------------------------------------------------- depth

def first_layer(t, S):
    q, k, v = (x @ draw(i, 4, 4) / 2 for i, x in enumerate((t, S, S)))
    return t + attend(q, k, v, "edp")


def test_the_kernel_of_a_second_layer():
    # checks: prp-depth
    t, S, other = draw(10, 25, 4), draw(11, 6, 4), draw(12, 6, 4)
    W, W_2 = draw(13, 4, 2), draw(14, 4, 2)
    x = first_layer(t, S)
    K = RBF()(x @ W, x @ W)
    assert asymmetry(K) < 1e-14 and torch.linalg.eigvalsh(K).min() > -1e-12
    crossed = RBF()(x @ W, x @ W_2)
    assert asymmetry(crossed) > 0.1 and inertia(crossed, 1e-9).negative > 0
    assert rank(Quadratic()(x @ W, x @ W_2)) == 3
    y = first_layer(t, other)
    assert apart(K, RBF()(y @ W, y @ W)) > 0.1
    # a memory of one token is added to all, whatever the query
    u = draw(15, 1, 4)
    assert apart(first_layer(t, u), t + u @ draw(2, 4, 4) / 2) < 1e-14


def test_attention_of_a_second_layer_depends_on_the_context():
    # checks: prp-depth
    t, A = draw(0, 9, 3), draw(1, 3, 2) @ draw(2, 2, 3)          # of rank 2
    blind = torch.linalg.svd(A.mT).Vh[2]                         # A.mT @ blind = 0
    assert apart(A.mT @ blind, torch.zeros(3, dtype=F64)) < 1e-13

    def second(shift):
        return ((t + shift) @ A @ (t + shift).mT).softmax(-1)

    assert apart(second(blind), second(-2 * blind)) < 1e-12
    assert apart(second(draw(3, 3)), second(0.0)) > 0.1


def test_what_heads_compute_is_not_convex():
    # checks: prp-hmd-not-convex
    t = torch.linspace(-4, 4, 200, dtype=F64)
    q, k, v = t[:, None], torch.tensor([[1.0], [-1.0]], dtype=F64), torch.tensor([[0.7], [-0.7]], dtype=F64)
    assert apart(attend(1.3 * q, 0.4 * k, v, "edp")[:, 0], 0.7 * torch.tanh(1.3 * 0.4 * t)) < 1e-14
    functions = torch.stack([torch.tanh(h * t) for h in range(1, 5)])
    assert torch.linalg.svdvals(functions)[-1] > 1e-2, "they are linearly independent"
    # coefficients of tan, which are those of tanh up to signs, from tan' = 1 + tan^2
    tan = [Fraction(0)]
    for n in range(12):
        square = sum(tan[i] * tan[n - i] for i in range(n + 1))
        tan.append(((n == 0) + square) / (n + 1))
    assert tan[:6] == [0, 1, 0, Fraction(1, 3), 0, Fraction(2, 15)]
    assert all(c > 0 for c in tan[1::2]) and not any(tan[::2])


def test_training_two_layers():
    # checks: prp-hmd-trained
    x, y = torch.tensor([[-1.0], [1.0]], dtype=F64), torch.tensor([-1.0, 2.0], dtype=F64)
    grid, phi = torch.linspace(-2, 2, 41, dtype=F64)[:, None], MultinomialFeatures(4)
    fits = []
    for alpha, beta in ((1.0, 1 / math.tanh(1)), (3.0, 1 / math.tanh(3)), (1.0, 2.0)):
        moved = beta * torch.tanh(alpha * x)
        fit = BanachRegressor(p=1.5, alpha=0.1).fit(phi(moved), y)
        v = torch.as_tensor(fit.coef_)
        iota = norm_gradient(v, 1.5)

        def residual(points, iota=iota):
            A = phi(points).mT
            return apart(A @ torch.linalg.lstsq(A, iota[:, None]).solution, iota[:, None])

        assert residual(moved) < 1e-6
        assert (residual(x) > 1e-3) == (beta == 2.0), "the points are where the first layer has put them"
        fits.append((fit.objective_, phi(beta * torch.tanh(alpha * grid)) @ v))
    assert fits[0][0] == pytest.approx(fits[1][0], rel=1e-9) and fits[0][0] - fits[2][0] > 0.01
    assert apart(fits[0][1], fits[1][1]) > 0.1, "the data do not determine the first layer"
