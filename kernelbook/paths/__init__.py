"""The statistical mechanics of attention paths: what a deep network of fixed attention learns at finite width."""

from .action import Architecture, action, action_gradients, energy, entropy, virial, whitened
from .diagnostics import Alignment, head_scores, kernel_alignment, prune_heads, task_alignment
from .kernels import combine, path_diagonal, path_heads, path_index, path_inputs, path_kernels, paths_through
from .theory import (
    Minimum,
    Prediction,
    Solution,
    gp_limit,
    large_width,
    noiseless_single_path,
    posterior,
    predict,
    single_path,
    solve_order_parameters,
)

__all__ = ["Architecture", "action", "action_gradients", "energy", "entropy", "virial", "whitened",
           "Alignment", "head_scores", "kernel_alignment", "prune_heads", "task_alignment",
           "combine", "path_diagonal", "path_heads", "path_index", "path_inputs", "path_kernels", "paths_through",
           "Minimum", "Prediction", "Solution", "gp_limit", "large_width", "noiseless_single_path", "posterior",
           "predict", "single_path", "solve_order_parameters"]
