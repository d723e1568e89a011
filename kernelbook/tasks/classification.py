"""Text classification: from labelled texts to accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import DataError, LabelledCorpus, Tokenizer, load_labelled, pad, token_budget_batches
from ..evaluation import accuracy
from ..models import Transformer
from ..training import Settings
from .base import Outcome, Preset, TaskKind, first, spread

__all__ = ["Classification", "CLASSIFICATION", "PRESETS", "TfIdf", "tfidf", "macro_f1"]

def _quick(steps: int, **more: Any) -> Preset:
    settings = Settings(steps=steps, batch_tokens=2048, learning_rate=2e-3, validate_every=steps // 8)
    return Preset(settings, {"width": 64, "heads": 4, "layers": 2, "feedforward": 256, "dropout": 0.3},
                  {"vocabulary": 4000, "max_tokens": 96}, **more)


PRESETS = {
    "smoke": Preset(
        Settings(steps=20, batch_tokens=512, learning_rate=3e-3),
        {"width": 32, "heads": 2, "layers": 1, "feedforward": 64},
        {"vocabulary": 500, "max_tokens": 32, "train_texts": 200, "test_texts": 50}),
    # Sentences are many to a batch: fewer steps are as many epochs.
    "quick": _quick(800, corpora={"sst2": _quick(440), "trec": _quick(440), "movie-sentences": _quick(440)}),
    "laptop": Preset(
        Settings(steps=3000, batch_tokens=4096, learning_rate=1e-3, validate_every=300),
        {"width": 128, "heads": 4, "layers": 2, "feedforward": 512, "dropout": 0.3},
        {"vocabulary": 8000, "max_tokens": 128}),
    "gpu": Preset(
        Settings(steps=10000, batch_tokens=16384, learning_rate=5e-4, validate_every=500),
        {"width": 256, "heads": 8, "layers": 4, "feedforward": 1024, "dropout": 0.3},
        {"vocabulary": 10000, "max_tokens": 256}),
}
"""Sizes of a classification run. Options: ``vocabulary`` (tokens of the byte-pair vocabulary), ``max_tokens`` (a text
is cut off after so many, a token for its beginning among them), ``train_texts`` and ``test_texts`` (at most so many,
the first of the split)."""

GRID = tuple((words, c) for words in (1, 2) for c in (1.0, 10.0, 100.0))
"""What the linear baseline chooses from, on the validation texts: the longest n-grams of words, and the inverse
strength of the regularisation."""

FEATURES = 100_000
"""The most n-grams that it uses, those that occur most often."""


def check_labels(corpus: LabelledCorpus, labels: Sequence[str]) -> None:
    """Raise unless every split has texts, and the training split has texts with each label, at least two labels."""
    for split, texts in corpus.splits.items():
        if not texts:
            raise DataError(f"the {split} split of {corpus.name} has no text; each split needs at least one")
    learned = {label for _, label in corpus.train}
    if len(learned) < 2:
        raise DataError(f"all training texts of {corpus.name} have the label {min(learned)!r}; there is nothing to "
                        "tell apart with fewer than two labels")
    for split, texts in corpus.splits.items():
        if new := {label for _, label in texts} - (learned & set(labels)):
            raise DataError(f"the {split} split of {corpus.name} has labels that were not learned: "
                            f"{', '.join(sorted(new))}; no training text has them, so leave out the texts with them, "
                            "or split the corpus anew")


class Classification:
    """Classification as a task for :func:`kernelbook.training.fit`: texts as token numbers, batches, losses.

    Parameters
    ----------
    corpus : LabelledCorpus
        Its training texts are learned, its validation texts watched.
    tokenizer : Tokenizer
        Of the texts.
    settings : Settings
        Budget of a batch, label smoothing, seed.
    max_tokens : int
        Where a text is cut off; the first token is always that of the beginning, so that no text is empty.
    labels : sequence of str, optional
        The labels in the order in which a trained model numbers them, instead of the corpus's.

    Raises
    ------
    DataError
        If a split is empty, all training texts have one label, or a label occurs in no training text.
    ValueError
        If ``max_tokens`` is below 2.
    """

    def __init__(self, corpus: LabelledCorpus, tokenizer: Tokenizer, settings: Settings, *, max_tokens: int,
                 labels: Sequence[str] | None = None) -> None:
        if max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2, the beginning and a token of the text, not {max_tokens}")
        self.labels = list(corpus.labels if labels is None else labels)
        check_labels(corpus, self.labels)
        self.corpus, self.tokenizer, self.settings, self.max_tokens = corpus, tokenizer, settings, max_tokens
        self.config = {"architecture": "classifier", "vocabulary": tokenizer.vocabulary_size,
                       "pad_id": tokenizer.pad_id, "classes": len(self.labels)}
        self.data = {"name": corpus.name, "corpus": corpus.name.partition(" (")[0], "origin": corpus.origin,
                     "fingerprint": corpus.fingerprint, "licence": corpus.licence, "labels": self.labels,
                     "train": len(corpus.train), "valid": len(corpus.valid), "test": len(corpus.test)}
        self.decoding = f"the most probable label; texts cut off after {max_tokens} tokens"
        self.metadata = {"tokenizer": tokenizer.to_json(), "labels": self.labels}
        self.train, self.valid, self.test = (self._encode(getattr(corpus, s)) for s in ("train", "valid", "test"))
        self._lengths = [len(ids) for ids, _ in self.train]
        cut = sum(n == max_tokens for n in self._lengths) / len(self._lengths)
        self.about = (f"{corpus.summary()}\n  {len(self.labels)} labels; the model reads the first {max_tokens} tokens "
                      f"of a text ({cut:.0%} of the training texts are as long or longer)")

    def _encode(self, texts: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
        encoded = self.tokenizer.encode_batch([text for text, _ in texts])
        return [([self.tokenizer.bos_id, *ids[:self.max_tokens - 1]], self.labels.index(label))
                for ids, (_, label) in zip(encoded, texts, strict=True)]

    def batches(self, epoch: int) -> list[list[int]]:
        """Batches of similar lengths within the token budget, drawn from (seed, epoch)."""
        s = self.settings
        return token_budget_batches(self._lengths, s.batch_tokens, shuffle=True, seed=s.seed, epoch=epoch)

    def _scores(self, model: torch.nn.Module, texts: list[tuple[list[int], int]], device: torch.device
                ) -> tuple[Tensor, Tensor]:
        """Scores of the labels, and the numbers of the right ones."""
        tokens = pad([ids for ids, _ in texts], self.tokenizer.pad_id).to(device)
        return model(tokens), torch.tensor([label for _, label in texts], device=device)

    def loss(self, model: torch.nn.Module, indices: list[int], device: torch.device) -> tuple[Tensor, int]:
        """Label-smoothed cross-entropy per text, in nats, and the number of texts."""
        scores, labels = self._scores(model, [self.train[i] for i in indices], device)
        return F.cross_entropy(scores, labels, label_smoothing=self.settings.label_smoothing), len(indices)

    def _classify(self, model: torch.nn.Module, texts: list[tuple[list[int], int]], device: torch.device,
                  progress: Callable[[int, int], None] = lambda done, of: None) -> tuple[list[int], float]:
        """Numbers of the most probable labels, in the order of the texts; and the mean cross-entropy in nats."""
        found, total, done = [0] * len(texts), 0.0, 0
        for indices in token_budget_batches([len(ids) for ids, _ in texts], max(8192, self.max_tokens), shuffle=False):
            scores, labels = self._scores(model, [texts[i] for i in indices], device)
            total += F.cross_entropy(scores.float(), labels, reduction="sum").item()
            for i, label in zip(indices, scores.argmax(-1).tolist(), strict=True):
                found[i] = label
            done += len(indices)
            progress(done, len(texts))
        return found, total / len(texts)

    def validate(self, model: torch.nn.Module, device: torch.device) -> dict[str, float]:
        """Cross-entropy of the validation labels, in nats a text, without label smoothing; share of right labels."""
        found, loss = self._classify(model, self.valid, device)
        return {"valid_loss": loss, "valid_accuracy": accuracy(found, [label for _, label in self.valid])}

    @torch.no_grad()
    def evaluate(self, model: Transformer, device: torch.device, progress: Callable[[int, int], None],
                 split: str = "test") -> Outcome:
        """Accuracy and macro F1 on a split, beside a linear model's accuracy and the most frequent label's."""
        model.eval()
        encoded, gold = getattr(self, split), [label for _, label in self.corpus.splits[split]]
        numbers, _ = self._classify(model, encoded, device, progress)
        found = [self.labels[i] for i in numbers]
        texts = [text for text, _ in self.corpus.splits[split]]
        linear = tfidf(self.corpus.train, self.corpus.valid)
        frequent = Counter(label for _, label in self.corpus.train).most_common(1)[0][0]
        baselines = {"tfidf_logistic_regression": accuracy(linear.predict(texts), gold),
                     "most_frequent_label": accuracy([frequent] * len(gold), gold)}
        return Outcome({f"{split}_accuracy": accuracy(found, gold), f"{split}_macro_f1": macro_f1(gold, found)},
                       baselines,
                       f"share of right labels; the model reads {self.max_tokens} tokens of a text, TF-IDF all of it "
                       f"({linear.description})",
                       [{"text": excerpt(texts[i]), "label": gold[i], "predicted": found[i]}
                        for i in spread(len(texts), 4)])


def excerpt(text: str, length: int = 120) -> str:
    """The beginning of a text, cut at a word."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[:length].rpartition(" ")[0] + " …"


