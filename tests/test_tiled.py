"""The tiled path against the definition, in tiles so small that there are many; its memory, dropout and compilation."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import EVERY, draw, problems
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernelbook import kernels
from kernelbook.attention import NORMALISERS, attend, compiling, explain, tiled
from kernelbook.attention.call import Call
from kernelbook.attention.definition import exact
from kernelbook.kernels import (
    EDP,
    L2,
    RBF,
    Coordinatewise,
    Cosine,
    Exponential,
    ExponentiatedIntersection,
    Intersection,
    L2Squared,
    Polynomial,
    Quadratic,
    Taylor,
)

RULES = [Coordinatewise("-abs(q - k)"), Coordinatewise("(q - k)**2", link="sqrt"),
         Coordinatewise("tanh(q*k) + max(q, k)", link="identity")]
MANY = [*EVERY, *RULES, kernels.get("elu"), Exponential(-L2()), Exponential(-0.5 * L2Squared()), 2 * Quadratic(),
        Polynomial(degree=5, offset=0.3), Taylor(degree=0), Taylor(degree=4).exp(), Cosine().exp(), 3 * EDP(),
        Exponential(2 * Quadratic()), Exponential(-1 * Intersection()),
        Exponential(ExponentiatedIntersection(scale=0.1))]


def small_tiles(patch, size: int) -> None:
    for tile in (tiled._Products, tiled._Coordinates):
        patch.setattr(tile, "tile", size)
    patch.setattr(tiled, "DEFINITION_TILE", 3 * size)


def with_gradients(function, qkv, kernel, **options):
    out = function(*qkv, kernel, **options)
    gradients = torch.autograd.grad(out.square().sum() + out.sum(), qkv, allow_unused=True)
    return out, *(torch.zeros_like(x) if g is None else g for x, g in zip(qkv, gradients, strict=True))


def error(got, expected) -> float:
    """The largest error of any of the tensors, over the largest value of all."""
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.isfinite().all()
    scale = max(x.abs().max().item() for x in expected if x.numel())
    worst = max((a.double() - b).abs().max().item() for a, b in zip(got, expected, strict=True) if a.numel())
    return worst / scale if scale else worst


# ------------------------------------------------------------------------- the definition

@pytest.mark.parametrize("size", [1, 12, 40, 10 ** 6])
@settings(max_examples=150)
@given(kernel=st.sampled_from(MANY), problem=problems(max_n=9), normaliser=st.sampled_from(list(NORMALISERS)),
       ties=st.booleans())
def test_tiles_are_the_definition_forward_and_backward(size, kernel, problem, normaliser, ties):
    *qkv, mask, causal = problem
    if ties:        # coordinates and points that are equal, where rules have corners
        qkv[:2] = [x.round() for x in qkv[:2]]
    if normaliser == "sum" and not kernel.normalisable:
        normaliser = "abs-sum"
    qkv = [x.requires_grad_() for x in qkv]
    options = {"mask": mask, "causal": causal, "normaliser": normaliser}
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch, size)
        got = with_gradients(tiled.tiled, qkv, kernel, **options)
    assert error(got, with_gradients(exact, qkv, kernel, **options)) <= 1e-12


def test_ties_share_their_gradient_as_in_torch_minimum():
    q, k, v = (torch.tensor([x], dtype=torch.float64).mT.requires_grad_() for x in ([1.0], [1.0, 2.0], [1.0, 0.0]))
    out = attend(q, k, v, Intersection(scale=1.0), normaliser="none", path="tiled")
    dq, dk = torch.autograd.grad(out, (q, k))
    assert dq.tolist() == [[0.5]] and dk.tolist() == [[0.5], [0.0]]


@pytest.mark.parametrize("kernel", [EDP(), RBF(), ExponentiatedIntersection(), L2(), L2Squared(), Quadratic(), RULES[0],
                                    EDP() + Quadratic()], ids=repr)
def test_gradients_by_differences(kernel, monkeypatch):
    small_tiles(monkeypatch, 12)
    mask = torch.tensor([True, True, False, True, True])
    qkv = [x.requires_grad_() for x in draw(0, (2, 4, 3), (2, 5, 3), (5, 2))]
    assert torch.autograd.gradcheck(lambda *x: attend(*x, kernel, mask=mask, causal=True, path="tiled"), qkv)


@pytest.mark.parametrize("kernel", [EDP(), ExponentiatedIntersection(), Quadratic(), L2(), EDP() + Quadratic()],
                         ids=repr)
def test_empty_sets_and_inputs_that_are_not_contiguous(kernel, monkeypatch):
    small_tiles(monkeypatch, 12)
    q, k, v = draw(0, (3, 7, 2, 4), (3, 9, 2, 4), (1, 9, 2, 5))
    qkv = [x.transpose(1, 2)[..., ::2].requires_grad_() for x in (q, k, v)]
    assert error(*(with_gradients(f, qkv, kernel) for f in (tiled.tiled, exact))) <= 1e-12
    q, k, v = qkv
    for few, keys, values in ((q[..., :0, :], k, v), (q, k[..., :0, :], v[..., :0, :]), (q[:0], k[:0], v),
                              (q, k, v[..., :0])):
        for causal in (False, True):
            got = with_gradients(tiled.tiled, (few, keys, values), kernel, causal=causal)
            assert got[0].shape == (*few.shape[:-1], values.shape[-1]) and all((x == 0).all() for x in got)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 5e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kernel", [EDP(), RBF(), ExponentiatedIntersection(), L2(), Quadratic(), RULES[0]], ids=repr)
def test_other_precisions(kernel, dtype, bound, monkeypatch):
    small_tiles(monkeypatch, 500)
    qkv = [x.requires_grad_() for x in draw(1, (2, 33, 16), (2, 40, 16), (2, 40, 8), dtype=dtype)]
    wide = [x.detach().double().requires_grad_() for x in qkv]
    got, expected = (with_gradients(f, x, kernel) for f, x in ((tiled.tiled, qkv), (exact, wide)))
    assert {x.dtype for x in got} == {dtype} and error(got, expected) < bound


def test_autocast_gives_the_dtype_that_the_definition_gives():
    q, k, v = draw(0, (5, 4), (6, 4), (6, 3), dtype=torch.float32)
    for kernel in (EDP(), RBF(), ExponentiatedIntersection(), EDP() + Quadratic()):
        with torch.autocast("cpu", torch.bfloat16):
            out = attend(q, k, v, kernel, path="tiled")
        assert out.dtype is torch.bfloat16
        assert error([out], [attend(q.double(), k.double(), v.double(), kernel)]) < 0.02


def test_second_derivatives_are_refused_rather_than_wrong():
    q, k, v = (x.requires_grad_() for x in draw(0, (3, 4), (5, 4), (5, 2)))
    first, = torch.autograd.grad(attend(q, k, v, "quadratic", path="tiled").sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives.*exact"):
        first.sum().backward()

    def loss(k, path):
        return attend(q.detach(), k, v.detach(), "quadratic", path=path).square().sum()

    a, b = (torch.func.grad(loss)(k.detach(), path) for path in ("tiled", "exact"))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------- dropout

@pytest.mark.parametrize("kernel", [EDP(), RBF(), ExponentiatedIntersection(), Quadratic(), EDP() + Quadratic()],
                         ids=repr)
def test_dropout_is_drawn_again_for_the_gradient(kernel, monkeypatch):
    """The same mask in both passes: else differences would not give the gradient."""
    small_tiles(monkeypatch, 12)
    qkv = [x.requires_grad_() for x in draw(0, (2, 4, 3), (2, 5, 3), (2, 5, 2))]

    def call(*qkv):
        torch.manual_seed(3)
        return attend(*qkv, kernel, causal=True, dropout=0.4, path="tiled")

    assert torch.autograd.gradcheck(call, qkv)
    assert torch.equal(call(*qkv), call(*qkv))
    assert not torch.equal(call(*qkv), attend(*qkv, kernel, causal=True, dropout=0.4, path="tiled"))


def test_dropout_drops_single_weights_and_keeps_their_mean(monkeypatch):
    small_tiles(monkeypatch, 64)
    q, k, v = torch.zeros(50, 20, 1), torch.zeros(50, 30, 1), torch.eye(30)     # weights 1/30, seen one by one
    torch.manual_seed(0)
    w = 30 * attend(q, k, v, "exponentiated_intersection", dropout=0.3, path="tiled")
    assert ((w == 0) | ((w - 1 / 0.7).abs() < 1e-5)).all()
    kept = (w != 0).double()
    error = math.sqrt(0.3 * 0.7 / w.numel())
    assert abs(kept.mean() - 0.7) < 4 * error
    for axis in (0, 1, 2):      # no two slices share a pattern
        a, b = kept.movedim(axis, 0)[:-1] - 0.7, kept.movedim(axis, 0)[1:] - 0.7
        assert abs((a * b).mean()) < 4 * 0.21 / math.sqrt(a.numel())


# ------------------------------------------------------------------------- memory and arithmetic

class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation makes, and how many all of them make together."""

    largest = total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given, made = ([x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)] for tree in ((args, kwargs), out))
        old = {x.untyped_storage()._cdata for x in given}
        for x in made:
            if x.untyped_storage()._cdata not in old:       # neither a view nor changed in place
                self.largest, self.total = max(self.largest, x.numel()), self.total + x.numel()
        return out


