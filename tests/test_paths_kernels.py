"""Paths of attention and the kernels between them: against the network itself, written out as its definition says."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernelbook.paths import (
    combine,
    head_scores,
    kernel_alignment,
    path_diagonal,
    path_heads,
    path_index,
    path_inputs,
    path_kernels,
    paths_through,
    prune_heads,
    task_alignment,
)

HEADS = st.sampled_from([(1,), (3,), (2, 2), (1, 3), (3, 2), (2, 1, 2), ()])


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data(heads, seed, P=3, N_0=3, n=4):
    """Sequences, column-stochastic attention and a readout."""
    attention = [random(seed + 1 + layer, H, P, n, n).mul(2).softmax(-2) for layer, H in enumerate(heads)]
    return random(seed, P, N_0, n), attention, random(seed + 9, n)


def by_definition(x, attention, readout):
    """Path inputs, one matrix after the other."""
    rows = []
    for path in itertools.product(*(range(len(omega)) for omega in attention)):
        rows.append([])
        for mu, matrix in enumerate(x):
            for omega, head in zip(attention, path, strict=True):
                matrix = matrix @ omega[head, mu]
            rows[-1].append(matrix @ readout)
    return torch.stack([torch.stack(row) for row in rows])


@given(heads=HEADS, seed=st.integers(0, 10_000))
def test_path_inputs_are_products_of_attention(heads, seed):
    x, attention, readout = data(heads, seed)
    leaves = [x.requires_grad_(), *(a.requires_grad_() for a in attention), readout.requires_grad_()]
    fast, slow = path_inputs(x, attention, readout), by_definition(x, attention, readout)
    assert fast.shape == (math.prod(heads), 3, 3)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-13)
    weight = random(seed + 20, *fast.shape)
    for ours, theirs in zip(torch.autograd.grad((fast * weight).sum(), leaves),
                            torch.autograd.grad((slow * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@given(heads=HEADS, seed=st.integers(0, 10_000), variance=st.sampled_from([1.0, 0.3]))
def test_a_network_with_fixed_upper_layers_is_a_gaussian_process(heads, seed, variance):
    # checks: thm-ap-gp
    # Layer by layer as defined.  The output is linear in the first weights, so its covariance is exact.
    x, attention, readout = data(heads, seed)
    widths = [4, 3, 5, 6][:len(heads) + 1]
    V = [random(seed + 30 + i, H, widths[i + 1], widths[i]) for i, H in enumerate(heads)]
    a, V_0 = random(seed + 40, widths[-1]), random(seed + 41, widths[0], 3).requires_grad_()
    outputs = []
    for mu in range(len(x)):
        z = V_0 @ x[mu] / math.sqrt(3)
        for layer, H in enumerate(heads):
            z = sum(V[layer][h] @ z @ attention[layer][h, mu] for h in range(H)) / math.sqrt(H * widths[layer])
        outputs.append(a @ z @ readout / math.sqrt(widths[-1]))
    slopes = torch.stack([torch.autograd.grad(f, V_0, retain_graph=True)[0].flatten() for f in outputs])

    w = []                                                       # what a path does to the hidden units of z^0
    for path in itertools.product(*(range(H) for H in heads)):
        row = a / math.sqrt(widths[-1]) if heads else a            # the factor 1/sqrt(N_1) is in U
        for layer in reversed(range(len(heads))):
            row = row @ V[layer][path[layer]] / (math.sqrt(widths[layer]) if layer else 1)
        w.append(row)
    U = torch.stack(w) @ torch.stack(w).T / widths[0]
    kernels = path_kernels(path_inputs(x, attention, readout), variance=variance)
    torch.testing.assert_close(combine(U, kernels), variance * slopes @ slopes.T, rtol=1e-11, atol=1e-12)


@given(paths=st.integers(1, 4), seed=st.integers(0, 10_000))
def test_kernels_are_inner_products(paths, seed):
    xi, other = random(seed, paths, 3, 5), random(seed + 1, paths, 2, 5)
    kernels, cross, diagonal = path_kernels(xi, variance=0.7), path_kernels(other, xi, 0.7), path_diagonal(other, 0.7)
    for a, b in itertools.product(range(paths), repeat=2):
        torch.testing.assert_close(kernels[a, b], 0.7 / 5 * xi[a] @ xi[b].T)
        torch.testing.assert_close(cross[a, b], 0.7 / 5 * other[a] @ xi[b].T)
        torch.testing.assert_close(diagonal[a, b], (0.7 / 5 * other[a] @ other[b].T).diagonal())
        torch.testing.assert_close(kernels[a, b], kernels[b, a].T)
    U = random(seed + 2, 2, paths, paths)
    for part in (kernels, cross, diagonal):
        written = [sum(u[a, b] * part[a, b] for a in range(paths) for b in range(paths)) / paths for u in U]
        torch.testing.assert_close(combine(U, part), torch.stack(written))
        torch.testing.assert_close(combine(U[1], part), written[1])
    assert torch.autograd.gradcheck(lambda z: path_kernels(z, other), xi.requires_grad_())


@given(heads=HEADS)
def test_the_first_layers_head_is_the_slowest_index(heads):
    paths = list(itertools.product(*(range(H) for H in heads)))
    assert [tuple(row) for row in path_heads(heads).tolist()] == paths
    assert [path_index(heads, path) for path in paths] == list(range(len(paths)))
    for layer, H in enumerate(heads):
        for head in range(H):
            assert paths_through(heads, layer, head).tolist() == [path[layer] == head for path in paths]


@given(heads=HEADS, seed=st.integers(0, 10_000))
def test_scores_and_pruning_of_heads(heads, seed):
    paths = list(itertools.product(*(range(H) for H in heads)))
    U = random(seed, len(paths), len(paths))
    U = U @ U.T
    expected = []
    for layer, H in enumerate(heads):                            # row block and column block, less what both hold
        for head in range(H):
            on = [path[layer] == head for path in paths]
            rows, both = U[on].abs().sum(), U[on][:, on].abs().sum()
            expected.append(rows + U[:, on].abs().sum() - both)
    scores = head_scores(torch.stack([U, 3 * U]), heads)
    assert [s.shape for s in scores] == [(2, H) for H in heads]
    if heads:
        for row in torch.cat(scores, -1):
            torch.testing.assert_close(row, torch.stack(expected) / max(expected))
    kernels = path_kernels(random(seed + 1, len(paths), 4, 6))
    for layer, H in enumerate(heads):
        left = [i for i, path in enumerate(paths) if path[layer] != H - 1]
        without = prune_heads(U, heads, [(layer, H - 1)])
        written = sum((U[a, b] * kernels[a, b] for a in left for b in left), torch.zeros(4, 4).double()) / len(paths)
        torch.testing.assert_close(combine(without, kernels), written)
    assert torch.equal(prune_heads(U, heads, []), U)


def test_alignment():
    A = random(0, 6, 6)
    K, y = A @ A.T, torch.tensor([1.0, -1, 1, 1, -1, -1]).double()
    eigenvalues, overlaps = task_alignment(K, y)
    assert (eigenvalues.diff() < 0).all() and (overlaps**2).sum() == pytest.approx(1)
    projected = sum(value * 6 * overlap**2 for value, overlap in zip(eigenvalues, overlaps, strict=True))
    assert projected == pytest.approx((y @ K @ y).item())
    task = torch.outer(y, y)
    assert task_alignment(task, y).overlaps[0] == pytest.approx(1) == kernel_alignment(5 * task, y)
    assert kernel_alignment(K, y) == pytest.approx((K * task).sum().item() / K.norm().item() / task.norm().item())


X, ATTENTION, READOUT = data((2, 2), 0)


@pytest.mark.parametrize("call, words", [
    (lambda: path_inputs(X[:0], [a[:, :0] for a in ATTENTION], READOUT), "at least one"),
    (lambda: path_inputs(X[0], ATTENTION, READOUT), "examples, features, tokens"),
    (lambda: path_inputs(X, ATTENTION, READOUT[1:]), "one weight for each of the 4 tokens"),
    (lambda: path_inputs(X, [ATTENTION[0][:, 1:]], READOUT), r"attention of layer 0 must have the shape"),
    (lambda: path_inputs(X, [ATTENTION[0][0]], READOUT), "must have the shape"),
    (lambda: path_inputs(X, [ATTENTION[0], ATTENTION[1].mT], READOUT), "layer 1 is not column-stochastic.*transpose"),
    (lambda: path_inputs(X, [2 * ATTENTION[0]], READOUT), "softmax over dim=-2"),
    (lambda: path_inputs(X, [-ATTENTION[0]], READOUT), "negative"),
    (lambda: path_inputs(X, [ATTENTION[0] * math.nan], READOUT), "not finite"),
    (lambda: path_kernels(random(0, 2, 3, 4), random(0, 2, 3, 5)), "same paths and features"),
    (lambda: path_kernels(random(0, 2, 0, 4)), "at least one"),
    (lambda: path_kernels(random(0, 2, 3, 4), variance=0.0), "variance"),
    (lambda: combine(random(0, 3, 3), random(0, 2, 2, 4, 4)), "paths"),
    (lambda: path_heads((2, 0)), "positive integers"),
    (lambda: path_index((2, 3), (1, 3)), "head 3 of layer 1 is out of range"),
    (lambda: path_index((2, 3), (1,)), "one head in each of the 2 layers"),
    (lambda: paths_through((2, 3), 2, 0), "layer 2 is out of range"),
    (lambda: paths_through((2, 3), 0, -1), "head -1 of layer 0 is out of range"),
    (lambda: head_scores(random(0, 5, 5), (2, 3)), "6 paths"),
    (lambda: head_scores(torch.zeros(6, 6), (2, 3)), "zero"),
    (lambda: prune_heads(random(0, 6, 6), (2, 3), [(0, 2)]), "head 2 of layer 0 is out of range"),
    (lambda: task_alignment(random(0, 3, 3), random(0, 2)), "shapes"),
    (lambda: kernel_alignment(torch.zeros(2, 2), random(0, 2)), "zero"),
])
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_numbers_of_several_types_are_refused():
    with pytest.raises(TypeError, match="double"):
        path_inputs(X.float(), ATTENTION, READOUT)
    with pytest.raises(TypeError, match="int64"):
        path_inputs(X, [ATTENTION[0].long()], READOUT)
