"""What every task provides: presets, a corpus made ready for a run, and an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from ..models import Transformer
from ..training import Settings, Task

__all__ = ["Preset", "Outcome", "Prepared", "TaskKind", "spread"]


@dataclass(frozen=True)
class Preset:
    """The size of a run.

    Parameters
    ----------
    settings : Settings
        Of the training.
    model : dict
        Numbers of :class:`kernelbook.models.TransformerConfig`.
    options : dict
        What the task makes of a corpus: size of the vocabulary, lengths, how many examples; each task says which.
    """

    settings: Settings
    model: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


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
        Of :class:`kernelbook.models.TransformerConfig`: ``architecture``, ``vocabulary``, ``pad_id``, ``classes``.
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

    def evaluate(self, model: Transformer, device: torch.device, progress: Callable[[int, int], None]) -> Outcome:
        """Metrics of a trained model on held-out data; ``progress(done, of)`` is called on the way."""


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
        ``prepare(corpus, data_dir, preset) -> Prepared``; ``preset.settings`` are those of the run, its seed among
        them.
    """

    name: str
    metric: str
    higher_is_better: bool
    corpus: str | None
    presets: Mapping[str, Preset]
    prepare: Callable[[str | None, Path | None, Preset], Prepared]


def spread(count: int, wanted: int) -> list[int]:
    """Indices spread evenly over ``range(count)``: a sample nobody picked."""
    wanted = min(count, wanted)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]
