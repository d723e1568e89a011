"""Learning problems on reproducing kernel Banach spaces: solvers that return a duality gap with every answer.

Everything here computes with NumPy arrays in double precision, as SciPy and scikit-learn do, on which it stands.
"""

from .binary import (
    AdditiveSolution,
    LocalMinimum,
    PairRegressor,
    ProductSolution,
    TraceNormSolution,
    solve_additive,
    solve_product,
    solve_trace_norm,
)
from .estimators import BanachClassifier, BanachRegressor
from .losses import AbsoluteLoss, HingeLoss, LogisticLoss, Loss, SquaredLoss
from .solvers import Solution, certify, solve
from .tensor import TensorKernelRegressor, tensor_kernel

__all__ = ["Loss", "SquaredLoss", "AbsoluteLoss", "LogisticLoss", "HingeLoss", "Solution", "solve", "certify",
           "tensor_kernel", "TensorKernelRegressor", "BanachRegressor", "BanachClassifier",
           "solve_additive", "AdditiveSolution", "solve_product", "ProductSolution", "LocalMinimum",
           "solve_trace_norm", "TraceNormSolution", "PairRegressor"]
