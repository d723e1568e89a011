r"""Kernels of finite rank in linear time: the sum over the keys is taken once, for all queries.

With features :math:`\kappa(q,k)=\Phi(q)\cdot\Psi(k)`, as :func:`kernelbook.features.pair_of` has them,

.. math:: o_i=\frac{\Phi(q_i)^\top S}{\Phi(q_i)\cdot z},\qquad S=\sum_j\Psi(k_j)\,v_j^\top,\quad z=\sum_j\Psi(k_j).

Causal attention goes through the sequence in chunks: the state :math:`(S,z)` holds the chunks before, and within a
chunk the kernel's matrix is computed.  Time and memory are linear in the length, in the backward pass too, which
computes the features again.  :class:`~kernelbook.attention.RecurrentState` is the same state, for decoding token by
token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import features, kernels
from ..debugging import check_finite
from ..features import LIMIT, FeatureKernel, FeatureMap
from ..kernels import Kernel, get
from .call import Call, autocasts, leading
from .definition import check_mask, check_normaliser
from .tiled import tiled

__all__ = ["linear", "does", "refusal", "drawback", "crossover", "RecurrentState"]

#: How many features a chunk may hold: about what stays in a core's cache.
CHUNK = 2 ** 18

#: The most rows of a chunk: of a full pass, of a causal one by features, and of one by the kernel's definition.
ROWS = 512, 64, 128


# ------------------------------------------------------------------------------------------------- the choice

def does(call: Call) -> str:
    """How the path computes a call."""
    rank = int(call.kernel.feature_dimension(call.d))
    how = "a running sum over chunks, and the kernel's matrix within each" if call.causal else "one sum over the keys"
    return f"{rank:,} features, whose products with the values are summed first: {how}; linear in the length"


def refusal(call: Call) -> str | None:
    """Why the linear path cannot serve a call, or None if it can."""
    kernel = call.kernel
    if not features.has_pair(kernel):
        return (f"{kernel!r} has no finite features here; kernels of its kind that have: 'positive_features' and "
                "'taylor' for EDP, 'fourier_features' for RBF")
    if (rank := kernel.feature_dimension(call.d)) > LIMIT:
        return f"{kernel!r} has {rank:,} features at width {call.d}, more than {LIMIT:,}"
    if call.mask == "pairs":
        return "it sums over the keys once for all queries, and the mask differs between queries (a mask of keys, " \
               "(..., 1, m), and causal=True are served)"
    if call.dropout:
        return "it has no weights that dropout could set to 0"
    if call.normaliser in ("abs-sum", "relu-sum") and not kernel.normalisable:
        return f"it knows the sum of a row only, and the normaliser is {call.normaliser!r}"
    return None


def drawback(call: Call) -> str | None:
    """Why another path serves a call better, or None."""
    if call.dtype is torch.float64 and call.batch * call.n * call.m * call.d <= 2 ** 16:
        return "so small a problem is computed by the definition, in the definition's rounding"
    least = crossover(call.kernel, call.d, call.causal)
    if 2 * call.n * call.m < least * (call.n + call.m):
        # Under torch.compile the lengths may be symbols, which no format takes.
        here = "" if torch.compiler.is_compiling() else f"; here are {call.n:,} and {call.m:,}"
        return f"it pays from about {least:,} queries and keys on (linear.crossover){here}"
    return None


#: The numbers a and c of :func:`crossover`, without causality and with it, for the squared distance, for features made
#: one by one, and for products of coordinates.
CROSSOVERS = {"distance": ((48, 0.25), (48, 0.25)), "features": ((96, 0.5), (160, 0.75)),
              "products": ((320, 1.3), (900, 2.2))}


def crossover(kernel: Kernel, d: int, causal: bool = False) -> int:
    r"""From which length on the linear path is faster than the best of the others.

    .. math:: m^*=a+c\,D,

    where :math:`D` is the number of features, and the numbers :math:`a` and :math:`c` (:data:`CROSSOVERS`) depend on
    how the features are made.  The squared distance has :math:`d+2` cheap ones, and the definition makes differences of
    all pairs; elu + 1 and random features are made one by one; those of polynomials of degree 2 and more, and of
    products of kernels, are products of coordinates, some :math:`d^2/2`, and the definition makes inner products.  They
    were measured for training steps, on one thread, in float32; ``python benchmarks/crossover.py`` measures again.

    Parameters
    ----------
    kernel : Kernel
        One that :func:`kernelbook.features.pair_of` knows.
    d : int
        Width of queries and keys.
    causal : bool

    Returns
    -------
    int
        For as many queries as keys.  For n queries and m keys, the number to compare with is their harmonic mean
        :math:`2nm/(n+m)`: the definition takes time in proportion to nm, this path to n + m.
    """
    rank = int(kernel.feature_dimension(d))
    kind = "distance" if type(kernel) is kernels.L2Squared else "products" if _by_gram(kernel, d, rank) else "features"
    a, c = CROSSOVERS[kind][causal]
    return int(a + c * rank)


def _by_gram(kernel: Kernel, d: int, rank: float) -> bool:
    """Whether the matrix of a chunk is cheaper by the kernel's definition than by its features."""
    return not isinstance(kernel, FeatureKernel) and type(kernel) is not kernels.L2Squared and rank > 2 * d


