r"""Kernels of finite rank in linear time: the sum over the keys is taken once, for all queries.

With features :math:`\kappa(q,k)=\Phi(q)\cdot\Psi(k)`, as :func:`kernelbook.features.pair_of` has them,

.. math:: o_i=\frac{\Phi(q_i)^\top S}{\Phi(q_i)\cdot z},\qquad S=\sum_j\Psi(k_j)\,v_j^\top,\quad z=\sum_j\Psi(k_j).

Causal attention goes through the sequence in chunks: the state :math:`(S,z)` holds the chunks before, and within a
chunk the kernel's matrix is computed.  Time and memory are linear in the length, in the backward pass too, which
computes the features again.  :class:`RecurrentState` is the same state, for decoding token by token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import features
from ..debugging import check_finite
from ..features import LIMIT, FeatureKernel, FeatureMap
from ..kernels import Kernel, get
from .call import Call
from .definition import check_mask, check_normaliser

__all__ = ["linear", "does", "refusal", "drawback", "crossover", "RecurrentState"]

#: How many features a chunk may hold: about what stays in a core's cache.
CHUNK = 2 ** 19


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
        return (f"it pays from about {least:,} queries and keys on (linear.crossover); here are {call.n:,} and "
                f"{call.m:,}")
    return None


def crossover(kernel: Kernel, d: int, causal: bool = False) -> int:
    """From which length on the linear path is faster."""
    return 2 * int(kernel.feature_dimension(d))


# ------------------------------------------------------------------------------------------------- the computation

@dataclass(frozen=True)
class _How:
    """What is the same for all chunks."""

    kernel: Kernel
    phi: FeatureMap
    psi: FeatureMap
    summed: bool            # whether the row sum divides
    causal: bool
    by_gram: bool           # whether the matrix within a chunk is the kernel's, or that of the features
    rows: int               # rows of a chunk
    dtype: torch.dtype      # of the computation

    @property
    def logs(self) -> bool:
        """Whether features are known by logarithms, so that rows may be divided by their largest."""
        return self.summed and hasattr(self.phi, "log")

    def queries(self, q: Tensor) -> Tensor:
        """The features of queries, up to a factor of each query where that cancels."""
        if self.logs:
            logs = self.phi.log(q)
            return (logs - logs.detach().amax(-1, keepdim=True)).exp()
        return self.phi._features(q)

    def keys(self, k: Tensor, see: Tensor | None, top: Tensor) -> Tensor:
        """The features of keys, divided by the exponential of ``top`` where they are known by logarithms."""
        if self.logs:
            f = (self.psi.log(k) - top).exp()
        else:
            f = self.psi._features(k)
        return f if see is None else f.masked_fill(~see, 0.0)

    def top(self, k: Tensor, see: Tensor | None, before: Tensor) -> Tensor:
        """The largest logarithm of a feature of these keys and those before, ``(B, 1, 1)``."""
        if not self.logs:
            return before
        logs = self.psi.log(k.detach())
        if see is not None:
            logs = logs.masked_fill(~see, -torch.inf)
        return torch.maximum(before, logs.amax((-2, -1), keepdim=True))

    def moved(self, state: Tensor, top: Tensor, higher: Tensor) -> Tensor:
        """The state, divided by the exponential of another reference."""
        return state * (top - higher).exp() if self.logs else state

    def values(self, v: Tensor) -> Tensor:
        """The values, with a column of ones where the row sum is wanted."""
        return torch.cat((v, torch.ones_like(v[..., :1])), -1) if self.summed else v

    def within(self, q: Tensor, k: Tensor, fq: Tensor, fk: Tensor, see: Tensor | None) -> Tensor:
        """The matrix of a chunk, causal."""
        w = self.kernel.gram(q, k) if self.by_gram else fq @ fk.transpose(-1, -2)
        if self.by_gram and see is not None:
            w = w.masked_fill(~see.transpose(-1, -2), 0.0)
        return w.tril()


def _absorb(how: _How, k: Tensor, v: Tensor, see: Tensor | None, state: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """The state and its reference after these keys and values as well."""
    for start in range(0, k.shape[-2], how.rows):
        stop = start + how.rows
        kc, s = k[..., start:stop, :].to(how.dtype), None if see is None else see[..., start:stop, :]
        higher = how.top(kc, s, top)
        fk = how.keys(kc, s, higher)
        vc = how.values(v[..., start:stop, :].to(how.dtype))
        state, top = how.moved(state, top, higher) + fk.transpose(-1, -2) @ vc, higher
    return state, top


def _read(how: _How, q: Tensor, state: Tensor) -> Tensor:
    """What queries that see all keys of the state get, with their row sums."""
    parts = [how.queries(x.to(how.dtype)) @ state for x in q.split(how.rows, -2)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def _follow(how: _How, q: Tensor, k: Tensor, v: Tensor, see: Tensor | None, state: Tensor, top: Tensor,
            ) -> tuple[Tensor, Tensor, Tensor]:
    """What queries get that see the keys of the state, and of these as many as there are queries up to them."""
    out = []
    for start in range(0, q.shape[-2], how.rows):
        stop = start + how.rows
        qc, kc, vc = (x[..., start:stop, :].to(how.dtype) for x in (q, k, v))
        s = None if see is None else see[..., start:stop, :]
        higher = how.top(kc, s, top)
        state, top = how.moved(state, top, higher), higher
        fq, fk, vc = how.queries(qc), how.keys(kc, s, top), how.values(vc)
        out.append(fq @ state + how.within(qc, kc, fq, fk, s) @ vc)
        state = state + fk.transpose(-1, -2) @ vc
    return out[0] if len(out) == 1 else torch.cat(out, -2), state, top


def _empty(how: _How, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The state before the first key, and its reference."""
    state = v.new_zeros((v.shape[0], how.psi.dimension(k.shape[-1]), v.shape[-1] + how.summed), dtype=how.dtype)
    return state, v.new_full((v.shape[0], 1, 1), torch.finfo(how.dtype).min, dtype=how.dtype)