def macro_f1(gold: Sequence[Any], found: Sequence[Any]) -> float:
    r"""Mean over the labels of :math:`F_1=2\,\mathrm{tp}/(2\,\mathrm{tp}+\mathrm{fp}+\mathrm{fn})`.

    Parameters
    ----------
    gold, found : sequence
        The right labels and the predicted ones; the mean is over the labels that occur in either.

    Returns
    -------
    float
    """
    from sklearn.metrics import f1_score

    return float(f1_score(gold, found, average="macro", zero_division=0.0))


@dataclass(frozen=True)
class TfIdf:
    """A linear classifier of n-grams of words, as :func:`tfidf` fitted it.

    Attributes
    ----------
    pipeline : Any
        Vectoriser and logistic regression.
    description : str
        What was chosen.
    valid_accuracy : float
        What it was chosen by.
    """

    pipeline: Any
    description: str
    valid_accuracy: float

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The most probable labels."""
        return self.pipeline.predict(texts).tolist()


def tfidf(train: Sequence[tuple[str, str]], valid: Sequence[tuple[str, str]],
          grid: Sequence[tuple[int, float]] = GRID) -> TfIdf:
    r"""Fit a logistic regression on TF-IDF weights of words, the strong simple baseline of text classification.

    The weight of an n-gram that occurs :math:`f>0` times in a text is :math:`(1+\ln f)(1+\ln\frac{1+n}{1+n_g})`, where
    :math:`n_g` of the :math:`n` training texts have it; the weights of a text are scaled to norm 1.  Case is ignored.
    Each label is told from the rest by a regression of its own, and the most probable is taken.
    The length of n-grams and the regularisation are those of ``grid`` with the best accuracy on the validation
    texts, the simpler where several are best; they are not fitted again with the validation texts.

    Parameters
    ----------
    train, valid : sequence of tuple
        Texts with their labels: fitted to the one, chosen by the other.
    grid : sequence of tuple
        What to choose from: the longest n-grams of words, and the inverse strength of the regularisation.

    Returns
    -------
    TfIdf
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline

    texts, labels = [text for text, _ in train], [label for _, label in train]
    valid_texts, valid_labels = [text for text, _ in valid], [label for _, label in valid]
    best: TfIdf | None = None
    for longest in sorted({words for words, _ in grid}):
        vectoriser = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, longest), max_features=FEATURES,
                                     token_pattern=r"(?u)\b\w+\b")
        x, y = vectoriser.fit_transform(texts), vectoriser.transform(valid_texts)
        for c in sorted(c for words, c in grid if words == longest):
            model = OneVsRestClassifier(LogisticRegression(C=c, solver="liblinear")).fit(x, labels)
            right = accuracy(model.predict(y), valid_labels)
            if best is None or right > best.valid_accuracy:
                grams = "words" if longest == 1 else f"1- to {longest}-grams of words"
                best = TfIdf(make_pipeline(vectoriser, model), f"{grams}, sublinear, C={c:g}, chosen on the validation "
                             "texts", right)
    return best


def prepare(corpus: str | None, data_dir: Path | None, preset: Preset) -> Classification:
    """A labelled corpus at a preset's size, its vocabulary learned from its training texts."""
    texts = load_labelled(corpus, data_dir=data_dir)
    size = preset.of(texts.name)
    texts = first(texts, size.options.get("train_texts"), size.options.get("test_texts"))
    max_tokens = size.options["max_tokens"]
    if size.metadata is not None:
        tokenizer = Tokenizer.from_json(size.metadata["tokenizer"])
        return Classification(texts, tokenizer, size.settings, max_tokens=max_tokens, labels=size.metadata["labels"])
    check_labels(texts, texts.labels)
    tokenizer = Tokenizer.train((text for text, _ in texts.train), size.options["vocabulary"])
    return Classification(texts, tokenizer, size.settings, max_tokens=max_tokens)


CLASSIFICATION = TaskKind("classification", "test_accuracy", True, "wikipedia-topics", PRESETS, prepare)
