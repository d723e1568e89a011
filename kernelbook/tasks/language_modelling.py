"""Language modelling: from documents to perplexity."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..data import DataError, TextCorpus, Tokenizer, load_text, pad
from ..decoding import sample
from ..evaluation import bits_per_byte, perplexity
from ..models import Transformer
from ..training import Settings
from .base import Outcome, Preset, TaskKind, first, spread

__all__ = ["LanguageModelling", "LANGUAGE_MODELLING", "PRESETS", "Bigrams", "Window", "windows"]

PRESETS = {
    "smoke": Preset(
        Settings(steps=20, batch_tokens=512, learning_rate=3e-3, label_smoothing=0.0),
        {"width": 32, "heads": 2, "layers": 1, "feedforward": 64, "dropout": 0.0},
        {"vocabulary": 500, "context": 32, "stride": 16, "train_documents": 100, "test_documents": 10}),
    "quick": Preset(
        Settings(steps=1500, batch_tokens=512, learning_rate=4e-3, label_smoothing=0.0, validate_every=150),
        {"width": 128, "heads": 4, "layers": 2, "feedforward": 512, "dropout": 0.0},
        {"vocabulary": 1000, "context": 64, "stride": 48, "valid_tokens": 8192}),
    "laptop": Preset(
        Settings(steps=3000, batch_tokens=2048, learning_rate=2e-3, label_smoothing=0.0),
        {"width": 192, "heads": 6, "layers": 3, "feedforward": 768, "dropout": 0.1},
        {"vocabulary": 4000, "context": 128, "stride": 64, "valid_tokens": 32768}),
    "gpu": Preset(
        Settings(steps=20000, batch_tokens=16384, learning_rate=7e-4, label_smoothing=0.0),
        {"width": 512, "heads": 8, "layers": 6, "feedforward": 2048, "dropout": 0.3},
        {"vocabulary": 10000, "context": 256, "stride": 128}),
}
"""Sizes of a run. Options: ``vocabulary`` (tokens of the byte-pair vocabulary), ``context`` (most tokens that the
model sees before the one it predicts), ``stride`` (see :func:`windows`), ``train_documents`` and ``test_documents`` (at
most so many, the first of the split), ``valid_tokens`` (at most so many, the first, are watched during training; the
test split is always taken whole)."""

TEMPERATURE = 0.7
"""Of the continuations shown: below 1, for a small model's tail is mostly noise."""


@dataclass(frozen=True)
class Window:
    """A stretch of a stream of tokens that the model reads at once.

    The tokens before ``end`` but for the last are read, from ``start``; predicted are those from ``first`` on.

    Attributes
    ----------
    start, first, end : int
        Positions in the stream.
    """

    start: int
    first: int
    end: int


def windows(length: int, context: int, stride: int) -> list[Window]:
    r"""Cut a stream into windows, so that every token but the first is predicted once, with much of its past.

    The first window predicts up to ``context`` tokens, each later one the next ``stride`` (or what is left), of which
    the first has :math:`\text{context}-\text{stride}+1` tokens before it in the window, the last ``context``.

    Parameters
    ----------
    length : int
        Of the stream, at least 2.
    context : int
        Most tokens that the model reads at once.
    stride : int
        From 1 (every token is predicted from as many as ``context`` tokens, at ``context`` times the cost) to
        ``context`` (windows do not overlap).

    Returns
    -------
    list of Window

    Raises
    ------
    ValueError
        If a number is out of range.

    Examples
    --------
    >>> [(w.start, w.first, w.end) for w in windows(10, context=4, stride=2)]
    [(0, 1, 5), (2, 5, 7), (4, 7, 9), (5, 9, 10)]
    """
    check_context(context, stride)
    if length < 2:
        raise ValueError(f"a stream of {length} tokens has nothing to predict from what comes before; "
                         "it needs at least 2")
    found, first = [], 1
    while first < length:
        end = min(length, first + (stride if first > 1 else context))
        found.append(Window(max(0, end - 1 - context), first, end))
        first = end
    return found


