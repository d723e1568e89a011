"""Decoding with what was seen kept: the answers of the full pass, token by token, and the searches built on them."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelbook import kernels
from kernelbook.attention import KernelAttention
from kernelbook.decoding import _draw, _largest, beam, greedy, probabilities, sample
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


def ending(sharpness=1.0, **options):
    """A model whose searches end, some earlier than others: its scores go up and down, where its own repeat a token."""
    model = make(**options)
    scores, ends = model.logits, 0.05 * (torch.arange(model.config.vocabulary) == EOS)
    model.logits = lambda x: sharpness * ((20 * scores(x)).sin() + ends)
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


def test_greedy_stops_each_target_at_its_own_limit():
    model, source = ending(), tokens(6, 6)
    options = {"bos_id": BOS, "eos_id": EOS}
    limits = [1, 9, 2, 30, 4, 3]
    expected = [greedy(model, row[None], max_length=limit, **options)[0]
                for row, limit in zip(source, limits, strict=True)]
    assert greedy(model, source, max_length=limits, **options) == expected
    assert [len(row) for row in expected[:3:2]] == [1, 2]


# ------------------------------------------------------------------------- beam search

SOURCES = tokens(3, 6)
SOURCES[1, 4:], SOURCES[2, 1:] = 0, 0


def plain_beam(model, source, width, alpha, limit):
    """By the definition: one sentence, no cache, and on to the limit whatever has been found."""
    live, finished = [((), 0.0)], []
    for t in range(1, limit + 1):
        found = []
        for rank, (path, total) in enumerate(live):
            scores = model(source[source != 0][None], torch.tensor([[BOS, *path]]))[0, -1].log_softmax(-1).tolist()
            found += [(-total - s, rank, token) for token, s in enumerate(scores)]
        best = [((*live[rank][0], token), -cost) for cost, rank, token in sorted(found)[:width]]
        finished += [(list(path[:-1]), total, total / t ** alpha, True) for path, total in best if path[-1] == EOS]
        live = [(path, total) for path, total in best if path[-1] != EOS]
    cut = [(list(path), total, total / limit ** alpha, False) for path, total in live]
    return sorted(finished, key=lambda h: -h[2]) + cut


@settings(max_examples=15, deadline=None, derandomize=True)
@given(width=st.integers(1, 6), alpha=st.sampled_from([0.0, 0.6, 1.0, 2.5]), sharpness=st.sampled_from([0.3, 3.0, 8.0]),
       limits=st.lists(st.integers(1, 7), min_size=3, max_size=3), cache=st.booleans())
def test_beam_search_is_its_definition(width, alpha, sharpness, limits, cache):
    """In a batch, with padding, with a cache, and although it stops as soon as nothing can win any more."""
    with torch.no_grad():
        model = ending(sharpness, layers=1)
        n_best = max(1, width - 1)
        options = {"bos_id": BOS, "eos_id": EOS, "max_length": limits, "width": width, "length_penalty": alpha,
                   "cache": cache}
        found = beam(model, SOURCES, n_best=n_best, **options)
        for row, limit, hypotheses in zip(SOURCES, limits, found, strict=True):
            expected = plain_beam(model, row, width, alpha, limit)[:n_best]
            assert [(h.tokens, h.finished) for h in hypotheses] == [(e[0], e[3]) for e in expected]
            assert [(h.log_probability, h.score) for h in hypotheses] == [pytest.approx(e[1:3]) for e in expected]
        assert beam(model, SOURCES, **options) == [hypotheses[0].tokens for hypotheses in found]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10 ** 6), alpha=st.sampled_from([0.0, 0.6, 1.0, 2.0]), sharpness=st.sampled_from([1.0, 9.0]))
def test_a_wide_beam_is_an_exhaustive_search(seed, alpha, sharpness):
    """Four tokens beside the last, at most three of them: 85 targets, of which no beam of 80 misses one of the best."""
    with torch.no_grad():
        torch.manual_seed(seed)
        config = TransformerConfig("encoder-decoder", 5, width=8, heads=1, layers=1, feedforward=8)
        model = Transformer(config).double().eval()
        plain = model.logits
        model.logits = lambda x: sharpness * plain(x)
        source = torch.tensor([[3, 4, 3], [4, 0, 0]])
        others = [token for token in range(5) if token != EOS]
        for row in source:
            paths, every = list(itertools.product(others, repeat=3)), {}
            inputs = torch.tensor([[BOS, *path] for path in paths])
            scores = model(row[row != 0].expand(64, -1), inputs).log_softmax(-1).tolist()
            for path, steps in zip(paths, scores, strict=True):
                totals = [sum(steps[i][token] for i, token in enumerate(path[:t])) for t in range(4)]
                for t in range(3):
                    every[path[:t]] = (False, -(totals[t] + steps[t][EOS]) / (t + 1) ** alpha, path[:t])
                every[path] = (True, -totals[3] / 3 ** alpha, path)
            every = sorted(every.values())
            assert len(every) == 21 + 64
            found = beam(model, row[None], bos_id=BOS, eos_id=EOS, max_length=3, width=80, length_penalty=alpha,
                         n_best=80)[0]
            assert [(not h.finished, tuple(h.tokens)) for h in found] == [(cut, path) for cut, _, path in every[:80]]
            assert [h.score for h in found] == pytest.approx([-cost for _, cost, _ in every[:80]], abs=1e-9)
        together = beam(model, source, bos_id=BOS, eos_id=EOS, max_length=3, width=80, length_penalty=alpha)
        assert together[1] == list(every[0][2])


@pytest.mark.parametrize("kernel", ["edp", "exponentiated_intersection", "taylor"])
def test_a_beam_of_one_is_greedy_and_the_cache_changes_nothing(kernel):
    model, source = ending(3.0, kernel=kernel), tokens(12, 6)
    source[::3, 4:] = 0
    options = {"bos_id": BOS, "eos_id": EOS, "max_length": 15}
    for alpha in (0.0, 1.0, 3.0):
        assert beam(model, source, width=1, length_penalty=alpha, **options) == greedy(model, source, **options)
    found = beam(model, source, width=4, **options)
    assert found == beam(model, source, width=4, cache=False, **options) != greedy(model, source, **options)
    assert found[3:5] == beam(model, source[3:5], width=4, **options)


class Scripted:
    """A model that knows the probabilities of next tokens by heart."""

    training, encoder = False, None

    def __init__(self, table):
        self.table, self.steps = table, 0

    def train(self, mode=True):
        return self

    eval = train

    def encode(self, source):
        return torch.zeros(*source.shape, 1), source == 0

    def decode(self, paths, memory, hidden):
        self.steps += 1
        return paths[:, None].double()

    def logits(self, paths):
        rows = [self.table.get(tuple(path[1:]), self.table.get("else")) for path in paths.long().tolist()]
        return torch.tensor(rows, dtype=torch.float64).log()


def search(table, **options):
    model = Scripted(table)
    found = beam(model, torch.tensor([[3]]), bos_id=1, eos_id=EOS, cache=False, n_best=options["width"], **options)[0]
    return [h.tokens for h in found], model.steps


def test_ties_go_to_the_better_beginning_then_the_lower_token_then_the_earlier_end():
    even = {"else": [0.25] * 4}
    assert search(even, width=2, max_length=2)[0] == [[0, 0], [0, 1]]
    assert search({(): [0.1, 0.1, 0.0, 0.8], **even}, width=3, max_length=2)[0] == [[3], [3, 0], [3, 1]]
    tied = {(): [0, 0, 0.5, 0.5], "else": [0, 0, 1, 0]}
    assert search(tied, width=2, max_length=2, length_penalty=0.0)[0] == [[], [3]]
    assert search(tied, width=2, max_length=2, length_penalty=1.0)[0] == [[3], []]


def test_what_beam_search_does_not_promise():
    """Greedy finds 3 3 at probability 0.51 * 0.34; a beam of two drops it for 0 0 and 0 1, which end less well."""
    table = {(): [0.49, 0, 0, 0.51], (3,): [0.33, 0.33, 0, 0.34], (3, 3): [0, 0, 1, 0], (0,): [0.5, 0.5, 0, 0],
             "else": [0.2, 0.2, 0.4, 0.2]}
    options = {"max_length": 3, "length_penalty": 0.0}
    assert search(table, width=1, **options)[0] == [[3, 3]]
    assert search(table, width=2, **options)[0][0] == [0, 0]         # 0.49 * 0.5 * 0.4
    assert search(table, width=64, **options)[0][0] == [3, 3]


def test_a_search_ends_when_nothing_can_win_any_more():
    sure = {"else": [0.04, 0.03, 0.9, 0.03]}
    assert search(sure, width=1, max_length=30)[1] == 1
    assert search(sure | {(): [0.05, 0.05, 0.9, 0.0]}, width=2, max_length=30, length_penalty=0.0)[1] == 2
    # The mean over 30 tokens at best: log(0.05) / 30 > log(0.9), then log(0.05 * 0.04) / 30 < both means found.
    model = Scripted(sure | {(): [0.05, 0.05, 0.9, 0.0]})
    options = {"bos_id": 1, "eos_id": EOS, "cache": False, "width": 2, "max_length": 30}
    assert beam(model, torch.tensor([[3]]), **options) == [[]] and model.steps == 2


def test_hypotheses_that_are_cut_off_come_last():
    loop = {(): [0, 0, 0.01, 0.99], "else": [0, 0, 0.01, 0.99]}
    assert search(loop, width=1, max_length=4)[0] == [[3] * 4]
    assert search(loop, width=2, max_length=4)[0] == [[3] * 3, [3] * 2]
    assert search(loop, width=5, max_length=2)[0] == [[3], [], [3, 3]]          # there are no more
    options = {"bos_id": 1, "eos_id": EOS, "cache": False, "max_length": 1, "width": 2, "n_best": 2}
    found = beam(Scripted(loop), torch.tensor([[3]]), **options)
    assert [(h.tokens, h.finished, round(h.score, 4)) for h in found[0]] == [([], True, -4.6052), ([3], False, -0.0101)]


@settings(deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4), k=st.integers(1, 8))
def test_the_largest_are_those_of_a_stable_sort(rows, k):
    x = torch.tensor(rows).double()
    value, place = x.sort(descending=True, stable=True)
    found = _largest(x, k)
    assert torch.equal(found[0], value[:, :k]) and torch.equal(found[1], place[:, :k])


# ------------------------------------------------------------------------- sampling

def test_probabilities_of_the_next_token():
    z = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64).log()

    def check(expected, **options):
        close(probabilities(z, **options), torch.tensor(expected, dtype=torch.float64))

    check([0.1, 0.4, 0.2, 0.3])
    check([1 / 30, 16 / 30, 4 / 30, 9 / 30], temperature=0.5)
    check([0, 1, 0, 0], temperature=0)
    check([0, 1, 0, 0], temperature=1e-300)
    check([0, 4 / 7, 0, 3 / 7], top_k=2)
    check([0.1, 0.4, 0.2, 0.3], top_k=9)
    check([0, 4 / 7, 0, 3 / 7], top_p=0.41)
    check([0, 1, 0, 0], top_p=0.39)
    check([0, 1, 0, 0], top_p=1e-9)
    check([0, 4 / 9, 2 / 9, 3 / 9], top_p=0.85)
    check([0, 4 / 7, 0, 3 / 7], top_k=3, top_p=0.75)        # of 4/9, 3/9, 2/9
    check([0, 1, 0, 0], temperature=0.5, top_p=0.5)
    z = torch.zeros(2, 4)
    assert probabilities(z, top_k=3).tolist() == [[pytest.approx(1 / 3)] * 3 + [0]] * 2
    assert probabilities(z, top_p=0.5).tolist() == [[0.5, 0.5, 0, 0]] * 2
    assert probabilities(z.bfloat16()).dtype is torch.float32


def test_a_draw_inverts_the_distribution_function():
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0]).expand(16, 6)
    assert _draw(p, (torch.arange(16) + 0.5).double() / 16).bincount(minlength=6).tolist() == [0, 4, 0, 8, 4, 0]
    assert _draw(p, torch.zeros(16).double()).tolist() == [1] * 16
    assert _draw(p / 3, torch.full((16,), 1 - 2 ** -53).double()).tolist() == [4] * 16


PROMPTS = tokens(5, 4, seed=3)
for i, length in enumerate([4, 1, 3, 4, 2]):
    PROMPTS[i, length:] = 0


def plain_sample(model, uniform, max_new, **options):
    """One text after another, by the full pass."""
    found = []
    for i, row in enumerate(PROMPTS):
        new = []
        for t in range(max_new):
            p = probabilities(model(torch.tensor([[*row[row != 0].tolist(), *new]]))[0, -1], **options)
            new.append(int((p.cumsum(-1) > uniform[t][i]).nonzero()[0]))
            if new[-1] == EOS:
                new.pop()
                break
        found.append(new)
    return found


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 20}, {"top_p": 0.6, "temperature": 1.5}])
@pytest.mark.parametrize("cache", [True, False])
def test_texts_of_different_lengths_are_continued_together(options, cache):
    model = ending(2.0, architecture="decoder", kernel="rbf")
    uniform = [torch.rand(5, generator=g, dtype=torch.float64) for g in [torch.Generator().manual_seed(4)] for _ in
               range(30)]
    expected = plain_sample(model, uniform, 30, **options)
    found = sample(model, PROMPTS, max_new=30, eos_id=EOS, cache=cache, generator=torch.Generator().manual_seed(4),
                   **options)
    assert found == expected and len({len(row) for row in found}) > 2
    assert found != sample(model, PROMPTS, max_new=30, eos_id=EOS, generator=torch.Generator().manual_seed(5),
                           **options)


@pytest.mark.parametrize("cache", [True, False])
def test_no_temperature_is_greedy(cache):
    model = ending(architecture="decoder")
    options = {"max_new": 12, "cache": cache}
    found = sample(model, PROMPTS, temperature=0, eos_id=EOS, **options)
    for row, new in zip(PROMPTS, found, strict=True):
        text = row[row != 0].tolist()
        for _ in range(12):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
        expected = text[-12:]
        assert new == (expected[:expected.index(EOS)] if EOS in expected else expected)
    assert found == sample(model, PROMPTS, temperature=1e-9, eos_id=EOS, **options)
    assert [len(row) for row in sample(model, PROMPTS, temperature=0, **options)] == [12] * 5
    state = torch.random.get_rng_state()
    sample(model, PROMPTS, temperature=0, **options)
    assert torch.equal(state, torch.random.get_rng_state())         # nothing is drawn


def test_searches_leave_the_model_in_its_mode():
    for model, run in ((make(), lambda m: beam(m, SOURCES, bos_id=BOS, eos_id=EOS, max_length=2)),
                       (make("decoder"), lambda m: sample(m, PROMPTS, max_new=2))):
        run(model.train())
        assert model.training
        run(model.eval())
        assert not model.training


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
    (lambda: greedy(MODEL, tokens(2, 3), bos_id=BOS, eos_id=EOS, max_length=[1]), "each of the 2 sources, not 1"),
    (lambda: beam(DECODER, tokens(1, 3), bos_id=BOS, eos_id=EOS, max_length=1), "no encoder"),
    (lambda: beam(MODEL, tokens(1, 3), bos_id=BOS, eos_id=EOS, max_length=0), "at least 1"),
    (lambda: beam(MODEL, tokens(1, 3), bos_id=BOS, eos_id=EOS, max_length=1, width=0), "width must be"),
    (lambda: beam(MODEL, tokens(1, 3), bos_id=BOS, eos_id=EOS, max_length=1, n_best=5), "from 1 to width, which is 4"),
    (lambda: beam(MODEL, tokens(1, 3), bos_id=BOS, eos_id=EOS, max_length=1, length_penalty=-1.0), "from 0 on"),
    (lambda: sample(MODEL, tokens(1, 3), max_new=1), "this is a encoder-decoder"),
    (lambda: sample(DECODER, tokens(1, 3), max_new=0), "max_new"),
    (lambda: sample(DECODER, tokens(1, 0), max_new=1), "prompt 0 is empty"),
    (lambda: sample(DECODER, torch.tensor([[3], [0]]), max_new=1), "prompt 1 is empty"),
    (lambda: sample(DECODER, torch.tensor([[0, 3]]), max_new=1), "end of a prompt"),
    (lambda: sample(DECODER, tokens(3), max_new=1), r"matrix of token numbers .* got \(3,\)"),
    (lambda: sample(DECODER, tokens(1, 3), max_new=1, temperature=-0.5), "temperature must be above 0"),
    (lambda: probabilities(torch.zeros(3), temperature=math.nan), "temperature"),
    (lambda: probabilities(torch.zeros(3), top_k=0), "top_k must be at least 1"),
    (lambda: probabilities(torch.zeros(3), top_p=0.0), "top_p must be above 0"),
    (lambda: probabilities(torch.zeros(3), top_p=1.01), "at most 1"),
])
def test_misuse_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_scores_that_are_no_numbers_are_named():
    model, decoder = make(), make("decoder")
    model.embedding.weight[7] = decoder.embedding.weight[7] = math.nan
    for call in (lambda: beam(model, tokens(1, 3).clamp(max=6), bos_id=BOS, eos_id=EOS, max_length=2),
                 lambda: sample(decoder, tokens(1, 3).clamp(max=6), max_new=2)):
        with pytest.raises(FloatingPointError, match="not a number"):
            call()


def test_gradients_through_a_cache_are_refused():
    with torch.enable_grad(), pytest.raises(ValueError, match="no_grad"):
        DECODER.decode(tokens(1, 2), cache=DECODER.new_cache())
