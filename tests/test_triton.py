"""Triton's kernels: run by its interpreter on the CPU against the float64 definition, and compiled without a GPU."""

from __future__ import annotations

import os
import re

import pytest
import torch

from kernelbook.attention import triton_tiles
from kernelbook.attention.call import Call
from kernelbook.attention.definition import exact
from kernelbook.attention.triton_tiles import Tiles, compiled, serves, tiled_triton
from kernelbook.kernels import L2, RBF, Coordinatewise, ExponentiatedIntersection, Intersection, L2Squared
from kernelbook.rules import coordinate_form

pytest.importorskip("triton")

EI = ExponentiatedIntersection()
SMALL = Tiles(1, 2, 8, 8)           # 16 x 16
EVERY_FUNCTION = ("tanh(q * k) - sqrt(abs(q - k)) + log(1 + q**2) * exp(-abs(k)) + max(q, 0.5) * sign(k) / 3 "
                  "+ (q - k)**3 / (8 + q**2) - (1 + q**2)**-2 * (2 + k)**2 + above(q, k) * (q * q + 1)**0.3 "
                  "+ min(q, k) * slope(1 + q**2, 0.5)")


def tensors(n, m, d, d_v, batch=(), q_batch=None, dtype=torch.float32, ties=False):
    generator = torch.Generator().manual_seed(0)
    q, k, v, up = (torch.randn(*b, *shape, generator=generator) for b, shape in (
        (batch if q_batch is None else q_batch, (n, d)), (batch, (m, d)), (batch, (m, d_v)), (batch, (n, d_v))))
    if ties:
        q, k = q.round(), k.round()
    return [x.to(dtype).requires_grad_() for x in (q, k, v)], up.to(dtype)


