"""Tasks: what a model is trained for, from a corpus to a record.

>>> from kernelbook import tasks
>>> record, folder = tasks.train("translation", kernel="rbf", preset="quick")       # doctest: +SKIP

Each task has presets of the same names: ``smoke`` (seconds, for tests), ``quick`` (at most 3 minutes on 2 CPU cores),
``laptop`` (at most 15), ``gpu``.
"""

from .base import Outcome, Prepared, Preset, TaskKind
from .run import TASKS, estimate, evaluate, run_name, train
from .translation import Translation

__all__ = ["TASKS", "train", "estimate", "evaluate", "run_name", "TaskKind", "Preset", "Prepared", "Outcome",
           "Translation"]
