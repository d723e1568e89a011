r"""Kernels whose normalised attention is a softmax of inner products, by torch's fused attention.

The exponentiated dot product is one as it stands.  The Gaussian kernel becomes one because a factor that depends
on the query alone cancels in the row normalisation (gauge theorem, chapter *Attention is a kernel smoother*):

.. math:: e^{-\lVert q-k\rVert^2/2\sigma^2}
          = e^{-\lVert q\rVert^2/2\sigma^2}\; e^{(q,\,1)\cdot(k,\,-\lVert k\rVert^2/2)/\sigma^2}.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ..kernels import EDP, RBF, Kernel
from .call import Call
from .definition import visible_keys

__all__ = ["fused", "does", "refusal", "drawback"]


def does(call: Call) -> str:
    """How the path computes a call."""
    return ("torch's fused attention on queries and keys in softmax form: no n x m array where torch's backend makes "
            "none")


def refusal(call: Call) -> str | None:
    """Why the fused path cannot serve a call, or None if it can."""
    if type(call.kernel) not in _SOFTMAX_FORM:
        served = ", ".join(cls.__name__ for cls in _SOFTMAX_FORM)
        return f"{call.kernel!r} has no reduction to a softmax of inner products here (served: {served})"
    if call.normaliser in ("none", "count"):
        return f"it divides by the row sum, and the normaliser is {call.normaliser!r}"
    return None


def drawback(call: Call) -> str | None:
    """Why another path serves a call better, or None."""
    return None


def _edp(kernel: EDP, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float]:
    return q, k, q.shape[-1] ** -0.5 if kernel.scale is None else kernel.scale


_SHARE = 256.0


def _rbf(kernel: RBF, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float]:
    precision = kernel.precision(q.shape[-1])
    device = k.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and k.dtype is torch.float32:
        # Autocast would round the column of norms below, when it is too late to split it.
        q, k = (x.to(torch.get_autocast_dtype(device)) for x in (q, k))
    # In at least float32: the norm is the largest term of the logit, and its rounding error goes there whole.
    norm = -0.5 * k.to(torch.promote_types(k.dtype, torch.float32)).square().sum(-1, keepdim=True)
    # A power of two moves from the keys' column to the queries', so that float16 holds the norms it can have.
    share = torch.full_like(q[..., :1], _SHARE)
    high = (norm / _SHARE).to(k.dtype)
    if k.dtype in (torch.float16, torch.bfloat16):      # one such column cannot hold it: high part and remainder
        low = (norm / _SHARE - high).to(k.dtype)
        return torch.cat((q, share, share), -1), torch.cat((k, high, low), -1), precision
    return torch.cat((q, share), -1), torch.cat((k, high), -1), precision


_SOFTMAX_FORM = {EDP: _edp, RBF: _rbf}


def fused(
    q: Float[Tensor, "*#batch n d"],
    k: Float[Tensor, "*#batch m d"],
    v: Float[Tensor, "*#batch m d_v"],
    kernel: Kernel,
    *,
    mask: Bool[Tensor, "*#batch #n #m"] | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    normaliser: str = "sum",
) -> Float[Tensor, "*batch n d_v"]:
    """Attention by :func:`torch.nn.functional.scaled_dot_product_attention`, for a kernel in softmax form."""
    n, m, d_v = q.shape[-2], k.shape[-2], v.shape[-1]
    if m == 0:
        return q @ k.transpose(-1, -2) @ v      # zeros of the right shape, and a gradient of zeros
    q, k, scale = _SOFTMAX_FORM[type(kernel)](kernel, q, k)
    if q.shape[-1] != d_v:
        # The fused kernels want q, k and v of one width; columns of zeros change no inner product.
        width = max(q.shape[-1], d_v)
        q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    batch = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v = (x.expand(*batch, *x.shape[-2:]) for x in (q, k, v))
    # torch aligns its causal mask with the first key, we with the last: they agree for n = m.
    square = causal and mask is None and n == m
    see = None if square else visible_keys(n, m, mask=mask, causal=causal, device=q.device)
    if see is not None and see.ndim < 2:
        see = see.expand(n, m)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=see, dropout_p=dropout, is_causal=square, scale=scale)
    return out[..., :d_v]