def _divide(how: _How, o: Tensor) -> Tensor:
    """By the row sums, if they are there."""
    if not how.summed:
        return o
    o, total = o[..., :-1], o[..., -1:]
    return o / torch.where(total == 0, torch.inf, total)


def _run(how: _How, q: Tensor, k: Tensor, v: Tensor, see: Tensor | None) -> Tensor:
    """Attention of ``(B, n, d)``, ``(B, m, d)``, ``(B, m, d_v)`` with visible keys ``(B or 1, m, 1)``."""
    n, m = q.shape[-2], k.shape[-2]
    state, top = _empty(how, k, v)
    if not how.causal:
        state, _ = _absorb(how, k, v, see, state, top)
        return _divide(how, _read(how, q, state))
    blind, first = max(n - m, 0), max(m - n, 0)         # queries before the first key, keys that all queries see
    if first:
        state, top = _absorb(how, k[:, :first], v[:, :first], None if see is None else see[:, :first], state, top)
    out, _, _ = _follow(how, q[:, blind:], k[:, first:], v[:, first:], None if see is None else see[:, first:],
                        state, top)
    out = _divide(how, out)
    return torch.cat((out.new_zeros(out.shape[0], blind, out.shape[-1]), out), -2) if blind else out


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
    """Attention by the features of a kernel, in time and memory linear in the numbers of queries and keys."""
    n, m = q.shape[-2], k.shape[-2]
    if n == 0 or m == 0:
        return q @ k.transpose(-1, -2) @ v      # zeros of the right shape, and a gradient of zeros
    batch = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    how = _how(kernel, q, causal, normaliser)
    see = None
    if mask is not None:
        lead = batch if mask.ndim > 2 else ()
        see = mask.expand(*lead, 1, m).reshape(math.prod(lead), m, 1)
    q, k, v = (x.expand(*batch, *x.shape[-2:]).reshape(math.prod(batch), *x.shape[-2:]) for x in (q, k, v))
    out = _run(how, q, k, v, see)
    if normaliser == "count":
        out = out / _counts(n, m, see, causal, out).clamp_min(1)
    return out.reshape(*batch, n, v.shape[-1]).to(q.dtype)