def errors(kernel, inputs, up, *, tiles=SMALL, normaliser="sum", **options):
    """Of the output and of each gradient: the largest error over the largest value in float64."""
    out = tiled_triton(*inputs, coordinate_form(kernel, inputs[0].shape[-1]), tiles=tiles, **options)
    assert out.dtype is inputs[2].dtype
    found = [out, *torch.autograd.grad(out, inputs, up)]
    inputs = [x.detach().double().requires_grad_() for x in inputs]
    out = exact(*inputs, kernel, normaliser=normaliser, **options)
    wanted = [out, *torch.autograd.grad(out, inputs, up.double(), materialize_grads=True)]
    return [((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for a, b in zip(found, wanted, strict=True)]


def some(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < 0.6


CASES = {
    "ties": (EI, dict(n=20, m=23, d=5, d_v=5, batch=(2,), ties=True), {}),
    "causal, fewer keys than queries: rows that see nothing": (EI, dict(n=33, m=17, d=3, d_v=7), dict(causal=True)),
    "causal, more keys, pairs masked": (EI, dict(n=17, m=33, d=6, d_v=3), dict(causal=True, mask=some(17, 33))),
    "keys masked, one problem wholly; broadcast": (
        EI, dict(n=5, m=18, d=4, d_v=20, batch=(2, 2), q_batch=(2,)),
        dict(mask=some(2, 1, 1, 18) & torch.tensor([True, False])[:, None, None, None])),
    "one mask for all": (L2Squared(), dict(n=18, m=5, d=1, d_v=2, batch=(2,), ties=True), dict(mask=some(1, 18, 1))),
    "distance": (L2(), dict(n=20, m=18, d=5, d_v=4, ties=True), dict(causal=True)),
    "root of 0": (Coordinatewise("max(q * k, 0)", link="sqrt"), dict(n=9, m=7, d=2, d_v=2, ties=True), {}),
    "signed": (Intersection(), dict(n=9, m=17, d=5, d_v=4), dict(normaliser="signed-sum")),
    "far scores": (Coordinatewise("-abs(q - k)", scale=60.0), dict(n=9, m=17, d=5, d_v=4, ties=True), {}),
    "every function": (Coordinatewise(EVERY_FUNCTION), dict(n=18, m=17, d=2, d_v=2, ties=True), {}),
    "of the key alone": (Coordinatewise("abs(k)", link="identity", non_negative=True), dict(n=9, m=7, d=2, d_v=2), {}),
    "one pair": (EI, dict(n=1, m=1, d=1, d_v=1), {}),
    "usual tiles": (EI, dict(n=130, m=66, d=2, d_v=3), dict(causal=True, tiles=Tiles())),
}


@pytest.mark.parametrize("kernel, shape, options", CASES.values(), ids=CASES)
def test_values_and_gradients_are_the_definitions(kernel, shape, options):
    inputs, up = tensors(**shape)
    assert max(errors(kernel, inputs, up, **options)) <= 2e-6


@pytest.mark.parametrize("dtype, kernel", [(torch.float16, EI), (torch.float16, L2()), (torch.bfloat16, EI)])
def test_half_precision_is_rounded_once(dtype, kernel):
    inputs, up = tensors(20, 18, 5, 4, dtype=dtype)
    assert max(errors(kernel, inputs, up)) <= 1.5 * torch.finfo(dtype).eps


def test_wide_values_are_taken_in_parts(monkeypatch):
    monkeypatch.setattr(triton_tiles, "WIDEST", 4)
    inputs, up = tensors(9, 8, 3, 10)
    assert max(errors(EI, inputs, up)) <= 2e-6


def test_gradients_are_computed_where_they_are_wanted():
    (q, k, v), up = tensors(9, 8, 3, 4)
    form = coordinate_form(EI, 3)
    every = torch.autograd.grad(tiled_triton(q, k, v, form, tiles=SMALL), (q, k, v), up)
    for i in range(3):
        inputs = [x.detach().requires_grad_(i == j) for j, x in enumerate((q, k, v))]
        (alone,) = torch.autograd.grad(tiled_triton(*inputs, form, tiles=SMALL), inputs[i], up)
        assert torch.equal(alone, every[i])


def test_a_second_derivative_is_refused():
    (q, k, v), up = tensors(3, 4, 3, 4)
    (g,) = torch.autograd.grad(tiled_triton(q, k, v, coordinate_form(EI, 3), tiles=SMALL).square().sum(), q,
                               create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; take path='exact'"):
        g.sum().backward()


@pytest.mark.parametrize("n, m, batch", [(0, 3, ()), (3, 0, ()), (3, 4, (0, 2))])
def test_nothing_to_do(n, m, batch):
    (q, k, v), up = tensors(n, m, 3, 4, batch)
    out = tiled_triton(q, k, v, coordinate_form(EI, 3))
    assert torch.equal(out, torch.zeros(*batch, n, 4))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(out, (q, k, v), up))


def test_it_can_be_compiled_into_a_graph():
    (q, k, v), up = tensors(9, 8, 3, 4)
    form = coordinate_form(EI, 3)

    def attention(q, k, v):
        return 2 * tiled_triton(q, k, v, form, causal=True, tiles=SMALL)

    out = torch.compile(attention, fullgraph=True, backend="aot_eager")(q, k, v)
    assert torch.equal(out, attention(q, k, v))
    for a, b in zip(*(torch.autograd.grad(o, (q, k, v), up) for o in (out, attention(q, k, v))), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------- where it serves

class _Gpu:
    major = 9


def on_gpu(kernel=EI, **options):
    return Call(kernel, n=8, m=8, d=4, d_v=4, device="cuda", **options)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _Gpu)


def test_what_it_serves(gpu):
    for kernel in (EI, L2(), L2Squared(), Coordinatewise("-abs(q - k)")):
        for normaliser in ("sum", "signed-sum", "abs-sum", "relu-sum"):
            assert serves(on_gpu(kernel, normaliser=normaliser, causal=True, mask="pairs")) is None
    assert serves(on_gpu(Intersection(), normaliser="signed-sum", dtype=torch.bfloat16)) is None


@pytest.mark.parametrize("call, why", [
    (Call(EI), "on 'cpu'"),
    (on_gpu(dtype=torch.float64), "torch.float64"),
    (on_gpu(RBF()), "not given by a rule"),
    (on_gpu(dropout=0.1), "dropout"),
    (on_gpu(normaliser="none"), "'none'"),
    (on_gpu(Intersection(), normaliser="abs-sum"), "'abs-sum'"),
    (Call(EI, n=2**26, m=8, d=64, device="cuda"), "too long"),
])
def test_what_it_refuses(gpu, call, why):
    assert why in serves(call)


def test_older_gpus_and_a_missing_triton_are_named(gpu, monkeypatch):
    monkeypatch.setattr(_Gpu, "major", 7)
    assert "capability 8.0" in serves(on_gpu())
    monkeypatch.setattr(triton_tiles, "HAVE_TRITON", False)
    assert "pip install triton" in serves(on_gpu())
    triton_tiles._kernels.cache_clear()
    with pytest.raises(ImportError, match="pip install triton"):
        tiled_triton(*tensors(3, 4, 3, 4)[0], coordinate_form(EI, 3))
    triton_tiles._kernels.cache_clear()


# ------------------------------------------------------------------------- the compiler, without a GPU

def test_the_kernels_compile_for_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert "TRITON_INTERPRET" not in os.environ         # the interpreted kernels of the other tests left nothing behind
    kernels = compiled(coordinate_form(EI, 16), d=16, d_v=16, dtype=torch.bfloat16, causal=True, masked=True,
                       tiles=Tiles(2, 4, 16, 8))
    for kernel in kernels.values():
        ptx = kernel.asm["ptx"]
        assert ".target sm_90" in ptx and kernel.asm["cubin"] and kernel.metadata.shared < 48 * 1024
        # the 16 pairs of a thread, four coordinates at once: one minimum for each, and no more
        assert len(re.findall(r"min\.NaN\.f32", ptx)) == 64