@pytest.mark.parametrize("kernel, dropout", [(EDP(), 0.0), (EDP(), 0.1), (RBF(), 0.1),
                                             (ExponentiatedIntersection(), 0.0), (L2(), 0.0), (Quadratic(), 0.0),
                                             (EDP() + Quadratic(), 0.0)], ids=repr)
def test_no_array_of_all_pairs_is_made(kernel, dropout, monkeypatch):
    n, heads, d = 300, 3, 4
    small_tiles(monkeypatch, 2 ** 12)
    keys = torch.ones(n, dtype=torch.bool)
    pairs = torch.ones(n, n, dtype=torch.bool).tril()
    most = {}
    for name, mask, causal in (("none", None, False), ("keys", keys, False), ("causal", None, True),
                               ("pairs", pairs, False)):
        qkv = [x.requires_grad_() for x in draw(0, *[(heads, n, d)] * 3, dtype=torch.float32)]
        with Largest() as mode:
            attend(*qkv, kernel, mask=mask, causal=causal, dropout=dropout, path="tiled").sum().backward()
        most[name] = mode.largest
        if name == "none":
            whole = mode.total
        if name == "causal":
            assert mode.total < 0.75 * whole, "hidden keys are skipped"
    assert max(most.values()) <= 3 * 2 ** 12 < n * n, most
    with Largest() as mode:
        attend(*qkv, kernel, path="exact")
    assert mode.largest >= heads * n * n


