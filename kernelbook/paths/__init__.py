"""The statistical mechanics of attention paths: what a deep network of fixed attention learns at finite width."""

from .kernels import combine, path_diagonal, path_heads, path_index, path_inputs, path_kernels, paths_through

__all__ = ["combine", "path_diagonal", "path_heads", "path_index", "path_inputs", "path_kernels", "paths_through"]
