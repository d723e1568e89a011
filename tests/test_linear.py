"""Attention in linear time against the definition, with all gradients; its state against the full pass."""

import functools
import itertools
import math

import pytest
import torch

from kernelbook import attend, explain, features, kernels
from kernelbook.attention import linear as module
from kernelbook.attention.call import Call
from kernelbook.attention.linear import RecurrentState, crossover, drawback, linear, refusal
from kernelbook.kernels import (
    EDP,
    RBF,
    Constant,
    Cosine,
    DirectSum,
    L2Squared,
    Linear,
    Polynomial,
    Quadratic,
    Taylor,
    TensorProduct,
)

ELU, FOURIER = kernels.get("elu"), kernels.get("fourier_features", count=10)
POSITIVE = kernels.get("positive_features", count=12)
KERNELS = [Quadratic(), Taylor(), Taylor(degree=1), Taylor(degree=3), Linear(), L2Squared(), L2Squared(scale=0.3),
           ELU, POSITIVE, kernels.get("quadrature_features", count=9), FOURIER, Cosine(), Constant(2.0),
           Polynomial(degree=2, offset=0.4), Polynomial(offset=-0.5), Polynomial(degree=1, scale=2.0),
           0.5 * Quadratic(), -Linear(), Quadratic() + L2Squared(), Quadratic() * ELU, 2 * ELU, 0.5 * POSITIVE,
           -0.5 * FOURIER,
           TensorProduct(Quadratic(), ELU, 1), DirectSum(Cosine(), Taylor(), 2)]
SIZES = [(5, 5), (3, 8), (8, 3), (1, 6), (6, 1), (20, 20), (17, 30)]


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 8 rows and groups of a problem or two, so that a test crosses their borders."""
    monkeypatch.setattr(module, "CHUNK", 64)
    monkeypatch.setattr(module, "ROWS", (8, 8, 8))


def problem(seed: int, n: int, m: int, d: int = 3, d_v: int = 2, batch=((2, 1), (3,), (2, 3))) -> list[torch.Tensor]:
    """Queries and keys with no row sum near 0, where a sum over features would lose digits that the kernel keeps."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(*b, size, width, generator=generator, dtype=torch.float64)
               for b, size, width in zip(batch, (n, m, m), (d, d, d_v), strict=True))
    return [q / 2 + 1, k / 2 + 1, v]


def results(path, q, k, v, kernel, **options) -> list[torch.Tensor]:
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v, kernel, path=path, **options)
    return [out.detach(), *torch.autograd.grad((out.square() + out).sum(), (q, k, v), materialize_grads=True)]


def error(got, expected) -> float:
    assert [x.shape for x in got] == [x.shape for x in expected] and all(x.isfinite().all() for x in got)
    largest = max(x.abs().max().item() for x in expected)
    return max((x - y).abs().max().item() for x, y in zip(got, expected, strict=True)) / (largest or 1.0)


def normalisers(kernel) -> list[str]:
    return ["sum", "abs-sum", "relu-sum", "signed-sum", "none", "count"] if kernel.normalisable else ["none", "count"]


# ------------------------------------------------------------------------- against the definition

@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_linear_is_exact_forward_and_backward(kernel, small_chunks):
    turn = itertools.cycle(normalisers(kernel))
    for (n, m), causal, masked in itertools.product(SIZES, (False, True), (None, "batch", "plain")):
        q, k, v = problem(n + m, n, m)
        mask = None if masked is None else torch.rand((2, 3, 1, m) if masked == "batch" else (m,),
                                                      generator=torch.Generator().manual_seed(m)) < 0.7
        options = {"mask": mask, "causal": causal, "normaliser": next(turn)}
        got, expected = (results(path, q, k, v, kernel, **options) for path in ("linear", "exact"))
        assert error(got, expected) < 1e-12, (n, m, options)


