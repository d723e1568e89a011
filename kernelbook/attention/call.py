"""What is asked of attention, without the numbers: all that the choice of a path depends on."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import Kernel

__all__ = ["Call", "autocasts", "leading"]


@dataclass(frozen=True)
class Call:
    """A call of :func:`attend`, as the paths see it when they are asked whether they serve it.

    Attributes
    ----------
    kernel : Kernel
    normaliser : str
    n, m, d, d_v : int
        Numbers of queries and keys, their width, and the width of the values.
    batch : int
        Number of problems: the product of the leading axes.
    mask : str
        ``"none"``; ``"keys"``, where all queries may see the same keys; or ``"pairs"``.
    causal : bool
    dropout : float
    dtype : torch.dtype
    device : str
        Type of the device, as in ``"cpu"``.
    gradient : bool
        Whether a gradient may be asked for.
    """

    kernel: Kernel
    normaliser: str = "sum"
    n: int = 1
    m: int = 1
    d: int = 1
    d_v: int = 1
    batch: int = 1
    mask: str = "none"
    causal: bool = False
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    gradient: bool = False

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, *, mask: Tensor | None, causal: bool, dropout: float,
           normaliser: str) -> Call:
        """The description of checked arguments."""
        batch = leading(q, k, v)
        n, m = q.shape[-2], k.shape[-2]
        kind = "none" if mask is None else "keys" if mask.ndim < 2 or mask.shape[-2] == 1 else "pairs"
        gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        d = operator.index(q.shape[-1])     # under torch.compile a width is a number, whatever the lengths are
        return cls(kernel, normaliser, n, m, d, v.shape[-1], math.prod(batch), kind, causal, dropout, q.dtype,
                   q.device.type, gradient)


def leading(q: Tensor, k: Tensor, v: Tensor) -> torch.Size:
    """The leading axes of checked points and values, broadcast."""
    if q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:        # as in a module; broadcast_shapes takes microseconds
        return q.shape[:-2]
    return torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device; asked of others, torch raises."""
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
