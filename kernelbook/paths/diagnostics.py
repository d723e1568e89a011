r"""What an order parameter says: which heads count, and how a kernel is aligned with its task.

Nothing here depends on how :math:`U` was found: by the theory, by sampling, or from the weights of a trained network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .kernels import checked_heads, paths_through

__all__ = ["Alignment", "head_scores", "kernel_alignment", "prune_heads", "task_alignment"]


# ------------------------------------------------------------------------- a kernel and its task

class Alignment(NamedTuple):
    """What :func:`task_alignment` returns: the eigenvalues of the kernel, descending, and overlaps, both ``(P,)``.

    The overlaps are those of its principal components with the labels.  The sum of their squares is 1 for labels of -1
    and +1.
    """

    eigenvalues: Float[Tensor, " P"]
    overlaps: Float[Tensor, " P"]


def _kernel_and_labels(kernel: Tensor, labels: Tensor) -> None:
    if kernel.ndim != 2 or len(kernel) == 0 or kernel.shape != (len(kernel),) * 2 or labels.shape != kernel.shape[:1]:
        raise ValueError(f"kernel must be (examples, examples) and labels (examples,), with at least one example, but "
                         f"they have the shapes {tuple(kernel.shape)} and {tuple(labels.shape)}")


def task_alignment(kernel: Float[Tensor, "P P"], labels: Float[Tensor, " P"]) -> Alignment:
    r"""Overlaps of the principal components of a kernel with the labels, :math:`|v_k\cdot y|/\sqrt P`.

    A kernel suits a task where few of its first components, those with the largest eigenvalues, hold most of the
    labels.  The components are those of :math:`K` itself, without centring and without the temperature.

    Parameters
    ----------
    kernel : Tensor
        Symmetric, ``(P, P)``; of a solution, ``solution.kernel``.
    labels : Tensor
        ``(P,)``.

    Returns
    -------
    Alignment

    Raises
    ------
    ValueError
        If the shapes do not fit.
    """
    _kernel_and_labels(kernel, labels)
    eigenvalues, vectors = torch.linalg.eigh(kernel)
    return Alignment(eigenvalues.flip(0), (vectors.mT @ labels.to(kernel)).abs().flip(0) / math.sqrt(len(labels)))


def kernel_alignment(kernel: Float[Tensor, "P P"], labels: Float[Tensor, " P"]) -> float:
    r"""One number for the alignment of a kernel with its task.

    .. math:: y^{\mathsf T}Ky\,/\,(\lVert K\rVert_F\lVert y\rVert^2)

    is the cosine between :math:`K` and :math:`yy^{\mathsf T}`, at most 1.

    Parameters
    ----------
    kernel, labels
        As for :func:`task_alignment`.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If the shapes do not fit, or the kernel or the labels are zero.
    """
    _kernel_and_labels(kernel, labels)
    labels = labels.to(kernel)
    size = torch.linalg.norm(kernel) * (labels @ labels)
    if size == 0:
        raise ValueError("the kernel or the labels are zero: there is no angle between them")
    return (labels @ kernel @ labels / size).item()


# ------------------------------------------------------------------------- heads

def _order_parameter(U: Tensor, heads: Sequence[int]) -> tuple[int, ...]:
    heads = checked_heads(heads)
    if U.ndim < 2 or U.shape[-2:] != (math.prod(heads),) * 2:
        raise ValueError(f"the heads make {math.prod(heads)} paths, so U must be (..., {math.prod(heads)}, "
                         f"{math.prod(heads)}), but has the shape {tuple(U.shape)}")
    return heads


def head_scores(U: Float[Tensor, "*batch Pi Pi"], heads: Sequence[int]) -> list[Float[Tensor, "*batch H"]]:
    r"""How much of the order parameter goes through each head.

    .. math:: s(l,h)\ \propto\sum_{\pi\ni h\ \text{or}\ \pi'\ni h}\lvert U_{\pi\pi'}\rvert,

    divided by the largest score of all heads.

    Parameters
    ----------
    U : Tensor
        Order parameters of the paths, ``(..., Pi, Pi)``.
    heads : sequence of int
        Heads of each layer, ``(H_1, ..., H_L)``.

    Returns
    -------
    list of Tensor
        One tensor per layer, ``(..., H_l)``; the largest entry of all is 1.

    Raises
    ------
    ValueError
        If ``U`` has not one row for each path, or is zero.
    """
    heads = _order_parameter(U, heads)
    sizes, scores = U.abs(), []
    if not heads:
        return []
    for layer, count in enumerate(heads):
        through = torch.stack([paths_through(heads, layer, head) for head in range(count)]).to(U.device)
        touched = (through[:, :, None] | through[:, None, :]).to(U)
        scores.append(torch.einsum("...ab,hab->...h", sizes, touched))
    largest = torch.cat(scores, -1).amax(-1, keepdim=True)
    if (largest == 0).any():
        raise ValueError("U is zero, and no head counts more than another")
    return [score / largest for score in scores]


def prune_heads(
    U: Float[Tensor, "*batch Pi Pi"], heads: Sequence[int], removed: Iterable[tuple[int, int]]
) -> Float[Tensor, "*batch Pi Pi"]:
    r"""The order parameter without some heads: rows and columns of the paths through them are zero.

    The factor :math:`1/\Pi` of :func:`~kernelbook.paths.combine` stays that of all paths.

    Parameters
    ----------
    U : Tensor
        Order parameters of the paths, ``(..., Pi, Pi)``.
    heads : sequence of int
        Heads of each layer, ``(H_1, ..., H_L)``.
    removed : iterable of pairs
        ``(layer, head)``, both counted from 0.

    Returns
    -------
    Tensor
        A new tensor of the same shape.

    Raises
    ------
    ValueError
        If ``U`` has not one row for each path, or there is no such head.
    """
    heads = _order_parameter(U, heads)
    kept = torch.ones(math.prod(heads), dtype=torch.bool)
    for layer, head in removed:
        kept &= ~paths_through(heads, layer, head)
    kept = kept.to(U)
    return U * kept[:, None] * kept