@pytest.mark.parametrize("kernel", [Quadratic(), ELU, POSITIVE, L2Squared(), Polynomial(offset=-0.5)], ids=repr)
def test_chunks_as_they_are(kernel):
    """At lengths of several chunks, and widths of several blocks of products; float32 too."""
    q, k, v = problem(0, 300, 420, d=20, d_v=3, batch=((2,), (2,), (2,)))
    options = {"mask": torch.arange(420) % 7 != 2, "normaliser": "sum" if kernel.normalisable else "none"}
    for causal in (False, True):
        got, expected = (results(path, q, k, v, kernel, causal=causal, **options) for path in ("linear", "exact"))
        assert error(got, expected) < 1e-12
        single = attend(*(x.float() for x in (q, k, v)), kernel, causal=causal, path="linear", **options)
        assert error([single.double()], expected[:1]) < (1e-4 if causal else 5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single(dtype):
    for kernel, causal in itertools.product((ELU, Quadratic(), L2Squared()), (False, True)):
        q, k, v = (x.to(dtype) for x in problem(0, 200, 200, d=16))
        got = attend(q, k, v, kernel, causal=causal, path="linear")
        expected = attend(*(x.double() for x in (q, k, v)), kernel, causal=causal, path="exact")
        assert got.dtype is dtype and error([got.double()], [expected]) < 2 * torch.finfo(dtype).eps


def test_autocast_rounds_the_result_only():
    q, k, v = (x.float().requires_grad_() for x in problem(1, 70, 70, d=16, batch=((2,), (2,), (2,))))
    for kernel, causal in ((Quadratic(), False), (ELU, True), (POSITIVE, True)):
        with torch.autocast("cpu", torch.bfloat16):
            got = attend(q, k, v, kernel, causal=causal, path="linear")
            gradients = torch.autograd.grad(got.float().sum(), (q, k, v))
        expected = attend(q, k, v, kernel, causal=causal, path="linear")
        assert got.dtype is torch.bfloat16 and torch.equal(got, expected.bfloat16())
        for x, y in zip(gradients, torch.autograd.grad(expected.sum(), (q, k, v)), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_layouts_and_empty_axes(small_chunks):
    q, k, v = problem(1, 20, 30, batch=((2, 3), (2, 3), (2, 3)))
    turned = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v)]
    shared = [q, k[:1, :1].expand_as(k), v[:, :1].expand_as(v)]
    for inputs, causal in itertools.product((turned, shared), (False, True)):
        got, expected = (results(path, *inputs, ELU, causal=causal) for path in ("linear", "exact"))
        assert error(got, expected) < 1e-12
    for a, b, c in ((q[..., :0, :], k, v), (q, k[..., :0, :], v[..., :0, :]), (q[:0], k[:0], v[:0]),
                    (q, k, v[..., :0])):
        for kernel, causal in itertools.product((ELU, Quadratic(), POSITIVE), (False, True)):
            got, expected = (results(path, a, b, c, kernel, causal=causal) for path in ("linear", "exact"))
            for x, y in zip(got, expected, strict=True):
                assert x.shape == y.shape and torch.equal(x, y)


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_rows_with_nothing_to_see_are_zeros(kernel, small_chunks):
    q, k, v = (x.requires_grad_() for x in problem(2, 12, 9, batch=((2,), (), ())))
    hidden, turn = torch.zeros(9, dtype=torch.bool), itertools.cycle(normalisers(kernel)[-3:])
    for mask, causal in ((None, True), (hidden, False), (hidden, True)):
        normaliser = next(turn)
        with torch.autograd.set_detect_anomaly(True):
            out = attend(q, k, v, kernel, mask=mask, causal=causal, normaliser=normaliser, path="linear")
            blind = out if mask is not None else out[..., :3, :]
            assert (blind == 0).all()
            for x in torch.autograd.grad(blind.sum(), (q, k, v), allow_unused=True):
                assert x is None or (x == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_positive_features_that_lie_far_apart_are_left_to_the_definition(dtype, small_chunks):
    q, k, v = (x.to(dtype) for x in problem(6, 40, 40, batch=((2,), (2,), (2,))))
    q, k = 300 * (q - 1), 300 * (k - 1) * torch.linspace(2, 0.1, 40, dtype=dtype)[:, None]
    for causal in (False, True):
        got, expected = (results(path, *(x.to(torch.float64) if path == "exact" else x for x in (q, k, v)), POSITIVE,
                                 causal=causal)[0] for path in ("linear", "exact"))
        assert error([got.double()], [expected]) < (0.1 if dtype is torch.float32 else 1e-9)


@pytest.mark.parametrize("kernel", [Quadratic(), ELU, POSITIVE, L2Squared()], ids=repr)
def test_transforms_of_functions(kernel):
    q, k, v = problem(8, 6, 6, batch=((3, 2), (3, 2), (3, 2)))
    def loss(path, *qkv):
        return attend(*qkv, kernel, path=path, causal=True).square().sum()

    for turn in (lambda f: f, torch.vmap):
        got, expected = (turn(torch.func.grad(functools.partial(loss, path), (0, 1, 2)))(q, k, v)
                         for path in ("linear", "exact"))
        assert error(got, expected) < 1e-12
    with torch.no_grad():
        rows = torch.vmap(functools.partial(loss, "linear"))(q, k, v)
    assert error([rows.sum()], [loss("exact", q, k, v)]) < 1e-12


def test_a_row_sum_of_zero_gives_zeros():
    q, k, v = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 2.0]]), torch.ones(2, 3)
    assert (attend(q, k, v, "quadratic", path="linear") == 0).all()
    opposite = torch.tensor([[1.0], [-1.0]])
    assert (attend(torch.ones(3, 1), opposite, torch.randn(2, 2), "linear", normaliser="signed-sum", path="linear")
            == 0).all()


