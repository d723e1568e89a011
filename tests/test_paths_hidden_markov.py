"""The hidden-Markov-chain task: its chains, its heads, and what the theory finds on its paths."""

import math

import pytest
import torch

from kernelbook.paths import path_diagonal, path_inputs, path_kernels, posterior, predict, solve_order_parameters
from kernelbook.paths.hidden_markov import (
    FOUR_PATHS,
    TWO_PATHS,
    HiddenMarkov,
    four_path_heads,
    four_paths,
    random_head,
    staying_head,
    two_path_heads,
    two_paths,
    uniform_head,
)
from kernelbook.paths.network import bilinear_attention


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------- chains

def test_statistics_of_the_states():
    _, labels, states = HiddenMarkov(length=11, features=2).sample(20_000, generator())
    assert labels.tolist() == [1.0] * 10_000 + [-1.0] * 10_000
    assert set(states.unique().tolist()) == {-1, 1}
    same = (states[:, 1:] == states[:, :-1]).double()
    for y, stay in ((1, 0.7), (-1, 0.3)):
        for state in (1, -1):                                   # the same for both states
            share = same[(labels == y)[:, None] & (states[:, :-1] == state)]
            assert share.mean().item() == pytest.approx(stay, abs=4 * 0.46 / math.sqrt(len(share)))
        assert (states[labels == y, 0] == 1).double().mean().item() == pytest.approx(0.5, abs=0.02)


def test_tokens_are_patterns_noise_and_positions():
    clean = HiddenMarkov(length=4, features=6, noise=0, noise_outside=0)
    x, _, states = clean.sample(10, generator(1))
    assert x.shape == (10, 11, 5) and (clean.width, clean.tokens) == (11, 5)
    assert (x[:, :6, 0] == 0).all() and torch.equal(x[3, 6:], torch.eye(5, dtype=torch.float64))
    plus, minus = clean.patterns
    assert (plus @ plus).item() == pytest.approx(6) and plus @ minus == 0 and plus[0] > 0
    for t in range(4):
        wanted = torch.where((states[:, t] > 0)[:, None], plus, minus)
        torch.testing.assert_close(x[:, :6, t + 1], wanted)
    assert clean.readout.tolist() == [0, 0, 0, 0, 1]


def test_strengths_of_the_noise():
    settings = {"length": 20, "features": 40}
    clean, noisy = (HiddenMarkov(noise=a, noise_outside=b, **settings).sample(400, generator(2))[0][:, :40, 1:]
                    for a, b in ((0, 0), (0.5, 3)))
    noise = (noisy - clean).mT
    plane = HiddenMarkov(**settings).patterns / math.sqrt(40)
    inside = noise @ plane.T
    assert inside.std(dim=(0, 1)).tolist() == pytest.approx([0.5, 0.5], rel=0.03)
    outside = noise - inside @ plane
    assert outside.square().sum(-1).mean().item() == pytest.approx(38 * 9, rel=0.02)


def test_streams_of_random_numbers():
    small = HiddenMarkov(length=5, features=4)
    a = four_paths(6, seed=3, chain=small)
    assert torch.equal(a.inputs, four_paths(6, seed=3, chain=small).inputs)
    assert not torch.equal(a.inputs, four_paths(6, seed=4, chain=small).inputs)
    assert not torch.equal(a.inputs, four_paths(6, seed=3, chain=small, test=True).inputs)
    first, second = four_path_heads(small, 1)
    assert not torch.equal(first[1], second[1]) and not torch.equal(first[1], four_path_heads(small, 2)[0][1])
    # Heads do not depend on the chains, nor on which stream these are from.
    same = (four_paths(6, seed=3, head_seed=s, chain=small) for s in (1, 1, 2))
    one, two, other = (t.attention[0] for t in same)
    assert torch.equal(one, two) and torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])


# ------------------------------------------------------------------------- heads

def test_logits_of_the_staying_head():
    chain = HiddenMarkov(length=5, features=6, noise=0, noise_outside=0)
    x, _, states = chain.sample(40, generator(3))
    logits = x.mT @ staying_head(chain) @ x                     # key, query
    assert (logits[:, :, 0] == 0).all()                         # the beginning looks at all alike
    for query in range(1, 6):
        assert logits[:, 0, query] == pytest.approx(1.5)
        for key in range(1, 6):
            same = (states[:, key - 1] == states[:, query - 1]).double() * 2 - 1
            torch.testing.assert_close(logits[:, key, query], same + (key == query - 1))


def test_the_good_path_reads_how_often_a_state_stayed():
    # At a low temperature of attention and without noise, exactly.
    chain = HiddenMarkov(length=9, features=6, noise=0, noise_outside=0)
    task = four_paths(30, seed=4, beta=100.0, chain=chain)
    states = torch.where(task.inputs[:, 0, 1:] > 0, 1, -1)
    good = path_inputs(task.inputs, task.attention, task.readout)[FOUR_PATHS.index("good")]
    stays = (states[:, 1:] == states[:, :-1]).sum(1)
    # The mean over 10 tokens; the beginning looks at all alike, so it adds a mean of its own: 9 of 10 have features.
    read = good[:, :6] @ chain.patterns.sum(0) / 6
    torch.testing.assert_close(read, (stays.double() + 0.9) / 10)


