"""The training loop, and the two files it writes: the state from which it resumes, and the finished model.

One loop serves every task: :func:`fit`.  It runs under Lightning Fabric, which places the model, starts the processes
and chooses the precision: :func:`make_fabric`.  A run is a function of its settings and seed: batches are drawn from
(seed, epoch) alone, and the state holds the rest (weights, optimiser, random numbers, position).
"""

from .loop import Interrupted, OutOfMemory, Task, estimate, fit
from .machine import ACCELERATORS, PRECISIONS, STRATEGIES, make_fabric
from .settings import SCHEDULES, Settings, learning_rate
from .state import load_model, save_model

__all__ = ["Settings", "SCHEDULES", "learning_rate", "make_fabric", "ACCELERATORS", "STRATEGIES", "PRECISIONS", "Task",
           "fit", "estimate", "Interrupted", "OutOfMemory", "save_model", "load_model"]
