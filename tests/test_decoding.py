"""Decoding with what was seen kept: the answers of the full pass, token by token, and the searches built on them."""

import pytest
import torch

from kernelbook import kernels
from kernelbook.attention import KernelAttention
from kernelbook.decoding import greedy
from kernelbook.models import Transformer, TransformerConfig

SMALL = {"vocabulary": 40, "width": 16, "heads": 2, "layers": 2, "feedforward": 32}
BOS, EOS = 1, 2
KERNELS = [(kernel, "sum" if kernel.normalisable else "abs-sum")
           for kernel in (*(kernels.get(name) for name in kernels.available()), kernels.EDP() * kernels.RBF(),
                          kernels.TensorProduct(kernels.EDP(), kernels.RBF(), 3), kernels.EDP() + kernels.Quadratic())]
each_kernel = pytest.mark.parametrize(("kernel", "normaliser"), KERNELS, ids=lambda x: repr(x))
each_architecture = pytest.mark.parametrize("architecture", ["decoder", "encoder-decoder"])


@pytest.fixture(autouse=True)
def _no_graph():
    with torch.no_grad():
        yield


def make(architecture="encoder-decoder", **options):
    torch.manual_seed(0)
    return Transformer(TransformerConfig(architecture, **(SMALL | options))).double().eval()


def tokens(*shape, seed=0):
    return torch.randint(3, 40, shape, generator=torch.Generator().manual_seed(seed))


def memory_of(model, batch):
    """What ``encode`` returns for sources of different lengths, or nothing for a decoder alone."""
    if model.encoder is None:
        return ()
    source = tokens(batch, 7, seed=1)
    for i in range(batch):
        source[i, 3 + i:] = 0
    return model.encode(source)


def close(got, expected, tolerance=1e-12):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@each_kernel
@each_architecture
def test_token_by_token_is_the_full_pass(architecture, kernel, normaliser):
    model, text = make(architecture, kernel=kernel, normaliser=normaliser), tokens(3, 9)
    memory = memory_of(model, 3)
    expected = model.decode(text, *memory)
    for pieces in ([1] * 9, [5, 1, 1, 2], [9]):
        cache = model.new_cache(*memory)
        parts = [model.decode(piece, cache=cache) for piece in text.split(pieces, 1)]
        close(torch.cat(parts, 1), expected)
        assert len(cache) == 9
    cache.truncate(4)       # another end, for other rows
    rows = torch.tensor([2, 0, 2, 1])
    cache.select(rows)
    other = tokens(4, 3, seed=5)
    parts = [model.decode(piece, cache=cache) for piece in other.split([2, 1], 1)]
    close(torch.cat(parts, 1), model.decode(torch.cat((text[rows, :4], other), 1), *(x[rows] for x in memory))[:, 4:])


@each_architecture
@pytest.mark.parametrize("kernel", ["rbf", "exponentiated_intersection", "taylor"])
def test_rows_of_different_lengths_go_on(architecture, kernel):
    """Padding takes no position and is seen by no later token: each row is what it would be alone."""
    model, lengths = make(architecture, kernel=kernel), [4, 2, 1]
    memory = memory_of(model, 3)
    prompt, rest = tokens(3, 4), tokens(3, 5, seed=1)
    hidden = torch.arange(4) >= torch.tensor(lengths)[:, None]
    ended = torch.zeros(3, 5, dtype=torch.bool)
    ended[1, 2:] = True         # the second row stops after two more tokens
    cache = model.new_cache(*memory)
    first = model.decode(prompt.masked_fill(hidden, 0), cache=cache, hidden=hidden)
    parts = [model.decode(rest[:, :2], cache=cache)]
    parts += [model.decode(rest[:, t, None], cache=cache, hidden=ended[:, t, None]) for t in (2, 3, 4)]
    for i, length in enumerate(lengths):
        alone = torch.cat((prompt[i, :length], rest[i][~ended[i]]))[None]
        expected = model.decode(alone, *(x[i:i + 1] for x in memory))[0]
        close(first[i, :length], expected[:length])
        close(torch.cat(parts, 1)[i][~ended[i]], expected[length:])
    cache.select(torch.tensor([2, 1]))
    cache.truncate(6)
    again = model.decode(rest[[2, 1], 2:], cache=cache)
    close(again[0], torch.cat(parts, 1)[2, 2:])