def test_further_derivatives():
    q, k, v = problem(3, 3, 4, d=2, d_v=1, batch=((), (), ()))
    for kernel, causal in ((Quadratic(), True), (ELU, False), (POSITIVE, True), (L2Squared(), False)):
        leaves = [x.requires_grad_() for x in (q, k, v)]
        options = {"causal": causal, "path": "linear"}
        assert torch.autograd.gradgradcheck(functools.partial(attend, kernel=kernel, **options), leaves)


def test_only_what_is_wanted_gets_a_gradient(small_chunks):
    q, k, v = problem(4, 20, 20, batch=((2,), (2,), (2,)))
    for kernel, causal in itertools.product((Quadratic(), ELU, POSITIVE, FOURIER), (False, True)):
        normaliser = "sum" if kernel.normalisable else "none"
        _, *every = results("linear", q, k, v, kernel, causal=causal, normaliser=normaliser)
        for wanted in itertools.product((False, True), repeat=3):
            leaves = [x.detach().clone().requires_grad_(yes) for x, yes in zip((q, k, v), wanted, strict=True)]
            if not any(wanted):
                continue
            out = attend(*leaves, kernel, causal=causal, normaliser=normaliser, path="linear")
            (out.square() + out).sum().backward()
            for x, full in zip(leaves, every, strict=True):
                assert (x.grad is not None) == x.requires_grad and (x.grad is None or error([x.grad], [full]) < 1e-13)


def test_what_the_backward_pass_keeps_is_linear_in_the_length():
    """Inputs, output and the state; never the features of all rows, and never a matrix of the lengths."""
    def kept(kernel, n, causal):
        tensors = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x: tensors.setdefault((x.data_ptr(), x.shape), x), lambda x: x):
            q, k, v = (torch.randn(2, n, 16, requires_grad=True) for _ in range(3))
            linear(q, k, v, kernel, causal=causal)
        return sum(x.numel() for x in tensors.values())

    for kernel, causal in itertools.product((Quadratic(), ELU), (False, True)):
        few, many = kept(kernel, 300, causal), kept(kernel, 1200, causal)
        assert few < 2 * (5 * 300 * 16 + 300 * 17) and many - few < 2 * 900 * (5 * 16)


