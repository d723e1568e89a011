"""Positions of tokens, as features."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["sinusoidal"]


def sinusoidal(
    length: int, width: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Float[Tensor, "length width"]:
    r"""Sinusoidal features of positions: :math:`\sin(p\,\omega_i)` and :math:`\cos(p\,\omega_i)`.

    The frequencies :math:`\omega_i = 10000^{-2i/w}` fall from 1; feature ``2i`` is the sine, ``2i + 1`` the cosine.

    Parameters
    ----------
    length : int
        Number of positions, from 0.
    width : int
        Number of features :math:`w`, even.
    device, dtype : optional
        Of the result.

    Returns
    -------
    Tensor
        ``(length, width)``.

    Raises
    ------
    ValueError
        If ``width`` is odd.

    References
    ----------
    Vaswani et al. 2017, section 3.5.
    """
    if width % 2:
        raise ValueError(f"sinusoidal positions come in pairs of sine and cosine: width must be even, not {width}")
    # In float64 first: p·ω of a late position has few correct digits in float32.
    frequency = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10000.0) / width))
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2).to(device=device, dtype=dtype or torch.float32)