def test_weights_are_kept_where_they_are_few(monkeypatch):
    """Up to four keys for each coordinate, the gradient takes the weights from the forward pass."""
    small_tiles(monkeypatch, 40)
    made = []
    values = tiled._Coordinates.values
    monkeypatch.setattr(tiled._Coordinates, "values", lambda *args: made.append(1) or values(*args))
    mask = torch.ones(2, 1, 12, dtype=torch.bool)
    mask[0, :, 3:], mask[1] = False, False
    for m, times in ((12, 1), (13, 2)):
        for causal, dropout in ((False, 0.0), (True, 0.0), (False, 0.3)):
            qkv = [x.round().requires_grad_() for x in draw(0, (2, 9, 3), (2, m, 3), (2, m, 2))]
            see = torch.nn.functional.pad(mask, (0, m - 12))
            made.clear()
            out = tiled.tiled(*qkv, ExponentiatedIntersection(), mask=see, causal=causal, dropout=dropout)
            forward = len(made)
            got = out, *torch.autograd.grad(out.square().sum() + out.sum(), qkv)
            assert len(made) == times * forward > 0
            if not dropout:
                expected = with_gradients(exact, qkv, ExponentiatedIntersection(), mask=see, causal=causal)
                assert error(got, expected) <= 1e-12
    call = Call(ExponentiatedIntersection(), n=9, m=12, d=3, gradient=True)
    assert "kept for the backward pass" in tiled.does(call)
    for other in ({"gradient": False}, {"m": 13}, {"normaliser": "none"}):
        assert "made anew in the backward pass" in tiled.does(dataclasses.replace(call, **other))


def test_masks_of_few_problems_are_not_copied_for_many(monkeypatch):
    small_tiles(monkeypatch, 2 ** 12)
    q, k, v = draw(0, *[(2, 5, 100, 4)] * 3)
    mask = torch.rand(2, 1, 100, 100, generator=torch.Generator().manual_seed(0)) < 0.5
    with Largest() as mode:
        out = attend(q, k, v, "exponentiated_intersection", mask=mask, path="tiled")
    assert mode.largest <= 2 ** 12
    torch.testing.assert_close(out, attend(q, k, v, "exponentiated_intersection", mask=mask, path="exact"))


# ------------------------------------------------------------------------- the choice

