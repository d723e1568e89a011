r"""Attention paths, and the kernels between them.

A network of :math:`L` attention layers on fixed attention is a sum over *paths*: a path :math:`\pi=(h_1,\dots,h_L)`
takes one head in each layer.  What a path does to a sequence does not depend on any weight,

.. math:: \xi^{\pi,\mu}=X^\mu\,\Omega^{1h_1,\mu}\cdots\Omega^{Lh_L,\mu}\,r\in\mathbb R^{N_0},

and all that the theory needs of the data are the inner products of these *path inputs*,

.. math:: C_{\pi\pi'}^{\mu\nu}=\frac{\sigma_0^2}{N_0}\,\xi^{\pi\mu}\cdot\xi^{\pi'\nu},\qquad
   K(U)=\frac1\Pi\sum_{\pi\pi'}U_{\pi\pi'}C_{\pi\pi'}.

Paths are numbered in C-order: :math:`h_1` is the slowest index.  Layers and heads are counted from 0, as everything in
Python.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["path_inputs", "path_kernels", "path_diagonal", "combine", "path_heads", "path_index", "paths_through"]

_STOCHASTIC = 1e-5      # how far a column of attention may sum from 1: attention may have been computed in float32


# ------------------------------------------------------------------------- which path is which

def checked_heads(heads: Sequence[int]) -> tuple[int, ...]:
    """The numbers of heads as a tuple, or a ValueError."""
    heads = tuple(heads)
    if any(isinstance(h, bool) or not isinstance(h, numbers.Integral) or h < 1 for h in heads):
        raise ValueError(f"heads must be the number of heads of each layer, positive integers (H_1, ..., H_L), "
                         f"not {heads}")
    return tuple(int(h) for h in heads)


def _one_head(heads: tuple[int, ...], layer: int, head: int) -> None:
    if not 0 <= layer < len(heads):
        raise ValueError(f"layer {layer} is out of range: there are {len(heads)} layers, counted from 0")
    if not 0 <= head < heads[layer]:
        raise ValueError(f"head {head} of layer {layer} is out of range: the layer has {heads[layer]}, counted from 0")


def path_heads(heads: Sequence[int]) -> Int[Tensor, "Pi L"]:
    """The heads of every path: row ``i`` is the path of index ``i``, column ``l`` its head in layer ``l``.

    Parameters
    ----------
    heads : sequence of int
        Heads of each layer, ``(H_1, ..., H_L)``.

    Returns
    -------
    Tensor
        ``(Pi, L)``, integers; C-order, the first layer's head varies slowest.
    """
    heads = checked_heads(heads)
    index = torch.arange(math.prod(heads))
    return torch.stack(torch.unravel_index(index, heads), -1) if heads else index.new_zeros(1, 0)


def path_index(heads: Sequence[int], path: Sequence[int]) -> int:
    """The index of a path, given by its head in each layer.

    Parameters
    ----------
    heads : sequence of int
        Heads of each layer, ``(H_1, ..., H_L)``.
    path : sequence of int
        One head in each layer, counted from 0.

    Raises
    ------
    ValueError
        If the path has not one head in each layer, or a head is out of range.
    """
    heads, path, index = checked_heads(heads), tuple(path), 0
    if len(path) != len(heads):
        raise ValueError(f"a path takes one head in each of the {len(heads)} layers, but {path} has {len(path)}")
    for layer, (count, head) in enumerate(zip(heads, path, strict=True)):
        _one_head(heads, layer, head)
        index = index * count + int(head)
    return index


def paths_through(heads: Sequence[int], layer: int, head: int) -> Bool[Tensor, " Pi"]:
    """Which paths go through a head.

    Parameters
    ----------
    heads : sequence of int
        Heads of each layer, ``(H_1, ..., H_L)``.
    layer, head : int
        Counted from 0.

    Raises
    ------
    ValueError
        If there is no such layer or head.
    """
    heads = checked_heads(heads)
    _one_head(heads, layer, head)
    return path_heads(heads)[:, layer] == head


# ------------------------------------------------------------------------- what a path does to the data

def _same_type(named: dict[str, Tensor]) -> None:
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a tensor of floating-point numbers, not "
                            f"{tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__}")
    types = {name: tensor.dtype for name, tensor in named.items()}
    if len(set(types.values())) > 1:
        raise TypeError(f"all must have the same type of number, but {types}; mend with .double()")


def check_attention(attention: Sequence[Float[Tensor, "H P n n"]], count: int, tokens: int) -> None:
    """Refuse attention that is not column-stochastic or has the wrong shape.

    Parameters
    ----------
    attention : sequence of Tensor
        One tensor per layer, ``(H_l, P, n, n)``; rows are the key's token and columns the query's.
    count, tokens : int
        ``P`` and ``n``.

    Raises
    ------
    ValueError
        If a shape does not fit, an entry is negative or not finite, or a column does not sum to 1.
    """
    for layer, omega in enumerate(attention):
        if omega.ndim != 4 or len(omega) < 1 or omega.shape[1:] != (count, tokens, tokens):
            raise ValueError(f"attention of layer {layer} must have the shape (heads, {count}, {tokens}, {tokens}), "
                             f"like the inputs, but has {tuple(omega.shape)}")
        if not torch.isfinite(omega).all() or (omega < 0).any():
            raise ValueError(f"attention of layer {layer} has entries that are negative or not finite; the softmax "
                             "over the key's token (dim=-2) has none")
        columns, rows = ((omega.sum(dim) - 1).abs().max().item() for dim in (-2, -1))
        if columns > _STOCHASTIC:
            hint = "its rows do, so transpose it: omega.mT" if rows <= _STOCHASTIC else "take the softmax over dim=-2"
            raise ValueError(f"attention of layer {layer} is not column-stochastic: a column (the weights that one "
                             f"query gives the keys) sums to 1 up to {columns:.2g} only; {hint}")


def path_inputs(
    x: Float[Tensor, "P N_0 n"],
    attention: Sequence[Float[Tensor, "H P n n"]],
    readout: Float[Tensor, " n"],
) -> Float[Tensor, "Pi P N_0"]:
    r"""The input of each path, :math:`\xi^{\pi,\mu}=X^\mu\,\Omega^{1h_1,\mu}\cdots\Omega^{Lh_L,\mu}\,r`.

    Parameters
    ----------
    x : Tensor
        The data, ``(P, N_0, n)``: of each example the features of its ``n`` tokens, in columns.
    attention : sequence of Tensor
        One tensor per layer, ``(H_l, P, n, n)``, column-stochastic: rows are the key's token, columns the query's.
        Layers may have different numbers of heads.
    readout : Tensor
        What the last layer's tokens are weighted by, ``(n,)``: a unit vector, or ``1/n`` for the mean.

    Returns
    -------
    Tensor
        ``(Pi, P, N_0)``.

    Raises
    ------
    ValueError
        If there is no data, shapes do not fit, or attention is not column-stochastic.
    TypeError
        If the numbers are not of one floating-point type.

    Notes
    -----
    Evaluated from the right, vector by vector: all paths cost :math:`O(\Pi P n^2+\Pi P N_0n)`.
    """
    attention = list(attention)
    _same_type({"x": x, "readout": readout, **{f"attention[{i}]": a for i, a in enumerate(attention)}})
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError("x must have the shape (examples, features, tokens), with at least one of each, but has "
                         f"{tuple(x.shape)}")
    count, _, tokens = x.shape
    if readout.shape != (tokens,):
        raise ValueError(f"readout must have one weight for each of the {tokens} tokens, but has the shape "
                         f"{tuple(readout.shape)}")
    check_attention(attention, count, tokens)
    vectors = readout.expand(1, count, tokens)                  # of the part of each path from here to the readout
    for omega in reversed(attention):
        vectors = torch.einsum("hpst,cpt->hcps", omega, vectors).flatten(0, 1)
    return torch.einsum("pit,cpt->cpi", x, vectors)


# ------------------------------------------------------------------------- kernels between paths

def _inputs(inputs: Tensor, name: str) -> None:
    if inputs.ndim != 3 or 0 in inputs.shape:
        raise ValueError(f"{name} must be path inputs, (paths, examples, features), with at least one of each, but has "
                         f"the shape {tuple(inputs.shape)}")


def _variance(variance: float) -> float:
    if not 0 < variance < math.inf:
        raise ValueError(f"variance (of the first weights, sigma_0^2) must be a positive number, not {variance!r}")
    return float(variance)


def path_kernels(
    inputs: Float[Tensor, "Pi P N_0"],
    other: Float[Tensor, "Pi P2 N_0"] | None = None,
    variance: float = 1.0,
) -> Float[Tensor, "Pi Pi P P2"]:
    r"""Kernels between paths, :math:`C_{\pi\pi'}^{\mu\nu}=\frac{\sigma_0^2}{N_0}\,\xi^{\pi\mu}\cdot\xi^{\pi'\nu}`.

    A block :math:`C_{\pi\pi'}` is not symmetric, but :math:`C_{\pi'\pi}=C_{\pi\pi'}^{\mathsf T}` where both sets of
    examples are the same.

    Parameters
    ----------
    inputs : Tensor
        Path inputs, ``(Pi, P, N_0)``, from :func:`path_inputs`.
    other : Tensor, optional
        Path inputs of other examples, ``(Pi, P2, N_0)``; the same ones by default.
    variance : float
        :math:`\sigma_0^2`.

    Returns
    -------
    Tensor
        ``(Pi, Pi, P, P2)``.

    Raises
    ------
    ValueError
        If a shape does not fit, or the variance is not positive.
    """
    other = inputs if other is None else other
    for tensor, name in ((inputs, "inputs"), (other, "other")):
        _inputs(tensor, name)
    if (inputs.shape[0], inputs.shape[2]) != (other.shape[0], other.shape[2]):
        raise ValueError(f"inputs and other must have the same paths and features, but have the shapes "
                         f"{tuple(inputs.shape)} and {tuple(other.shape)}")
    scaled = inputs * (_variance(variance) / inputs.shape[-1])
    # Row by row into place: the result is the largest array of the theory, so it is not copied.
    kernels = inputs.new_empty(len(inputs), len(inputs), inputs.shape[1], other.shape[1])
    for row, xi in enumerate(scaled):
        kernels[row] = torch.matmul(xi, other.mT)
    return kernels


def path_diagonal(inputs: Float[Tensor, "Pi P N_0"], variance: float = 1.0) -> Float[Tensor, "Pi Pi P"]:
    r"""The entries :math:`C_{\pi\pi'}^{\mu\mu}` of :func:`path_kernels`: each example with itself.

    Parameters
    ----------
    inputs : Tensor
        Path inputs, ``(Pi, P, N_0)``.
    variance : float
        :math:`\sigma_0^2`.

    Returns
    -------
    Tensor
        ``(Pi, Pi, P)``.
    """
    _inputs(inputs, "inputs")
    return torch.einsum("apn,bpn->abp", inputs, inputs) * (_variance(variance) / inputs.shape[-1])


def combine(U: Float[Tensor, "*batch Pi Pi"], kernels: Float[Tensor, "Pi Pi *rest"]) -> Float[Tensor, "*shape"]:
    r"""The kernel of an order parameter, :math:`K(U)=\frac1\Pi\sum_{\pi\pi'}U_{\pi\pi'}C_{\pi\pi'}`.

    Parameters
    ----------
    U : Tensor
        Order parameters, ``(..., Pi, Pi)``.
    kernels : Tensor
        Kernels between paths, ``(Pi, Pi, ...)``: of :func:`path_kernels` or :func:`path_diagonal`.

    Returns
    -------
    Tensor
        The leading axes of ``U``, then the trailing ones of ``kernels``.

    Raises
    ------
    ValueError
        If the numbers of paths differ.
    """
    paths = len(kernels)
    if kernels.ndim < 2 or U.ndim < 2 or not U.shape[-2] == U.shape[-1] == kernels.shape[1] == paths:
        raise ValueError(f"U must be (..., paths, paths) and kernels (paths, paths, ...), but they have the shapes "
                         f"{tuple(U.shape)} and {tuple(kernels.shape)}")
    K = U.reshape(-1, paths * paths) @ kernels.reshape(paths * paths, -1) / paths
    return K.reshape(*U.shape[:-2], *kernels.shape[2:])