# ------------------------------------------------------------------------------------------------- features of rows

def _recorded() -> bool:
    """Whether somebody follows what is computed, and tensors are better made anew than written to."""
    return (torch.is_grad_enabled() or torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active())


class _Rows:
    """The features of the rows of an array, and the gradient of the rows from that of their features."""

    logs = False            # whether the features are known by their logarithms, and a factor of a query's cancels

    def __init__(self, phi: FeatureMap) -> None:
        self.phi = phi
        self.dimension = phi.dimension

    def of(self, x: Tensor) -> Tensor:
        """The features, or their logarithms."""
        return self.phi._features(x)

    def back(self, x: Tensor, f: Tensor, grad: Tensor) -> Tensor:
        """The gradient of the rows."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            f = self.of(x)
            return torch.autograd.grad(f, x, grad)[0] if f.requires_grad else torch.zeros_like(x)


class _LogRows(_Rows):
    """Positive features; ``of`` gives their logarithms, and ``back`` wants the features."""

    logs = True

    def of(self, x: Tensor) -> Tensor:
        return self.phi.log(x)

    def back(self, x: Tensor, f: Tensor, grad: Tensor) -> Tensor:
        root, g = math.sqrt(_number(self.phi.scale, x)), grad * f
        return (g @ self.phi._nodes(x)[0] - g.sum(-1, keepdim=True) * (root * x)).mul_(root)


class _FourierRows(_Rows):
    def back(self, x: Tensor, f: Tensor, grad: Tensor) -> Tensor:
        (f_cos, f_sin), (g_cos, g_sin) = f.chunk(2, -1), grad.chunk(2, -1)
        return (g_sin * f_cos).addcmul_(g_cos, f_sin, value=-1) @ self.phi.frequencies(x)


class _EluRows(_Rows):
    def of(self, x: Tensor) -> Tensor:
        return x.clamp(max=0).exp() + x.relu()

    def back(self, x: Tensor, f: Tensor, grad: Tensor) -> Tensor:
        return grad * f.clamp(max=1)


class _DistanceRows(_Rows):
    r"""(|q|^2, 1, -2 q) and (s, s |k|^2, s k), with the scale s."""

    def __init__(self, scale: float | None, of_keys: bool) -> None:
        self.scale, self.of_keys = scale, of_keys

    def dimension(self, d: int) -> int:
        return d + 2

    def of(self, x: Tensor) -> Tensor:
        square = x.square().sum(-1, keepdim=True)
        if not self.of_keys:
            return torch.cat((square, torch.ones_like(square), -2 * x), -1)
        s = _number(self.scale, x)
        return torch.cat((torch.full_like(square, s), s * square, s * x), -1)

    def back(self, x: Tensor, f: Tensor, grad: Tensor) -> Tensor:
        if not self.of_keys:
            return 2 * (x * grad[..., :1] - grad[..., 2:])
        return _number(self.scale, x) * (2 * x * grad[..., 1:2] + grad[..., 2:])


class _PolynomialRows(_Rows):
    r"""Features of :math:`a_0+a_1\,s\,q\cdot k+a_2(s\,q\cdot k)^2`, the factors with the keys.

    The quadratic ones are products of a coordinate of a block and one of the same block or a later one: contiguous
    pieces, of which none is gathered.  Within a block a product is there twice; else the keys have a factor 2.
    """

    BLOCK = 16

    def __init__(self, scale: float | None, a: tuple[float, float, float], of_keys: bool) -> None:
        self.scale, self.a, self.of_keys = scale, a, of_keys

    def dimension(self, d: int) -> int:
        squares = sum(min(self.BLOCK, d - i) * (d - i) for i in range(0, d, self.BLOCK))
        return bool(self.a[0]) + d * bool(self.a[1]) + squares * bool(self.a[2])

    def _factors(self, x: Tensor) -> tuple[float, float, float]:
        s = _number(self.scale, x)
        return (self.a[0], self.a[1] * s, self.a[2] * s * s) if self.of_keys else (1.0, 1.0, 1.0)

    def _second(self, x: Tensor, start: int) -> Tensor:
        """The second factors of the products with a block."""
        c, stop = self._factors(x)[2], start + self.BLOCK
        if not self.of_keys:
            return x[..., start:]
        return torch.cat((c * x[..., start:stop], 2 * c * x[..., stop:]), -1)

    def of(self, x: Tensor) -> Tensor:
        a, factors = self.a, self._factors(x)
        pieces = [torch.full_like(x[..., :1], factors[0])] if a[0] else []
        pieces += [factors[1] * x] if a[1] else []
        pairs = [(x[..., start:start + self.BLOCK, None], self._second(x, start)[..., None, :])
                 for start in range(0, x.shape[-1], self.BLOCK)] if a[2] else []
        if _recorded():
            return torch.cat([*pieces, *((first * second).flatten(-2) for first, second in pairs)], -1)
        out, at = x.new_empty(*x.shape[:-1], self.dimension(x.shape[-1])), 0       # written at once, not copied there
        for piece in pieces:
            out[..., at:at + piece.shape[-1]] = piece
            at += piece.shape[-1]
        for first, second in pairs:
            shape = first.shape[-2], second.shape[-1]
            torch.mul(first, second, out=out[..., at:at + shape[0] * shape[1]].unflatten(-1, shape))
            at += shape[0] * shape[1]
        return out

    def back(self, x: Tensor, f: Tensor, grad: Tensor) -> Tensor:
        d, factors, out, at = x.shape[-1], self._factors(x), torch.zeros_like(x), int(bool(self.a[0]))
        if self.a[1]:
            out += factors[1] * grad[..., at:at + d]
            at += d
        if self.a[2]:
            for start in range(0, d, self.BLOCK):
                stop = min(start + self.BLOCK, d)
                size = (stop - start) * (d - start)
                g = grad[..., at:at + size].unflatten(-1, (stop - start, d - start))
                at += size
                first, second = x[..., start:stop], self._second(x, start)
                out[..., start:stop] += (g * second[..., None, :]).sum(-1)
                both = (first[..., None, :] @ g).squeeze(-2)
                out[..., start:stop] += factors[2] * both[..., :stop - start]
                out[..., stop:] += (1 + self.of_keys) * factors[2] * both[..., stop - start:]
        return out


def _number(scale: float | None, x: Tensor) -> float:
    return x.shape[-1] ** -0.5 if scale is None else scale


def _polynomial(kernel: Kernel) -> tuple[float, float, float] | None:
    """The coefficients of a polynomial of degree 2 or less, or None."""
    kind = type(kernel)
    if kind is kernels.Linear:
        return 0.0, 1.0, 0.0
    if kind is kernels.Quadratic:
        return 0.0, 0.0, 1.0
    if kind is kernels.Taylor and kernel.degree <= 2:
        return ((1.0, 0.0, 0.0), (1.0, 1.0, 0.0), (1.0, 1.0, 0.5))[kernel.degree]
    if kind is kernels.Polynomial and kernel.degree <= 2:
        c = kernel.offset
        return (c, 1.0, 0.0) if kernel.degree == 1 else (c * c, 2 * c, 1.0)
    return None


def _rows(kernel: Kernel, summed: bool) -> tuple[_Rows, _Rows]:
    """The fastest features of queries and keys."""
    if type(kernel) is kernels.L2Squared:
        return _DistanceRows(kernel.scale, False), _DistanceRows(kernel.scale, True)
    if (a := _polynomial(kernel)) is not None:
        return _PolynomialRows(kernel.scale, a, False), _PolynomialRows(kernel.scale, a, True)
    phi, psi = features.pair_of(kernel)
    if summed and hasattr(phi, "log"):
        return _LogRows(phi), _LogRows(psi)
    fast = {features.EluFeatures: _EluRows, features.FourierFeatures: _FourierRows}
    return fast.get(type(phi), _Rows)(phi), fast.get(type(psi), _Rows)(psi)


# ------------------------------------------------------------------------------------------------- the computation

@dataclass(frozen=True)
class _How:
    """What is the same for all chunks."""

    kernel: Kernel
    queries: _Rows
    keys: _Rows
    summed: bool            # whether the row sum divides
    causal: bool
    by_gram: bool           # whether the matrix within a chunk is the kernel's, or that of the features
    rows: int               # rows of a chunk
    group: int              # problems of the batch that are computed together
    dtype: torch.dtype      # of the computation


@dataclass
class _State:
    r"""What is kept of the keys: :math:`S`, ``(B, D, d_v)``, :math:`z`, ``(B, 1, D)``, and the logarithm of what both
    were divided by, ``(B, 1, 1)``; the last two or one where they are needed."""

    s: Tensor
    z: Tensor | None
    top: Tensor | None

    @classmethod
    def empty(cls, how: _How, k: Tensor, v: Tensor) -> _State:
        size, rank, made = v.shape[0], how.keys.dimension(k.shape[-1]), {"dtype": how.dtype, "device": v.device}
        return cls(torch.zeros(size, rank, v.shape[-1], **made),
                   torch.zeros(size, 1, rank, **made) if how.summed else None,
                   torch.full((size, 1, 1), torch.finfo(how.dtype).min, **made) if how.keys.logs else None)

    def __getitem__(self, index: slice) -> _State:
        return _State(*(x if x is None else x[index] for x in (self.s, self.z, self.top)))

    def features(self, how: _How, k: Tensor, see: Tensor | None) -> Tensor:
        """The features of keys.  Where they are known by logarithms, all are divided by the largest so far first."""
        f = how.keys.of(k)
        if self.top is not None:
            logs = f.detach() if see is None else f.detach().masked_fill(~see, -torch.inf)
            self.move(torch.maximum(self.top, logs.amax((-2, -1), keepdim=True)))
        return _visible(f, see, self.top)

    def move(self, top: Tensor | None) -> None:
        """Divide by the exponential of ``top`` instead."""
        if top is not None:
            factor = (self.top - top).exp()
            self.s, self.z, self.top = self.s * factor, self.z * factor, top

    def turn(self, top: Tensor | None) -> None:
        """As :meth:`move`, for the gradient of a state, which is multiplied by what the state is divided by."""
        if top is not None:
            factor = (top - self.top).exp()
            self.s, self.z, self.top = self.s * factor, self.z * factor, top

    def add(self, f: Tensor, v: Tensor) -> None:
        """Take in keys with these features, and their values."""
        if _recorded():
            self.s = torch.baddbmm(self.s, f.mT, v)
        else:
            self.s.baddbmm_(f.mT, v)
        if self.z is not None:
            self.z = self.z + f.sum(-2, keepdim=True)


def _part(x: Tensor | None, start: int, rows: int, dtype: torch.dtype | None = None) -> Tensor | None:
    x = None if x is None else x[..., start:start + rows, :]
    return x if dtype is None else x.to(dtype)


def _visible(f: Tensor, see: Tensor | None, top: Tensor | None) -> Tensor:
    """The features of keys that may be seen, and zeros for the others."""
    f = f if top is None else (f - top).exp()
    return f if see is None else f.masked_fill(~see, 0.0)


def _queries(how: _How, q: Tensor) -> Tensor:
    """The features of queries, divided by the largest of each where they are known by logarithms."""
    f = how.queries.of(q)
    return (f - f.detach().amax(-1, keepdim=True)).exp() if how.queries.logs else f


def _absorb(how: _How, k: Tensor, v: Tensor, see: Tensor | None, state: _State) -> None:
    """Take in keys and values."""
    for start in range(0, k.shape[-2], how.rows):
        kc, vc = (_part(x, start, how.rows, how.dtype) for x in (k, v))
        s = _part(see, start, how.rows)
        state.add(state.features(how, kc, s), vc)


def _read(how: _How, q: Tensor, state: _State) -> tuple[Tensor, Tensor | None]:
    """What queries get that see all keys of the state, and their row sums."""
    out, totals = [], []
    for start in range(0, max(q.shape[-2], 1), how.rows):
        f = _queries(how, _part(q, start, how.rows, how.dtype))
        out.append(f @ state.s)
        totals.append(None if state.z is None else (f * state.z).sum(-1, keepdim=True))
    return _joined(out), _joined(totals)


def _follow(how: _How, q: Tensor, k: Tensor, v: Tensor, see: Tensor | None, state: _State
            ) -> tuple[Tensor, Tensor | None]:
    """What queries get that see the keys of the state, and of these as many as there are queries up to them."""
    out, totals = [], []
    for start in range(0, q.shape[-2], how.rows):
        qc, kc, vc = (_part(x, start, how.rows, how.dtype) for x in (q, k, v))
        s = _part(see, start, how.rows)
        fq, fk = _queries(how, qc), state.features(how, kc, s)
        w = _within(how, qc, kc, fq, fk, s)
        out.append(torch.baddbmm(fq @ state.s, w, vc))
        totals.append(None if state.z is None else (fq * state.z).sum(-1, keepdim=True) + w.sum(-1, keepdim=True))
        state.add(fk, vc)
    return _joined(out), _joined(totals)


def _within(how: _How, q: Tensor, k: Tensor, fq: Tensor, fk: Tensor, see: Tensor | None) -> Tensor:
    """The matrix of a chunk, causal."""
    if not how.by_gram:
        return (fq @ fk.mT).tril()
    w = how.kernel.gram(q, k).tril()
    return w if see is None else w.masked_fill(~see.mT, 0.0)


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts, -2)


def _inverse(total: Tensor) -> Tensor:
    """1 over the row sum, and 0 where that is 0."""
    return 1 / torch.where(total == 0, torch.inf, total)


def _forward(how: _How, q: Tensor, k: Tensor, v: Tensor, see: Tensor | None, state: _State
             ) -> tuple[Tensor, Tensor | None]:
    """Attention of ``(B, n, d)``, ``(B, m, d)``, ``(B, m, d_v)`` with visible keys ``(B or 1, m, 1)``, and 1 over the
    row sums; the state becomes that of the keys which all queries see.  Causal calls have no more queries than keys."""
    first = _first(how, q, k)
    _absorb(how, k[:, :first], v[:, :first], _part(see, 0, first), state)
    if how.causal:
        later = _State(state.s.clone(), state.z, state.top)
        out, total = _follow(how, q, k[:, first:], v[:, first:], None if see is None else see[:, first:], later)
    else:
        out, total = _read(how, q, state)
    return (out, None) if total is None else (out * (inverse := _inverse(total)), inverse)


def _first(how: _How, q: Tensor, k: Tensor) -> int:
    """How many keys all queries see."""
    return k.shape[-2] - how.causal * q.shape[-2]


def _backward(how: _How, q: Tensor, k: Tensor, v: Tensor, see: Tensor | None, out: Tensor, inverse: Tensor | None,
              state: _State, grad: Tensor, wanted: tuple[bool, bool, bool]) -> list[Tensor | None]:
    """The gradients of queries, keys and values; the features are computed again, a chunk at a time.

    The state runs forward once more, for the queries; its own gradient runs backward, for keys and values.
    """
    first, rows, wide = _first(how, q, k), how.rows, how.dtype
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) if yes else None
                  for x, yes in zip((q, k, v), wanted, strict=True))
    back = _State(torch.zeros_like(state.s), None if state.z is None else torch.zeros_like(state.z), state.top)
    if how.summed:      # of the sums before they are divided, and of what divides them
        grad = grad * inverse
        d_total = -(grad * out).sum(-1, keepdim=True)
    else:
        d_total = None

    def of_features(sums: Tensor, start: int) -> Tensor:
        """The gradient of queries' features, from the state they met."""
        f = _part(grad, start, rows) @ sums.s.mT
        return f if d_total is None else f.addcmul_(_part(d_total, start, rows), sums.z)

    def of_keys(start: int, size: int, more=None) -> None:
        """The gradients of keys and values, from that of the state which they entered, and further ones."""
        kc, vc, s = _part(k, start, size, wide), _part(v, start, size, wide), _part(see, start, size)
        f = _visible(how.keys.of(kc), s, back.top)
        if dv is not None:
            dv[:, start:start + size] += f @ back.s
        if dk is not None:
            df = vc @ back.s.mT
            df = df if back.z is None else df.add_(back.z)
            df = df if more is None else df.add_(more)
            df = df if s is None else df.masked_fill_(~s, 0.0)
            dk[:, start:start + size] += how.keys.back(kc, f, df)

    def of_state(f: Tensor, start: int) -> None:
        """Add to the gradient of the state what these queries' features give."""
        back.s.baddbmm_(f.mT, _part(grad, start, rows))
        if d_total is not None:
            back.z += (f * _part(d_total, start, rows)).sum(-2, keepdim=True)

    def of_weights(a: int, vc: Tensor, s: Tensor | None) -> Tensor:
        """The gradient of a chunk's matrix."""
        dw = _part(grad, a, rows) @ vc.mT
        dw = (dw if d_total is None else dw.add_(_part(d_total, a, rows))).tril_()
        return dw if s is None else dw.masked_fill_(~s.mT, 0.0)

    if not how.causal:
        for start in range(0, q.shape[-2], rows):
            qc = _part(q, start, rows, wide)
            f = _queries(how, qc)
            if dq is not None:
                dq[:, start:start + rows] = how.queries.back(qc, f, of_features(state, start))
            if dk is not None or dv is not None:
                of_state(f, start)
    else:
        starts, tops, run = range(0, q.shape[-2], rows), [], _State(state.s.clone(), state.z, state.top)
        for start in starts:
            a, b, size = start, first + start, min(rows, q.shape[-2] - start)
            qc, kc, vc = _part(q, a, size, wide), _part(k, b, size, wide), _part(v, b, size, wide)
            s = _part(see, b, size)
            fk = run.features(how, kc, s)
            tops.append(run.top)
            if how.by_gram:
                with torch.enable_grad():
                    qg, kg = qc.detach().requires_grad_(), kc.detach().requires_grad_()
                    w = how.kernel.gram(qg, kg)
                gq, gk = torch.autograd.grad(w, (qg, kg), of_weights(a, vc, s))
                if dk is not None:
                    dk[:, b:b + size] = gk
                if dv is not None:
                    w = w.detach().tril()
                    dv[:, b:b + size] = (w if s is None else w.masked_fill(~s.mT, 0.0)).mT @ _part(grad, a, size)
            if dq is not None:
                fq, df = _queries(how, qc), of_features(run, a)
                df = df if how.by_gram else df.baddbmm_(of_weights(a, vc, s), fk)
                dq[:, a:a + size] = how.queries.back(qc, fq, df)
                if how.by_gram:
                    dq[:, a:a + size] += gq
            run.add(fk, vc)
        if dk is not None or dv is not None:
            back.top = tops[-1]
            for start, top in zip(reversed(starts), reversed(tops), strict=True):
                a, b, size = start, first + start, min(rows, q.shape[-2] - start)
                back.turn(top)
                fq, more = _queries(how, _part(q, a, size, wide)), None
                if not how.by_gram:
                    kc, vc, s = _part(k, b, size, wide), _part(v, b, size, wide), _part(see, b, size)
                    more = of_weights(a, vc, s).mT @ fq
                    if dv is not None:
                        fk = _visible(how.keys.of(kc), s, top)
                        dv[:, b:b + size] = (fq @ fk.mT).tril_().mT @ _part(grad, a, size)
                of_keys(b, size, more)
                of_state(fq, a)
            back.turn(state.top)
    if dk is not None or dv is not None:
        for start in range(0, first, rows):
            of_keys(start, min(rows, first - start))
    return [dq, dk, dv]