def test_uniform_and_random_heads():
    chain = HiddenMarkov(length=15, features=60)
    x = chain.sample(2, generator())[0]
    omega = bilinear_attention(x, torch.stack([uniform_head(chain)]))
    torch.testing.assert_close(omega, torch.full_like(omega, 1 / 16))
    W = torch.stack([random_head(chain, generator(k)) for k in range(40)])
    for block, scale in ((W[:, :60, :60], 1 / 60), (W[:, 60:, 60:], 1.0), (W[:, :60, 60:], 60**-0.5),
                         (W[:, 60:, :60], 60**-0.5)):
        assert block.std().item() == pytest.approx(scale, rel=0.03) and abs(block.mean().item()) < 0.05 * scale


def test_which_heads_make_which_path():
    assert FOUR_PATHS == ("good", "adversarial 1", "denoising", "adversarial 2") and TWO_PATHS == ("good", "denoising")
    chain = HiddenMarkov(length=6, features=4)
    task = four_paths(4, seed=5, head_seed=6, beta=2.0, chain=chain)
    staying, uniform = staying_head(chain), uniform_head(chain)
    (_, random), _ = four_path_heads(chain, 6)
    xi = path_inputs(task.inputs, task.attention, task.readout)
    for index, heads in ((0, (staying, uniform)), (2, (random, uniform))):
        first, second = (bilinear_attention(task.inputs, 2.0 * W[None])[0] for W in heads)
        torch.testing.assert_close(xi[index], (task.inputs @ first @ second)[:, :, -1])
    assert [len(o) for o in task.attention] == [2, 2]
    assert [len(W) for W in two_path_heads(chain)] == [2, 1] == [len(o) for o in two_paths(4, chain=chain).attention]
    x = two_paths(4, seed=5, beta=2.0, chain=chain)
    xi = path_inputs(x.inputs, x.attention, x.readout)
    torch.testing.assert_close(xi[1], x.inputs.mean(-1))        # of a mean nothing is left but a mean


# ------------------------------------------------------------------------- what the theory finds

def accuracies(make, heads, seed, widths):
    """Of the theory on 500 test chains at each width, of infinite width, and the order parameters."""
    training, test = make(100, seed), make(500, seed, test=True)
    xi, new = (path_inputs(t.inputs, t.attention, t.readout) for t in (training, test))
    kernels, cross, diagonal = path_kernels(xi), path_kernels(new, xi), path_diagonal(new)

    def accuracy(mean):
        return (mean.sign() == test.labels).double().mean().item()

    def at_infinity(*paths):
        U = torch.zeros(len(kernels), len(kernels), dtype=torch.float64)
        U[paths, paths] = 1.0
        return accuracy(posterior(U, kernels, training.labels, cross, diagonal, temperature=0.01).mean)

    solutions = [solve_order_parameters(kernels, training.labels, heads=heads, widths=(N,) * 3, variances=(1.0,) * 4,
                                        temperature=0.01) for N in widths]
    assert all(s.converged for s in solutions)
    return [accuracy(predict(s, cross, diagonal).mean) for s in solutions], at_infinity, [s.U[0] for s in solutions]


def test_four_paths():
    for seed in (0, 1):
        finite, at_infinity, U = accuracies(lambda P, seed, **o: four_paths(P, seed=seed, head_seed=seed, **o), (2, 2),
                                            seed, (10, 100, 1000))
        good, adversarial, denoising, other = range(4)
        everything, alone, both = at_infinity(0, 1, 2, 3), at_infinity(good), at_infinity(good, denoising)
        assert 0.94 < finite[0] < 0.98 and 0.86 < finite[1] < 0.95 and 0.78 < finite[2] < 0.89
        assert everything < finite[2] + 0.01 < finite[1] < finite[0]        # towards that of infinite width
        assert 0.77 < everything < 0.88 and 0.89 < alone < 0.96 and 0.93 < both < 0.985
        assert everything < alone < both < finite[0] + 0.03
        # Noise is subtracted, and paths that disturb are turned down; both fade with the width.
        off = [u[good, denoising].item() for u in U]
        assert off[0] < -3 and off[0] < 5 * off[1] < 25 * off[2] < 0
        assert U[0][good, good] > 9 and U[0][denoising, denoising] > 3
        assert max(U[0][adversarial, adversarial], U[0][other, other]) < 0.7 < U[2].diagonal().min()


def test_two_paths():
    finite, at_infinity, U = accuracies(lambda P, seed, **o: two_paths(P, seed=seed, **o), (2, 1), 0, (10, 100, 1000))
    assert 0.92 < finite[0] < 0.97 and 0.86 < finite[1] < 0.92 and 0.79 < finite[2] < 0.87
    assert 0.76 < at_infinity(0, 1) <= finite[2] + 0.01 and at_infinity(0) < 0.62       # the good path alone is blind
    assert U[0][0, 1] < -1 and U[0][0, 0] > 2 and -0.06 < U[2][0, 1] < 0


@pytest.mark.parametrize("call, words", [
    (lambda: HiddenMarkov(length=0), "length"),
    (lambda: HiddenMarkov(features=7), "even"),
    (lambda: HiddenMarkov(stay=(0.7, 1.3)), "stay"),
    (lambda: HiddenMarkov(noise_outside=-1), "noise"),
    (lambda: four_paths(7), "even number"),
    (lambda: two_paths(0), "even number"),
    (lambda: four_paths(4, beta=-1.0), "beta"),
])
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()
