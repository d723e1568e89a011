"""Softmax forms against their kernels, and the fused path, with its own backward pass, against the definition."""

import itertools
import math
import warnings
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kernelbook import kernels
from kernelbook.attention import KernelAttention, attend, explain, flex, fused, reductions
from kernelbook.attention.call import Call
from kernelbook.attention.definition import exact
from kernelbook.attention.reductions import SoftmaxForm, has_softmax_form, softmax_form
from kernelbook.kernels import (
    EDP,
    RBF,
    Constant,
    Cosine,
    DirectSum,
    Kernel,
    L2Squared,
    Linear,
    Polynomial,
    Quadratic,
    Taylor,
    TensorProduct,
)

FORMS = [
    EDP(), EDP(scale=0.3), RBF(), RBF(bandwidth=0.7), Constant(2.0), 3 * RBF(), Cosine().exp(), Linear().exp(),
    Linear(scale=0.4).exp(), EDP() * RBF(), EDP() * Cosine().exp(), TensorProduct(EDP(), RBF(bandwidth=0.9), 2),
    TensorProduct(Linear().exp() * RBF(), 0.5 * Cosine().exp(), 3) * RBF(), (-L2Squared()).exp(),
    L2Squared(scale=0.05).exp(), (-Linear()).exp(), (Linear() + Cosine()).exp(), (Linear() + -Linear()).exp() * RBF(),
    DirectSum(Linear(), -2 * L2Squared(), 2).exp(), (Linear() + 3).exp(), Constant(-1.0).exp(),
    Quadratic(scale=0.2).exp(), Polynomial(degree=1, offset=0.5).exp(), (Taylor(degree=1) + -L2Squared()).exp(),
]
NO_FORMS = [
    (EDP() + RBF(), "sum"), (DirectSum(EDP(), RBF(), 2), "sum"), (Quadratic(), "logarithm.*FlexAttention"),
    (Polynomial(degree=4), "logarithm.*FlexAttention"), (Taylor(), "Taylor"), (Cosine(), "Cosine"),
    (kernels.get("exponentiated_intersection"), "ExponentiatedIntersection"), (kernels.L2().exp(), "L2"),
    (EDP() * Quadratic(), "Quadratic"), (TensorProduct(RBF() + EDP(), EDP(), 2), "RBF"), (-EDP(), "EDP"),
    (EDP().exp(), "EDP"), (Taylor(degree=4).exp(), "width 4.*too many"),
    (Polynomial(degree=2, offset=-1.0).exp(), "unknown"),
]
BIASED = [RBF(), EDP() * RBF(bandwidth=0.8), TensorProduct(EDP(), RBF(), 2), L2Squared(scale=0.05).exp()]