def test_it_compiles_whole():
    q, k, v = (x.float() for x in problem(5, 20, 20))
    for kernel in (kernels.get("positive_features", count=8, seed=91), Taylor(degree=4)):
        torch._dynamo.reset()
        compiled = torch.compile(attend, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(q, k, v, kernel, causal=True, path="linear"),
                                   attend(q, k, v, kernel, causal=True, path="exact"), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------- pairs of feature maps

@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_pairs_have_the_kernel_as_their_inner_product(kernel):
    q, k, _ = problem(6, 7, 9)
    q, k = q - 1, k - 1
    phi, psi = features.pair_of(kernel)
    expected = kernel(q, k)
    assert (phi(q) @ psi(k).mT - expected).abs().max() < 1e-13 * expected.abs().max()
    assert phi.dimension(3) == psi.dimension(3) == phi(q).shape[-1] == kernel.feature_dimension(3)
    assert features.has_pair(kernel)
    if kernel.positive_definite and type(kernel) in (Quadratic, Taylor, Linear, Polynomial, Constant):
        assert phi == psi == features.of(kernel)
    rows = module._rows(kernel, summed=False)
    assert (rows[0].of(q) @ rows[1].of(k).mT - expected).abs().max() < 1e-13 * expected.abs().max()
    assert rows[0].dimension(3) == rows[0].of(q).shape[-1] == rows[1].of(k).shape[-1]


def test_the_squared_distance_needs_two_maps():
    """No one map has it as its inner product: it vanishes at coinciding points, and is not zero."""
    phi, psi = features.pair_of(L2Squared())
    assert phi != psi and phi.dimension(8) == 10
    x = problem(7, 6, 1)[0]
    assert (phi(x) * psi(x)).sum(-1).abs().max() < 1e-13 and L2Squared()(x, x).max() > 0.1


@pytest.mark.parametrize("call, words", [
    (lambda: features.pair_of(EDP()), ["no finite features", "L2Squared", "positive_features"]),
    (lambda: features.pair_of(Quadratic() + RBF()), ["no finite features", "RBF"]),
    (lambda: features.pair_of("edp"), ["str", "kernels.get"]),
    (lambda: features.pair_of(L2Squared())[0].kernel, ["one map of a pair"]),
])
def test_pairs_say_what_would_help(call, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value


# ------------------------------------------------------------------------- the choice

def test_auto_takes_it_from_its_crossover_on():
    for kernel, d, causal in itertools.product((ELU, Quadratic(), L2Squared(), Taylor()), (8, 64), (False, True)):
        least = crossover(kernel, d, causal)
        asked = {"d": d, "d_v": d, "batch": 8, "causal": causal}
        assert drawback(Call(kernel, n=least, m=least, **asked)) is None
        why = drawback(Call(kernel, n=least - 1, m=least - 1, **asked))
        assert f"{least:,}" in why and "crossover" in why
        assert drawback(Call(kernel, n=1, m=10 ** 6, **asked)) is not None         # one query: a row, not a matrix
        assert least <= crossover(kernel, 2 * d, causal)
    q, k, v = (torch.zeros(2, 700, 16) for _ in range(3))
    plan = explain(q, k, v, "elu")
    assert plan.path == "linear" and "16 features" in plan.reason
    assert "crossover" in explain(q[:, :20], k[:, :20], v[:, :20], "elu").passed_over["linear"]
    assert "rounding" in drawback(Call(ELU, n=90, m=90, d=8, dtype=torch.float64))
    assert explain(q, k, v, "elu", path="exact").path == "exact"


Q, K, V = torch.ones(2, 3, 4), torch.ones(2, 5, 4), torch.ones(2, 5, 4)


@pytest.mark.parametrize("options, words", [
    ({"kernel": "edp"}, ["EDP", "no finite features", "positive_features"]),
    ({"kernel": Quadratic() + RBF()}, ["no finite features"]),
    ({"kernel": Taylor(degree=40) * Taylor(degree=40)}, ["18,428,334,001 features", "more than 1,000,000"]),
    ({"mask": torch.ones(3, 5, dtype=torch.bool)}, ["differs between queries", "causal=True", "exact"]),
    ({"dropout": 0.1}, ["dropout"]),
    ({"kernel": "linear", "normaliser": "abs-sum"}, ["abs-sum"]),
    ({"kernel": "linear", "normaliser": "relu-sum"}, ["relu-sum"]),
])
def test_refusals_name_the_path_the_reason_and_the_alternative(options, words):
    with pytest.raises(ValueError) as caught:
        attend(Q, K, V, **{"kernel": "elu", "path": "linear"} | options)
    assert all(word in str(caught.value) for word in ("'linear'", "exact", *words)), caught.value


def test_the_choice_is_quick_and_right_about_masks():
    shapes = {(5,): True, (1, 5): True, (2, 1, 5): True, (): True, (3, 5): False, (3, 1): False}
    for shape, served in shapes.items():
        mask = torch.ones(shape, dtype=torch.bool)
        call = Call.of(Q, K, V, ELU, mask=mask, causal=False, dropout=0.0, normaliser="sum")
        assert (refusal(call) is None) == served
        if served:
            assert torch.equal(attend(Q, K, V, ELU, mask=mask, path="linear"), attend(Q, K, V, ELU, path="linear"))


# ------------------------------------------------------------------------- the recurrent state

@pytest.mark.parametrize("kernel", [Quadratic(), Taylor(degree=3), L2Squared(), ELU, POSITIVE, FOURIER], ids=repr)
def test_token_by_token_is_the_causal_pass(kernel, small_chunks):
    q, k, v = problem(8, 30, 30, batch=((2, 3), (2, 3), (2, 3)))
    k = k * torch.linspace(0.1, 3, 30)[:, None]         # the largest feature grows on the way
    visible = torch.rand(2, 1, 30, generator=torch.Generator().manual_seed(0)) < 0.8
    for normaliser in normalisers(kernel):
        full = attend(q, k, v, kernel, mask=visible[..., None, :], causal=True, normaliser=normaliser, path="exact")
        state, sizes, out = RecurrentState(kernel, normaliser), set(), []
        for t in range(30):
            row = slice(t, t + 1)
            out.append(state.attend(q[..., row, :], k[..., row, :], v[..., row, :], visible=visible[..., row]))
            sizes.add(state.size)
        assert error([torch.cat(out, -2)], [full]) < 1e-12
        assert len(sizes) == 1 and len(state) == 30 and state.size < 6 * (kernel.feature_dimension(3) + 40) * 4
        state = RecurrentState(kernel, normaliser)      # a prefix at once, then a few, then the rest
        state.append(k[..., :11, :], v[..., :11, :], visible[..., :11])
        out = [state.attend(q[..., a:b, :], k[..., a:b, :], v[..., a:b, :], visible=visible[..., a:b], causal=True)
               for a, b in ((11, 12), (12, 25), (25, 30))]
        assert error([torch.cat(out, -2)], [full[..., 11:, :]]) < 1e-12
        assert error([state.attend(q[..., -1:, :])], [full[..., -1:, :]]) < 1e-12


def test_rows_of_a_state_can_be_selected():
    q, k, v = problem(9, 6, 6, batch=((3, 2), (3, 2), (3, 2)))
    for kernel, normaliser in ((ELU, "count"), (POSITIVE, "sum"), (L2Squared(), "none")):
        state, index = RecurrentState(kernel, normaliser), torch.tensor([2, 0, 0, 1])
        state.select(index)                             # nothing to select from yet
        state.append(k[..., :4, :], v[..., :4, :])
        state.select(index)
        got = state.attend(q[index][..., 4:, :], k[index][..., 4:, :], v[index][..., 4:, :], causal=True)
        expected = attend(q, k, v, kernel, causal=True, normaliser=normaliser, path="exact")[index][..., 4:, :]
        assert error([got], [expected]) < 1e-12


def test_a_state_says_when_its_sums_underflow():
    q, k, v = (x.float() for x in problem(3, 60, 60, d=8, batch=((), (), ())))
    state = RecurrentState(POSITIVE)
    state.append(200 * (k - 1), v)
    with pytest.raises(FloatingPointError, match="Cache"):
        state.attend(200 * (q - 1))


STATE = RecurrentState("elu")
STATE.append(K, V)


@pytest.mark.parametrize("call, words", [
    (lambda: RecurrentState("edp"), ["EDP", "no finite features", "Cache"]),
    (lambda: RecurrentState("linear"), ["signed", "abs-sum"]),
    (lambda: RecurrentState("linear", "abs-sum"), ["abs-sum", "Cache"]),
    (lambda: RecurrentState("elu").attend(Q), ["no keys", "append"]),
    (lambda: STATE.attend(Q, K), ["go together"]),
    (lambda: STATE.attend(Q, K, V, causal=True), ["as many keys"]),
    (lambda: STATE.attend(Q, causal=True), ["know its keys apart"]),
    (lambda: STATE.append(K[0], V[0]), ["k must have", r"(2, 'n', 4)"]),
    (lambda: STATE.append(K, V[:, :3]), ["same leading axes"]),
    (lambda: STATE.append(K.double(), V.double()), ["float32", "float64"]),
    (lambda: STATE.append(K.clone().requires_grad_(), V), ["gradient", "no_grad"]),
    (lambda: STATE.append(K, V, torch.ones(2, 4, dtype=torch.bool)), ["broadcast"]),
    (lambda: STATE.append(K, V, torch.ones(2, 5)), ["boolean"]),
])
def test_a_state_says_what_would_help(call, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value
    assert len(STATE) == 5 and math.isfinite(STATE.attend(Q).sum())