def check_context(context: int, stride: int) -> None:
    """Raise unless a window can be read and moved on."""
    if context < 1:
        raise ValueError(f"context must be at least 1 token, not {context}")
    if not 1 <= stride <= context:
        raise ValueError(f"stride must be from 1 to the context, {context}, not {stride}: a longer one would leave out "
                         "tokens")


def check_text(corpus: TextCorpus) -> None:
    """Raise unless every split has text."""
    for split, documents in corpus.splits.items():
        if not any(text.strip() for text in documents):
            raise DataError(f"the {split} split of {corpus.name} has no text; each split needs a document that is not "
                            "empty")


class Bigrams:
    r"""Unigram and interpolated bigram models of a stream of tokens: what a language model must beat.

    With :math:`c` for counts in the stream of :math:`N` tokens, :math:`V` tokens in the vocabulary, and
    :math:`d(x)` different tokens seen after :math:`x`,

    .. math:: p(y)=\frac{c(y)+1}{N+V},\qquad
              p(y\mid x)=\frac{\max(c(xy)-D,0)}{c(x\,\cdot)}+\frac{D\,d(x)}{c(x\,\cdot)}\,p(y),

    and :math:`p(y\mid x)=p(y)` after an :math:`x` that nothing followed.  Both sum to 1 over :math:`y`.

    Parameters
    ----------
    stream : sequence of int
        Of the training split.
    vocabulary : int
        :math:`V`.
    discount : float
        :math:`D`, from 0 to 1; see :meth:`fitted`.

    References
    ----------
    Absolute discounting: Ney, Essen and Kneser, Computer Speech and Language 8, 1994.
    """

    def __init__(self, stream: Sequence[int] | np.ndarray, vocabulary: int, discount: float = 0.75) -> None:
        stream = np.asarray(stream, dtype=np.int64)
        self.vocabulary, self.discount = vocabulary, discount
        counts = np.bincount(stream, minlength=vocabulary)
        self.unigram = (counts + 1) / (len(stream) + vocabulary)
        self._pairs, self._counts = np.unique(stream[:-1] * vocabulary + stream[1:], return_counts=True)
        first = self._pairs // vocabulary
        self._followed = np.bincount(first, weights=self._counts, minlength=vocabulary)
        self._different = np.bincount(first, minlength=vocabulary)

    @classmethod
    def fitted(cls, stream: Sequence[int] | np.ndarray, valid: Sequence[int] | np.ndarray, vocabulary: int) -> Bigrams:
        """The one with the discount, of 0.05, 0.1, ..., 0.95, that gives a validation stream the most probability."""
        model = cls(stream, vocabulary)
        best = min((model.nats(valid, d)[1], d) for d in (i / 20 for i in range(1, 20)))
        model.discount = best[1]
        return model

    def nats(self, stream: Sequence[int] | np.ndarray, discount: float | None = None) -> tuple[float, float]:
        """Minus the logarithm of the probability of all tokens but the first: by unigrams, and by bigrams."""
        stream = np.asarray(stream, dtype=np.int64)
        discount = self.discount if discount is None else discount
        x, y = stream[:-1], stream[1:]
        places = np.searchsorted(self._pairs, pairs := x * self.vocabulary + y).clip(max=len(self._pairs) - 1)
        seen = np.where(self._pairs[places] == pairs, self._counts[places], 0)
        followed = np.maximum(self._followed[x], 1)
        left = np.where(self._followed[x] > 0, discount * self._different[x] / followed, 1.0)
        unigram = self.unigram[y]
        bigram = np.maximum(seen - discount, 0) / followed + left * unigram
        return float(-np.log(unigram).sum()), float(-np.log(bigram).sum())