def test_the_memory_is_projected_once(monkeypatch):
    rows, project = [], KernelAttention._project

    def record(module, query, key, value):
        rows.append(key.shape[1])
        return project(module, query, key, value)

    monkeypatch.setattr(KernelAttention, "_project", record)
    model, source = make(), tokens(3, 7)
    memory = model.encode(source)
    cache = model.new_cache(*memory)
    rows.clear()
    for t in range(5):
        model.decode(tokens(3, 1, seed=t), cache=cache)
    assert rows == [1] * 10         # two self-attentions, five tokens: one key each, and none of the memory


def ending(**options):
    """A model whose searches end, some earlier than others: its scores go up and down, where its own repeat a token."""
    model = make(**options)
    scores = model.logits
    model.logits = lambda x: (20 * scores(x)).sin() + 0.05 * (torch.arange(40) == EOS)
    return model


@pytest.mark.parametrize("kernel", ["edp", "rbf", "exponentiated_intersection", "taylor", "l2"])
def test_greedy_keeps_what_it_saw_with_the_same_result(kernel):
    model, source = ending(kernel=kernel), tokens(24, 6)
    source[::3, 4:] = 0
    options = {"bos_id": BOS, "eos_id": EOS, "max_length": 20}
    found = greedy(model, source, **options)
    assert found == greedy(model, source, cache=False, **options)
    assert found[3:5] == greedy(model, source[3:5], **options)          # whoever else is in the batch
    lengths = {len(row) for row in found}
    assert len(lengths) > 3 and min(lengths) < 8, lengths


def test_greedy_stops_when_all_have_ended():
    model, source = make(), tokens(4, 6)
    steps, decode = [], model.decode
    model.decode = lambda tokens, **options: (steps.append(len(tokens)), decode(tokens, **options))[1]
    model.embedding.weight[EOS] = 0.0
    assert [len(row) for row in greedy(model, source, bos_id=BOS, eos_id=EOS, max_length=3)] == [3] * 4
    assert steps == [4] * 3
    steps.clear()
    model.logits = lambda x: torch.nn.functional.one_hot(torch.tensor([EOS] * len(x)), 40).double()
    assert greedy(model, source, bos_id=BOS, eos_id=EOS, max_length=30) == [[]] * 4 and steps == [4]


MODEL, DECODER = make(), make("decoder")
MEMORY = [x.detach() for x in MODEL.encode(tokens(2, 3))]


@pytest.mark.parametrize(("call", "words"), [
    (lambda: MODEL.new_cache(), "memory="),
    (lambda: DECODER.new_cache(*MEMORY), "a decoder alone without"),
    (lambda: make("classifier", classes=2).new_cache(), "has no decoder"),
    (lambda: MODEL.decode(tokens(2, 1), *MEMORY, cache=MODEL.new_cache(*MEMORY)), "cache holds"),
    (lambda: MODEL.decode(tokens(2, 1), cache=DECODER.new_cache()), "another model"),
    (lambda: make(layers=1).decode(tokens(2, 1), cache=MODEL.new_cache(*MEMORY)), "another model"),
    (lambda: make(kernel="rbf").decode(tokens(2, 1), cache=MODEL.new_cache(*MEMORY)), "EDP"),
    (lambda: MODEL.decode(tokens(3, 1), cache=MODEL.new_cache(*MEMORY)), r"q must be \(2, 2, 'n', 8\)"),
    (lambda: DECODER.decode(tokens(2, 1), hidden=torch.ones(2, 1, dtype=torch.bool)), "goes with cache="),
    (lambda: DECODER.decode(tokens(2, 1), cache=DECODER.new_cache(), hidden=torch.ones(2, 1)), "boolean"),
    (lambda: DECODER.decode(tokens(2, 1), cache=DECODER.new_cache(), hidden=torch.ones(2, 2) > 0), r"\(2, 1\)"),
    (lambda: DECODER.new_cache().truncate(1), "from 0 to 0"),
    (lambda: MODEL.record_heads(lambda: greedy(MODEL, tokens(1, 3), bos_id=BOS, eos_id=EOS, max_length=2)),
     "with a cache"),
    (lambda: greedy(MODEL, tokens(1, 3), bos_id=BOS, eos_id=EOS, max_length=0), "at least 1"),
    (lambda: greedy(DECODER, tokens(1, 3), bos_id=BOS, eos_id=EOS, max_length=1), "no encoder"),
])
def test_misuse_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_gradients_through_a_cache_are_refused():
    with torch.enable_grad(), pytest.raises(ValueError, match="no_grad"):
        DECODER.decode(tokens(1, 2), cache=DECODER.new_cache())