def draw(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def seen(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def with_gradients(function, inputs, **options) -> list[torch.Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs, **options)
    return [out, *torch.autograd.grad((out.double().square() + out).sum(), inputs, materialize_grads=True)]


def error(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest error, over the largest value."""
    assert all(x.shape == y.shape and x.isfinite().all() for x, y in zip(got, expected, strict=True))
    scale = max(y.abs().max().item() for y in expected if y.numel())
    return max((x - y).abs().max().item() for x, y in zip(got, expected, strict=True) if y.numel()) / (scale or 1.0)


def compare(kernel: Kernel, *qkv: torch.Tensor, **options) -> float:
    """The error of the fused path, forward and all gradients, against the definition."""
    calls = (lambda q, k, v, path=path: attend(q, k, v, kernel, path=path, **options) for path in ("fused", "exact"))
    return error(*(with_gradients(call, qkv) for call in calls))


# ------------------------------------------------------------------------- the forms

@pytest.mark.parametrize("kernel", FORMS, ids=repr)
def test_a_form_is_the_kernel_s_logarithm_up_to_a_term_of_the_query(kernel):
    q, k = draw(0, (2, 5, 6), (2, 7, 6))
    assert has_softmax_form(kernel, 6)
    form = softmax_form(kernel, q, k)
    logits = form.scale * form.q @ form.k.mT + (0 if form.key_bias is None else form.key_bias[:, None])
    of_the_query = kernel.log_gram(q, k) - logits
    assert (of_the_query - of_the_query[..., :1]).abs().max() < 1e-13
    # Each key for itself: what a cache keeps stays right when keys are added.
    one = softmax_form(kernel, q, k[:, 2:3])
    assert torch.equal(one.k, form.k[:, 2:3]) and one.scale == form.scale and torch.equal(one.q, form.q)
    assert form.key_bias is None or torch.equal(one.key_bias, form.key_bias[:, 2:3])


@pytest.mark.parametrize("kernel, reason", NO_FORMS, ids=lambda x: repr(x) if isinstance(x, Kernel) else "")
def test_what_has_no_form_is_refused_with_the_reason(kernel, reason):
    q, k, v = draw(0, (5, 4), (7, 4), (7, 2))
    assert not has_softmax_form(kernel, 4)
    with pytest.raises(ValueError, match="softmax"):
        softmax_form(kernel, q, k)
    with pytest.raises(ValueError, match=f"(?s)'fused' cannot.*{reason}.*exact"):
        attend(q, k, v, kernel, path="fused", normaliser="abs-sum")
    with pytest.raises(ValueError, match="'fused' cannot.*'count'.*exact"):
        attend(q, k, v, "rbf", path="fused", normaliser="count")


def test_a_reader_s_kernel_declares_its_form():
    @dataclass(frozen=True, repr=False)
    class Popular(Kernel):
        range = kernels.POSITIVE
        exponential = True

        def log_gram(self, q, k):
            return q @ k.mT + k[..., None, :, 0].sin()

        def gram(self, q, k):
            return self.log_gram(q, k).exp()

    class Other(Popular):
        pass

    q, k, v = draw(0, (5, 4), (7, 4), (7, 2))
    assert "register" in explain(q, k, v, Popular()).refused["fused"]
    try:
        @reductions.register(Popular)
        def _(kernel, q, k):
            return SoftmaxForm(q, k, 1.0, k[..., 0].sin())

        assert not has_softmax_form(Other(), 4), "a subclass may be another function"
        for kernel in (Popular(), Popular() * RBF(), TensorProduct(Popular(), EDP(), 2)):
            assert compare(kernel, q, k, v) < 1e-12
    finally:
        reductions._OF_LOGARITHM.pop(Popular)
    with pytest.raises(TypeError, match="class of the kernel"):
        reductions.register(Popular())


# ------------------------------------------------------------------------- against the definition

@pytest.mark.parametrize("kernel", FORMS, ids=repr)
def test_every_form_forward_and_backward(kernel):
    q, k, v = draw(1, (2, 3, 6, 5), (2, 3, 9, 5), (2, 3, 9, 7))
    for mask, causal in itertools.product((None, seen(0, 9), seen(1, 2, 1, 6, 9)), (False, True)):
        assert compare(kernel, q, k, v, mask=mask, causal=causal) < 1e-12


@settings(max_examples=150)
@given(kernel=st.sampled_from(BIASED), n=st.integers(1, 40), m=st.integers(1, 40), d=st.integers(3, 6),
       d_v=st.integers(1, 9), lead=st.sampled_from([((), (), ()), ((3,), (3,), (3,)), ((2, 5), (2, 5), (2, 5)),
                                                    ((2, 1), (3,), (1,)), ((2, 1, 2), (2, 1), (2, 1, 1))]),
       kind=st.sampled_from(["none", "keys", "pairs", "all pairs", "queries"]), causal=st.booleans(),
       tile=st.sampled_from([(64, 7), (600, 4096), (4096, 16), (2 ** 17, 4096)]), turn=st.booleans(),
       seed=st.integers(0, 99))
def test_biases_in_tiles_of_all_sizes(kernel, n, m, d, d_v, lead, kind, causal, tile, turn, seed):
    """Our own backward pass: gradients to 1e-12 whatever the tiles are, with masks, broadcasting and strides."""
    batch = torch.broadcast_shapes(*lead)
    q, k, v = draw(seed, *((*axes, *size) for axes, size in zip(lead, ((n, d), (m, d), (m, d_v)), strict=True)))
    if turn:
        q, k, v = (x.mT.contiguous().mT for x in (q, k, v))
    mask = {"none": None, "keys": seen(seed, *batch, 1, m), "pairs": seen(seed, n, m), "queries": seen(seed, n, 1),
            "all pairs": seen(seed, *batch, n, m)}[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_TILE", tile[0])
        patch.setattr(fused, "_COLUMNS", tile[1])
        patch.setattr(fused, "_ROWS", (4, 16) if tile[0] < 2 ** 17 else fused._ROWS)
        assert compare(kernel, q, k, v, mask=mask, causal=causal) < 1e-12


def test_long_sequences_in_single_precision():
    """Several tiles of the usual size; the reference is the same path in float64, itself compared elsewhere."""
    for kernel, (n, m) in itertools.product((EDP(), RBF(), EDP() * RBF()), ((600, 600), (300, 900))):
        inputs = draw(0, (2, n, 64), (2, m, 64), (2, m, 64))
        for causal in (False, True):
            def call(*qkv, kernel=kernel, causal=causal):
                return attend(*qkv, kernel, causal=causal, path="fused")
            got, expected = with_gradients(call, [x.float() for x in inputs]), with_gradients(call, inputs)
            for a, b in zip(got, expected, strict=True):
                assert (a - b).abs().max() < 5e-6 * b.abs().max(), kernel


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kernel, rival", [
    (RBF(), EDP()), (RBF(bandwidth=2.0), EDP(scale=0.25)), (EDP() * RBF(), EDP(scale=0.25)),
    (TensorProduct(RBF(), EDP(), 32), EDP(scale=32 ** -0.5)), (TensorProduct(RBF(), EDP(), 16), EDP(scale=0.25)),
], ids=repr)
def test_half_precision_errs_at_most_twice_as_much_as_edp(kernel, rival, dtype, autocast):
    """Of outputs twice, of gradients four times the largest error of EDP with the same factor of q·k."""
    worst: dict[Kernel, list[float]] = {}
    for seed, kernel_ in itertools.product(range(3), (rival, kernel)):
        half = draw(seed, *[(2, 64, 64)] * 3, dtype=torch.float32 if autocast else dtype)
        with torch.autocast("cpu", dtype, enabled=autocast):
            got = with_gradients(lambda *qkv, kernel=kernel_: attend(*qkv, kernel, path="fused"), half)
        assert got[0].dtype is dtype
        expected = with_gradients(lambda *qkv, kernel=kernel_: attend(*qkv, kernel, path="exact"),
                                  [x.double() for x in half])
        errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, expected, strict=True)]
        worst[kernel_] = [max(pair) for pair in zip(errors, worst.get(kernel_, [0.0] * 4), strict=True)]
    for a, b, factor in zip(worst[kernel], worst[rival], (2, 4, 4, 4), strict=True):
        assert a <= factor * b, worst


# ------------------------------------------------------------------------- what it does not make, and does not do

class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.size = max(self.size, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": seen(0, 1500)}], ids=str)
@pytest.mark.parametrize("batch", [(), (3,), (1, 3)], ids=str)
def test_no_array_of_all_weights_is_made(batch, options):
    n, d = 1500, 8
    q, k, v = (x.requires_grad_() for x in draw(0, *[(*batch, n, d)] * 3, dtype=torch.float32))
    for kernel in (EDP(), RBF()):
        if kernel == EDP() and "mask" in options:
            continue                            # torch itself makes a mask of numbers of it
        with Largest() as largest:
            attend(q, k, v, kernel, path="fused", **options).sum().backward()
        assert largest.size <= max(4 * fused._TILE, 9 * q.numel()) < n * n / 2


def test_only_gradients_that_are_needed_are_made():
    inputs = draw(0, (5, 4), (7, 4), (7, 3))
    whole = with_gradients(lambda *qkv: attend(*qkv, "rbf", path="fused"), inputs)
    for wanted in itertools.product((False, True), repeat=3):
        tensors = [x.clone().requires_grad_(need) for x, need in zip(inputs, wanted, strict=True)]
        out = attend(*tensors, "rbf", path="fused")
        assert out.requires_grad == any(wanted)
        if any(wanted):
            (out.square() + out).sum().backward()
        for x, need, expected in zip(tensors, wanted, whole[1:], strict=True):
            assert (x.grad is not None) == need
            if need:
                torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=1e-12)
    q, k, v = inputs
    bias = k[:, 0].clone().requires_grad_()
    out = fused._Biased.apply(q[None, None], k[None, None], v[None, None, :, [0, 1, 2, 0]], bias[None, None, None],
                              None, False, 1.0)
    grad, = torch.autograd.grad(out.sum(), bias)
    expected, = torch.autograd.grad(((q @ k.T + bias).softmax(-1) @ v[:, [0, 1, 2, 0]]).sum(), bias)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


def test_second_derivatives_are_refused_and_transforms_served():
    q, k, v = draw(0, (5, 4), (7, 4), (7, 4))
    q.requires_grad_()
    first, = torch.autograd.grad(attend(q, k, v, "rbf", path="fused").square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives.*exact"):
        torch.autograd.grad(first.sum(), q)
    second, = torch.autograd.grad(attend(q, k, v, "rbf", path="exact").square().sum(), q, create_graph=True)
    assert torch.autograd.grad(second.sum(), q)[0].abs().max() > 0, "the definition has them"

    def loss(k, path):
        return attend(q.detach(), k, v, "rbf", path=path).square().sum()

    a, b = (torch.func.grad(loss)(k, path) for path in ("fused", "exact"))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_what_auto_takes():
    def plan(kernel, **call):
        return Call(kernel, **({"n": 512, "m": 512, "d": 64, "d_v": 64, "batch": 8} | call))

    assert fused.drawback(plan(RBF())) is fused.drawback(plan(RBF(), n=2, m=2)) is None
    assert "definition" in fused.drawback(plan(EDP() * RBF(), n=4, m=4, d=4, batch=1))
    assert fused.drawback(plan(EDP() * RBF())) is None
    long = {"n": 2048, "m": 2048, "dropout": 0.1}
    assert "n x m" in fused.drawback(plan(RBF(), **long)) and "n x m" in fused.drawback(plan(EDP(), **long))
    assert fused.drawback(plan(EDP(), **long | {"device": "cuda"})) is None
    assert fused.drawback(plan(EDP(), dropout=0.1)) is None and "n x m" in fused.does(plan(EDP(), dropout=0.1))
    assert "Flex" in fused.does(plan(Quadratic(), device="cuda"))


def test_far_from_the_origin_single_precision_wants_centred_points():
    """The docstring's figure: what cancels, and that subtracting a mean from both sides mends it."""
    q, k, v = draw(0, (64, 64), (64, 64), (64, 4))
    expected = attend(q, k, v, "rbf", path="exact")
    far = [(x + 100).float() for x in (q, k)]
    wrong = (attend(*far, v.float(), "rbf", path="fused") - expected).abs().max()
    centred = [x - far[1].mean(0) for x in far]
    right = (attend(*centred, v.float(), "rbf", path="fused") - expected).abs().max()
    assert right < 1e-4 and 1e-3 < wrong < 0.1


# ------------------------------------------------------------------------- in the module

@pytest.mark.parametrize("kernel", BIASED[:2], ids=repr)
def test_in_the_module_with_all_parameters(kernel):
    torch.manual_seed(0)
    x, = draw(0, (2, 33, 12))
    hidden = torch.arange(33) >= torch.tensor([[33], [20]])
    modules = [KernelAttention(12, 3, kernel=kernel, path=path, batch_first=True, dtype=torch.float64)
               for path in ("fused", "exact")]
    modules[1].load_state_dict(modules[0].state_dict())
    padded, causal = {"key_padding_mask": hidden}, {"is_causal": True}
    for options in ({}, padded, causal, padded | causal):
        results = []
        for module in modules:
            inputs = x.clone().requires_grad_()
            out, _ = module(inputs, inputs, inputs, need_weights=False, **options)
            results.append([out, *torch.autograd.grad(out.square().sum(), (inputs, *module.parameters()))])
        assert error(*results) < 1e-12


# ------------------------------------------------------------------------- FlexAttention, on a CPU and uncompiled

def test_even_polynomials_by_flex_attention():
    q, k, v = draw(0, (2, 3, 6, 8), (3, 9, 8), (2, 1, 9, 5), dtype=torch.float32)
    q[0, 0, 2] = 0.0                            # orthogonal to every key
    masks = (None, seen(0, 2, 3, 6, 9), seen(1, 9))
    for kernel, mask, causal in itertools.product((Quadratic(), Polynomial(degree=4, offset=0.5, scale=0.2)), masks,
                                                  (False, True)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # that it is not compiled
            out = flex.attention(q, k, v, kernel, mask=mask, causal=causal, compiled=False)
        expected = exact(q.double(), k.double(), v.double(), kernel, mask=mask, causal=causal)
        assert (out - expected).abs().max() < 2e-6 * expected.abs().max()
    x = torch.tensor([0.0, 2.0], requires_grad=True)
    flex._score(x, 0, 0, 0, Quadratic(), None, None)[1].backward()
    assert x.grad.tolist() == [0.0, 1.0]


def test_when_flex_attention_serves():
    def refusal(kernel=None, **call):
        return fused.refusal(Call(kernel or Quadratic(), **({"device": "cuda", "d": 64} | call)))

    assert refusal() is refusal(Polynomial(degree=4)) is None
    assert "negative" in refusal(Polynomial(degree=3)) and "dropout" in refusal(dropout=0.1)
    assert "'cpu'" in refusal(device="cpu") and "float64" in refusal(dtype=torch.float64)
    assert math.isinf(Quadratic().range.high)
