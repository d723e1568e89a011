"""The statistical mechanics of attention paths: what a deep network of fixed attention learns at finite width.

From data and attention to kernels between paths (:func:`path_inputs`, :func:`path_kernels`), from these to the order
parameter (:func:`solve_order_parameters`), and from it to predictions (:func:`predict`) and to what each head is worth
(:func:`head_scores`).  None of this knows how attention came about.  The network itself is in
:mod:`kernelbook.paths.network`, one whose attention is trained too in :mod:`kernelbook.paths.model`, the posterior
in :mod:`kernelbook.paths.sampling`, and a task to try all of it on in :mod:`kernelbook.paths.hidden_markov`.
"""

from .action import Architecture, Virial, action, action_gradients, energy, entropy, virial, whitened
from .diagnostics import Alignment, head_scores, kernel_alignment, prune_heads, task_alignment
from .hidden_markov import (
    FOUR_PATHS,
    TWO_PATHS,
    HiddenMarkov,
    PathTask,
    four_path_heads,
    four_paths,
    random_head,
    staying_head,
    two_path_heads,
    two_paths,
    uniform_head,
)
from .kernels import combine, path_diagonal, path_heads, path_index, path_inputs, path_kernels, paths_through
from .model import PathNetwork, PathNetworkConfig
from .network import (
    AttentionNetwork,
    QueryKeyAttention,
    Training,
    bilinear_attention,
    draw_weights,
    network_output,
    order_parameter,
    output_of_paths,
    path_weights,
    train,
)
from .sampling import Draws, sample_order_parameters, sample_weights
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

__all__ = ["Architecture", "Virial", "action", "action_gradients", "energy", "entropy", "virial", "whitened",
           "Alignment", "head_scores", "kernel_alignment", "prune_heads", "task_alignment",
           "combine", "path_diagonal", "path_heads", "path_index", "path_inputs", "path_kernels", "paths_through",
           "PathNetwork", "PathNetworkConfig",
           "Minimum", "Prediction", "Solution", "gp_limit", "large_width", "noiseless_single_path", "posterior",
           "predict", "single_path", "solve_order_parameters",
           "AttentionNetwork", "QueryKeyAttention", "Training", "bilinear_attention", "draw_weights", "network_output",
           "order_parameter", "output_of_paths", "path_weights", "train",
           "Draws", "sample_order_parameters", "sample_weights",
           "FOUR_PATHS", "TWO_PATHS", "HiddenMarkov", "PathTask", "four_path_heads", "four_paths", "random_head",
           "staying_head", "two_path_heads", "two_paths", "uniform_head"]
