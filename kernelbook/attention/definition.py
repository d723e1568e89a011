r"""Attention by a kernel, as it is defined: weights from the kernel's matrix, and their mean of the values.

.. math:: o_i = \sum_j w_{ij} v_j, \qquad w_{ij} = \kappa(q_i, k_j) \big/ N_i

where the normaliser :math:`N_i` is the row sum over the keys that query :math:`i` may see, or one of the others in
:data:`NORMALISERS`.  Every faster path in this package is tested against these functions.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..debugging import check_finite
from ..kernels import Kernel, check_points, get

__all__ = ["NORMALISERS", "weights", "exact", "visible_keys"]

#: What the values of the kernel may be divided by, row by row.
NORMALISERS = {
    "sum": "by their sum: a weighted mean; only for kernels that are never negative",
    "signed-sum": "by their sum, for any kernel: the weights sum to 1 but may be huge where the sum nears 0",
    "abs-sum": "by the sum of their absolute values: bounded, but a constant is not reproduced",
    "relu-sum": "negative values set to 0, then by their sum: a weighted mean, of another kernel",
    "count": "by the number of visible keys: a plain kernel expansion, averaged",
    "none": "by nothing: a plain kernel expansion",
}


def check_normaliser(kernel: Kernel, normaliser: str) -> None:
    """Raise unless ``normaliser`` is known and defined for ``kernel``."""
    if normaliser not in NORMALISERS:
        raise ValueError(f"no normaliser is called {normaliser!r} (known: {', '.join(NORMALISERS)})")
    if normaliser == "sum" and not kernel.normalisable:
        others = "; ".join(f"{name!r} divides {what}" for name, what in NORMALISERS.items() if name != "sum")
        raise ValueError(
            f"{kernel!r} takes values in {kernel.range}: a row sum of signed values may vanish, so its weights are not "
            f"normalised by 'sum' unasked. Say how: {others}. Or exponentiate it: kernel.exp()")


def check_mask(mask: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless ``mask`` is boolean, broadcasts to ``shape``, and is on ``device``."""
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        kind = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a boolean tensor, True where a key may be seen, not {kind}; an additive mask of "
                        "0 and -inf becomes one by mask == 0")
    try:
        fits = torch.broadcast_shapes(mask.shape, shape) == torch.Size(shape)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, which does not broadcast to the weights' shape "
                         f"(..., n, m) = {tuple(shape)}; a mask of keys (batch, m) becomes one by mask[:, None, :]")
    if mask.device != device:
        raise ValueError(f"mask must be on the device of q and k, {device}, but is on {mask.device}")


def visible_keys(
    n: int, m: int, *, mask: Bool[Tensor, "*#batch #n #m"] | None, causal: bool, device: torch.device | None = None
) -> Bool[Tensor, "*#batch #n #m"] | None:
    """The mask that says which keys each query may see, or None where it may see all.

    Parameters
    ----------
    n, m : int
        Numbers of queries and keys.
    mask : Tensor, optional
        Boolean, True where a key may be seen.
    causal : bool
        Whether, besides, query ``i`` may see only the keys ``j <= i + m - n``: the last query is aligned with the
        last key.
    device : torch.device, optional
        Where to make it.

    Returns
    -------
    Tensor or None
    """
    if not causal:
        return mask
    lower = torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n)
    return lower if mask is None else mask & lower


def weights(
    q: Float[Tensor, "*#batch n d"],
    k: Float[Tensor, "*#batch m d"],
    kernel: str | Kernel = "edp",
    *,
    mask: Bool[Tensor, "*#batch #n #m"] | None = None,
    causal: bool = False,
    normaliser: str = "sum",
) -> Float[Tensor, "*batch n m"]:
    r"""Attention weights :math:`w_{ij}=\kappa(q_i,k_j)/N_i`; 0 where a key may not be seen.

    A row with nothing to see, or whose normaliser is 0, is a row of zeros.

    Parameters
    ----------
    q, k : Tensor
        Queries ``(..., n, d)`` and keys ``(..., m, d)``.
    kernel : str or Kernel
        A name among :func:`kernelbook.kernels.available`, or a kernel.
    mask : Tensor, optional
        Boolean, broadcasting to ``(..., n, m)``; True where a key may be seen.
    causal : bool
        Whether a query sees only the keys up to its own position, the last query aligned with the last key.
    normaliser : str
        One of :data:`NORMALISERS`.

    Returns
    -------
    Tensor
        ``(..., n, m)``.

    Raises
    ------
    TypeError
        If an argument is of the wrong type or dtype.
    ValueError
        If a shape, a name or a device does not fit, or the kernel may be negative and ``normaliser`` is ``"sum"``.
    FloatingPointError
        In debug mode, if an input holds NaN or infinity.
    """
    kernel = get(kernel)
    check_points(q, k)
    check_normaliser(kernel, normaliser)
    check_finite(q=q, k=k)
    if mask is not None:
        shape = (*torch.broadcast_shapes(q.shape[:-2], k.shape[:-2]), q.shape[-2], k.shape[-2])
        check_mask(mask, shape, q.device)
    return _weights(q, k, kernel, mask, causal, normaliser)


def _weights(q: Tensor, k: Tensor, kernel: Kernel, mask: Tensor | None, causal: bool, normaliser: str) -> Tensor:
    n, m = q.shape[-2], k.shape[-2]
    see = visible_keys(n, m, mask=mask, causal=causal, device=q.device)

    if kernel.exponential and normaliser in ("sum", "signed-sum", "abs-sum", "relu-sum"):
        return _softmax(kernel.log_gram(q, k), see)     # all four agree for a positive kernel
    values = kernel.gram(q, k)
    if normaliser == "relu-sum":
        values = values.relu()
    if see is not None:
        values = values.masked_fill(~see, 0.0)
    if normaliser == "none":
        return values
    if normaliser == "count":
        total = values.new_full((), m) if see is None else see.broadcast_to(*see.shape[:-1], m).sum(-1, True)
    else:
        total = (values.abs() if normaliser == "abs-sum" else values).sum(-1, keepdim=True)
    return values / torch.where(total == 0, torch.inf, total).to(values.dtype)


def _softmax(logits: Tensor, see: Tensor | None) -> Tensor:
    if see is None:
        return logits.softmax(-1)
    # Rows with nothing to see get finite logits first, so that no NaN is made on the way, forward or backward.
    empty = ~see.any(-1, keepdim=True)
    logits = logits.masked_fill(~see, float("-inf")).masked_fill(empty, 0.0)
    return logits.softmax(-1).masked_fill(empty, 0.0)


def exact(
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
    """Attention by the definition: the whole matrix of weights, times the values."""
    w = _weights(q, k, kernel, mask, causal, normaliser)
    return torch.dropout(w, dropout, train=True) @ v if dropout else w @ v