def test_auto_takes_tiles_where_the_array_would_be_large():
    def choice(kernel, n, d=64, batch=8, **options) -> str | None:
        return tiled.drawback(Call(kernels.get(kernel), n=n, m=n, d=d, d_v=d, batch=batch, **options))

    for kernel in ("edp", "exponentiated_intersection", "l2", "quadratic", EDP() + Quadratic()):
        assert choice(kernel, 2048) is None
        assert "small" in choice(kernel, 16, 16, 8, gradient=True), "2**16 differences stay with the definition"
    assert choice("exponentiated_intersection", 64, gradient=True) is None
    assert "small" in choice("exponentiated_intersection", 64)
    assert "small" in choice("l2", 64, gradient=True), "whose definition makes no array of differences"
    assert "small" in choice("positive_features", 128, 32, 128), "each tile would make the features of all keys again"
    assert choice("positive_features", 4096) is None
    assert tiled.refusal(Call(EDP())) is None
    large = [torch.zeros(8, 1024, 16)] * 3
    assert explain(*large, "exponentiated_intersection").path == "tiled"
    assert explain(*large, "edp", dropout=0.1).path == "tiled"


def test_does_names_the_tile():
    for kernel, normaliser, words in (("edp", "sum", "matrix products"), ("edp", "none", "matrix products"),
                                      ("rbf", "sum", "matrix products"), ("rbf", "none", "coordinates"),
                                      ("exponentiated_intersection", "sum", "a loop over the coordinates"),
                                      (L2(), "sum", "coordinates"), (Quadratic(), "sum", "matrix products"),
                                      (EDP() + Quadratic(), "sum", "the definition row by row")):
        assert words in tiled.does(Call(kernels.get(kernel), normaliser, d=4))


# ------------------------------------------------------------------------- compilation

def has_compiler() -> bool:
    try:
        tiled._check_compiler()
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler: compiled tiles are not tested")
def test_compiled_tiles_are_the_definition_and_compile_once():
    from torch._dynamo.utils import counters

    compiled = tiled._compiled_values.cache_info().misses, tiled._compiled_gradient.cache_info().misses
    before = counters["stats"]["unique_graphs"]
    with compiling():
        assert "compiled" in tiled.does(Call(ExponentiatedIntersection(), d=4))
        for seed, (batch, n, m, d, causal) in enumerate([(3, 21, 37, 12, False), (5, 50, 40, 8, True),
                                                         (2, 64, 64, 16, True)]):
            q, k, v = draw(seed, (batch, n, d), (batch, m, d), (batch, m, 5))
            qkv = [x.requires_grad_() for x in (q.mul(2).round(), k.mul(2).round(), v)]     # with ties
            got, expected = (with_gradients(f, qkv, ExponentiatedIntersection(), causal=causal)
                             for f in (tiled.tiled, exact))
            assert error(got, expected) <= 1e-12
    misses = tiled._compiled_values.cache_info().misses, tiled._compiled_gradient.cache_info().misses
    assert [b - a for a, b in zip(compiled, misses, strict=True)] == [1, 1]
    assert counters["stats"]["unique_graphs"] - before == 2, "once for all shapes"


def test_compiling_is_a_switch_and_a_context():
    if not has_compiler():
        pytest.skip("no C++ compiler")
    on = tiled._COMPILING.get
    with compiling():
        assert on()
        with compiling(False):
            assert not on()
        assert on()
    assert not on()
    compiling()
    assert on()
    compiling(False)
    assert not on()


def test_compiling_without_a_compiler_says_what_to_do(monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(RuntimeError, match="(?s)C\\+\\+ compiler.*install.*CXX"):
        compiling()
    assert not tiled._COMPILING.get()


def test_kernels_with_tensors_of_their_own_keep_their_gradients():
    """A reader's kernel may learn; its tiles are the definition's, so autograd sees its parameters."""
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    class Learned(kernels.Kernel):
        exponential, range = True, kernels.POSITIVE

        def log_gram(self, q, k):
            return -rate * (q[..., :, None, :] - k[..., None, :, :]).abs().sum(-1)

        def gram(self, q, k):
            return self.log_gram(q, k).exp()

    q, k, v = draw(0, (2, 9, 3), (2, 8, 3), (2, 8, 2))
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch, 12)
        slopes = [torch.autograd.grad(attend(q, k, v, Learned(), path=path).square().sum(), rate)[0]
                  for path in ("tiled", "exact")]
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=0)
