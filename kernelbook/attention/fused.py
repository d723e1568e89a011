r"""Kernels whose attention is a softmax of inner products, by torch's fused attention.

A kernel in softmax form (:mod:`.reductions`) has logits :math:`c\,(q_i\cdot k_j)+b_j`.  Where there is a bias, as the
Gaussian kernel has :math:`-\lVert k_j\rVert^2/2\sigma^2`, there are two ways:

* on the CPU, in float32 and float64, the bias is handed over as an additive mask, which broadcasts over the queries;
  the backward pass is our own, in tiles, since torch's has no gradient for a mask;
* elsewhere it is one more coordinate, :math:`(q,1)\cdot(k,\,b/c)`; in half precision two, for what one such number
  rounds away is the largest error of the logits.

Neither costs precision near the origin.  Far from it the Gaussian kernel's terms cancel, as wherever the square is
expanded: in float32, a shift of all 64 coordinates by 10 costs two digits of the output, by 100 four.  The kernel does
not notice if the mean of the keys is subtracted from queries and keys beforehand; that costs a copy of both, and what
a cache keeps of a key must not depend on the others, so it is not done unasked.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from .. import kernels
from ..kernels import EDP, RBF, Kernel
from . import flex
from .call import Call, leading
from .definition import visible_keys
from .reductions import SoftmaxForm, has_softmax_form, softmax_form

__all__ = ["fused", "does", "refusal", "drawback"]

#: The kernels without a history of speed leave problems with so many differences of coordinates to the definition.
_SMALL = 2 ** 16

#: An array of so many weights is no burden, and quicker than tiles.
_SMALL_ARRAY = 2 ** 22


def does(call: Call) -> str:
    """How the path computes a call."""
    if not has_softmax_form(call.kernel, call.d):
        return "FlexAttention, compiled at the first call, with a function of the inner products"
    if call.dropout and call.device == "cpu":
        return "torch's attention on queries and keys in softmax form: with dropout, on the CPU, an n x m array"
    return ("torch's fused attention on queries and keys in softmax form: no n x m array where torch's backend makes "
            "none")


def refusal(call: Call) -> str | None:
    """Why the fused path cannot serve a call, or None if it can."""
    if call.normaliser in ("none", "count"):
        return f"it divides by the row sum, and the normaliser is {call.normaliser!r}"
    if has_softmax_form(call.kernel, call.d):
        return None
    return flex.refusal(call) if type(call.kernel) in flex.KERNELS else _no_softmax(call.kernel, call.d)


def _no_softmax(kernel: Kernel, d: int) -> str:
    kind = type(kernel)
    if kind is kernels.Scaled and kernel.factor > 0:
        return _no_softmax(kernel.base, d)
    if kind in (kernels.Product, kernels.TensorProduct):
        widths = (d, d) if kind is kernels.Product else (kernel.split, d - kernel.split)
        parts = zip((kernel.first, kernel.second), widths, strict=True)
        return next((_no_softmax(part, width) for part, width in parts if not has_softmax_form(part, width)),
                    f"{kernel!r} needs a width of more than {d}")
    if kind in (kernels.Sum, kernels.DirectSum):
        return f"{kernel!r} is a sum, whose logarithm is no inner product; (a + b).exp() is a softmax where a.exp() is"
    if kind is kernels.Exponential and kernel.base.feature_dimension(d) < math.inf:
        return f"at width {d} the features of the exponent of {kernel!r} are unknown or too many for a softmax of them"
    return f"{kernel!r} is not known to be a softmax of inner products; kernelbook.attention.reductions.register tells"


def drawback(call: Call) -> str | None:
    """Why another path serves a call better, or None."""
    if type(call.kernel) not in (EDP, RBF) and call.batch * call.n * call.m * call.d <= _SMALL:
        return f"so small a problem ({call.n} queries, {call.m} keys) is left to the definition"
    if call.dropout and call.device == "cpu" and call.batch * call.n * call.m > _SMALL_ARRAY:
        return "where weights are dropped, torch makes the n x m array on the CPU"
    return None


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
    if n == 0 or m == 0:
        return q @ k.transpose(-1, -2) @ v      # zeros of the right shape, and a gradient of zeros
    if not has_softmax_form(kernel, q.shape[-1]):
        return flex.attention(q, k, v, kernel, mask=mask, causal=causal)
    form = softmax_form(kernel, q, k)
    if form.scale < 0:                          # torch hides keys before it scales the logits
        form = replace(form, q=-form.q, scale=-form.scale)
    batch = leading(q, k, v)
    if form.key_bias is not None and (dropout or not _takes_bias(form.q, math.prod(batch))):
        form = _bias_as_coordinates(form)
    q, k, v, bias, scale = form.q, form.k, v.to(form.q.dtype), form.key_bias, form.scale

    width = max(q.shape[-1], d_v, 1)            # fused kernels want one; columns of zeros change no inner product
    q, k, v = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    q, k, v = (_two_batch_axes(x, batch) for x in (q, k, v))
    mask = None if mask is None else _mask_of_two_batch_axes(mask, batch)
    causal = causal and n > 1                   # a single query is the last: it sees all keys
    if bias is None:
        # torch aligns its causal mask with the first key, we with the last: they agree for n = m.
        square = True if causal and mask is None and n == m else False      # a symbol would not do (torch.compile)
        see = None if square else visible_keys(n, m, mask=mask, causal=causal, device=q.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=see, dropout_p=dropout, is_causal=square, scale=scale)
    else:
        bias = _two_batch_axes(bias.to(q.dtype).unsqueeze(-2), batch)
        if mask is not None and mask.shape[-2] == 1:
            bias, mask = torch.where(mask, bias, -torch.inf), None
        out = _Biased.apply(q, k, v, bias, mask, causal, scale)
    if width != d_v:
        out = out[..., :d_v]
    return out if len(batch) == 2 else out.reshape(*batch, n, d_v)


def _two_batch_axes(x: Tensor, batch: tuple[int, ...]) -> Tensor:
    """Leading axes that broadcast to ``batch`` become two: fused kernels take no other number of them."""
    x = x.expand(*batch, *x.shape[-2:])
    return x if len(batch) == 2 else x.reshape(math.prod(batch[:-1]), batch[-1] if batch else 1, *x.shape[-2:])


def _mask_of_two_batch_axes(mask: Tensor, batch: tuple[int, ...]) -> Tensor:
    """The same of a mask, whose axes of size 1 stay so where they can."""
    axes = max(2, len(batch)) + 2
    mask = mask[(None,) * (axes - mask.ndim)]
    if axes > 4 and math.prod(mask.shape[:-3]) > 1:
        mask = mask.expand(*batch[:-1], *mask.shape[-3:])
    return mask.flatten(0, -4)


# ------------------------------------------------------------------------- the bias as a coordinate

#: Moved from the keys' column to the queries', so that float16 holds the biases it can have; a power of two.
_SHARE = 256.0


def _bias_as_coordinates(form: SoftmaxForm) -> SoftmaxForm:
    """The same logits without a bias: it is one more coordinate of the keys, and 1 (or so) the queries'."""
    q, k, bias = form.q, form.k, (form.key_bias / (form.scale * _SHARE)).unsqueeze(-1)
    columns = [bias.to(k.dtype)]
    if k.dtype in (torch.float16, torch.bfloat16):      # one such column cannot hold it: high part and remainder
        columns.append((bias - columns[0]).to(k.dtype))
    share = q.new_full((*q.shape[:-1], len(columns)), _SHARE)
    return SoftmaxForm(torch.cat((q, share), -1), torch.cat((k, *columns), -1), form.scale)