def _how(kernel: Kernel, q: Tensor, causal: bool, normaliser: str) -> _How:
    phi, psi = features.pair_of(kernel)
    d = q.shape[-1]
    rank = phi.dimension(d)
    by_gram = not isinstance(kernel, FeatureKernel) and rank > 2 * d + 2
    rows = max(16, min(128 if causal else 1024, CHUNK // rank))
    return _How(kernel, phi, psi, normaliser not in ("none", "count"), causal, by_gram, rows,
                torch.promote_types(q.dtype, torch.float32))


def _counts(n: int, m: int, see: Tensor | None, causal: bool, like: Tensor) -> Tensor:
    """How many keys each query sees, ``(B or 1, n or 1, 1)``."""
    if not causal:
        return like.new_full((1, 1, 1), m) if see is None else see.sum(-2, keepdim=True).to(like)
    last = torch.arange(m - n, m, device=like.device)           # the last key that each may see
    if see is None:
        return (last + 1).clamp_min(0).to(like)[None, :, None]
    sums = torch.nn.functional.pad(see.cumsum(-2), (0, 0, 1, 0))
    return sums[..., (last + 1).clamp_min(0), :].to(like)


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
        self._state: Tensor | None = None       # (B, D, d_v) or, with the row sums, (B, D, d_v + 1)
        self._top: Tensor | None = None         # (B, 1, 1): the logarithm of what the state was divided by
        self._seen: Tensor | None = None        # (B, 1, 1): number of visible keys, where the normaliser counts them

    def __len__(self) -> int:
        """Number of keys appended, hidden ones among them."""
        return self._length

    @property
    def size(self) -> int:
        """How many numbers are held."""
        return sum(x.numel() for x in (self._state, self._top, self._seen) if x is not None)

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
            out = _divide(how, _read(how, self._flat(q), self._state))
            return self._shaped(out if self._seen is None else out / self._seen.clamp_min(1), q)

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
        for name in ("_state", "_top", "_seen"):
            if (x := getattr(self, name)) is not None:
                setattr(self, name, x.unflatten(0, self._batch).index_select(0, index).flatten(0, len(self._batch) - 1))
        self._batch = (len(index), *self._batch[1:])

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
                self._state, self._top = _empty(how, self._flat(k), self._flat(v))
                if self.normaliser == "count":
                    self._seen = torch.zeros_like(self._top)
            new = visible is not None and self._flat(visible.expand(k.shape[:-1])[..., None])
            see = None if visible is None else new
            seen = torch.ones_like(self._flat(k)[..., :1], dtype=how.dtype) if see is None else see.to(how.dtype)
            k, v = self._flat(k), self._flat(v)
            self._length += k.shape[-2]
            if q is None:
                self._state, self._top = _absorb(how, k, v, see, self._state, self._top)
            else:
                out, self._state, self._top = _follow(how, self._flat(q), k, v, see, self._state, self._top)
                out = _divide(how, out)
            if self._seen is not None:
                counts = self._seen + seen.cumsum(-2)
                out = None if q is None else out / counts.clamp_min(1)
                self._seen = counts[:, -1:] if counts.shape[-2] else self._seen
            return None if q is None else self._shaped(out, q)

    def _flat(self, x: Tensor) -> Tensor:
        return x.reshape(math.prod(self._batch), *x.shape[-2:])

    def _shaped(self, x: Tensor, q: Tensor) -> Tensor:
        return x.reshape(*self._batch, *x.shape[-2:]).to(q.dtype)

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