class _Linear(torch.autograd.Function):
    """Linear attention that keeps its inputs, its output and the state, and computes the features again."""

    @staticmethod
    def forward(ctx, how, q, k, v, see):
        out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=how.dtype, device=q.device)
        kept = []
        for g in _groups(how, q):
            state = _State.empty(how, k[g], v[g])
            out[g], inverse = _forward(how, q[g], k[g], v[g], _of(see, g), state)
            kept += [inverse, state.s, state.z, state.top]
        ctx.how = how
        ctx.save_for_backward(q, k, v, see, out, *kept)
        inverse = torch.cat(kept[::4]) if how.queries.logs and kept else None
        if inverse is not None:
            ctx.mark_non_differentiable(inverse)
        return out, inverse

    @staticmethod
    def backward(ctx, grad, _=None):
        if autocasts(grad.device.type):
            with torch.autocast(grad.device.type, enabled=False):
                return _Linear.backward(ctx, grad)
        how, (q, k, v, see, out, *kept) = ctx.how, ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:4]
        if torch.is_grad_enabled():         # a gradient of this gradient is asked for: by torch's own rules then
            inputs = [x for x, yes in zip((q, k, v), wanted, strict=True) if yes]
            again, _ = _forward(how, q, k, v, see, _State.empty(how, k, v))
            given = iter(torch.autograd.grad(again, inputs, grad, create_graph=True, materialize_grads=True))
            return None, *(next(given) if yes else None for yes in wanted), None
        grads = [torch.empty_like(x) if yes else None for x, yes in zip((q, k, v), wanted, strict=True)]
        for number, g in enumerate(_groups(how, q)):
            inverse, s, z, top = kept[4 * number:4 * number + 4]
            new = _backward(how, q[g], k[g], v[g], _of(see, g), out[g], inverse, _State(s, z, top), grad[g], wanted)
            for x, y in zip(grads, new, strict=True):
                if x is not None:
                    x[g] = y
        return None, *grads, None


