"""What every task provides: presets, a corpus made ready for a run, and an evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ..data import fingerprint
from ..models import ModelConfig, TransformerConfig
from ..training import Settings, Task

__all__ = ["Preset", "Outcome", "Prepared", "TaskKind", "first", "seeded", "spread"]


@dataclass(frozen=True)
class Preset:
    """The size of a run.

    Parameters
    ----------
    settings : Settings
        Of the training.
    model : dict
        Numbers of the task's configuration: :class:`kernelbook.models.TransformerConfig`, say.
    options : dict
        What the task makes of a corpus: size of the vocabulary, lengths, how many examples; each task says which.
    corpora : dict of Preset
        What takes the place of this one for the corpora named.
    metadata : dict, optional
        That of a trained model, to evaluate it: its tokeniser and its classes are taken, instead of learning new ones.
    """

    settings: Settings
    model: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    corpora: dict[str, Preset] = field(default_factory=dict)
    metadata: dict[str, Any] | None = None

    def of(self, corpus: str | None) -> Preset:
        """The preset for a corpus.

        Parameters
        ----------
        corpus : str or None
            Its name.

        Returns
        -------
        Preset
        """
        return self.corpora.get(corpus, self)

    def changed(self, *, settings: Mapping[str, Any] | None = None, model: Mapping[str, Any] | None = None,
                options: Mapping[str, Any] | None = None, metadata: Mapping[str, Any] | None = None) -> Preset:
        """The same with some values replaced, for every corpus.

        Parameters
        ----------
        settings, model, options : dict, optional
            New values by name.
        metadata : dict, optional
            Of a trained model.

        Returns
        -------
        Preset

        Raises
        ------
        ValueError
            If a setting is out of range.
        """
        changes = {"settings": settings, "model": model, "options": options, "metadata": metadata}
        return Preset(replace(self.settings, **(settings or {})), self.model | dict(model or {}),
                      self.options | dict(options or {}),
                      {name: preset.changed(**changes) for name, preset in self.corpora.items()},
                      self.metadata if metadata is None else dict(metadata))


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found.

    Attributes
    ----------
    metrics : dict
        Numbers by name; which split they come from is in the name.
    baselines : dict
        The task's metric of simpler systems on the same split.
    signature : str
        How the metric was computed.
    samples : list of dict
        A few outputs beside their references.
    """

    metrics: dict[str, float]
    baselines: dict[str, float] = field(default_factory=dict)
    signature: str = ""
    samples: list[dict[str, str]] = field(default_factory=list)


class Prepared(Task, Protocol):
    """A corpus made ready for one run: what the loop needs (:class:`kernelbook.training.Task`), and what comes after.

    Attributes
    ----------
    config : dict
        What the corpus decides of the model: of :class:`kernelbook.models.TransformerConfig` ``architecture``,
        ``vocabulary``, ``pad_id``, ``classes``.
    data : dict
        For the record: ``name``, ``corpus``, ``origin``, ``fingerprint``, ``licence``, the sizes ``train``, ``valid``
        and ``test``, and what else tells this corpus from another.
    about : str
        One line for the terminal.
    metadata : dict
        Plain values stored beside the weights, such as the tokeniser.
    decoding : str
        How outputs are made, for the record.
    """

    config: dict[str, Any]
    data: dict[str, Any]
    about: str
    metadata: dict[str, Any]
    decoding: str

    def evaluate(self, model: torch.nn.Module, device: torch.device, progress: Callable[[int, int], None],
                 split: str = "test") -> Outcome:
        """Metrics of a trained model on a split, ``"test"`` or ``"valid"``; their names begin with that of the split.

        ``progress(done, of)`` is called on the way.
        """


@dataclass(frozen=True)
class TaskKind:
    """A task by name.

    Parameters
    ----------
    name : str
        As in ``kernelbook train NAME``.
    metric : str
        The one of the record's metrics that sums a run up.
    higher_is_better : bool
        Of that metric.
    corpus : str or None
        The corpus taken where none is named.
    presets : dict of Preset
        By name.
    prepare : callable
        ``prepare(corpus, data_dir, preset) -> Prepared``.  ``preset.of(name of the corpus)`` is the run's own: its
        settings, the seed among them, and its options.
    config : type
        Of the models that are trained for it: a :class:`kernelbook.models.ModelConfig`.
    stand_in : dict
        Any values for what the corpus will decide of that configuration, so that the rest can be checked before.
    """

    name: str
    metric: str
    higher_is_better: bool
    corpus: str | None
    presets: Mapping[str, Preset]
    prepare: Callable[[str | None, Path | None, Preset], Prepared]
    config: type[ModelConfig] = TransformerConfig
    stand_in: Mapping[str, Any] = field(default_factory=lambda: {"architecture": "decoder", "vocabulary": 1})


def first(corpus: Any, train: int | None, held_out: int | None) -> Any:
    """The same corpus with at most so many records in its training split, and in the two others: the first ones."""
    kept = {"train": corpus.train[:train], "valid": corpus.valid[:held_out], "test": corpus.test[:held_out]}
    if kept == corpus.splits:
        return corpus
    return replace(corpus, name=f"{corpus.name} (first {len(kept['train'])})", fingerprint=fingerprint(kept), **kept)


def seeded(text: str) -> torch.Generator:
    """Random numbers from a text's hash: those of "1/12" and "11/2" are unrelated."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))


def spread(count: int, wanted: int) -> list[int]:
    """Indices spread evenly over ``range(count)``: a sample nobody picked."""
    wanted = min(count, wanted)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]
