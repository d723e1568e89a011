"""Translation: from aligned sentences to BLEU."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import evaluation
from ..data import DataError, Pair, ParallelCorpus, Tokenizer, fingerprint, load_translation, pad, token_budget_batches
from ..models import Transformer
from ..training import Settings
from .base import Outcome, Preset, TaskKind, spread

__all__ = ["Translation", "TRANSLATION", "PRESETS"]

_GREEDY = {"beam": 1, "length_penalty": 1.0}

PRESETS = {
    "smoke": Preset(
        Settings(steps=20, batch_tokens=512, learning_rate=3e-3),
        {"width": 32, "heads": 2, "layers": 1, "feedforward": 64},
        {"vocabulary": 500, "max_words": {"bible": 12, "multi30k": 12}, "train_pairs": 200, "test_pairs": 20}
        | _GREEDY),
    "quick": Preset(
        Settings(steps=1000, batch_tokens=1024, learning_rate=3e-3),
        {"width": 128, "heads": 4, "layers": 2, "feedforward": 512},
        {"vocabulary": 4000, "max_words": {"bible": 16}} | _GREEDY),
    "laptop": Preset(
        Settings(steps=2000, batch_tokens=1536, learning_rate=2e-3),
        {"width": 192, "heads": 6, "layers": 3, "feedforward": 768},
        {"vocabulary": 6000, "max_words": 0, "beam": 4, "length_penalty": 1.0},
        corpora={"bible": Preset(
            Settings(steps=1800, batch_tokens=1536, learning_rate=2e-3),
            {"width": 192, "heads": 6, "layers": 3, "feedforward": 768},
            {"vocabulary": 6000, "max_words": 24} | _GREEDY)}),
    "gpu": Preset(
        Settings(steps=8000, batch_tokens=4096, learning_rate=1e-3),
        {"width": 256, "heads": 4, "layers": 4, "feedforward": 1024, "dropout": 0.3},
        {"vocabulary": 8000, "max_words": 0, "beam": 5, "length_penalty": 1.0}),
}
"""Sizes of a translation run. Options: ``vocabulary`` (tokens of the joint byte-pair vocabulary), ``max_words`` (by
corpus, or one number for any: pairs with a longer side are left out, in every split; 0 leaves out none),
``train_pairs`` and ``test_pairs`` (at most so many, the first of the split), ``beam`` and ``length_penalty`` (of the
search that translates the test pairs, see :func:`kernelbook.decoding.beam`; a beam of 1 is greedy)."""


class Translation:
    """Translation as a task for :func:`kernelbook.training.fit`: pairs as token numbers, batches, losses.

    Parameters
    ----------
    corpus : ParallelCorpus
        Its training pairs are learned, its validation pairs watched.
    tokenizer : Tokenizer
        Joint, of both languages.
    settings : Settings
        Budget of a batch, label smoothing, seed.
    beam : int
        Width of the search that translates held-out pairs; 1 is greedy decoding.
    length_penalty : float
        As in :func:`kernelbook.decoding.beam`.

    Raises
    ------
    ValueError
        If ``beam`` is below 1 or ``length_penalty`` negative.
    DataError
        If one training pair is longer than a batch.
    """

    def __init__(self, corpus: ParallelCorpus, tokenizer: Tokenizer, settings: Settings, *, beam: int = 1,
                 length_penalty: float = 1.0) -> None:
        if beam < 1 or not 0 <= length_penalty < math.inf:
            raise ValueError("beam must be at least 1 and length_penalty a number from 0 on, but are "
                             f"{beam} and {length_penalty}")
        self._search = {} if beam == 1 else {"beam": beam, "length_penalty": length_penalty}
        self.corpus, self.tokenizer, self.settings = corpus, tokenizer, settings
        self.config = {"architecture": "encoder-decoder", "vocabulary": tokenizer.vocabulary_size,
                       "pad_id": tokenizer.pad_id}
        direction = f"{corpus.source_language}-{corpus.target_language}"
        self.data = {"name": corpus.name, "corpus": corpus.name.partition(" (")[0], "origin": corpus.origin,
                     "fingerprint": corpus.fingerprint, "licence": corpus.licence, "direction": direction,
                     "train": len(corpus.train), "valid": len(corpus.valid), "test": len(corpus.test)}
        self.about = corpus.summary()
        self.decoding = "greedy" if beam == 1 else f"beam search, width {beam}, length penalty {length_penalty:g}"
        self.metadata = {"tokenizer": tokenizer.to_json(), "direction": direction}
        self.train, self.valid = self._encode(corpus.train), self._encode(corpus.valid)
        self._lengths = [max(len(s), len(t)) for s, t in self.train]
        longest = max(range(len(self._lengths)), key=self._lengths.__getitem__)
        if (tokens := self._lengths[longest]) > settings.batch_tokens:
            raise DataError(f"training pair {longest + 1} of {corpus.name} has {tokens:,} tokens, more than a batch of "
                            f"{settings.batch_tokens:,}: {corpus.train[longest].source[:60]!r}...; raise the batch, as "
                            f"with --setting batch_tokens={tokens}, or leave long pairs out, as with --option "
                            "max_words=60")

    def _encode(self, pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
        t = self.tokenizer
        sources = t.encode_batch([p.source for p in pairs])
        targets = t.encode_batch([p.target for p in pairs])
        return [([*s, t.eos_id], [t.bos_id, *y, t.eos_id]) for s, y in zip(sources, targets, strict=True)]

    def batches(self, epoch: int) -> list[list[int]]:
        """Batches of similar lengths within the token budget, drawn from (seed, epoch)."""
        s = self.settings
        return token_budget_batches(self._lengths, s.batch_tokens, shuffle=True, seed=s.seed, epoch=epoch)

    def loss(self, model: torch.nn.Module, indices: list[int], device: torch.device) -> tuple[Tensor, int]:
        """Label-smoothed cross-entropy per target token, in nats, and the number of target tokens."""
        return self._loss(model, [self.train[i] for i in indices], device, self.settings.label_smoothing)

    def _loss(self, model: torch.nn.Module, pairs: list[tuple[list[int], list[int]]], device: torch.device,
              smoothing: float) -> tuple[Tensor, int]:
        pad_id = self.tokenizer.pad_id
        source = pad([s for s, _ in pairs], pad_id).to(device)
        target = pad([t for _, t in pairs], pad_id).to(device)
        logits = model(source, target[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=pad_id,
                               label_smoothing=smoothing)
        return loss, sum(len(t) - 1 for _, t in pairs)

    def validate(self, model: torch.nn.Module, device: torch.device) -> dict[str, float]:
        """Cross-entropy of the validation pairs, in nats a token, without label smoothing; and its exponential."""
        total, count = 0.0, 0
        lengths = [max(len(s), len(t)) for s, t in self.valid]
        for indices in token_budget_batches(lengths, max(4096, *lengths), shuffle=False):
            loss, n = self._loss(model, [self.valid[i] for i in indices], device, 0.0)
            total, count = total + loss.item() * n, count + n
        return {"valid_loss": total / count, "valid_perplexity": math.exp(min(total / count, 50.0))}

    def evaluate(self, model: Transformer, device: torch.device, progress: Callable[[int, int], None],
                 split: str = "test") -> Outcome:
        """BLEU of the pairs of a split, and of trivial systems; and three translations."""
        pairs = self.corpus.splits[split]
        references = [p.target for p in pairs]
        found = evaluation.translate(model, self.tokenizer, [p.source for p in pairs], progress=progress,
                                     **self._search)
        score = evaluation.bleu(found, references)
        return Outcome({f"{split}_bleu": score.score}, evaluation.baselines(self.corpus.train, pairs), score.signature,
                       [{"source": pairs[i].source, "reference": references[i], "translation": found[i]}
                        for i in spread(len(pairs), 3)])


def prepare(corpus: str | None, data_dir: Path | None, preset: Preset) -> Translation:
    """A parallel corpus at a preset's size, its vocabulary learned from its training pairs."""
    pairs = load_translation(corpus, data_dir=data_dir)
    preset = preset.of(pairs.name)
    pairs = _sized(pairs, preset.options)
    if preset.metadata is not None:
        tokenizer = Tokenizer.from_json(preset.metadata["tokenizer"])
    else:
        tokenizer = Tokenizer.train((text for p in pairs.train for text in p), preset.options["vocabulary"])
    return Translation(pairs, tokenizer, preset.settings,
                       **{name: preset.options[name] for name in _GREEDY if name in preset.options})


def _sized(corpus: ParallelCorpus, options: Mapping[str, Any]) -> ParallelCorpus:
    words = options.get("max_words", 0)
    if words := words.get(corpus.name, 0) if isinstance(words, Mapping) else words:
        corpus = corpus.short(words)
    train, test = options.get("train_pairs"), options.get("test_pairs")
    if train or test:
        kept = {"train": corpus.train[:train], "valid": corpus.valid[:test], "test": corpus.test[:test]}
        corpus = replace(corpus, name=f"{corpus.name} (first {len(kept['train'])})", fingerprint=fingerprint(kept),
                         **kept)
    return corpus


TRANSLATION = TaskKind("translation", "test_bleu", True, "bible", PRESETS, prepare)
