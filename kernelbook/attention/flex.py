r"""Even polynomials of :math:`q\cdot k` by FlexAttention, on a GPU.

Their logarithm is no inner product, but a function of one, :math:`m\log|q\cdot k+c|`, and FlexAttention takes softmaxes
of functions of inner products.  It is compiled at the first call.  On a CPU it has no gradient and is slower than the
tiles of :mod:`.tiled`, so there it is refused.

Tested are the functions of the scores and the masks, on a CPU and uncompiled; on a GPU nothing was measured.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels import Kernel, Polynomial, Quadratic
from .call import Call, leading

__all__ = ["KERNELS", "refusal", "attention"]

KERNELS = (Quadratic, Polynomial)


def refusal(call: Call) -> str | None:
    """Why FlexAttention cannot serve a call of one of :data:`KERNELS`, or None if it can."""
    if not call.kernel.normalisable:
        return f"{call.kernel!r} takes negative values, which have no logarithm"
    if call.device != "cuda":
        return (f"the logarithm of {call.kernel!r} is no inner product but a function of one, which takes "
                f"FlexAttention on a GPU, and the call is on {call.device!r}")
    if call.dropout or call.dtype is torch.float64:
        return f"{call.kernel!r} takes FlexAttention, which has neither dropout nor float64"
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, *, mask: Tensor | None, causal: bool,
              compiled: bool = True) -> Tensor:
    """Attention by an even polynomial; arguments as of the fused path."""
    n, m = q.shape[-2], k.shape[-2]
    batch = leading(q, k, v)
    q, k, v = (x.expand(*batch, *x.shape[-2:]).reshape(-1, 1, *x.shape[-2:]) for x in (q, k, v))
    if mask is not None:
        mask = mask.expand(*batch, n, m).reshape(-1, n, m)
    scale = q.shape[-1] ** -0.5 if kernel.scale is None else kernel.scale

    def score_mod(x: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return _score(x, b, i, j, kernel, mask, m - n if causal else None)

    out = _flex_attention(compiled)(q, k, v, score_mod=score_mod, scale=scale)
    return out.reshape(*batch, n, v.shape[-1])


def _score(x: Tensor, b: Tensor, i: Tensor, j: Tensor, kernel: Kernel, mask: Tensor | None,
           ahead: int | None) -> Tensor:
    """The logarithm of the kernel at a scaled inner product; minus infinity where it is 0 or the key is hidden."""
    x = torch.abs(x + getattr(kernel, "offset", 0.0))
    none = x == 0
    if mask is not None:
        none = none | ~mask[b, i, j]
    if ahead is not None:
        none = none | (j > i + ahead)
    # The logarithm is never taken of 0, whose gradient would be NaN.
    return torch.where(none, -math.inf, getattr(kernel, "degree", 2) * torch.log(torch.where(x == 0, 1.0, x)))


@functools.cache
def _flex_attention(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention  # takes a second to import

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
