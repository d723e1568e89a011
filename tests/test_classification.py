"""Classification: texts are cut where it is said, and what they are compared with is strong, and chosen honestly."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from kernelbook import tasks
from kernelbook.data import DataError, Example, LabelledCorpus, Tokenizer, fingerprint
from kernelbook.kernels import get
from kernelbook.models import Transformer, TransformerConfig
from kernelbook.tasks import classification
from kernelbook.tasks.classification import PRESETS, Classification, macro_f1, prepare, tfidf
from kernelbook.training import Settings

CPU = torch.device("cpu")
SETTINGS = Settings(batch_tokens=40, label_smoothing=0.1, seed=1)
KERNELS = [("edp", {}, "sum"), ("rbf", {}, "sum"), ("l2", {}, "sum"), ("exponentiated_intersection", {}, "sum"),
           ("quadratic", {}, "sum"), ("linear", {}, "abs-sum"), ("polynomial", {"degree": 3}, "abs-sum"),
           ("taylor", {"degree": 2}, "sum"), ("taylor", {"degree": 4}, "sum"), ("taylor", {"degree": 6}, "sum"),
           ("positive_features", {"count": 16}, "sum")]
TEXTS = [Example(f"The {a} {v} a {b} today.", label) for (a, label), v, b in itertools.product(
    (("cat", "animal"), ("dog", "animal"), ("oak", "plant"), ("rose", "plant"), ("iron", "metal")),
    ("meets", "finds", "likes", "wants"), ("stone", "house", "car", "road"))]
random.Random(0).shuffle(TEXTS)


def corpus(train=TEXTS[:50], valid=TEXTS[50:65], test=TEXTS[65:], labels=("animal", "metal", "plant")):
    splits = {"train": list(train), "valid": list(valid), "test": list(test)}
    return LabelledCorpus("toy", **splits, origin="directory", fingerprint=fingerprint(splits), labels=list(labels))


TOKENIZER = Tokenizer.train([text for text, _ in TEXTS], 300)


def task(of=None, max_tokens=8, **more):
    return Classification(of or corpus(), TOKENIZER, SETTINGS, max_tokens=max_tokens, **more)


def model_for(it):
    torch.manual_seed(0)
    config = TransformerConfig(**it.config, width=8, heads=2, layers=1, feedforward=8)
    return Transformer(config).double().eval()


def test_texts_are_cut_off_and_none_is_empty():
    texts = [Example("", "animal"), Example("The cat", "metal"), Example("The cat meets a stone today. " * 9, "plant")]
    it = task(corpus(train=texts))
    (empty, _), (short, metal), (long, _) = it.train
    bos = TOKENIZER.bos_id
    assert empty == [bos] and short == [bos, *TOKENIZER.encode("The cat")] and metal == 1
    assert long == [bos, *TOKENIZER.encode(texts[2].text)[:7]]
    assert it.config["classes"] == 3 and torch.isfinite(it.loss(model_for(it), [0, 1, 2], CPU)[0])
    assert "33%" in it.about


def test_batches_have_every_text_once_within_the_budget():
    it = task()
    for epoch in (0, 1):
        batches = it.batches(epoch)
        assert sorted(sum(batches, [])) == list(range(50))
        assert all(len(b) * max(len(it.train[i][0]) for i in b) <= 40 for b in batches)
    assert it.batches(1) == task().batches(1) != it.batches(0)


def test_the_loss_is_that_of_each_text_alone():
    it = task()
    model, rows = model_for(it), [0, 7, 31]
    scores = torch.cat([model(torch.tensor([it.train[i][0]])) for i in rows])
    labels = torch.tensor([it.labels.index(it.corpus.train[i].label) for i in rows])
    loss, count = it.loss(model, rows, CPU)
    assert count == 3
    assert loss.item() == pytest.approx(F.cross_entropy(scores, labels, label_smoothing=0.1).item(), abs=1e-12)
    parts = [it.loss(model, [i], CPU) for i in rows]               # as divided among processes
    assert sum(part.item() for part, _ in parts) / 3 == pytest.approx(loss.item(), abs=1e-12)


def test_validation_is_a_plain_loop_over_the_texts():
    it = task()
    model = model_for(it)
    total = right = 0
    for text, label in it.corpus.valid:
        scores = model(torch.tensor([[TOKENIZER.bos_id, *TOKENIZER.encode(text)][:8]]))[0].log_softmax(-1)
        total -= scores[it.labels.index(label)].item()
        right += it.labels[scores.argmax()] == label
    assert it.validate(model, CPU) == {"valid_loss": pytest.approx(total / 15, abs=1e-6),
                                       "valid_accuracy": pytest.approx(right / 15)}


def test_predictions_are_in_the_order_of_the_texts():
    class ByLast(torch.nn.Module):
        """The label is told by a text's last token."""

        def forward(self, tokens):
            last = tokens.gather(1, (tokens != TOKENIZER.pad_id).sum(1, keepdim=True) - 1)
            return F.one_hot(last[:, 0] % 3, 3).double()

        def eval(self):
            return self

    words = "a house", "house", "road", "the road today", "car", "oak", "the", "rose today today"
    it = task(corpus(test=[Example(text, "metal") for text in words]))
    expected = [[TOKENIZER.bos_id, *TOKENIZER.encode(text)][:8][-1] % 3 for text in words]
    assert len(set(expected)) > 1 and len({len(ids) for ids, _ in it.test}) > 2
    assert it._classify(ByLast(), it.test, CPU)[0] == expected


