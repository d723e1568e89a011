"""Attention against its definition written as loops, against torch, and against theory."""

import dataclasses
import itertools
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import kernelbook
from kernelbook import kernels
from kernelbook.attention import NORMALISERS, PATHS, KernelAttention, attend, dispatch, explain, weights
from kernelbook.kernels import EDP, RBF, Constant, Coordinatewise, DirectSum, Linear, Quadratic, TensorProduct

EVERY = [*(kernels.get(name) for name in kernels.available()), RBF(bandwidth=0.8), EDP() + Quadratic(), -Linear(),
         EDP() * RBF(), TensorProduct(EDP(), RBF(), 1), DirectSum(EDP(), RBF(), 1), Linear().exp()]
NONNEGATIVE = [kernel for kernel in EVERY if kernel.normalisable]
FUSED = [EDP(), EDP(scale=0.4), RBF(), RBF(bandwidth=0.8)]
each_path = pytest.mark.parametrize("path", [path for path in PATHS if path != "linear"])   # which serves none of these


def draw(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def f64(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape and got.isfinite().all()
    return ((got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-9)).item() if got.numel() else 0.0


@st.composite
def problems(draw_from, max_n: int = 6):
    """Queries, keys and values whose leading axes broadcast, and a mask of any shape that does."""
    q_batch, k_batch, v_batch = draw_from(st.sampled_from([
        ((), (), ()), ((2,), (2,), (2,)), ((), (), (3,)), ((2, 1), (3,), (1,)), ((2,), (1,), (3, 1)),
        ((2, 2), (2, 2), (2, 2))]))
    sizes = st.integers(1, max_n)
    n, m, d, d_v = draw_from(sizes), draw_from(sizes), draw_from(st.integers(2, 5)), draw_from(st.integers(1, 6))
    q, k, v = draw(draw_from(st.integers(0, 999)), (*q_batch, n, d), (*k_batch, m, d), (*v_batch, m, d_v))
    batch = torch.broadcast_shapes(q_batch, k_batch, v_batch)
    shape = draw_from(st.sampled_from([None, (), (m,), (n, m), (n, 1), (1, m), (*batch, n, m), (*batch, 1, m)]))
    mask = None
    if shape is not None:
        seen = torch.rand(shape, generator=torch.Generator().manual_seed(draw_from(st.integers(0, 99))))
        mask = seen < draw_from(st.sampled_from([0.0, 0.6, 0.9]))
    return q, k, v, mask, draw_from(st.booleans())


def by_loops(q, k, v, kernel, mask, causal, normaliser) -> torch.Tensor:
    """The definition, one query at a time, in NumPy."""
    batch = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v = (x.expand(*batch, *x.shape[-2:]) for x in (q, k, v))
    n, m = q.shape[-2], k.shape[-2]
    mask = torch.tensor(True) if mask is None else mask
    values, see, v = kernel(q, k).numpy(), mask.expand(*batch, n, m).numpy(), v.numpy()
    out = np.zeros((*batch, n, v.shape[-1]))
    for *b, i in np.ndindex(*batch, n):
        b = tuple(b)
        visible = [j for j in range(m) if see[(*b, i, j)] and not (causal and j > i + m - n)]
        row = [values[(*b, i, j)] for j in visible]
        if normaliser == "relu-sum":
            row = [max(x, 0.0) for x in row]
        total = {"abs-sum": sum(map(abs, row)), "count": len(row), "none": 1}.get(normaliser, sum(row))
        for j, x in zip(visible, row, strict=True):
            out[(*b, i)] += x / total * v[(*b, j)] if total else 0
    return torch.from_numpy(out)


# ------------------------------------------------------------------------- every path against the definition

@settings(max_examples=300)
@given(kernel=st.sampled_from(EVERY), problem=problems(), normaliser=st.sampled_from(list(NORMALISERS)))
def test_every_path_is_the_definition(kernel, problem, normaliser):
    q, k, v, mask, causal = problem
    if normaliser == "sum" and not kernel.normalisable:
        normaliser = "abs-sum"
    expected = by_loops(q, k, v, kernel, mask, causal, normaliser)
    options = {"mask": mask, "causal": causal, "normaliser": normaliser}
    refused = explain(q, k, v, kernel, **options).refused
    for path in PATHS:
        if path not in refused:
            assert relative_error(attend(q, k, v, kernel, path=path, **options), expected) < 1e-9, path
    if mask is None or mask.ndim <= 2:      # more axes may be those of the values
        w = weights(q, k, kernel, **options)
        torch.testing.assert_close(w @ v, expected)


# ------------------------------------------------------------------------- every path against the exact one

#: What may be seen of m keys by n queries, in a batch of (2, 3).
SEEN = {
    "all": lambda n, m: {},
    "keys": lambda n, m: {"mask": some(2, 1, 1, m)},
    "pairs": lambda n, m: {"mask": some(n, m)},
    "causal": lambda n, m: {"causal": True},
    "keys, causal": lambda n, m: {"mask": some(2, 1, 1, m), "causal": True},
    "pairs, causal": lambda n, m: {"mask": some(2, 3, n, m), "causal": True},
    "nothing": lambda n, m: {"mask": torch.zeros(n, m, dtype=torch.bool)},
}
SIZES = [(5, 5), (3, 7), (7, 3), (1, 6), (6, 1), (1, 1), (0, 4), (4, 0), (70, 130)]
LONG = (150, 300)       # more than a tile, and than a chunk
MORE = [*(kernels.get(name) for name in ("elu", "positive_features", "fourier_features", "quadrature_features")),
        Coordinatewise("max(q, k) - abs(q)"), Coordinatewise("abs(q - k)", "identity", non_negative=True),
        Coordinatewise("(q - k)**2", "sqrt"), 2.0 * EDP(), RBF() * Constant(2.0), Quadratic() * EDP(),
        (-kernels.L2Squared(scale=0.1)).exp(), (Quadratic(scale=0.1) + Linear()).exp(),
        TensorProduct(Quadratic(), Linear(), 2), DirectSum(Linear(), kernels.L2Squared(), 2),
        Quadratic() + kernels.L2Squared()]


def plain(x):
    return x


def second(x):          # (batch, length, heads, width) in memory, as a module has it
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def spaced(x):
    return torch.stack((x, x + 1), -1).flatten(-2)[..., ::2]


def shared(x):
    return x[:, :1]


def expanded(x):
    return x[:, :1].expand_as(x)


def alone(x):
    return x[0, 0]


#: How queries, keys and values lie in memory, and which of their leading axes are broadcast.
LAYOUTS = [(plain, plain, plain), (second, second, second), (spaced, expanded, plain), (plain, shared, alone),
           (alone, spaced, shared), (shared, expanded, spaced), (plain, plain, shared)]


def points(kernel, n: int, m: int) -> list[torch.Tensor]:
    """Queries, keys and values.  Inner products of finitely many features err by a fraction of the features' norms, not
    of the kernel, so for such kernels the points are such that no row sum is near 0."""
    q, k, v = draw(n + m, (2, 3, n, 4), (2, 3, m, 4), (2, 3, m, 5))
    return [q, k, v] if math.isinf(kernel.feature_dimension(4)) else [q / 2 + 1, k / 2 + 1, v]


def some(*shape: int) -> torch.Tensor:
    """A mask, with a few rows that see nothing."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    seen = torch.rand(shape, generator=generator) < 0.7
    return seen & (torch.rand((*shape[:-1], 1), generator=generator) < 0.85)


def with_gradients(q, k, v, kernel, **options) -> list[torch.Tensor]:
    """The output, and the gradients of a number made of it."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]       # with the strides of q, k and v
    out = attend(*leaves, kernel, **options)
    gradients = torch.autograd.grad((out.square() + out).sum(), leaves, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True))]


