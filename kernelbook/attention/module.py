"""Multi-head attention with a kernel, in the place of :class:`torch.nn.MultiheadAttention`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..debugging import check_finite
from ..kernels import Kernel, get
from .cache import Cache
from .call import Call
from .definition import check_normaliser, weights
from .dispatch import attend, check_dropout, choose

__all__ = ["KernelAttention"]


class KernelAttention(nn.Module):
    r"""Multi-head attention by any kernel, a drop-in for :class:`torch.nn.MultiheadAttention`.

    .. math:: \operatorname{head}_h = \operatorname{attend}(XW^Q_h, YW^K_h, YW^V_h), \qquad
              \text{output} = [\operatorname{head}_1,\dots,\operatorname{head}_H]\,W^O .

    Arguments, parameter names and mask conventions are torch's (in particular a boolean mask is True where a key may
    *not* be seen, the opposite of :func:`attend`), so its weights load here and the two agree for ``kernel="edp"``;
    only a query with no key to see gets zeros here and NaN there.

    With ``tied``, :math:`W^Q=W^K`, biases included: in self-attention the kernel then compares points of one set, so
    its matrix is symmetric where the kernel is.  With ``qk_width``, queries and keys of a head have a width :math:`w`
    of their own: a small one makes the logits of ``kernel="edp"`` a matrix of low rank.  Either changes the shapes of
    parameters, not their names: ``in_proj_weight`` is :math:`W^Q`, :math:`W^K` and :math:`W^V`, one below the other, of
    ``num_heads * w``, ``num_heads * w`` and ``embed_dim`` rows; if tied, there is no :math:`W^K` in it (and no
    ``k_proj_weight``).  Entries are drawn from the distribution that they have by default: coordinates of queries and
    keys begin at the same size.

    Parameters
    ----------
    embed_dim, num_heads : int
        Width of the model, and number of heads, which must divide it.
    dropout : float
        Of the weights, while training.
    bias : bool
        Whether the projections have biases.
    kdim, vdim : int, optional
        Widths of key and value inputs (default ``embed_dim``).
    batch_first : bool
        Whether inputs are ``(batch, length, embed_dim)`` rather than ``(length, batch, embed_dim)``.
    device, dtype : optional
        Of the parameters.
    kernel : str or Kernel
        Of the heads, at width ``qk_width``.
    normaliser, path : str
        As in :func:`attend`.
    tied : bool
        Whether queries and keys are projected by the same matrix and bias.
    qk_width : int, optional
        Width of the queries and keys of a head (default ``embed_dim // num_heads``, which the values always have).

    Raises
    ------
    ValueError
        If ``num_heads`` does not divide ``embed_dim``, or the kernel may be negative and ``normaliser`` is ``"sum"``,
        or ``path``, ``dropout`` or ``qk_width`` does not fit, or ``kdim`` is another width and the matrices are to be
        tied, or ``add_bias_kv`` or ``add_zero_attn`` is asked for: neither is provided.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True,
                 add_bias_kv: bool = False, add_zero_attn: bool = False, kdim: int | None = None,
                 vdim: int | None = None, batch_first: bool = False, device=None, dtype=None, *,
                 kernel: str | Kernel = "edp", normaliser: str = "sum", path: str = "auto", tied: bool = False,
                 qk_width: int | None = None) -> None:
        super().__init__()
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim, but {num_heads} does not divide {embed_dim}")
        if add_bias_kv or add_zero_attn:
            raise ValueError("KernelAttention has neither add_bias_kv nor add_zero_attn; leave them False")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        self.tied, self.qk_width = tied, self.head_dim if qk_width is None else qk_width
        if self.qk_width < 1:
            raise ValueError(f"qk_width must be at least 1, not {qk_width}; None means the width of the values")
        if tied and self.kdim != embed_dim:
            raise ValueError("one matrix serves queries and keys only where both come with one width, but embed_dim is "
                             f"{embed_dim} and kdim is {kdim}; leave out kdim=, or tied=")
        self.dropout, self.batch_first, self.normaliser, self.path = dropout, batch_first, normaliser, path
        self.kernel = get(kernel)
        check_normaliser(self.kernel, normaliser)
        choose(Call(self.kernel, normaliser, d=self.qk_width, d_v=self.head_dim), path)
        check_dropout(dropout)
        made = {"device": device, "dtype": dtype}
        self._one_projection = self.kdim == self.vdim == embed_dim
        self._qkv_same_embed_dim = False    # keeps torch's encoder layer from its fast path, which knows no kernels
        wide = num_heads * self.qk_width
        self._rows = (wide, embed_dim) if tied else (wide, wide, embed_dim)
        if self._one_projection:
            self.in_proj_weight = nn.Parameter(torch.empty(sum(self._rows), embed_dim, **made))
        else:
            self.q_proj_weight = nn.Parameter(torch.empty(wide, embed_dim, **made))
            if not tied:
                self.k_proj_weight = nn.Parameter(torch.empty(wide, self.kdim, **made))
            self.v_proj_weight = nn.Parameter(torch.empty(embed_dim, self.vdim, **made))
        if bias:
            self.in_proj_bias = nn.Parameter(torch.empty(sum(self._rows), **made))
        else:
            self.register_parameter("in_proj_bias", None)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as torch's module does."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif not name.startswith("out_proj"):
                # xavier_uniform_ of the default's shape, whatever the matrix's own rows are.
                rows = 3 * self.embed_dim if name == "in_proj_weight" else self.embed_dim
                bound = math.sqrt(3.0) * math.sqrt(2.0 / (rows + p.shape[1]))
                nn.init.uniform_(p, -bound, bound)
        nn.init.kaiming_uniform_(self.out_proj.weight, a=5 ** 0.5)

    def extra_repr(self) -> str:
        shown = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, kernel={self.kernel!r}"
        shown += ", tied" if self.tied else ""
        return shown if self.qk_width == self.head_dim else f"{shown}, qk_width={self.qk_width}"

    def heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the heads.

        Parameters
        ----------
        query, key, value : Tensor
            ``(batch, length, width)``, batch first whatever ``batch_first`` says.

        Returns
        -------
        tuple of Tensor
            ``(batch, num_heads, n, qk_width)``, ``(batch, num_heads, m, qk_width)`` and
            ``(batch, num_heads, m, head_dim)``.
        """
        return tuple(self._split(x) for x in self._project(query, key, value))

    def _split(self, x: Tensor) -> Tensor:
        """Into heads, which become an axis before that of the length."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._one_projection and query is key and key is value:
            found = F.linear(query, self.in_proj_weight, self.in_proj_bias).split(self._rows, -1)
            return (found[0], *found) if self.tied else found
        biases = (None,) * len(self._rows) if self.in_proj_bias is None else self.in_proj_bias.split(self._rows)
        if self._one_projection:
            ws = self.in_proj_weight.split(self._rows)
        else:
            keys = () if self.tied else (self.k_proj_weight,)
            ws = (self.q_proj_weight, *keys, self.v_proj_weight)
        if self.tied:
            ws, biases = (ws[0], *ws), (biases[0], *biases)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), ws, biases, strict=True))

    def new_cache(self, kind: str = "auto") -> Cache:
        """An empty cache of keys and values, for the argument ``cache`` of the module.

        Parameters
        ----------
        kind : str
            As in :class:`kernelbook.attention.Cache`.

        Returns
        -------
        Cache
        """
        return Cache(self.kernel, normaliser=self.normaliser, path=self.path, kind=kind)

    def forward(self, query: Tensor, key: Tensor | None, value: Tensor | None, key_padding_mask: Tensor | None = None,
                need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
                is_causal: bool = False, cache: Cache | None = None) -> tuple[Tensor, Tensor | None]:
        """Attend from ``query`` to ``key`` and ``value``.

        Parameters
        ----------
        query, key, value : Tensor
            ``(length, batch, width)``, or ``(batch, length, width)`` if ``batch_first``, or ``(length, width)``.
        key_padding_mask : Tensor, optional
            ``(batch, m)``, True at keys that nobody may see.
        need_weights : bool
            Whether to return the weights too, which takes the exact path.
        attn_mask : Tensor, optional
            ``(n, m)`` or ``(batch * num_heads, n, m)``, True where a key may *not* be seen; or floating, of 0 and
            -inf.
        average_attn_weights : bool
            Whether the weights are averaged over the heads.
        is_causal : bool
            Whether the attention is causal.  Where ``attn_mask`` is given, that mask counts, as in torch.
        cache : Cache, optional
            Keys and values seen before, from :meth:`new_cache`.  Those of ``key`` and ``value`` (and their
            ``key_padding_mask``) are appended to it first; both may be None.  The queries attend to all of them, the
            last query being aligned with the last key where ``is_causal``.  It takes no ``attn_mask``, returns no
            weights (``need_weights=False``), and knows neither dropout nor gradients.

        Returns
        -------
        output : Tensor
            Of the shape of ``query``.
        weights : Tensor or None
            ``(batch, n, m)``, or ``(batch, num_heads, n, m)`` if not averaged; without the batch axis where the
            query has none.

        Raises
        ------
        TypeError
            If a mask is neither boolean nor floating.
        ValueError
            If a shape, a width or a mask does not fit, or the cache cannot serve the call.
        """
        if cache is not None:
            self._check_cache(cache, need_weights, attn_mask)
            if key is None and value is None and key_padding_mask is None:
                return self._attend_cached(cache, query, is_causal), None
        if key is None or value is None:
            raise ValueError("key and value may be None only with a cache, and then both, without key_padding_mask")
        alone = query.ndim == 2
        if query.ndim not in (2, 3) or not query.ndim == key.ndim == value.ndim:
            raise ValueError("query, key and value must all have 2 axes (length, width) or all 3, but have "
                             f"{query.ndim}, {key.ndim} and {value.ndim}")
        expected = (self.embed_dim, self.kdim, self.vdim)
        if (widths := (query.shape[-1], key.shape[-1], value.shape[-1])) != expected:
            raise ValueError(f"query, key and value must have widths {expected}, but have {widths}")
        batch_axis = 0 if self.batch_first else 1
        if key.shape[:-1] != value.shape[:-1] or not alone and query.shape[batch_axis] != key.shape[batch_axis]:
            layout = "(batch, length, width)" if self.batch_first else "(length, batch, width)"
            raise ValueError("key and value must be of one length, and all three of one batch, but query, key and "
                             f"value have shapes {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}, "
                             f"which batch_first={self.batch_first} reads as {layout}")
        check_finite(query=query, key=key, value=value)
        one = query is key and key is value         # then one projection makes all three
        if alone:
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        if alone or not self.batch_first:
            query, key, value = (x.unsqueeze(0) if alone else x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self.heads(query, *(query, query) if one else (key, value))
        if cache is not None:
            see = self._visible(key_padding_mask, None, q.shape[0], q.shape[2], k.shape[2])
            out = cache.attend(q, k, v, visible=None if see is None else see[..., 0, :], causal=is_causal)
            return self._merge(out, alone), None
        causal = is_causal and attn_mask is None
        mask = self._visible(key_padding_mask, attn_mask, q.shape[0], q.shape[2], k.shape[2])
        dropout = self.dropout if self.training else 0.0
        w = None
        if need_weights:
            w = weights(q, k, self.kernel, mask=mask, causal=causal, normaliser=self.normaliser)
            w = torch.dropout(w, dropout, train=True) if dropout else w
            out = w @ v
            w = w.mean(1) if average_attn_weights else w
        else:
            out = attend(q, k, v, self.kernel, mask=mask, causal=causal, dropout=dropout, normaliser=self.normaliser,
                         path=self.path)
        return self._merge(out, alone), w.squeeze(0) if alone and w is not None else w

    def _merge(self, out: Tensor, alone: bool) -> Tensor:
        out = self.out_proj(out.transpose(1, 2).flatten(-2))
        return out.squeeze(0) if alone else out if self.batch_first else out.transpose(0, 1)

    def _check_cache(self, cache: Cache, need_weights: bool, attn_mask: Tensor | None) -> None:
        if need_weights or attn_mask is not None or self.training and self.dropout:
            raise ValueError("with a cache there are no weights, no attn_mask and no dropout: pass need_weights=False, "
                             "is_causal in the place of attn_mask, and call eval() on the module")
        mine = (self.kernel, self.normaliser)
        if (theirs := (cache.kernel, cache.normaliser)) != mine:
            raise ValueError(f"the cache is of kernel and normaliser {theirs}, the module of {mine}; new_cache() makes "
                             "one that fits")

    def _attend_cached(self, cache: Cache, query: Tensor, causal: bool) -> Tensor:
        """Attend to what is in the cache, projecting the queries only."""
        alone = query.ndim == 2
        if query.ndim not in (2, 3) or query.shape[-1] != self.embed_dim:
            raise ValueError(f"query must have 2 or 3 axes, the last of width {self.embed_dim}, but has shape "
                             f"{tuple(query.shape)}")
        if alone or not self.batch_first:
            query = query.unsqueeze(0) if alone else query.transpose(0, 1)
        rows = self._rows[0]
        w = self.in_proj_weight[:rows] if self._one_projection else self.q_proj_weight
        b = None if self.in_proj_bias is None else self.in_proj_bias[:rows]
        return self._merge(cache.attend(self._split(F.linear(query, w, b)), causal=causal), alone)

    def _visible(self, padding: Tensor | None, attn_mask: Tensor | None, batch: int, n: int, m: int) -> Tensor | None:
        """Torch's masks, True or -inf at what is hidden, as one mask of what is visible."""
        see = None
        if attn_mask is not None:
            see = ~_hidden(attn_mask, "attn_mask")
            if attn_mask.shape == (batch * self.num_heads, n, m):
                see = see.unflatten(0, (batch, self.num_heads))
            elif attn_mask.shape != (n, m):
                raise ValueError(f"attn_mask must have shape (n, m) = {(n, m)} or (batch * num_heads, n, m) = "
                                 f"{(batch * self.num_heads, n, m)}, but has {tuple(attn_mask.shape)}")
        if padding is not None:
            if padding.shape != (batch, m):
                raise ValueError(f"key_padding_mask must have shape (batch, m) = {(batch, m)}, but has "
                                 f"{tuple(padding.shape)}")
            keys = ~_hidden(padding, "key_padding_mask")[:, None, None, :]
            see = keys if see is None else see & keys
        return see


def _hidden(mask: Tensor, name: str) -> Tensor:
    if mask.dtype is torch.bool:
        return mask
    if not mask.is_floating_point():
        raise TypeError(f"{name} must be boolean (True = may not be seen) or floating (0 and -inf), not {mask.dtype}")
    hidden = mask == float("-inf")
    if not (hidden | (mask == 0)).all():
        raise ValueError(f"{name} holds values other than 0 and -inf; a bias of the logits means something only for "
                         "exponential kernels: multiply kernels instead (kernelbook.kernels.TensorProduct)")
    return hidden