def test_metrics_of_a_split_are_beside_those_of_simpler_systems():
    it, done = task(), []
    model = model_for(it)
    found = it.evaluate(model, CPU, lambda *at: done.append(at))
    gold = [label for _, label in it.corpus.test]
    frequent = max(sorted(set(gold)), key=[label for _, label in it.corpus.train].count)
    assert found.baselines["most_frequent_label"] == gold.count(frequent) / len(gold)
    assert found.baselines["tfidf_logistic_regression"] > 0.9
    assert done[-1] == (15, 15) and "8 tokens" in found.signature and "C=" in found.signature
    again = it.evaluate(model, CPU, lambda *at: None, split="valid")
    assert again.metrics["valid_accuracy"] == pytest.approx(it.validate(model, CPU)["valid_accuracy"])
    assert all(s["label"] in it.labels and s["predicted"] in it.labels for s in found.samples)


def test_macro_f1_is_that_of_a_plain_count():
    gold, found = list("aaaabbbcc"), list("aabbbbacd")
    each = []
    for label in "abcd":
        tp = sum(g == f == label for g, f in zip(gold, found, strict=True))
        each.append(2 * tp / (gold.count(label) + found.count(label)))
    assert macro_f1(gold, found) == pytest.approx(sum(each) / 4)


def test_the_linear_model_is_chosen_by_the_validation_texts_only(monkeypatch):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    # Only the order of the words tells the labels apart: single words cannot.
    pairs = list(itertools.permutations("ant bee cow dog elk fox gnu hen".split(), 2))
    texts = [Example(f"{a} {b}" if a < b else f"{b} {a}", "up") for a, b in pairs] + [
        Example(f"{b} {a}" if a < b else f"{a} {b}", "down") for a, b in pairs]
    random.Random(1).shuffle(texts)
    chosen = tfidf(texts, texts[:20])
    assert "2-grams" in chosen.description and chosen.valid_accuracy == 1
    assert chosen.predict(["ant bee", "bee ant"]) == ["up", "down"]
    assert {"ant", "bee", "ant bee", "bee ant"} <= set(chosen.pipeline[0].vocabulary_)
    single = tfidf(texts, texts[:20], grid=[(1, 10.0)])
    assert single.description.startswith("words") and "C=10" in single.description and single.valid_accuracy < 0.8
    # And where words do, the simplest that is best; as if fitted by hand.
    it = corpus()
    each = {}
    for words, c in classification.GRID:
        vectoriser = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, words), token_pattern=r"(?u)\b\w+\b")
        regression = OneVsRestClassifier(LogisticRegression(C=c, solver="liblinear"))
        model = regression.fit(vectoriser.fit_transform([t for t, _ in it.train]), [label for _, label in it.train])
        found = model.predict(vectoriser.transform([t for t, _ in it.valid]))
        each[words, c] = sum(f == label for f, (_, label) in zip(found, it.valid, strict=True)) / len(it.valid)
    words, c = max(each, key=each.get)
    chosen = tfidf(it.train, it.valid)
    assert chosen.valid_accuracy == max(each.values()) and f"C={c:g}" in chosen.description
    assert ("grams" in chosen.description) == (words > 1)


@pytest.mark.parametrize(("changes", "words"), [
    ({"train": []}, "the train split of toy has no text"), ({"valid": []}, "the valid split"),
    ({"test": []}, "the test split"),
    ({"train": [x for x in TEXTS if x.label == "animal"]}, "all training texts of toy have the label 'animal'"),
    ({"train": [x for x in TEXTS if x.label != "metal"]}, "not learned: metal")])
def test_a_corpus_that_cannot_be_learned_is_told(changes, words, monkeypatch):
    bad = corpus(**changes)
    with pytest.raises(DataError, match=words):
        task(bad)
    monkeypatch.setattr(classification, "load_labelled", lambda *_, **__: bad)
    with pytest.raises(DataError, match=words):
        prepare(None, None, PRESETS["smoke"])


def test_a_text_of_no_tokens_is_told():
    with pytest.raises(ValueError, match="max_tokens must be at least 2"):
        task(max_tokens=1)


@pytest.mark.parametrize(("kernel", "options", "normaliser"), KERNELS)
def test_every_kernel_can_be_tried(tmp_path, monkeypatch, kernel, options, normaliser):
    monkeypatch.setattr(classification, "load_labelled", lambda *_, **__: corpus())
    record, _ = tasks.train("classification", kernel=get(kernel, **options), normaliser=normaliser, preset="smoke",
                            settings={"steps": 3}, out=tmp_path / "run")
    assert 0 <= record.metrics["test_macro_f1"] <= 1 and 0 <= record.metrics["test_accuracy"] <= 1
    assert record.data["labels"] == ["animal", "metal", "plant"] and record.data["train"] == 50


def test_it_learns(tmp_path, monkeypatch):
    monkeypatch.setattr(classification, "load_labelled", lambda *_, **__: corpus())
    record, _ = tasks.train("classification", preset="smoke", settings={"steps": 60}, out=tmp_path / "run")
    assert record.metrics["test_accuracy"] > 0.9 > record.baselines["most_frequent_label"]