def _groups(how: _How, q: Tensor) -> list[slice]:
    return [slice(i, i + how.group) for i in range(0, q.shape[0], how.group)]


def _of(see: Tensor | None, g: slice) -> Tensor | None:
    return see if see is None or see.shape[0] == 1 else see[g]


def linear(
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
    """Attention by the features of a kernel, in time and memory linear in the numbers of queries and keys.

    Where positive features lie so far apart that a row sum of them underflows, it is left to the tiled path.
    """
    n, m = q.shape[-2], k.shape[-2]
    if n == 0 or m == 0:
        return q @ k.transpose(-1, -2) @ v      # zeros of the right shape, and a gradient of zeros
    if autocasts(q.device.type):        # it would round features and states; only the result has its type
        dtype = torch.get_autocast_dtype(q.device.type) if q.dtype is torch.float32 else q.dtype
        with torch.autocast(q.device.type, enabled=False):
            return linear(q, k, v, kernel, mask=mask, causal=causal, normaliser=normaliser).to(dtype)
    batch = leading(q, k, v)
    how = _how(kernel, q, causal, normaliser)
    see = None
    if mask is not None:
        lead = batch if mask.ndim > 2 else ()
        see = mask.expand(*lead, 1, m).reshape(math.prod(lead), m, 1)
    given = q, k, v
    blind = max(n - m, 0) if causal else 0      # queries before the first key
    q, k, v = (x.expand(*batch, *x.shape[-2:]).reshape(math.prod(batch), *x.shape[-2:])
               for x in (q[..., blind:, :], k, v))
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        out, _ = _forward(how, q, k, v, see, _State.empty(how, k, v))
    else:
        out, inverse = _Linear.apply(how, q, k, v, see)
        if how.queries.logs and _underflows(inverse, _counts(n - blind, m, see, causal, out)):
            return tiled(*given, kernel, mask=mask, causal=causal, normaliser=normaliser)
    if normaliser == "count":
        out = out / _counts(n - blind, m, see, causal, out).clamp_min(1)
    out = F.pad(out, (0, 0, blind, 0)) if blind else out
    return out.reshape(*batch, n, v.shape[-1]).to(q.dtype)


def _how(kernel: Kernel, q: Tensor, causal: bool, normaliser: str) -> _How:
    summed = normaliser not in ("none", "count")
    while summed and type(kernel) is kernels.Scaled:        # the row sum divides the factor away
        kernel = kernel.base
    queries, keys = _rows(kernel, summed)
    d = q.shape[-1]
    rank = queries.dimension(d)
    by_gram = _by_gram(kernel, d, rank)
    most = ROWS[1 + by_gram if causal else 0]
    rows = min(most, max(128, CHUNK // max(rank, 1)))
    group = max(1, CHUNK // (rows * max(rank, 1)))
    dtype = torch.promote_types(q.dtype, torch.float32)
    return _How(kernel, queries, keys, summed, causal, by_gram, rows, group, dtype)


def _underflows(inverse: Tensor | None, seen: Tensor) -> bool:
    """Whether a query that sees keys has a row sum so small that the numbers in it are rounded to 0 or nearly so."""
    if inverse is None:
        return False
    most = torch.finfo(inverse.dtype).eps / torch.finfo(inverse.dtype).tiny * 2.0 ** -10
    return bool((((inverse == 0) | (inverse > most)) & (seen > 0)).any())


def _counts(n: int, m: int, see: Tensor | None, causal: bool, like: Tensor) -> Tensor:
    """How many keys each query sees, ``(B or 1, n or 1, 1)``."""
    if not causal:
        return like.new_full((1, 1, 1), m) if see is None else see.sum(-2, keepdim=True).to(like)
    if see is None:
        return torch.arange(m - n + 1, m + 1, device=like.device).to(like)[None, :, None]
    return see.cumsum(-2)[..., m - n:, :].to(like)


# ------------------------------------------------------------------------------------------------- decoding

class RecurrentState:
    r"""The state of attention by a kernel of finite rank, for keys that come one after another.

    It holds :math:`S=\sum_j\Psi(k_j)v_j^\top` and :math:`z=\sum_j\Psi(k_j)`, however many keys there have been: its
    memory and the time of a step do not grow with the length.  It is for inference, and keeps no graph.

    Parameters
    ----------
    kernel : str or Kernel
        One that :func:`kernelbook.features.pair_of` knows.
    normaliser : str
        ``"sum"``, ``"signed-sum"``, ``"none"`` or ``"count"``; the others too where the kernel is never negative.

    Raises
    ------
    ValueError
        If an argument does not fit the other.

    Examples
    --------
    >>> state = RecurrentState("elu")
    >>> q, k, v = torch.randn(3, 5, 4).unbind(0)
    >>> whole = attend(q, k, v, "elu", causal=True)
    >>> parts = [state.attend(*rows) for rows in zip(q.split(1), k.split(1), v.split(1))]
    >>> torch.allclose(torch.cat(parts), whole, atol=1e-6)
    True
    """

    def __init__(self, kernel: str | Kernel, normaliser: str = "sum") -> None:
        self.kernel, self.normaliser = get(kernel), normaliser
        check_normaliser(self.kernel, normaliser)
        if (why := refusal(Call(self.kernel, normaliser))) is not None:
            raise ValueError(f"RecurrentState cannot serve {self.kernel!r}: {why}; kernelbook.attention.Cache keeps "
                             "the keys, and serves every kernel")
        self._length = 0
        self._batch: tuple[int, ...] = ()
        self._state: _State | None = None       # its axis B is the product of the leading axes
        self._seen: Tensor | None = None        # (B, 1, 1): number of visible keys, where the normaliser counts them

    def __len__(self) -> int:
        """Number of keys appended, hidden ones among them."""
        return self._length

    @property
    def size(self) -> int:
        """How many numbers are held."""
        held = () if self._state is None else (self._state.s, self._state.z, self._state.top, self._seen)
        return sum(x.numel() for x in held if x is not None)

    def append(self, k: Float[Tensor, "*batch n d"], v: Float[Tensor, "*batch n d_v"],
               visible: Bool[Tensor, "*#batch n"] | None = None) -> None:
        """Take in further keys and values.

        Parameters
        ----------
        k, v : Tensor
            ``(..., n, d)`` and ``(..., n, d_v)``, with the same leading axes as those before.
        visible : Tensor, optional
            Boolean, broadcasting to ``(..., n)``; True where a key may be seen.

        Raises
        ------
        TypeError
            If a dtype does not fit.
        ValueError
            If a shape does not fit, or a gradient is required.
        """
        self._take(None, k, v, visible)

    def attend(self, q: Float[Tensor, "*batch n d"], k: Float[Tensor, "*batch n d"] | None = None,
               v: Float[Tensor, "*batch n d_v"] | None = None, *, visible: Bool[Tensor, "*#batch n"] | None = None,
               causal: bool = False) -> Float[Tensor, "*batch n d_v"]:
        """Attention from new queries to all keys so far, after taking in those given.

        Parameters
        ----------
        q : Tensor
            ``(..., n, d)``.
        k, v, visible : Tensor, optional
            As in :meth:`append`.
        causal : bool
            Whether each query sees, of the keys given with it, only those up to its own: then there must be as many
            of the ones as of the others.

        Returns
        -------
        Tensor
            ``(..., n, d_v)``.

        Raises
        ------
        TypeError, ValueError
            As in :meth:`append`; also if there has been no key yet.
        """
        if (k is None) != (v is None) or k is None and visible is not None:
            raise ValueError("k and v go together, and visible goes with them")
        if causal and q.shape[-2] != (1 if k is None else k.shape[-2]):
            raise ValueError("causal attention needs with the queries as many keys, since a state does not know its "
                             "keys apart; append those that all queries see first")
        if causal and k is not None:
            return self._take(q, k, v, visible)
        if k is not None:
            self.append(k, v, visible)
        if self._state is None:
            raise ValueError("the state has seen no keys; append keys and values first")
        self._check(q=q)
        how = _how(self.kernel, q, False, self.normaliser)
        with torch.no_grad():
            out, total = _read(how, self._flat(q), self._state)
            self._check_total(total)
            return self._shaped(out, total, self._seen, q)

    def select(self, index: Int[Tensor, " rows"]) -> None:
        """Keep these rows of the first axis, in this order; one may be kept several times.

        Parameters
        ----------
        index : Tensor
            Numbers of rows: those of the sequences that go on, say, or of the best beams.

        Raises
        ------
        ValueError
            If the keys have no leading axis.
        """
        if self._state is None:
            return
        if not self._batch:
            raise ValueError("the keys had no leading axis to select from")
        def chosen(x: Tensor | None) -> Tensor | None:
            return x if x is None else x.unflatten(0, self._batch).index_select(0, index).flatten(0, -3)

        self._state = _State(chosen(self._state.s), chosen(self._state.z), chosen(self._state.top))
        self._seen, self._batch = chosen(self._seen), (len(index), *self._batch[1:])

    def _take(self, q: Tensor | None, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor | None:
        """Append; and return what queries get that are as many, each with its own key the last that it sees."""
        self._check(k=k, v=v) if q is None else self._check(q=q, k=k, v=v)
        if k.shape[:-1] != v.shape[:-1]:
            raise ValueError("k and v must be (..., n, d) and (..., n, d_v) with the same leading axes and n, but have "
                             f"shapes {tuple(k.shape)} and {tuple(v.shape)}")
        if visible is not None:
            check_mask(visible, k.shape[:-1], k.device)
        how = _how(self.kernel, k, True, self.normaliser)
        with torch.no_grad():
            if self._state is None:
                self._batch, self._like = tuple(k.shape[:-2]), k.new_empty(0)
                self._width = {"q": k.shape[-1], "k": k.shape[-1], "v": v.shape[-1]}
                self._state = _State.empty(how, self._flat(k), self._flat(v))
                if self.normaliser == "count":
                    self._seen = torch.zeros_like(self._state.s[:, :1, :1])
            if k.shape[-2] == 0:
                return None if q is None else torch.zeros_like(v)
            see = None if visible is None else self._flat(visible.expand(k.shape[:-1])[..., None])
            k, v, counts = self._flat(k), self._flat(v), None
            self._length += k.shape[-2]
            if self._seen is not None:
                new = torch.ones_like(k[..., :1]) if see is None else see
                counts = self._seen + new.cumsum(-2).to(how.dtype)
                self._seen = counts[:, -1:]
            if q is None:
                return _absorb(how, k, v, see, self._state)
            out, total = _follow(how, self._flat(q), k, v, see, self._state)
            self._check_total(None if total is None else total[:, -1:])     # this query has seen all in the state
            return self._shaped(out, total, counts, q)

    def _check_total(self, total: Tensor | None) -> None:
        if total is not None and self._state.top is not None and _underflows(
                _inverse(total), self._state.z.sum(-1, keepdim=True)):
            raise FloatingPointError(f"the features of {self.kernel!r} lie so far apart that their row sum underflows "
                                     f"in a state of {total.dtype}; kernelbook.attention.Cache(kind='keys') keeps the "
                                     "keys, and serves them")

    def _flat(self, x: Tensor) -> Tensor:
        return x.reshape(math.prod(self._batch), *x.shape[-2:])

    def _shaped(self, out: Tensor, total: Tensor | None, counts: Tensor | None, q: Tensor) -> Tensor:
        """Divided, and with the leading axes."""
        if total is not None:
            out = out * _inverse(total)
        if counts is not None:
            out = out / counts.clamp_min(1)
        return out.reshape(*self._batch, *out.shape[-2:]).to(q.dtype)

    def _check(self, **given: Tensor) -> None:
        check_finite(**given)
        for name, x in given.items():
            if torch.is_grad_enabled() and x.requires_grad:
                raise ValueError(f"a state keeps no graph, but {name} requires a gradient: decode under "
                                 "torch.no_grad(), or train by the full pass")
            if x.ndim < 2 or self._state is not None and (x.shape[:-2] != self._batch
                                                          or x.shape[-1] != self._width[name]):
                wanted = (*self._batch, "n", self._width[name]) if self._state is not None else "(..., n, d)"
                raise ValueError(f"{name} must have the shape {wanted}, but has {tuple(x.shape)}")
            if self._state is not None and (x.dtype is not self._like.dtype or x.device != self._like.device):
                raise TypeError(f"{name} must be {self._like.dtype} on {self._like.device} like the keys before, but "
                                f"is {x.dtype} on {x.device}")