class LanguageModelling:
    """Language modelling as a task for :func:`kernelbook.training.fit`: a stream of tokens, windows, losses.

    The documents of a split become one stream: a token that separates, document, separator, document, ..., separator.
    Each separator but the first is predicted as the end of a document, and a window may reach across it.

    An epoch of training reads the stream in windows of ``context`` tokens that begin at an offset drawn from (seed,
    epoch), in an order drawn from them too; every token but the first is predicted once.

    Parameters
    ----------
    corpus : TextCorpus
        Its training documents are learned, its validation documents watched.
    tokenizer : Tokenizer
        Of the documents; its end token separates.
    settings : Settings
        Budget of a batch, label smoothing, seed.
    context, stride : int
        As in :func:`windows`.
    valid_tokens : int, optional
        How much of the validation stream is watched.

    Raises
    ------
    DataError
        If a split has no text.
    ValueError
        If ``context`` or ``stride`` is out of range, or a window does not fit in a batch.
    """

    def __init__(self, corpus: TextCorpus, tokenizer: Tokenizer, settings: Settings, *, context: int, stride: int,
                 valid_tokens: int | None = None) -> None:
        check_context(context, stride)
        if settings.batch_tokens < context:
            raise ValueError(f"batch_tokens is {settings.batch_tokens}, less than one window of context {context}; "
                             f"raise it to {context} or more")
        check_text(corpus)
        self.corpus, self.tokenizer, self.settings = corpus, tokenizer, settings
        self.context, self.stride = context, stride
        self.train, self.valid, self.test = (self._stream(getattr(corpus, s)) for s in ("train", "valid", "test"))
        self.watched = self.valid[:None if valid_tokens is None else 1 + valid_tokens]
        self.config = {"architecture": "decoder", "vocabulary": tokenizer.vocabulary_size, "pad_id": tokenizer.pad_id}
        self.data = {"name": corpus.name, "corpus": corpus.name.partition(" (")[0], "origin": corpus.origin,
                     "fingerprint": corpus.fingerprint, "licence": corpus.licence,
                     "train": len(corpus.train), "valid": len(corpus.valid), "test": len(corpus.test),
                     "train_tokens": len(self.train) - 1, "valid_tokens": len(self.valid) - 1,
                     "test_tokens": len(self.test) - 1}
        self.about = (f"{corpus.summary()}\n  {len(self.train) - 1:,} training tokens of a vocabulary of "
                      f"{tokenizer.vocabulary_size:,}; context {context}")
        self.metadata = {"tokenizer": tokenizer.to_json()}
        self.decoding = f"context {context}, stride {stride}; samples drawn at temperature {TEMPERATURE:g}"

    def _stream(self, documents: Sequence[str]) -> Int[Tensor, " tokens"]:
        end = self.tokenizer.eos_id
        return torch.tensor([end, *(t for ids in self.tokenizer.encode_batch(documents) if ids for t in (*ids, end))])

    def batches(self, epoch: int) -> list[list[int]]:
        """Batches of windows drawn from (seed, epoch); a window's index is where it ends in the stream, less 1."""
        # Seeding with a text hashes it, so that (seed, epoch) = (1, 12) and (11, 2) are unrelated.
        generator = random.Random(f"{self.settings.seed}/{epoch}")
        ends = list(range(generator.randint(1, self.context), len(self.train) - 1 + self.context, self.context))
        generator.shuffle(ends)
        size = self.settings.batch_tokens // self.context
        return [ends[i:i + size] for i in range(0, len(ends), size)]

    def loss(self, model: torch.nn.Module, indices: list[int], device: torch.device) -> tuple[Tensor, int]:
        """Cross-entropy per predicted token, in nats, and the number of predicted tokens."""
        # The window that ends beyond the stream, and the one that begins before it, are cut off there.
        rows = [self.train[max(0, i - self.context):i + 1].tolist() for i in indices]
        tokens = pad(rows, self.tokenizer.pad_id).to(device)
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=self.tokenizer.pad_id,
                               label_smoothing=self.settings.label_smoothing)
        return loss, sum(len(row) - 1 for row in rows)

    def nats(self, model: torch.nn.Module, stream: Int[Tensor, " tokens"], device: torch.device,
             progress: Callable[[int, int], None] = lambda done, of: None) -> Float[Tensor, " predicted"]:
        """Minus the logarithm of the probability of each token of a stream but the first, in its own window."""
        found = torch.empty(len(stream) - 1, dtype=torch.float64)
        cut = windows(len(stream), self.context, self.stride)
        size = max(1, 4096 // self.context)
        for part in (cut[i:i + size] for i in range(0, len(cut), size)):
            tokens = pad([stream[w.start:w.end].tolist() for w in part], self.tokenizer.pad_id).to(device)
            scores = model(tokens[:, :-1]).double().transpose(1, 2)
            losses = F.cross_entropy(scores, tokens[:, 1:], reduction="none").cpu()
            for w, row in zip(part, losses, strict=True):
                found[w.first - 1:w.end - 1] = row[w.first - w.start - 1:w.end - w.start - 1]
            progress(part[-1].end - 1, len(found))
        return found

    def validate(self, model: torch.nn.Module, device: torch.device) -> dict[str, float]:
        """Cross-entropy of the watched tokens, in nats, without label smoothing; and its exponential."""
        each = self.nats(model, self.watched, device).mean().item()
        return {"valid_loss": each, "valid_perplexity": math.exp(min(each, 50.0))}

    @torch.no_grad()
    def evaluate(self, model: Transformer, device: torch.device, progress: Callable[[int, int], None],
                 split: str = "test") -> Outcome:
        """Perplexity of the documents of a split, beside those of unigrams and bigrams; and three continuations.

        The ends of documents are predicted like all tokens, but are neither words nor bytes.
        """
        model.eval()
        stream = getattr(self, split)
        total, tokens = self.nats(model, stream, device, progress).sum().item(), len(stream) - 1
        _, words, size = self.corpus.counts(split)
        simple = Bigrams.fitted(self.train.numpy(), self.valid.numpy(), self.tokenizer.vocabulary_size)
        unigram, bigram = (perplexity(nats, tokens) for nats in simple.nats(stream.numpy()))
        least = self.context - self.stride + 1
        return Outcome(
            {f"{split}_perplexity": perplexity(total, tokens), f"{split}_perplexity_word": perplexity(total, words),
             f"{split}_bits_per_byte": bits_per_byte(total, size)},
            {"unigram": unigram, "bigram": bigram},
            f"perplexity per token, {tokens} tokens each scored once, from the {least} to {self.context} tokens before "
            f"it (all there are at the beginning), across documents; {words} words, {size} bytes; "
            f"bigrams by absolute discounting, D={simple.discount:g}",
            self._samples(model, split, device))

    def _samples(self, model: Transformer, split: str, device: torch.device, begin: int = 12, more: int = 24
                 ) -> list[dict[str, str]]:
        """The beginnings of three documents, at most half of each, and how the model goes on."""
        t = self.tokenizer
        documents = [ids for ids in t.encode_batch(self.corpus.splits[split]) if len(ids) > 1]
        documents = [documents[i] for i in spread(len(documents), 3)]
        if not documents:
            return []
        begun = [ids[:min(begin, len(ids) // 2, self.context)] for ids in documents]
        found = sample(model, pad([[t.eos_id, *ids] for ids in begun], t.pad_id).to(device), max_new=more,
                       temperature=TEMPERATURE, generator=torch.Generator().manual_seed(0), eos_id=t.eos_id)
        return [{"text": t.decode(prompt), "continued": t.decode(continued),
                 "original": t.decode(ids[len(prompt):len(prompt) + more])}
                for ids, prompt, continued in zip(documents, begun, found, strict=True)]


def prepare(corpus: str | None, data_dir: Path | None, preset: Preset) -> LanguageModelling:
    """Documents at a preset's size, their vocabulary learned from the training documents."""
    documents = load_text(corpus, data_dir=data_dir)
    size = preset.of(documents.name)
    options = dict(size.options)
    documents = first(documents, options.pop("train_documents", None), options.pop("test_documents", None))
    check_text(documents)
    vocabulary = options.pop("vocabulary")
    if size.metadata is not None:
        tokenizer = Tokenizer.from_json(size.metadata["tokenizer"])
    else:
        tokenizer = Tokenizer.train(documents.train, vocabulary)
    return LanguageModelling(documents, tokenizer, size.settings, **options)


LANGUAGE_MODELLING = TaskKind("language-modelling", "test_perplexity", False, "wikipedia", PRESETS, prepare)