# ------------------------------------------------------------------------- the bias as a mask, on the CPU

#: A tile of the backward pass has at most about so many numbers: it stays in the cache.
_TILE = 2 ** 17

#: It is at most so many queries wide, and has so many keys, at least and at most (or all there are).
_COLUMNS = 4096
_ROWS = (128, 256)


def _takes_bias(q: Tensor, batch: int) -> bool:
    """Whether :class:`_Biased` serves these queries."""
    return (q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64) and batch > 0
            and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active())


class _Biased(torch.autograd.Function):
    r"""Attention with logits :math:`c\,q_i\cdot k_j+b_j`, and the gradient of all four.

    Queries, keys and values ``(b, h, n or m, d)``, bias ``(b, h, 1, m)``, mask as it broadcasts to ``(b, h, n, m)``.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, mask, causal, scale):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out, lse = _forward(q, k, v, bias, mask, causal, scale)
        ctx.save_for_backward(q, k, v, bias, mask, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        needed = tuple(ctx.needs_input_grad[:4])
        return *_BiasedGradient.apply(grad, *ctx.saved_tensors, ctx.causal, ctx.scale, needed), None, None, None


class _BiasedGradient(torch.autograd.Function):
    """The gradient of :class:`_Biased`, a function of its own so that a second derivative meets an error."""

    @staticmethod
    def forward(ctx, *arguments):
        return _backward(*arguments)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("the fused path has no second derivatives; use path='exact'")


def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, causal: bool,
             scale: float) -> tuple[Tensor, Tensor]:
    """The output, and the logarithms of the normalisers (0 for a row with nothing to see)."""
    # torch's public function takes no causal attention with a mask, and does not return the normalisers.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    (b, h, n, d), m = q.shape, k.shape[-2]
    if mask is None and (not causal or n == m):
        return attention(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    out, lse = q.new_empty(b, n, h, d).transpose(1, 2), q.new_empty(b, h, n)
    rows = max(32, 4 * _TILE // (b * h * m))
    for i in range(0, n, rows):
        stop = min(i + rows, n)
        seen = min(m, max(1, m - n + stop)) if causal else m
        see = None if mask is None else _tile(mask, i, stop, 0, seen)
        if causal:
            later = torch.ones(stop - i, seen, dtype=torch.bool).tril(m - n + i)
            see = later if see is None else see & later
        out[:, :, i:stop], lse[:, :, i:stop] = attention(
            q[:, :, i:stop], k[:, :, :seen], v[:, :, :seen], attn_mask=torch.where(see, bias[..., :seen], -torch.inf),
            scale=scale)
    return out, lse


def _tile(mask: Tensor, i: int, stop: int, j: int, end: int) -> Tensor:
    """The part of a mask for some queries and some keys."""
    mask = mask if mask.shape[-1] == 1 else mask[..., j:end]
    return mask if mask.shape[-2] == 1 else mask[..., i:stop, :]


def _backward(grad, q, k, v, bias, mask, out, lse, causal, scale, needed):
    r"""Gradients from the weights :math:`p_{ij}`, made again tile by tile, and the gradients of the logits

    .. math:: g_{ij}=p_{ij}\,(\bar o_i\cdot v_j-\bar o_i\cdot o_i),\qquad
        \bar v_j=\sum_ip_{ij}\bar o_i,\quad\bar k_j=c\sum_ig_{ij}q_i,\quad\bar q_i=c\sum_jg_{ij}k_j,\quad
        \bar b_j=\sum_ig_{ij}.

    A tile has keys for rows: then no large matrix product has to transpose it.
    """
    (b, h, n, d), m = q.shape, k.shape[-2]
    needs_q, needs_k, needs_v, needs_bias = needed
    dq, dk, dv, db = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), q.new_empty(b, h, m)
    log2 = 1 / math.log(2)                      # powers of 2 are quicker than powers of e
    lse, bias = lse * -log2, bias.squeeze(-2) * log2
    columns = min(n, _COLUMNS)
    rows = min(m, _ROWS[1], max(_ROWS[0], _TILE // columns))
    together = max(1, _TILE // (rows * columns))                # problems in a tile: some heads of one batch, or
    bs, hs = min(b, max(1, together // h)), min(h, together)    # all heads of some batches
    # Memory that is used again for each of them; new memory each time would cost a tenth more.
    tiles = q.new_empty(2, bs * hs * rows * columns)
    # One matrix is soon transposed if its rows are not a power of 2 apart; several had better be contiguous.
    dqs_ = q.new_empty(bs * hs, d, columns + 16 * (bs * hs == 1))[..., :columns]
    dks_, dvs_, dbs_ = q.new_empty(bs * hs, m, d), q.new_empty(bs * hs, m, d), q.new_empty(bs * hs, m)
    for b0, h0 in itertools.product(range(0, b, bs), range(0, h, hs)):
        some = (slice(b0, b0 + bs), slice(h0, h0 + hs))
        heads = db[some].shape[:2]
        see = mask
        if mask is not None:
            see = mask[tuple(x if size > 1 else slice(None) for x, size in zip(some, mask.shape, strict=False))]
        ks, vs, biases = (x[some].flatten(0, 1) for x in (k, v, bias))
        dks, dvs, dbs = (x[:len(ks)] for x in (dks_, dvs_, dbs_))
        for i in range(0, n, columns):
            stop = min(i + columns, n)
            qs, os, gs, lses = (x[some][:, :, i:stop].flatten(0, 1) for x in (q, out, grad, lse))
            means = (gs * os).sum(-1).neg_()
            dqs = dqs_[:len(qs), :, :stop - i]
            if causal and n - m > i:
                dqs[..., :n - m - i] = 0.0      # these queries see nothing
            for j in range(0, m, rows):
                end = min(j + rows, m)
                sees = max(0, j - m + n) if causal else 0       # the first query that sees key j
                first = max(0, sees - i)
                if first >= stop - i:
                    break
                more = float(sees < i)                          # 0 where the keys' gradients begin, else 1
                q_, g_, k_, v_ = qs[:, first:], gs[:, first:], ks[:, j:end], vs[:, j:end]
                shape = (len(qs), end - j, stop - i - first)
                p, g = tiles[:, :math.prod(shape)].view(2, *shape)
                torch.add(biases[:, j:end, None], lses[:, None, first:], out=p)
                p.baddbmm_(k_, q_.mT, alpha=scale * log2).exp2_()
                if causal:
                    p[..., :end - j].triu_(j - first - i - m + n)
                if mask is not None:
                    p.unflatten(0, heads).masked_fill_(~_tile(see, i + first, stop, j, end).mT, 0.0)
                if needs_v:
                    dvs[:, j:end].baddbmm_(p, g_, beta=more)
                if not (needs_q or needs_k or needs_bias):
                    continue
                torch.baddbmm(means[:, None, first:], v_, g_.mT, out=g).mul_(p)
                if needs_q:
                    dqs[..., first:].baddbmm_(k_.mT, g, beta=float(j > 0), alpha=scale)
                if needs_k:
                    dks[:, j:end].baddbmm_(g, q_, beta=more, alpha=scale)
                if needs_bias:
                    dbs[:, j:end] = g.sum(-1) if not more else dbs[:, j:end] + g.sum(-1)
            dq[some][:, :, i:stop] = dqs.mT.unflatten(0, heads)
        dk[some], dv[some], db[some] = (x.unflatten(0, heads) for x in (dks, dvs, dbs))
    return tuple(x if needs else None for x, needs in zip((dq, dk, dv, db.unsqueeze(-2)), needed, strict=True))
