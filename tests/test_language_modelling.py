"""Language modelling: every token is scored once, from its past alone; what it is compared with is computed exactly."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kernelbook import tasks
from kernelbook.data import DataError, TextCorpus, Tokenizer, fingerprint
from kernelbook.kernels import get
from kernelbook.models import Transformer, TransformerConfig
from kernelbook.tasks.language_modelling import Bigrams, LanguageModelling, prepare, windows
from kernelbook.training import Settings

CPU = torch.device("cpu")
SETTINGS = Settings(batch_tokens=40, label_smoothing=0.0, seed=1)
DOCUMENTS = [f"The {a} {v} the {b} in the {place}." for a, v, b, place in itertools.product(
    ("dog", "man", "bird", "fish"), ("sees", "hears", "calls"), ("tree", "stone", "Häuser"), ("wood", "sea"))]
KERNELS = [("edp", {}, "sum"), ("rbf", {}, "sum"), ("l2", {}, "sum"), ("exponentiated_intersection", {}, "sum"),
           ("quadratic", {}, "sum"), ("linear", {}, "abs-sum"), ("polynomial", {"degree": 3}, "abs-sum"),
           ("taylor", {"degree": 2}, "sum"), ("taylor", {"degree": 4}, "sum"), ("taylor", {"degree": 6}, "sum"),
           ("positive_features", {"count": 16}, "sum")]


def corpus(train=DOCUMENTS[::2], valid=DOCUMENTS[1::4], test=DOCUMENTS[3::4]):
    splits = {"train": list(train), "valid": list(valid), "test": list(test)}
    return TextCorpus("toy", **splits, origin="directory", fingerprint=fingerprint(splits))


TOKENIZER = Tokenizer.train(DOCUMENTS, 300)


def task(context=8, stride=4, settings=SETTINGS, **more):
    return LanguageModelling(corpus(), TOKENIZER, settings, context=context, stride=stride, **more)


def model_for(it, **more):
    torch.manual_seed(0)
    config = TransformerConfig(**it.config, **{"width": 16, "heads": 2, "layers": 2, "feedforward": 16} | more)
    return Transformer(config).double().eval()


class Uniform(torch.nn.Module):
    """Every token is as probable as any other."""

    def forward(self, tokens):
        return torch.zeros(*tokens.shape, TOKENIZER.vocabulary_size)


# ------------------------------------------------------------------------- windows

@given(st.integers(2, 60), st.integers(1, 12), st.integers(1, 12))
def test_windows_predict_every_token_once_from_as_much_as_they_say(length, context, stride):
    stride = min(stride, context)
    cut = windows(length, context, stride)
    assert [p for w in cut for p in range(w.first, w.end)] == list(range(1, length))
    for i, w in enumerate(cut):
        assert 0 <= w.start < w.first < w.end <= length and w.end - 1 - w.start <= context
        least = context - stride + 1 if i else 1
        assert w.first - w.start >= least and (i or w.start == 0)


@pytest.mark.parametrize(("numbers", "words"), [
    ((10, 0, 1), "context must be at least 1"), ((10, 4, 0), "stride must be from 1 to the context, 4"),
    ((10, 4, 5), "leave out tokens"), ((1, 4, 2), "at least 2")])
def test_windows_that_cannot_be_are_told(numbers, words):
    with pytest.raises(ValueError, match=words):
        windows(*numbers)


def test_each_token_is_scored_in_its_own_window():
    it = task(context=7, stride=3)
    model = model_for(it)
    with torch.no_grad():
        found = it.nats(model, it.test, CPU)
        assert found.shape == (len(it.test) - 1,)
        for w in windows(len(it.test), 7, 3):
            for p in range(w.first, w.end):
                past = it.test[None, w.start:p]
                assert 1 <= past.shape[1] <= 7
                plain = -model(past)[0, -1].log_softmax(-1)[it.test[p]].item()
                assert found[p - 1].item() == pytest.approx(plain, abs=1e-10)


@pytest.mark.parametrize(("kernel", "options", "normaliser"), KERNELS)
def test_a_later_token_changes_no_earlier_loss(kernel, options, normaliser):
    it = task(context=7, stride=3)
    model = model_for(it, kernel=get(kernel, **options), normaliser=normaliser)
    other = it.test.clone()
    other[60] = (other[60] + 1) % TOKENIZER.vocabulary_size
    with torch.no_grad():
        before, after = it.nats(model, it.test, CPU), it.nats(model, other, CPU)
    assert torch.equal(before[:59], after[:59])
    assert (before[59:59 + 3] != after[59:59 + 3]).any()


# ------------------------------------------------------------------------- training

def test_an_epoch_predicts_every_token_once_whatever_its_offset():
    class Asked(torch.nn.Module):
        """Keeps its scores: a loss raises one of them only where that token is to be predicted."""

        def forward(self, tokens):
            scores.append(torch.zeros(*tokens.shape, n + 1, requires_grad=True))
            return scores[-1]

    it = task()
    n = len(it.train)
    it.train = torch.arange(1, n + 1)                   # each token another; 0 is padding
    offsets = set()
    for epoch in range(6):
        scores, predicted, counted = [], [], 0
        for indices in it.batches(epoch):
            assert len(indices) <= 5                    # windows of 8 in 40 tokens
            loss, count = it.loss(Asked(), indices, CPU)
            loss.backward()
            predicted += (scores[-1].grad < 0).nonzero()[:, 2].tolist()
            counted += count
        assert sorted(predicted) == list(range(2, n + 1)) and counted == n - 1
        offsets.add(min(sum(it.batches(epoch), [])))
    assert len(offsets) > 2                             # windows are not cut at the same places again


def test_batches_are_those_of_seed_and_epoch():
    it, other = task(), task(settings=Settings(batch_tokens=40, label_smoothing=0.0, seed=2))
    assert it.batches(3) == task().batches(3)
    assert it.batches(3) != it.batches(4) and it.batches(3) != other.batches(3)


def test_the_loss_is_a_mean_over_tokens_and_can_be_divided():
    it = task()
    model = model_for(it)
    indices = [5, 21, len(it.train) + 2]                # cut off in front, whole, cut off behind
    plain = []
    for i in indices:
        row = it.train[max(0, i - 8):i + 1]
        plain += F.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="none").tolist()
    loss, count = it.loss(model, indices, CPU)
    assert count == len(plain) == 5 + 8 + 5 and loss.item() == pytest.approx(sum(plain) / count, abs=1e-12)
    parts = [it.loss(model, [i], CPU) for i in indices]
    assert sum(part.item() * n for part, n in parts) / count == pytest.approx(loss.item(), abs=1e-12)


def test_documents_of_any_length_make_one_stream():
    long = "word " * 500
    splits = {"train": ["", long, "short", "  "], "valid": ["a"], "test": ["b"]}
    it = LanguageModelling(TextCorpus("toy", **splits, origin="directory", fingerprint="f"), TOKENIZER, SETTINGS,
                           context=8, stride=8)
    end = TOKENIZER.eos_id
    assert it.train.tolist() == [end, *TOKENIZER.encode(long), end, *TOKENIZER.encode("short"), end]
    assert it.nats(Uniform(), it.test, CPU).tolist() == pytest.approx([math.log(TOKENIZER.vocabulary_size)] * (
        len(TOKENIZER.encode("b")) + 1))


# ------------------------------------------------------------------------- evaluation

def test_perplexities_of_a_uniform_model_are_known():
    it = task(valid_tokens=20)
    found = it.evaluate(model_for(it), CPU, lambda done, of: None)
    assert set(found.metrics) == {"test_perplexity", "test_perplexity_word", "test_bits_per_byte"}
    it._samples = lambda *_: []                         # which it cannot make
    found = it.evaluate(Uniform(), CPU, lambda done, of: None)
    v, n = TOKENIZER.vocabulary_size, len(it.test) - 1
    words, size = (sum(map(len, x)) for x in ([d.split() for d in it.corpus.test], map(str.encode, it.corpus.test)))
    size = sum(len(d.encode()) for d in it.corpus.test)
    assert found.metrics == {
        "test_perplexity": pytest.approx(v), "test_perplexity_word": pytest.approx(v ** (n / words)),
        "test_bits_per_byte": pytest.approx(n * math.log2(v) / size)}
    assert f"{n} tokens" in found.signature and "5 to 8 tokens" in found.signature
    assert it.validate(Uniform(), CPU) == {"valid_loss": pytest.approx(math.log(v)),
                                           "valid_perplexity": pytest.approx(v)}
    assert len(it.watched) == 21 and "valid_perplexity" in it.evaluate(Uniform(), CPU, print, split="valid").metrics


def test_bigrams_are_those_of_a_plain_count():
    rng = np.random.default_rng(0)
    # 6 is followed once, 7 never.
    stream, test = [6, *rng.integers(0, 6, 200).tolist()], rng.integers(0, 8, 200).tolist()
    model = Bigrams(stream, 8, discount=0.6)
    count, pairs, follow = Counter(stream), Counter(itertools.pairwise(stream)), Counter(stream[:-1])
    after = Counter(x for x, _ in pairs)

    def p(y, x=None):
        one = (count[y] + 1) / (len(stream) + 8)
        if x is None or not follow[x]:
            return one
        return max(pairs[x, y] - 0.6, 0) / follow[x] + 0.6 * after[x] / follow[x] * one

    assert sum(map(p, range(8))) == pytest.approx(1)
    assert all(sum(p(y, x) for y in range(8)) == pytest.approx(1) for x in range(8))
    assert model.nats(test) == pytest.approx((-sum(math.log(p(y)) for y in test[1:]),
                                              -sum(math.log(p(y, x)) for x, y in itertools.pairwise(test))))


def test_the_discount_is_the_best_for_the_validation_stream():
    it = task()
    streams = it.train.numpy(), it.valid.numpy()
    fitted = Bigrams.fitted(*streams, TOKENIZER.vocabulary_size)
    each = {i / 20: Bigrams(streams[0], TOKENIZER.vocabulary_size, i / 20).nats(streams[1])[1] for i in range(1, 20)}
    assert fitted.discount == min(each, key=each.get)


def test_samples_are_beginnings_of_documents_and_the_same_again():
    it = task()
    model = model_for(it)
    samples = it.evaluate(model, CPU, lambda *_: None).samples
    assert samples == it.evaluate(model, CPU, lambda *_: None).samples and len(samples) == 3
    for found in samples:
        whole = [text for text in it.corpus.test if text.startswith(found["text"])]
        assert found["text"] and any(found["original"] in text for text in whole)
        assert len(TOKENIZER.encode(found["text"])) <= 8       # the context


# ------------------------------------------------------------------------- bad input, and whole runs

@pytest.mark.parametrize(("changes", "error", "words"), [
    ({"context": 0}, ValueError, "context must be at least 1"),
    ({"stride": 9}, ValueError, "stride must be from 1"),
    ({"settings": Settings(batch_tokens=7)}, ValueError, "batch_tokens is 7, less than one window of context 8")])
def test_sizes_that_cannot_be_are_told(changes, error, words):
    with pytest.raises(error, match=words):
        task(**changes)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("documents", [[], ["", "  "]])
def test_a_split_without_text_is_told(split, documents, monkeypatch):
    bad = corpus(**{split: documents})
    with pytest.raises(DataError, match=f"the {split} split of toy has no text"):
        LanguageModelling(bad, TOKENIZER, SETTINGS, context=8, stride=4)
    monkeypatch.setattr(tasks.language_modelling, "load_text", lambda *_, **__: bad)
    with pytest.raises(DataError, match=f"the {split} split of toy"):
        prepare(None, None, tasks.language_modelling.PRESETS["smoke"])


@pytest.mark.parametrize(("kernel", "options", "normaliser"), KERNELS)
def test_every_kernel_can_be_tried(tmp_path, monkeypatch, kernel, options, normaliser):
    monkeypatch.setattr(tasks.language_modelling, "load_text", lambda *_, **__: corpus())
    record, _ = tasks.train("language-modelling", kernel=get(kernel, **options), normaliser=normaliser, preset="smoke",
                            settings={"steps": 3}, out=tmp_path / "run")
    assert 1 < record.metrics["test_perplexity"] < 1000 and set(record.baselines) == {"unigram", "bigram"}
    assert record.data["train"] == len(DOCUMENTS) // 2 and record.data["test"] == 10
    assert record.samples[0]["original"] and len(record.samples) == 3


def test_it_learns(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks.language_modelling, "load_text", lambda *_, **__: corpus())
    record, _ = tasks.train("language-modelling", preset="smoke", settings={"steps": 40, "learning_rate": 0.01},
                            out=tmp_path / "run")
    assert max(record.metrics["test_perplexity"], record.baselines["bigram"]) < record.baselines["unigram"] / 2