def errors(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest error of outputs and gradients, over the largest of their values."""
    largest = max((x.abs().max().item() for x in expected if x.numel()), default=0.0)
    assert [x.shape for x in got] == [x.shape for x in expected] and all(x.isfinite().all() for x in expected)
    error = max(((x - y).abs().max().item() for x, y in zip(got, expected, strict=True) if x.numel()), default=0.0)
    return error / largest if largest else error


def fitting(kernel) -> str:
    """The plainest normaliser of a kernel; by points() the sums of those of finite rank are not near 0."""
    return "sum" if kernel.normalisable else "abs-sum" if math.isinf(kernel.feature_dimension(4)) else "signed-sum"


@pytest.mark.parametrize("kernel", EVERY + MORE, ids=repr)
def test_every_path_is_the_exact_one_forward_and_backward(kernel):
    """Each path, on all that may be seen, sizes and layouts: outputs and all gradients to 1e-12 of the largest value;
    where it refuses, it says so with its name, the reason, and what would serve."""
    layouts = itertools.cycle(LAYOUTS)
    for (what, seen), (n, m) in [*itertools.product(SEEN.items(), SIZES),
                                 ((last := "keys, causal", SEEN[last]), LONG)]:
        problem = [lie(x) for lie, x in zip(next(layouts), points(kernel, n, m), strict=True)]
        options = seen(n, m) | {"normaliser": fitting(kernel)}
        expected, plan = with_gradients(*problem, kernel, path="exact", **options), explain(*problem, kernel, **options)
        for path in ("auto", *PATHS):
            if path in plan.refused:
                with says(f"path '{path}' cannot serve", re.escape(plan.refused[path]), "path='auto'", plan.path):
                    attend(*problem, kernel, path=path, **options)
            elif path != "exact":
                error = errors(with_gradients(*problem, kernel, path=path, **options), expected)
                assert error <= 1e-12, (path, what, n, m, error)


@pytest.mark.parametrize("kernel", EVERY + MORE, ids=repr)
def test_every_path_is_the_exact_one_for_every_normaliser(kernel):
    problem = points(kernel, 6, 9)
    for normaliser, (what, seen) in itertools.product(NORMALISERS, SEEN.items()):
        if normaliser == "sum" and not kernel.normalisable:
            continue
        options = seen(6, 9) | {"normaliser": normaliser}
        expected = with_gradients(*problem, kernel, path="exact", **options)
        for path in set(PATHS) - set(explain(*problem, kernel, **options).refused):
            error = errors(with_gradients(*problem, kernel, path=path, **options), expected)
            assert error <= 1e-12, (path, normaliser, what, error)


# ------------------------------------------------------------------------- precision, and the choice of a path

@each_path
@pytest.mark.parametrize("kernel", ["edp", "rbf"])
def test_single_precision(kernel, path):
    for seed, (n, m, d) in enumerate([(1, 1, 8), (33, 65, 16), (64, 64, 64), (17, 128, 64)]):
        q, k, v = draw(seed, (2, n, d), (2, m, d), (2, m, 24))
        expected = attend(q, k, v, kernel, path="exact")
        assert relative_error(attend(q.float(), k.float(), v.float(), kernel, path=path), expected) < 5e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_rbf_errs_at_most_twice_as_much_as_edp(dtype, autocast):
    """Largest errors over a few draws; of outputs twice, of gradients four times EDP's."""
    worst = {}
    for seed, size, kernel in itertools.product(range(3), (1, 3), ("edp", "rbf")):
        given_in = torch.float32 if autocast else dtype
        half = [x.to(given_in).requires_grad_() for x in draw(seed, *[(2, 64, 64)] * 3)]
        full = [x.detach().double().requires_grad_() for x in half]
        with torch.autocast("cpu", dtype, enabled=autocast):
            got = attend(size * half[0], size * half[1], half[2], kernel, path="fused")
        expected = attend(size * full[0], size * full[1], full[2], kernel, path="exact")
        assert got.dtype == dtype
        pairs = zip((got, *torch.autograd.grad(got.float().square().sum(), half)),
                    (expected, *torch.autograd.grad(expected.square().sum(), full)), strict=True)
        for name, (a, b) in zip(("output", "dq", "dk", "dv"), pairs, strict=True):
            worst[kernel, name] = max(worst.get((kernel, name), 0), relative_error(a, b))
    for name, factor in (("output", 2), ("dq", 4), ("dk", 4), ("dv", 4)):
        assert worst["rbf", name] <= factor * worst["edp", name], worst


def test_long_keys_do_not_overflow_in_half_precision():
    q, k, v = draw(0, (8, 64), (8, 64), (8, 4))
    half = [x.half() for x in (q + 50, k + 50, v)]       # |k|^2/2 is 80,000: more than float16 holds
    assert relative_error(attend(*half, "rbf", path="fused"), attend(*(x.double() for x in half), "rbf")) < 0.02


def test_explain_says_what_attend_does(monkeypatch):
    taken = []
    for name, path in PATHS.items():
        def record(*args, name=name, compute=path.compute, **options):
            taken.append(name)
            return compute(*args, **options)
        monkeypatch.setitem(dispatch.PATHS, name, dataclasses.replace(path, compute=record))
    q, k, v = draw(0, (3, 4), (5, 4), (5, 2))
    for kernel, normaliser, path in itertools.product(EVERY, NORMALISERS, ("auto", *PATHS)):
        options = {"normaliser": normaliser, "path": path}
        may = normaliser != "sum" or kernel.normalisable
        if not may or path in explain(q, k, v, kernel, normaliser=normaliser).refused:
            for call in (attend, explain):
                with pytest.raises(ValueError):
                    call(q, k, v, kernel, **options)
            continue
        plan = explain(q, k, v, kernel, **options)
        taken.clear()
        attend(q, k, v, kernel, **options)
        assert taken == [plan.path] and plan.path not in plan.refused | plan.passed_over
        reasons = plan.refused | plan.passed_over
        assert len(reasons) == len(plan.refused) + len(plan.passed_over)
        assert plan.path in str(plan) and all(f"not {name!r}: {why}" in str(plan) for name, why in reasons.items())
        if path == "auto":          # the first path that has no reason against it
            assert plan.path == next(name for name in PATHS if name not in reasons)
            assert plan.path == ("fused" if type(kernel) in (EDP, RBF) and normaliser not in ("none", "count")
                                 else "exact")


@pytest.mark.parametrize(("kernel", "length", "options", "path"), [
    ("edp", 256, {}, "fused"),
    ("rbf", 2048, {"causal": True}, "fused"),
    (EDP() * RBF(), 256, {"mask": "pairs"}, "fused"),
    (EDP() + RBF(), 2048, {}, "tiled"),
    ("exponentiated_intersection", 512, {"mask": "pairs"}, "tiled"),
    ("exponentiated_intersection", 4, {}, "exact"),
    ("l2", 512, {"dropout": 0.1}, "tiled"),
    (Coordinatewise("abs(q - k)", "identity", non_negative=True), 512, {}, "tiled"),
    ("elu", 2048, {}, "linear"),
    ("elu", 2048, {"mask": "keys", "causal": True}, "linear"),
    ("elu", 2048, {"mask": "pairs"}, "tiled"),
    ("elu", 2048, {"dropout": 0.1}, "tiled"),
    ("l2_squared", 2048, {}, "linear"),
    ("quadratic", 512, {}, "tiled"),            # 2,080 features
    ("quadratic", 16384, {}, "linear"),
    ("rbf", 2048, {"normaliser": "none"}, "tiled"),
])
def test_auto_takes_the_quickest_path(kernel, length, options, path):
    """In single precision, with 8 heads of width 64; nothing is computed."""
    x = torch.empty(8, length, 64)
    shape = {"keys": (1, length), "pairs": (length, length)}.get(options.get("mask"))
    mask = torch.ones(1, 1, dtype=torch.bool).expand(shape) if shape else None
    plan = explain(x, x, x, kernel, **(options | {"mask": mask}))
    assert plan.path == path, plan
    assert all(len(why) > 20 for why in (plan.refused | plan.passed_over).values())


# ------------------------------------------------------------------------- what must hold of any attention

@pytest.mark.parametrize("kernel", EVERY, ids=repr)
@pytest.mark.parametrize("normaliser", list(NORMALISERS))
def test_fully_masked_rows_give_zeros_and_finite_gradients(kernel, normaliser):
    if normaliser == "sum" and not kernel.normalisable:
        return
    q, k, v = (x.requires_grad_() for x in draw(0, (2, 5, 3), (2, 4, 3), (2, 4, 2)))
    mask = torch.ones(5, 4, dtype=torch.bool)
    mask[1] = False
    for path, (options, empty) in itertools.product(PATHS, [({"mask": mask}, [1]), ({"causal": True}, [0]),
                                                            ({"mask": mask, "causal": True}, [0, 1])]):
        if path in explain(q, k, v, kernel, normaliser=normaliser, **options).refused:
            continue
        out = attend(q, k, v, kernel, normaliser=normaliser, path=path, **options)
        assert (out[:, empty] == 0).all() and (out[:, 2:] != 0).any()
        with torch.autograd.set_detect_anomaly(True):       # no NaN on the way either
            for x in torch.autograd.grad(out.sum(), (q, k, v), allow_unused=True):
                assert x is None or x.isfinite().all()


@pytest.mark.parametrize("kernel", NONNEGATIVE, ids=repr)
@given(problem=problems())
def test_weights_of_a_normalisable_kernel_are_means(kernel, problem):
    q, k, _, mask, causal = problem
    mask = None if mask is not None and mask.ndim > 2 else mask
    w = weights(q, k, kernel, mask=mask, causal=causal)
    total = w.sum(-1)
    assert (w >= 0).all() and ((total - 1).abs().minimum(total.abs()) < 1e-12).all()
    if mask is None and not causal:
        torch.testing.assert_close(total, torch.ones_like(total))
    if causal:      # the last query sees the last key, and none sees a key after its own
        n, m = w.shape[-2:]
        assert (w[..., torch.arange(m) > torch.arange(n)[:, None] + m - n] == 0).all()


def test_normalisers_do_what_they_say():
    q, k, v = draw(0, (4, 3), (6, 3), (6, 2))
    values = Linear()(q, k)
    rows = {name: weights(q, k, "linear", normaliser=name) for name in NORMALISERS if name != "sum"}
    torch.testing.assert_close(rows["signed-sum"].sum(-1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(rows["abs-sum"].abs().sum(-1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(rows["relu-sum"].sum(-1), torch.ones(4, dtype=torch.float64))
    assert (rows["relu-sum"] >= 0).all() and torch.equal(rows["relu-sum"] > 0, values > 0)
    torch.testing.assert_close(rows["count"], values / 6)
    for mask in (torch.tensor(True), torch.ones(4, 1, dtype=torch.bool), torch.ones(6, dtype=torch.bool)):
        assert torch.equal(weights(q, k, "linear", normaliser="count", mask=mask), rows["count"])
    assert torch.equal(rows["none"], values)
    opposite = torch.tensor([[1.0], [-1.0]])        # a signed sum of exactly 0
    assert (weights(torch.ones(1, 1), opposite, "linear", normaliser="signed-sum") == 0).all()
    assert (weights(torch.zeros(1, 3), opposite.expand(2, 3), "quadratic") == 0).all()


@pytest.mark.parametrize("kernel", [kernel for kernel in EVERY if not kernel.normalisable], ids=repr)
def test_a_signed_kernel_refuses_row_normalisation(kernel):
    q, k, v = draw(0, (2, 3), (4, 3), (4, 2))
    for call in (lambda: attend(q, k, v, kernel), lambda: weights(q, k, kernel), lambda: explain(q, k, v, kernel),
                 lambda: KernelAttention(6, 2, kernel=kernel)):
        with says("signed", "abs-sum", "relu-sum", "none"):
            call()


@pytest.mark.parametrize("kernel", EVERY, ids=repr)
@given(seed=st.integers(0, 99), order=st.permutations(range(7)))
def test_keys_have_no_order(kernel, seed, order):
    q, k, v = draw(seed, (4, 3), (7, 3), (7, 2))
    out = attend(q, k, v, kernel, normaliser="abs-sum")
    torch.testing.assert_close(attend(q, k[order], v[order], kernel, normaliser="abs-sum"), out)


def test_different_kernels_give_different_outputs():
    q, k, v = draw(0, (4, 3), (7, 3), (7, 2))
    different = [kernel for kernel in EVERY if kernel != Linear().exp()]        # which is EDP
    outputs = {repr(kernel): attend(q, k, v, kernel, normaliser="abs-sum") for kernel in different}
    for (a, x), (b, y) in itertools.combinations(outputs.items(), 2):
        assert (x - y).abs().max() > 1e-3, (a, b)
    torch.testing.assert_close(attend(q, k, v, Linear().exp()), attend(q, k, v))
    torch.testing.assert_close(attend(q, k, v, Constant(3.0)), v.mean(0).expand(4, 2))


@each_path
@pytest.mark.parametrize("n, m", [(2, 5), (5, 2), (4, 4), (1, 6)])
def test_causal_aligns_the_last_query_with_the_last_key(n, m, path):
    q, k, v = draw(0, (n, 3), (m, 3), (m, 2))
    out = attend(q, k, v, "rbf", causal=True, path=path)
    for i in range(n):
        seen = max(0, i + m - n + 1)
        expected = attend(q[i:i + 1], k[:seen], v[:seen], "rbf", path="exact")
        torch.testing.assert_close(out[i:i + 1], expected)


@each_path
def test_empty_sets(path):
    q, k, v = (x.requires_grad_() for x in draw(0, (2, 3, 4), (2, 5, 4), (2, 5, 6)))
    for kernel in FUSED:
        nothing = attend(q, k[:, :0], v[:, :0], kernel, path=path)
        assert nothing.shape == (2, 3, 6) and (nothing == 0).all()
        assert all((x == 0).all() for x in torch.autograd.grad(nothing.sum(), (q, k, v)))
        assert attend(q[:, :0], k, v, kernel, path=path).shape == (2, 0, 6)
        assert attend(q[:0], k[:0], v[:0], kernel, path=path, causal=True).shape == (0, 3, 6)
        assert attend(q, k, v[..., :0], kernel, path=path).shape == (2, 3, 0)


@each_path
@pytest.mark.parametrize("kernel", ["edp", "rbf"])
def test_dropout_keeps_the_mean(kernel, path):
    q, k, v = draw(0, (3, 4), (6, 4), (6, 4))
    expected = attend(q, k, v, kernel)
    torch.manual_seed(0)
    draws = attend(q.expand(4000, 3, 4), k, v, kernel, dropout=0.3, path=path)
    error = draws.std(0) / math.sqrt(4000)
    assert ((draws.mean(0) - expected).abs() < 4 * error).all() and (error > 0).all()
    assert torch.equal(attend(q, k, v, kernel, dropout=0.0, path=path), attend(q, k, v, kernel, path=path))
    one_key = attend(q.expand(4000, 3, 4), k[:1], v[:1], kernel, dropout=0.3, path=path)
    kept = one_key[..., 0] != 0
    assert 0.67 < kept.double().mean() < 0.73
    torch.testing.assert_close(one_key[kept], (v[:1] / 0.7).expand(int(kept.sum()), 4))


def test_gradients_of_attention():
    q, k, v = (x.requires_grad_() for x in draw(0, (3, 4), (5, 4), (5, 2)))
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) < 0.7
    for kernel, path in [*itertools.product(FUSED, ["fused"]), *itertools.product(EVERY, ["exact"])]:
        def call(q, k, v, kernel=kernel, path=path):
            return attend(q, k, v, kernel, mask=mask, normaliser="abs-sum", path=path)
        assert torch.autograd.gradcheck(call, (q, k, v)), (kernel, path)


# ------------------------------------------------------------------------- torch

@each_path
@given(problem=problems(), scale=st.sampled_from([None, 0.3]))
def test_edp_is_torch_attention(path, problem, scale):
    q, k, v, mask, causal = problem
    batch = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    see = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool) if mask is None else mask
    if causal:
        see = see & torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(k.shape[-2] - q.shape[-2])
    see = see.expand(*batch, q.shape[-2], k.shape[-2])
    expected = F.scaled_dot_product_attention(q.expand(*batch, -1, -1), k.expand(*batch, -1, -1),
                                              v.expand(*batch, -1, -1), see, scale=scale)
    expected = expected.masked_fill(~see.any(-1, keepdim=True), 0.0)
    out = attend(q, k, v, EDP(scale=scale), mask=mask, causal=causal, path=path)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


flags = st.booleans()


@settings(max_examples=120)
@given(seed=st.integers(0, 99), batched=flags, batch_first=flags, bias=flags, other_widths=flags, self_attention=flags,
       need_weights=flags, average=flags, training=flags, attn=st.sampled_from([None, "2d", "3d"]), floating=flags,
       padding=flags, causal=flags)
def test_module_is_torch_multihead_attention(seed, batched, batch_first, bias, other_widths, self_attention,
                                             need_weights, average, training, attn, floating, padding, causal):
    b, n, m, heads, width = 3, 4, 5, 2, 6
    kdim, vdim = (5, 7) if other_widths and not self_attention else (None, None)
    made = {"bias": bias, "kdim": kdim, "vdim": vdim, "batch_first": batch_first, "dtype": torch.float64}
    torch.manual_seed(seed)
    theirs = torch.nn.MultiheadAttention(width, heads, **made)
    ours = KernelAttention(width, heads, **made)
    if bias:        # torch's start at 0
        torch.nn.init.normal_(theirs.in_proj_bias), torch.nn.init.normal_(theirs.out_proj.bias)
    ours.load_state_dict(theirs.state_dict())
    ours.train(training), theirs.train(training)

    lead = (lambda length: (length,)) if not batched else (lambda length: (b, length) if batch_first else (length, b))
    m = n if self_attention or causal else m
    query, key, value = draw(seed, (*lead(n), width), (*lead(m), kdim or width), (*lead(m), vdim or width))
    query.requires_grad_()
    inputs = (query,) * 3 if self_attention else (query, key, value)
    generator = torch.Generator().manual_seed(seed)
    hidden_keys, hidden = None, None
    if padding:
        hidden_keys = torch.rand((b, m) if batched else (m,), generator=generator) < 0.3
        hidden_keys[..., 0] = False         # torch makes NaN of a query with nothing to see
    if attn:
        shape = (n, m) if attn == "2d" else (heads * (b if batched else 1), n, m)
        hidden = torch.rand(shape, generator=generator) < 0.3
        hidden[..., 0] = False
    if causal:
        hidden = torch.ones(n, m, dtype=torch.bool).triu(1)
    if floating:
        hidden_keys, hidden = (None if x is None else torch.where(x, -math.inf, 0.0).double()
                               for x in (hidden_keys, hidden))
    options = {"key_padding_mask": hidden_keys, "attn_mask": hidden, "need_weights": need_weights,
               "average_attn_weights": average, "is_causal": causal}
    results = [module(*inputs, **options) for module in (ours, theirs)]
    torch.testing.assert_close(*(out for out, _ in results), rtol=1e-11, atol=1e-11)
    (mine, yours) = (w for _, w in results)
    assert (mine is None) is (yours is None) is (not need_weights)
    if need_weights:
        torch.testing.assert_close(mine, yours, rtol=1e-11, atol=1e-11)
    if causal and not padding:      # without the mask that torch insists on
        out = ours(*inputs, need_weights=need_weights, is_causal=True)[0]
        torch.testing.assert_close(out, results[1][0], rtol=1e-11, atol=1e-11)
    gradients = [torch.autograd.grad(out.square().sum(), (query, *module.parameters()))
                 for module, (out, _) in zip((ours, theirs), results, strict=True)]
    for (name, _), x, y in zip([("query", 0), *ours.named_parameters()], *gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_module_starts_like_torch_s():
    torch.manual_seed(0)
    ours, theirs = (make(256, 4) for make in (KernelAttention, torch.nn.MultiheadAttention))
    for (name, x), (other, y) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other and x.shape == y.shape
        assert x.abs().max().item() == pytest.approx(y.abs().max().item(), rel=0.01)
        assert x.std().item() == pytest.approx(y.std().item(), rel=0.02)


def test_module_takes_torch_s_place_in_its_encoder():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x, = draw(0, (3, 5, 8), dtype=torch.float32)
    hidden = torch.arange(5) >= torch.tensor([[5], [3], [2]])
    state, expected = layer.self_attn.state_dict(), layer(x, src_key_padding_mask=hidden)
    outputs = {}
    for kernel, training in itertools.product(("edp", "rbf"), (True, False)):
        layer.self_attn = KernelAttention(8, 2, batch_first=True, kernel=kernel)
        layer.self_attn.load_state_dict(state)
        with torch.no_grad():
            outputs[kernel, training] = layer.train(training)(x, src_key_padding_mask=hidden)
        torch.testing.assert_close(outputs[kernel, training], outputs[kernel, True])
    seen = ~hidden
    torch.testing.assert_close(outputs["edp", False][seen], expected[seen])
    assert (outputs["rbf", False] - outputs["edp", False])[seen].abs().max() > 1e-3


def test_module_is_attention_between_its_heads():
    for bias in (True, False):
        module = KernelAttention(8, 2, kernel="rbf", batch_first=True, bias=bias)
        x, y = draw(0, (3, 4, 8), (3, 5, 8), dtype=torch.float32)
        for inputs in ((x, x, x), (x, y, y)):
            q, k, v = module.heads(*inputs)
            assert q.shape == (3, 2, 4, 4) and k.shape == v.shape == (3, 2, inputs[1].shape[1], 4)
            merged = attend(q, k, v, "rbf", path="exact").transpose(1, 2).flatten(-2)
            for need_weights in (True, False):
                torch.testing.assert_close(module(*inputs, need_weights=need_weights)[0], module.out_proj(merged))


@settings(max_examples=80)
@given(seed=st.integers(0, 99), tied=flags, width=st.sampled_from([None, 1, 3, 7]), bias=flags, self_attention=flags,
       other_values=flags, batch_first=flags, causal=flags, need_weights=flags,
       kernel=st.sampled_from(["edp", "rbf", "quadratic"]))
def test_module_with_one_matrix_or_another_width_is_the_formula(seed, tied, width, bias, self_attention, other_values,
                                                                batch_first, causal, need_weights, kernel):
    """The first rows are those of queries, then keys unless tied, then values; heads are consecutive rows."""
    vdim = 5 if other_values and not self_attention else None
    torch.manual_seed(seed)
    module = KernelAttention(6, 2, bias=bias, vdim=vdim, batch_first=batch_first, dtype=torch.float64, kernel=kernel,
                             tied=tied, qk_width=width)
    for p in module.parameters():
        torch.nn.init.normal_(p)
    wide, state = 2 * (width or 3), module.state_dict()
    rows = [wide, 6] if tied else [wide, wide, 6]
    if vdim is None:
        ws = list(state["in_proj_weight"].split(rows))
    else:
        ws = [state[name] for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight") if name in state]
    bs = list(state["in_proj_bias"].split(rows)) if bias else [0.0] * len(rows)
    assert [len(w) for w in ws] == rows
    if tied:
        ws, bs = [ws[0], *ws], [bs[0], *bs]

    x, = draw(seed, (2, 4, 6))
    y, z = (x, x) if self_attention else draw(seed + 1, (2, 5, 6), (2, 5, vdim or 6))
    q, k, v = (t @ w.T + b for t, w, b in zip((x, y, z), ws, bs, strict=True))
    heads = [attend(q[..., h * wide // 2:(h + 1) * wide // 2], k[..., h * wide // 2:(h + 1) * wide // 2],
                    v[..., 3 * h:3 * h + 3], kernel, causal=causal, path="exact") for h in range(2)]
    expected = module.out_proj(torch.cat(heads, -1))
    inputs = (x, y, z) if batch_first else tuple(t.transpose(0, 1) for t in (x, y, z))
    inputs = (inputs[0],) * 3 if self_attention else inputs
    out, _ = module(*inputs, is_causal=causal, need_weights=need_weights)
    torch.testing.assert_close(out if batch_first else out.transpose(0, 1), expected)
    module.eval()
    with torch.no_grad():       # the cache, and queries that come after
        cache = module.new_cache()
        module(*inputs, is_causal=causal, need_weights=False, cache=cache)
        if not causal:
            late, _ = module(inputs[0], None, None, need_weights=False, cache=cache)
            torch.testing.assert_close(late if batch_first else late.transpose(0, 1), expected)


@given(seed=st.integers(0, 99))
def test_tied_matrices_make_a_symmetric_kernel_matrix(seed):
    """Of EDP it is positive semidefinite too, whatever the matrix; the weights are not symmetric, being normalised.
    In attention to other points there is one matrix too.  Control: with two matrices neither holds."""
    x, y = draw(seed, (1, 12, 8), (1, 5, 8))
    asymmetry, least = {}, {}
    for tied in (True, False):
        torch.manual_seed(seed)
        module = KernelAttention(8, 2, batch_first=True, dtype=torch.float64, tied=tied)
        q, k, _ = module.heads(x, x, x)
        gram = EDP()(q, k)
        asymmetry[tied] = ((gram - gram.mT).abs().amax((-2, -1)) / gram.abs().amax((-2, -1))).min().item()
        least[tied] = torch.linalg.eigvalsh((gram + gram.mT) / 2).min().item()
        forth, (back, keys, _) = module.heads(x, y, y), module.heads(y, x, x)
        assert torch.equal(EDP()(forth[0], forth[1]), EDP()(back, keys).mT) is tied
        w = weights(q, k)
        assert (w - w.mT).abs().max() > 1e-3
    assert asymmetry[True] == 0 and least[True] > -1e-10
    assert asymmetry[False] > 1e-3 and least[False] < -1e-2


def test_module_draws_its_parameters_in_one_order():
    """The default draws what it always drew, so that runs of earlier records can be made again; other layouts draw from
    the same distribution."""
    torch.manual_seed(0)
    module = KernelAttention(64, 4)
    torch.manual_seed(0)
    torch.nn.Linear(64, 64)
    expected = torch.nn.init.xavier_uniform_(torch.empty(192, 64)), torch.empty(64, 64)
    torch.nn.init.kaiming_uniform_(expected[1], a=5 ** 0.5)
    assert torch.equal(module.in_proj_weight, expected[0]) and torch.equal(module.out_proj.weight, expected[1])
    bound = expected[0].abs().max().item()
    for options in ({"tied": True}, {"qk_width": 4}, {"tied": True, "qk_width": 40}):
        weight = KernelAttention(64, 4, **options).in_proj_weight
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    torch.manual_seed(0)
    module = KernelAttention(64, 4, kdim=10, vdim=20)
    torch.manual_seed(0)
    torch.nn.Linear(64, 64)
    for name, width in (("q", 64), ("k", 10), ("v", 20)):
        drawn = torch.nn.init.xavier_uniform_(torch.empty(64, width))
        assert torch.equal(getattr(module, f"{name}_proj_weight"), drawn)
    narrow = KernelAttention(64, 4, vdim=20, qk_width=2).q_proj_weight
    assert narrow.abs().max().item() == pytest.approx((6 / 128) ** 0.5, rel=0.01)


def test_module_dropout_and_empty_rows():
    x, = draw(0, (4, 2, 8), dtype=torch.float32)
    for need_weights in (True, False):
        module = KernelAttention(8, 2, dropout=0.5, kernel="rbf")
        first, second = (module(x, x, x, need_weights=need_weights)[0] for _ in range(2))
        assert not torch.equal(first, second)
        module.eval()
        hidden = torch.tensor([[True] * 4, [False] * 4])
        out, _ = module(x, x, x, key_padding_mask=hidden, need_weights=need_weights)
        torch.testing.assert_close(out[:, 0], module.out_proj.bias.expand(4, 8))
        torch.testing.assert_close(out[:, 1], module(x[:, 1], x[:, 1], x[:, 1])[0])
    assert "RBF" in repr(module)


@pytest.mark.parametrize(("kernel", "path"), [("rbf", "auto"), ("taylor", "auto"), ("elu", "linear"),
                                             ("exponentiated_intersection", "tiled")])
def test_attention_compiles_whole(kernel, path):
    """In one graph, and again where lengths and widths have become symbols (from the second shape on)."""
    torch._dynamo.reset()
    kernel, compiled = kernels.get(kernel), torch.compile(attend, backend="eager", fullgraph=True)
    for shape in ((2, 5, 4), (2, 6, 4), (2, 9, 4), (2, 7, 3)):
        qkv = [x.requires_grad_() for x in draw(0, *[shape] * 3)]
        outputs = [function(*qkv, kernel, causal=True, path=path) for function in (compiled, attend)]
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), qkv) for out in outputs))


# ------------------------------------------------------------------------- theory, part 1C

def test_gauge_corollaries():
    """E4.1: which different kernels attend alike."""
    q, k = draw(0, (6, 3), (8, 3))
    root, norms = math.sqrt(3), k.square().sum(-1)
    rbf = weights(q, k, "rbf")
    torch.testing.assert_close(rbf, (q @ k.T / root - norms / (2 * root)).softmax(-1), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(rbf, (-torch.cdist(q, k) ** 2 / (2 * root)).softmax(-1), rtol=1e-12, atol=1e-13)
    assert (rbf - weights(q, k, "edp")).abs().max() > 0.05, "the bias of the keys matters"
    sphere = F.normalize(k, dim=-1)
    torch.testing.assert_close(weights(q, sphere, "rbf"), weights(q, sphere, "edp"), rtol=1e-13, atol=1e-13)
    laplace = k.sum(-1) / (2 * root) - torch.cdist(q, k, p=1) / (2 * root)
    torch.testing.assert_close(weights(q, k, "exponentiated_intersection"), laplace.softmax(-1))


def test_hull_theorem():
    """E4.2: a key in the hull of others is never selected by EDP; by RBF it is."""
    theta = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    keys, = draw(0, (3, 2))
    keys = torch.cat((keys, theta[None] @ keys))
    best = torch.linalg.solve(keys[:2] - keys[2], (theta[:2] / theta[2]).log())      # where kappa(q, k_m) ~ theta_m
    assert weights(best[None], keys, EDP(scale=1.0))[0, 3].item() == pytest.approx(0.263151380158, abs=1e-9)
    queries, = draw(1, (5000, 2))
    assert weights(4 * queries, keys, EDP(scale=1.0))[:, 3].max() <= 0.263151380159
    assert weights(keys[3:], keys, RBF(bandwidth=0.01))[0, 3] > 0.999


def test_signed_weights():
    """E4.3: weights that sum to 1 and yet carry the output far outside the values."""
    q, k, v = f64([1, 0]), f64([1, 0], [-0.9, 0]), f64([0], [1])
    w = weights(q, k, "linear", normaliser="signed-sum")
    torch.testing.assert_close(w, f64([10, -9]), rtol=1e-12, atol=0)
    assert w.abs().sum().item() == pytest.approx(19, rel=1e-12)
    assert attend(q, k, v, "linear", normaliser="signed-sum").item() == pytest.approx(-9, rel=1e-12)
    near, far = weights(q, f64([1.1, 0], [5, 0]), -kernels.L2Squared(), normaliser="signed-sum")[0]
    assert 0 < near < far
    p, keys = draw(0, (4, 3), (6, 3))
    assert torch.equal(weights(p, keys, "quadratic"), weights(-p, keys, "quadratic"))


def test_smoother():
    """E4.4 to E4.6: a local mean, a real spectrum on shared points, blind to how often the context is repeated."""
    q, k, v = draw(0, (6, 3), (8, 3), (8, 2))
    for name in ("edp", "rbf", "taylor"):
        kernel, out = kernels.get(name), attend(q, k, v, name)
        gradient = (kernel(q, k)[..., None] * (out[:, None] - v)).sum(1)    # of sum_j kappa_j |v_j - m|^2 / 2 at out
        assert gradient.abs().max() < 1e-11 * kernel(q, k).max()
        assert (out >= v.amin(0)).all() and (out <= v.amax(0)).all()
        torch.testing.assert_close(attend(q, k, 3 * v + 1, name), 3 * out + 1)
        torch.testing.assert_close(attend(q, k.repeat(2, 1), v.repeat(2, 1), name), out)
        spectrum = torch.linalg.eigvals(weights(q, q, name))
        assert spectrum.imag.abs().max() < 1e-12 and spectrum.real.min() > -1e-12
        assert spectrum.real.max().item() == pytest.approx(1)
    once = attend(q, k, v, "edp", normaliser="none")
    torch.testing.assert_close(attend(q, k.repeat(2, 1), v.repeat(2, 1), "edp", normaliser="none"), 2 * once)


def test_perturbed_logits():
    """E4.7: logits that move by at most 0.3 move the weights by at most tanh(0.15) in total variation, and may."""
    one = torch.ones(1, 1, dtype=torch.float64)
    logits, moves = draw(0, (500, 6), (500, 6))
    a, b = (weights(one, x[..., None], EDP(scale=1.0))[:, 0] for x in (logits, logits + 0.3 * moves.sign()))
    bound = math.tanh(0.15)
    assert 0.1 < ((a - b).abs().sum(-1) / 2).max() <= bound
    a, b = (weights(one, f64([x], [-x]), EDP(scale=1.0)) for x in (0.15, -0.15))
    assert ((a - b).abs().sum() / 2).item() == pytest.approx(bound, rel=1e-12) == pytest.approx(0.148885033623)


# ------------------------------------------------------------------------- bad input

def says(*words: str, error=(TypeError, ValueError)):
    return pytest.raises(error, match="(?s)" + "".join(f"(?=.*{word})" for word in words))


Q, K, V = torch.ones(3, 4), torch.ones(5, 4), torch.ones(5, 2)
BAD_CALLS = [
    ({"kernel": "gauss"}, [*kernels.available()]),
    ({"kernel": "rfb"}, ["did you mean 'rbf'"]),
    ({"kernel": RBF}, ["class RBF"]),
    ({"normaliser": "softmax"}, ["softmax", *NORMALISERS]),
    ({"q": torch.ones(4)}, ["q must have shape", r"\(4,\)"]),
    ({"q": torch.ones(3, 3)}, ["width d", r"\(3, 3\)", r"\(5, 4\)"]),
    ({"q": Q.double()}, ["float64", "float32"]),
    ({"q": Q.int()}, ["q must hold floating", r"q\.float\(\)"]),
    ({"q": Q.to("meta")}, ["meta", "cpu"]),
    ({"k": K.numpy()}, ["k must be a torch.Tensor", "ndarray"]),
    ({"mask": torch.ones(3, 5)}, ["boolean", "float32", "mask == 0"]),
    ({"mask": [[True] * 5] * 3}, ["boolean tensor", "list"]),
    ({"mask": torch.ones(5, 3, dtype=torch.bool)}, ["broadcast", r"\(5, 3\)", r"\(3, 5\)"]),
    ({"mask": torch.ones(2, 3, 5, dtype=torch.bool)}, ["broadcast", r"\(2, 3, 5\)"]),
    ({"mask": torch.ones(3, 5, dtype=torch.bool, device="meta")}, ["mask", "meta", "cpu"]),
]
BAD_VALUES = [
    ({"v": torch.ones(4, 2)}, ["v must have a row for each key", r"\(4, 2\)"]),
    ({"v": torch.ones(5)}, ["v must be a tensor of shape", r"\(5,\)"]),
    ({"v": V.numpy()}, ["v must be a tensor", "ndarray"]),
    ({"v": V.double()}, ["v must have the dtype", "float64"]),
    ({"v": V.to("meta")}, ["v must have", "meta"]),
    ({"q": Q.expand(2, 3, 4), "v": V.expand(3, 5, 2)}, ["leading axes", r"\(2, 3, 4\)", r"\(3, 5, 2\)"]),
    ({"dropout": 1.0}, ["dropout", "below 1"]),
    ({"dropout": -0.1}, ["dropout", "-0.1"]),
    ({"dropout": math.nan}, ["dropout", "nan"]),
    ({"path": "flash"}, ["flash", "auto", *PATHS]),
    ({"path": "fused", "kernel": "l2"}, ["fused", "L2", "exact"]),
    ({"path": "fused", "normaliser": "count"}, ["fused", "count"]),
    ({"path": "fused", "kernel": EDP() + RBF()}, ["fused", "softmax"]),
]


@pytest.mark.parametrize("change, words", BAD_CALLS + BAD_VALUES, ids=lambda x: str(list(x))[:60])
def test_bad_input_is_named(change, words):
    call = {"q": Q, "k": K, "v": V} | change
    for function in (attend, explain):
        with says(*words):
            function(**call)
    if any(change is other for other, _ in BAD_CALLS):
        call.pop("v")
        with says(*words):
            weights(**call)


X = torch.ones(4, 3, 8)         # (length, batch, width)


@pytest.mark.parametrize("call, words", [
    (lambda: KernelAttention(8, 3), ["num_heads", "divide", "8"]),
    (lambda: KernelAttention(8, 2, add_zero_attn=True), ["add_zero_attn"]),
    (lambda: KernelAttention(8, 2, kernel="linear"), ["abs-sum"]),
    (lambda: KernelAttention(8, 2, normaliser="softmax"), ["softmax", "signed-sum"]),
    (lambda: KernelAttention(8, 2, path="flash"), ["flash", "fused"]),
    (lambda: KernelAttention(8, 2, kernel="l2", path="fused"), ["L2"]),
    (lambda: KernelAttention(8, 2, dropout=1.5), ["dropout", "1.5"]),
    (lambda: KernelAttention(8, 2, qk_width=0), ["qk_width", "at least 1"]),
    (lambda: KernelAttention(8, 2, kdim=6, tied=True), ["embed_dim is 8", "kdim is 6"]),
    (lambda: KernelAttention(8, 2, kernel=TensorProduct(EDP(), RBF(), 3), path="fused", qk_width=3), ["width", "3"]),
    (lambda: KernelAttention(8, 2)(X, X, X[:2]), ["one length", r"\(2, 3, 8\)", "batch_first"]),
    (lambda: KernelAttention(8, 2)(X, X[:, :1], X[:, :1]), ["one batch", r"\(4, 1, 8\)"]),
    (lambda: KernelAttention(8, 2)(X[..., :6], X, X), ["widths", "8", "6"]),
    (lambda: KernelAttention(8, 2)(X[0], X, X), ["axes", "2, 3 and 3"]),
    (lambda: KernelAttention(8, 2)(X, X, X, attn_mask=torch.ones(4, 3, dtype=torch.bool)), ["attn_mask", r"\(4, 3\)"]),
    (lambda: KernelAttention(8, 2)(X, X, X, attn_mask=torch.ones(4, 4)), ["attn_mask", "bias"]),
    (lambda: KernelAttention(8, 2)(X, X, X, attn_mask=torch.ones(4, 4).long()), ["attn_mask", "boolean", "int64"]),
    (lambda: KernelAttention(8, 2)(X, X, X, key_padding_mask=torch.ones(4, 3, dtype=torch.bool)),
     ["key_padding_mask", r"\(3, 4\)", r"\(4, 3\)"]),
])
def test_bad_input_of_the_module_is_named(call, words):
    with says(*words):
        call()


def test_debug_mode_finds_what_is_not_finite():
    good = {"q": Q, "k": K, "v": V}
    x = torch.ones(4, 3, 8)
    module = KernelAttention(8, 2)
    for name, value in itertools.product(good, (math.nan, math.inf)):
        bad = good | {name: good[name].clone()}
        bad[name][2, 1] = value
        attend(**bad)                       # off by default
        with kernelbook.debug(), says(rf"{name} .*holds 1 ", r"\(2, 1\)", str(value), error=FloatingPointError):
            attend(**bad)
    for i, need_weights in itertools.product(range(3), (True, False)):
        inputs = [x.clone() for _ in range(3)]
        inputs[i][1, 2, 3] = math.nan
        module(*inputs, need_weights=need_weights)
        with kernelbook.debug(), says(("query", "key", "value")[i], r"\(1, 2, 3\)", error=FloatingPointError):
            module(*inputs, need_weights=need_weights)
    with kernelbook.debug():
        attend(**good)
        with kernelbook.debug(False):
            attend(**bad)
    with kernelbook.debug(), says("k ", error=FloatingPointError):
        weights(Q, K * math.nan)


def test_debug_mode_from_the_environment():
    code = "import torch, kernelbook; x = torch.ones(2, 2) * float('nan'); kernelbook.attend(x, x, x)"
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"KERNELBOOK_DEBUG": "1"},
                         capture_output=True, text=True, check=False)
    assert run.returncode != 0 and "FloatingPointError: q (2, 2) holds 4" in run.stderr
