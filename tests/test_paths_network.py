"""Networks of attention paths: the definition, what paths make of it, the prior, and training."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernelbook.paths import combine, path_inputs, path_kernels
from kernelbook.paths.network import (
    AttentionNetwork,
    QueryKeyAttention,
    bilinear_attention,
    draw_weights,
    network_output,
    order_parameter,
    output_of_paths,
    path_weights,
    train,
)

layers = st.lists(st.integers(1, 3), min_size=0, max_size=3).flatmap(lambda heads: st.fixed_dictionaries({
    "heads": st.just(tuple(heads)),
    "widths": st.tuples(*[st.integers(1, 4)] * (len(heads) + 1)),
    "variances": st.tuples(*[st.floats(0.2, 3)] * (len(heads) + 2)),
}))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def data(heads, seed=0, examples=3, features=4, tokens=5):
    """Inputs, attention and a readout, all random."""
    attention = [torch.softmax(normal(h, examples, tokens, tokens, seed=seed + 7 * k), -2)
                 for k, h in enumerate(heads, start=1)]
    return normal(examples, features, tokens, seed=seed), attention, normal(tokens, seed=seed + 5)


def by_loops(weights, inputs, attention, readout):
    """The definition, an entry at a time."""
    found = []
    for m in range(len(inputs)):
        V = weights[0][0]
        z = V @ inputs[m] / math.sqrt(V.shape[1])
        for V, omega in zip(weights[1:-1], attention, strict=True):
            heads, width = len(V), V.shape[2]
            new = torch.zeros(V.shape[1], z.shape[1], dtype=z.dtype)
            for h, i, t in itertools.product(range(heads), range(V.shape[1]), range(z.shape[1])):
                for j, s in itertools.product(range(width), range(z.shape[1])):
                    new[i, t] += V[h, i, j] * z[j, s] * omega[h, m, s, t]
            z = new / math.sqrt(heads * width)
        a = weights[-1][0, 0]
        found.append(a @ z @ readout / math.sqrt(len(a)))
    return torch.stack(found)


# ------------------------------------------------------------------------- the definition, and paths

@given(layers, st.integers(0, 999))
def test_layers_loops_and_paths_agree(sizes, seed):
    # checks: thm-ap-paths
    weights = draw_weights(4, generator=generator(seed), **sizes)
    problem = data(sizes["heads"], seed)
    xi = path_inputs(*problem)
    f = network_output(weights, *problem)
    assert f.shape == (3,)
    torch.testing.assert_close(f, by_loops(weights, *problem), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(output_of_paths(weights, xi), f, rtol=1e-10, atol=1e-12)
    # The sum over paths, written out.
    V_0, w = weights[0][0], path_weights(weights)
    whole = torch.einsum("pi,ij,pmj->m", w, V_0, xi) / math.sqrt(len(V_0) * V_0.shape[1] * len(xi))
    torch.testing.assert_close(whole, f, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(order_parameter(weights), w @ w.mT / len(V_0), rtol=1e-10, atol=1e-12)


@given(layers, st.integers(0, 999))
def test_gradients_agree(sizes, seed):
    weights = [V.requires_grad_() for V in draw_weights(4, generator=generator(seed), **sizes)]
    problem = data(sizes["heads"], seed)
    for f, g in zip(torch.autograd.grad(network_output(weights, *problem).square().sum(), weights),
                    torch.autograd.grad(output_of_paths(weights, path_inputs(*problem)).square().sum(), weights),
                    strict=True):
        torch.testing.assert_close(f, g, rtol=1e-9, atol=1e-11)


@given(layers, st.integers(0, 99))
def test_a_batch_of_networks(sizes, seed):
    weights = draw_weights(4, batch=(2, 3), generator=generator(seed), **sizes)
    problem = data(sizes["heads"], seed)
    one = [V[1, 2] for V in weights]
    assert network_output(weights, *problem).shape == (2, 3, 3)
    torch.testing.assert_close(network_output(weights, *problem)[1, 2], network_output(one, *problem))
    torch.testing.assert_close(output_of_paths(weights, path_inputs(*problem))[1, 2], network_output(one, *problem))
    torch.testing.assert_close(order_parameter(weights)[1, 2], order_parameter(one))


def test_paths_are_numbered_with_the_first_head_slowest():
    weights = draw_weights(4, heads=(2, 3), widths=(5, 3, 4), generator=generator())
    a, last, first = weights[3][0, 0], weights[2], weights[1]
    w = a @ last[2] @ first[1] / math.sqrt(4 * 3)                    # N_a, N_2
    torch.testing.assert_close(path_weights(weights)[1 * 3 + 2], w)


# ------------------------------------------------------------------------- the prior

@given(layers, st.integers(0, 999))
def test_given_the_order_parameter_the_output_is_a_gaussian_process(sizes, seed):
    # checks: thm-ap-gp
    # The output is linear in the first weights, so its covariance over them is exact linear algebra.
    weights = draw_weights(4, generator=generator(seed), **sizes)
    problem = data(sizes["heads"], seed)
    J = torch.autograd.functional.jacobian(lambda V: network_output([V, *weights[1:]], *problem), weights[0]).flatten(1)
    C = path_kernels(path_inputs(*problem), variance=sizes["variances"][0])
    K = combine(order_parameter(weights), C)
    torch.testing.assert_close(sizes["variances"][0] * J @ J.mT, K, rtol=1e-9, atol=1e-11)


def test_moments_of_the_prior():
    # checks: prp-ap-moments
    # Of a hierarchy of Wishart matrices: means, and second moments that depend on the widths.
    v_1, v_a, N_1, N_a, count = 0.8, 1.4, 3, 2, 200_000
    weights = draw_weights(1, heads=(2,), widths=(N_1, N_a), variances=(1, v_1, v_a), batch=(count,),
                           generator=generator(1))
    U = order_parameter(weights)
    above = (v_a * v_1) ** 2 * (1 + 2 / N_a)
    for value, wanted in ((U[:, 0, 0], v_1 * v_a), (U[:, 1, 1], v_1 * v_a), (U[:, 0, 1], 0.0),
                          (U[:, 0, 0] ** 2, above * (1 + 2 / N_1)), (U[:, 0, 1] ** 2, above / N_1),
                          (U[:, 0, 0] * U[:, 1, 1], above)):
        assert abs(value.mean() - wanted) < 4 * value.std() / math.sqrt(count)


# ------------------------------------------------------------------------- attention

def test_attention_of_a_form_and_of_queries_and_keys():
    x, W = normal(3, 4, 5), normal(2, 4, 4, seed=1)
    omega = bilinear_attention(x, W)
    logits = torch.einsum("s,st,t->", x[2, :, 3], W[1], x[2, :, 0]), torch.einsum("s,st,t->", x[2, :, 1], W[1],
                                                                                  x[2, :, 0])
    assert (omega[1, 2, 3, 0] / omega[1, 2, 1, 0]).log().item() == pytest.approx((logits[0] - logits[1]).item())
    torch.testing.assert_close(omega.sum(-2), torch.ones(2, 3, 5, dtype=torch.float64))

    module = QueryKeyAttention(4, (2, 3), 6, generator=generator())
    assert [tuple(o.shape) for o in module(x)] == [(2, 3, 5, 5), (3, 3, 5, 5)]
    form = module.keys[1].mT @ module.queries[1] / math.sqrt(6)
    torch.testing.assert_close(module(x)[1], bilinear_attention(x, form))


# ------------------------------------------------------------------------- training

PROBLEM = data((2, 1), seed=3, examples=8)
LABELS = normal(8, seed=4).sign()


def network(**options):
    return AttentionNetwork(4, heads=(2, 1), widths=(5, 4, 3), generator=generator(2), **options)


def test_one_step_of_gradient_descent():
    net = network(variances=(1, 2, 0.5, 1))
    before = [V.detach().clone().requires_grad_() for V in net.weights]
    f = network_output(before, *PROBLEM)
    loss = ((f - LABELS).square().sum() / 2 + 0.3 * sum(V.square().sum() / (2 * v) for V, v in
                                                        zip(before, (1, 2, 0.5, 1), strict=True))) / 8
    gradients = torch.autograd.grad(loss, before)
    result = train(net, PROBLEM[0], PROBLEM[1], LABELS, PROBLEM[2], steps=1, learning_rate=0.1, temperature=0.3,
                   method="sgd")
    assert result.losses.tolist() == pytest.approx([loss.item()])
    for V, old, slope in zip(net.weights, before, gradients, strict=True):
        torch.testing.assert_close(V.detach(), (old - 0.1 * slope).detach())


def test_training_reaches_a_point_of_rest_where_all_layers_pay_the_same():
    net = network(variances=(1, 2, 0.5, 1))
    temperature = 0.05
    train(net, PROBLEM[0], PROBLEM[1], LABELS, PROBLEM[2], steps=400, learning_rate=0.05, temperature=temperature)
    result = train(net, PROBLEM[0], PROBLEM[1], LABELS, PROBLEM[2], steps=1500, learning_rate=0.3, method="sgd",
                   temperature=temperature)
    assert result.gradient_norm < 1e-6
    # The output is linear in each layer: sum (f - y) f + T |V|^2 / sigma^2 = 0, for every one of them.
    f = net(*PROBLEM).detach()
    pays = [temperature * V.detach().square().sum().item() / v for V, v in zip(net.weights, net.variances, strict=True)]
    assert pays == pytest.approx([((LABELS - f) * f).sum().item()] * 4, rel=1e-3) and pays[0] > 0.1


def test_batches_take_every_example_once():
    # With a step of almost nothing, the losses of an epoch average to the loss of all examples.
    net = network()
    result = train(net, PROBLEM[0], PROBLEM[1], LABELS, PROBLEM[2], steps=8, learning_rate=1e-12, batch_size=2,
                   generator=generator(5))
    assert result.losses[:4].mean().item() == pytest.approx(result.loss, rel=1e-9)
    assert result.losses[4:].mean().item() == pytest.approx(result.loss, rel=1e-9)
    assert sorted(result.losses[:4].tolist()) != pytest.approx(sorted(result.losses[4:].tolist()), rel=1e-6)
    again = train(network(), PROBLEM[0], PROBLEM[1], LABELS, PROBLEM[2], steps=8, learning_rate=1e-12, batch_size=2,
                  generator=generator(5))
    assert torch.equal(again.losses, result.losses)


def test_attention_can_be_trained_too():
    fixed, free = network(), network()
    attention = QueryKeyAttention(4, (2, 1), 3, generator=generator(6))
    options = {"steps": 60, "learning_rate": 0.02}
    before = [Q.detach().clone() for Q in attention.queries]
    held = train(fixed, PROBLEM[0], attention.forward, LABELS, PROBLEM[2], **options)     # a function: nothing to train
    assert all(torch.equal(Q.detach(), old) for Q, old in zip(attention.queries, before, strict=True))
    trained = train(free, PROBLEM[0], attention, LABELS, PROBLEM[2], **options)
    assert all((Q.detach() - old).abs().max() > 1e-3 for Q, old in zip(attention.queries, before, strict=True))
    assert trained.loss < held.loss < held.losses[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_training_on_a_gpu():
    here, there = network(), network().cuda()
    options = {"steps": 20, "learning_rate": 0.02, "batch_size": 4}
    a = train(here, PROBLEM[0], PROBLEM[1], LABELS, PROBLEM[2], generator=generator(1), **options)
    b = train(there, PROBLEM[0], PROBLEM[1], LABELS, PROBLEM[2], generator=generator(1), **options)
    torch.testing.assert_close(a.losses, b.losses)


@pytest.mark.parametrize("call, words", [
    (lambda: draw_weights(4, heads=(2,), widths=(3,)), "widths"),
    (lambda: draw_weights(4, heads=(2,), widths=(3, 2.5)), "whole numbers"),
    (lambda: draw_weights(4, heads=(0,), widths=(3, 2)), "heads"),
    (lambda: draw_weights(4, heads=(2,), widths=(3, 2), variances=(1, 1)), "variances"),
    (lambda: draw_weights(0, heads=(2,), widths=(3, 2)), "features"),
    (lambda: network_output(draw_weights(4, heads=(2,), widths=(3, 2)), *PROBLEM), "do not go with"),
    (lambda: network_output(draw_weights(4, heads=(2, 2), widths=(3, 2, 2)), *PROBLEM), "do not go with"),
    (lambda: bilinear_attention(PROBLEM[0], normal(2, 3, 3)), "forms"),
    (lambda: QueryKeyAttention(4, (2,), 0), "positive"),
    (lambda: train(network(), PROBLEM[0], PROBLEM[1], LABELS[:3], PROBLEM[2], steps=1, learning_rate=1), "labels"),
    (lambda: train(network(), PROBLEM[0], PROBLEM[1], LABELS, PROBLEM[2], steps=1, learning_rate=0), "learning_rate"),
    (lambda: train(network(), PROBLEM[0], PROBLEM[1], LABELS, PROBLEM[2], steps=1, learning_rate=1, temperature=-1),
     "temperature"),
    (lambda: train(network(), PROBLEM[0], PROBLEM[1], LABELS, PROBLEM[2], steps=1, learning_rate=1, batch_size=9),
     "batch_size"),
    (lambda: train(network(), PROBLEM[0], PROBLEM[1], LABELS, PROBLEM[2], steps=1, learning_rate=1, method="x"),
     "method"),
    (lambda: train(network(), PROBLEM[0], [o.mT for o in PROBLEM[1]], LABELS, PROBLEM[2], steps=1, learning_rate=1),
     "not column-stochastic"),
])
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_loss_that_is_no_number_stops():
    with pytest.raises(FloatingPointError, match="learning rate"):
        train(network(), PROBLEM[0], PROBLEM[1], LABELS, PROBLEM[2], steps=300, learning_rate=100, method="sgd")
