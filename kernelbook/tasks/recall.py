"""Key-value recall: a synthetic diagnostic of what an attention can look up."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..evaluation import accuracy
from ..models import Transformer
from ..training import Settings
from .base import Outcome, Preset, TaskKind, seeded, spread

__all__ = ["Recall", "RECALL", "PRESETS"]

PRESETS = {
    "smoke": Preset(
        Settings(steps=20, batch_tokens=832, learning_rate=3e-3, label_smoothing=0.0),
        {"width": 32, "heads": 2, "layers": 2, "feedforward": 64, "dropout": 0.0},
        {"pairs": 2, "keys": 8, "values": 8, "epoch_sequences": 640, "held_out": 50}),
    "quick": Preset(
        Settings(steps=1800, batch_tokens=1664, learning_rate=3e-3, label_smoothing=0.0),
        {"width": 32, "heads": 2, "layers": 2, "feedforward": 128, "dropout": 0.0},
        {"pairs": 6, "keys": 16, "values": 16, "epoch_sequences": 12800, "held_out": 1000}),
    "laptop": Preset(
        Settings(steps=5000, batch_tokens=2112, learning_rate=2e-3, label_smoothing=0.0),
        {"width": 64, "heads": 4, "layers": 2, "feedforward": 256, "dropout": 0.0},
        {"pairs": 16, "keys": 64, "values": 64, "epoch_sequences": 32000, "held_out": 2000}),
    "gpu": Preset(
        Settings(steps=20000, batch_tokens=33024, learning_rate=1e-3, label_smoothing=0.0),
        {"width": 128, "heads": 4, "layers": 2, "feedforward": 512, "dropout": 0.0},
        {"pairs": 64, "keys": 256, "values": 256, "epoch_sequences": 256000, "held_out": 4000}),
}
"""Sizes of a recall run. Options: ``pairs`` in a sequence, ``keys`` and ``values`` to draw from, ``epoch_sequences``
(sequences drawn anew for each epoch), ``held_out`` (sequences of the validation split, and of the test split)."""


class Recall:
    r"""Key-value recall as a task for :func:`kernelbook.training.fit`.

    A sequence :math:`k_1 v_1 k_2 v_2\dots k_p v_p\,k` ends with one of its keys, :math:`k=k_i`; the answer is
    :math:`v_i`.  The keys of a sequence are distinct; its values are drawn independently, so that they may repeat.
    Every epoch has sequences of its own, drawn from (seed, epoch); none of them is a validation or test sequence.
    Tokens: 0 is padding (never used), then the keys, then the values.

    Parameters
    ----------
    settings : Settings
        Budget of a batch, label smoothing, seed.
    pairs, keys, values : int
        How many pairs a sequence has, how many keys and values there are to draw from.
    epoch_sequences, held_out : int
        Sequences an epoch, and of each of the validation and test splits.

    Raises
    ------
    ValueError
        If a number is out of range, there are too few different sequences, or a sequence does not fit in a batch.
    """

    def __init__(self, settings: Settings, *, pairs: int, keys: int, values: int, epoch_sequences: int,
                 held_out: int) -> None:
        for name, value, least in (("pairs", pairs, 1), ("keys", keys, pairs), ("values", values, 2),
                                   ("epoch_sequences", epoch_sequences, 1), ("held_out", held_out, 1)):
            if value < least:
                why = ": the keys of a sequence are distinct" if name == "keys" else ""
                raise ValueError(f"{name} must be at least {least}, not {value}{why}")
        different = math.perm(keys, pairs) * values**pairs * pairs
        if different < 4 * held_out:        # else drawing what is not held out could take for ever
            raise ValueError(f"there are only {different} different sequences of {pairs} pairs from {keys} keys and "
                             f"{values} values, and {2 * held_out} are to be held out; "
                             f"ask for more keys or values, or hold out at most {different // 4}")
        self.length = 2 * pairs + 1
        if settings.batch_tokens < self.length:
            raise ValueError(f"batch_tokens is {settings.batch_tokens}, but one sequence of {pairs} pairs has "
                             f"{self.length} tokens; raise it to {self.length} or more")
        self.settings, self.pairs, self.keys, self.values = settings, pairs, keys, values
        self.epoch_sequences = epoch_sequences
        self._held_out: set[bytes] = set()
        # The same in every run of these sizes, whatever its seed.
        tokens, answers = self._draw(2 * held_out, seeded("held out"), apart=True)
        self.valid, self.test = (tokens[:held_out], answers[:held_out]), (tokens[held_out:], answers[held_out:])
        self._held_out = {row.tobytes() for row in tokens.numpy()}
        self._epoch: tuple[int, tuple[Tensor, Tensor]] | None = None

        sizes: dict[str, Any] = {"pairs": pairs, "keys": keys, "values": values}
        digest = hashlib.sha256(json.dumps(sizes).encode())
        for tensor in (*self.valid, *self.test):
            digest.update(tensor.numpy().tobytes())
        self.config = {"architecture": "decoder", "vocabulary": 1 + keys + values, "pad_id": 0}
        self.data = {"name": f"synthetic key-value recall ({pairs} pairs, {keys} keys, {values} values)",
                     "corpus": "synthetic", "origin": "synthetic", "fingerprint": digest.hexdigest(),
                     "licence": "none needed", "train": epoch_sequences, "valid": held_out, "test": held_out} | sizes
        self.about = (f"{self.data['name']}, a diagnostic: {self.length} tokens a sequence, {epoch_sequences:,} new "
                      f"ones an epoch; {held_out:,} held out for validation, {held_out:,} for the test")
        self.metadata, self.decoding = {"keys": keys, "values": values}, "the most probable value or other token"

    def _any(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sequences drawn at random, and their answers."""
        keys = torch.rand(count, self.keys, generator=generator).argsort(-1)[:, :self.pairs] + 1
        values = torch.randint(self.values, (count, self.pairs), generator=generator) + 1 + self.keys
        asked = torch.randint(self.pairs, (count, 1), generator=generator)
        pairs = torch.stack((keys, values), -1).flatten(1)
        return torch.cat((pairs, keys.gather(1, asked)), 1), values.gather(1, asked)[:, 0]

    def _draw(self, count: int, generator: torch.Generator, apart: bool = False
              ) -> tuple[Int[Tensor, "count length"], Int[Tensor, " count"]]:
        """Sequences of which none is held out, and their answers; with ``apart``, no two are equal."""
        seen = set(self._held_out) if apart else self._held_out
        parts: list[tuple[Tensor, Tensor]] = []
        while (missing := count - sum(len(answers) for _, answers in parts)) > 0:
            tokens, answers = self._any(missing, generator)
            new = []
            for row, plain in enumerate(tokens.numpy()):
                sequence = plain.tobytes()
                if sequence not in seen:
                    new.append(row)
                    if apart:
                        seen.add(sequence)
            parts.append((tokens[new], answers[new]))
        return torch.cat([tokens for tokens, _ in parts]), torch.cat([answers for _, answers in parts])

    def sequences(self, epoch: int) -> tuple[Int[Tensor, "count length"], Int[Tensor, " count"]]:
        """The training sequences of an epoch and their answers: a function of (seed, epoch)."""
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._draw(self.epoch_sequences, seeded(f"{self.settings.seed}/{epoch}"))
        return self._epoch[1]

    def batches(self, epoch: int) -> list[list[int]]:
        """Batches of the sequences of an epoch; a sequence's index counts through all epochs."""
        size = self.settings.batch_tokens // self.length
        first, end = epoch * self.epoch_sequences, (epoch + 1) * self.epoch_sequences
        return [list(range(i, min(i + size, end))) for i in range(first, end, size)]

    def loss(self, model: torch.nn.Module, indices: list[int], device: torch.device) -> tuple[Tensor, int]:
        """Cross-entropy of the answers, in nats, and their number; nothing else of a sequence is learned."""
        tokens, answers = self.sequences(indices[0] // self.epoch_sequences)
        rows = torch.tensor(indices) % self.epoch_sequences
        scores = model(tokens[rows].to(device))[:, -1]
        return F.cross_entropy(scores, answers[rows].to(device),
                               label_smoothing=self.settings.label_smoothing), len(indices)

    def scores(self, model: torch.nn.Module, tokens: Int[Tensor, "count length"], device: torch.device
               ) -> Float[Tensor, "count vocabulary"]:
        """Of every token as the answer, on the CPU."""
        return torch.cat([model(part.to(device))[:, -1].float().cpu()
                          for part in tokens.split(max(1, 8192 // self.length))])

    def validate(self, model: torch.nn.Module, device: torch.device) -> dict[str, float]:
        """Cross-entropy of the validation answers, in nats, and the share of right ones."""
        tokens, answers = self.valid
        scores = self.scores(model, tokens, device)
        return {"valid_loss": F.cross_entropy(scores, answers).item(),
                "valid_accuracy": accuracy(scores.argmax(-1), answers)}

    @torch.no_grad()
    def evaluate(self, model: Transformer, device: torch.device, progress: Callable[[int, int], None],
                 split: str = "test") -> Outcome:
        """Share of right answers on a split, beside what can be had without looking up."""
        model.eval()
        tokens, answers = getattr(self, split)
        found = self.scores(model, tokens, device).argmax(-1)
        progress(len(found), len(found))
        return Outcome({f"{split}_accuracy": accuracy(found, answers)}, self.baselines(tokens, answers),
                       "share of right answers; synthetic",
                       [{"sequence": self.text(tokens[i].tolist()), "answer": self.text([int(answers[i])]),
                         "model": self.text([int(found[i])])} for i in spread(len(found), 3)])

    def baselines(self, tokens: Int[Tensor, "count length"], answers: Int[Tensor, " count"]) -> dict[str, float]:
        """Accuracy, on some sequences, of systems that cannot look up.

        Parameters
        ----------
        tokens, answers : Tensor
            The sequences, and their answers.

        Returns
        -------
        dict
            ``uniform_value``: expected, of any value at random.  ``a_value_seen``: of the value that occurs most
            often in the sequence, the best answer without the key; expected, where several occur as often, of one of
            them at random.
        """
        counts = (tokens[:, 1::2, None] == torch.arange(1 + self.keys, 1 + self.keys + self.values)).sum(1)
        best = (counts == counts.amax(-1, keepdim=True)).double()
        right = best.gather(1, (answers - 1 - self.keys)[:, None])[:, 0] / best.sum(-1)
        return {"uniform_value": 1 / self.values, "a_value_seen": right.mean().item()}

    def text(self, tokens: list[int]) -> str:
        """Tokens as people read them: ``k3 v7 k1 v2 k3``."""
        return " ".join("pad" if t == 0 else f"k{t}" if t <= self.keys else f"v{t - self.keys}" for t in tokens)


def prepare(corpus: str | None, data_dir: Path | None, preset: Preset) -> Recall:
    """The synthetic sequences at a preset's size."""
    if corpus not in (None, "synthetic") or data_dir is not None:
        raise ValueError("recall draws its own sequences and reads no corpus: leave out --data and --data-dir")
    size = preset.of("synthetic")
    return Recall(size.settings, **size.options)


RECALL = TaskKind("recall", "test_accuracy", True, None, PRESETS, prepare)
