"""Attention by any kernel: the definition, the paths that compute it, and the module built on it."""

from .cache import Cache
from .definition import NORMALISERS, visible_keys, weights
from .dispatch import PATHS, Plan, attend, explain
from .linear import RecurrentState, crossover
from .module import KernelAttention
from .tiled import compiling

__all__ = ["attend", "explain", "weights", "KernelAttention", "Cache", "RecurrentState", "crossover",
           "NORMALISERS", "PATHS", "Plan", "visible_keys", "compiling"]
