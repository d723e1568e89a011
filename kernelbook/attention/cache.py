r"""Attention to keys that come one after another, as in decoding: what has been seen is kept, and never computed again.

A :class:`Cache` holds the keys and values themselves, in buffers that double when they are full, so that appending
:math:`m` of them one at a time copies fewer than :math:`2m` rows.  One query then takes :math:`O(md)` operations, for
every kernel and every normaliser.  For a kernel of finite rank it may hold the sums over the keys instead, a
:class:`kernelbook.attention.RecurrentState`: a step then takes the same time however many keys there have been.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..debugging import check_finite
from ..features import FeatureKernel
from ..kernels import Kernel, get
from .call import Call
from .definition import _softmax, _weights, check_normaliser
from .dispatch import PATHS, choose
from .linear import RecurrentState
from .linear import refusal as no_state
from .reductions import has_softmax_form, softmax_form

__all__ = ["Cache"]

_FIRST_ROWS = 16

#: A state is held once the keys and values are this many times as many numbers as it has, and so many more.  Measured
#: on a CPU: a step reads and writes the state and computes features, which costs more than reading as many keys.
STATE_FACTOR, STATE_START = 3, 2 ** 19


class Cache:
    r"""The keys and values that attention has seen so far, and attention to them.

    It is for inference: it keeps no graph, so it refuses inputs that require a gradient.

    Parameters
    ----------
    kernel : str or Kernel
        As in :func:`attend`.
    normaliser : str
        As in :func:`attend`.
    path : str
        As in :func:`attend`.  With ``path="auto"``, a single query takes the definition, whose one row is small, in at
        least float32.
    kind : str
        What to hold: ``"keys"``, which serve every kernel; ``"state"``, sums over the keys, for a kernel of finite
        rank, with ``path`` ``"auto"`` or ``"linear"``; or ``"auto"``: keys, until a state is cheaper
        (:meth:`explain`).

    Raises
    ------
    ValueError
        If a name is unknown, or the kernel may be negative and ``normaliser`` is ``"sum"``.

    Examples
    --------
    >>> cache = Cache("rbf")
    >>> q, k, v = torch.randn(3, 5, 4).unbind(0)
    >>> whole = attend(q, k, v, "rbf", causal=True)
    >>> parts = [cache.attend(q[i:i + 1], k[i:i + 1], v[i:i + 1]) for i in range(5)]
    >>> torch.allclose(torch.cat(parts), whole, atol=1e-6)
    True
    """

    def __init__(self, kernel: str | Kernel = "edp", *, normaliser: str = "sum", path: str = "auto",
                 kind: str = "auto") -> None:
        self.kernel, self.normaliser, self.path, self._asked = get(kernel), normaliser, path, kind
        check_normaliser(self.kernel, normaliser)
        if path != "auto" and path not in PATHS:
            raise ValueError(f"no path is called {path!r} (known: auto, {', '.join(PATHS)})")
        if kind not in ("auto", "keys", "state"):
            raise ValueError(f"kind must be 'auto', 'keys' or 'state', not {kind!r}")
        self._length = 0
        self._keys: Tensor | None = None        # (..., capacity, d)
        self._values: Tensor | None = None      # (..., capacity, d_v)
        self._visible: Tensor | None = None     # (..., capacity, 1), or None while all keys are visible
        self._bias: Tensor | None = None        # (..., capacity, 1): of the softmax form, if it leaves q and k as they
        self._scale = 1.0                       # are, and the factor of their inner products
        self._state: RecurrentState | None = None
        self._state_from: float = math.inf      # number of keys

    def __len__(self) -> int:
        """Number of keys appended, hidden ones among them."""
        return self._length

    @property
    def kind(self) -> str:
        """What is held: ``"keys"`` or ``"state"``."""
        return "keys" if self._state is None else "state"

    @property
    def size(self) -> int:
        """How many numbers are held, in all."""
        if self._state is not None:
            return self._state.size
        return sum(x[..., :self._length, :].numel() for x in (self._keys, self._values, self._bias) if x is not None)

    def explain(self) -> str:
        """What is held, and until when, in a line.

        Returns
        -------
        str
        """
        held = f"kind {self.kind!r}: {self.size:,} numbers for {self._length:,} keys"
        if self._state is not None:
            return f"{held}; as many for any number of keys"
        if self._asked == "keys":
            return f"{held}; a state was not to be held"
        if self._keys is None:
            return f"{held}; what to hold is decided at the first key"
        if (why := self._no_state(self._keys.shape[-1], self._values.shape[-1])) is not None:
            return f"{held}; no state: {why}"
        return f"{held}; a state is cheaper from {self._state_from:,} keys on"

    def _no_state(self, d: int, d_v: int) -> str | None:
        """Why there can be no state, or None."""
        if self.path not in ("auto", "linear"):
            return f"it takes path 'auto' or 'linear', and the path is {self.path!r}"
        return no_state(Call(self.kernel, self.normaliser, d=d, d_v=d_v, mask="keys"))

    def _least_for_state(self, k: Tensor, v: Tensor) -> float:
        """From how many keys on a state is to be held; raise if what was asked for cannot serve such keys."""
        d, d_v = k.shape[-1], v.shape[-1]
        choose(Call(self.kernel, self.normaliser, d=d, d_v=d_v, mask="keys"), self.path)
        why = None if self._asked == "keys" else self._no_state(d, d_v)
        if self._asked == "state" and why is not None:
            raise ValueError(f"kind='state' cannot serve {self.kernel!r}: {why}; kind='keys' can")
        if self._asked == "keys" or why is not None:
            return math.inf
        # Features that define the kernel would be computed anew for all keys at every step.
        if self._asked == "state" or self.path == "linear" or isinstance(self.kernel, FeatureKernel):
            return 0
        problems = max(1, math.prod(k.shape[:-2]))
        state = int(self.kernel.feature_dimension(d)) * (d_v + 1)
        return math.ceil((STATE_FACTOR * state + STATE_START / problems) / (d + d_v))

    @property
    def keys(self) -> Float[Tensor, "*batch m d"] | None:
        """The keys held, or None."""
        return None if self._keys is None else self._keys[..., :self._length, :]

    @property
    def values(self) -> Float[Tensor, "*batch m d_v"] | None:
        """The values held, or None."""
        return None if self._values is None else self._values[..., :self._length, :]

    @property
    def visible(self) -> Bool[Tensor, "*#batch m"] | None:
        """Which of the keys may be seen, or None if all may."""
        return None if self._visible is None else self._visible[..., :self._length, 0]

    def append(self, k: Float[Tensor, "*batch n d"], v: Float[Tensor, "*batch n d_v"],
               visible: Bool[Tensor, "*#batch n"] | None = None) -> None:
        """Keep further keys and values.

        Parameters
        ----------
        k, v : Tensor
            ``(..., n, d)`` and ``(..., n, d_v)``, with the leading axes of those held.
        visible : Tensor, optional
            Boolean, broadcasting to ``(..., n)``; True where a key may be seen, now and later.  The keys of a
            sequence that has ended, say, may not.

        Raises
        ------
        TypeError
            If a dtype does not fit.
        ValueError
            If a shape or a device does not fit, a gradient is required, or the path or kind asked for cannot serve
            the kernel.
        """
        self._check_new(k, v, visible)
        self._decide(k, v, rows=0)
        self._append(k, v, visible)

    def _append(self, k: Tensor, v: Tensor, visible: Tensor | None) -> None:
        start, rows = self._length, k.shape[-2]
        if self._state is not None:
            self._state.append(k, v, visible)       # or raises: then nothing has been taken in
            self._length = start + rows
            return
        self._length = start + rows
        if start == 0 or self._bias is not None:
            bias = self._key_bias(k)
            self._bias = None if bias is None else _put(self._bias, start, bias)
        self._keys, self._values = _put(self._keys, start, k), _put(self._values, start, v)
        if visible is not None and self._visible is None:
            self._visible = visible.new_ones(*visible.shape[:-1], start, 1)
        if self._visible is not None:
            shape = (*self._visible.shape[:-2], rows, 1)
            new = self._visible.new_ones(shape) if visible is None else visible[..., None]
            self._visible = _put(self._visible, start, new)

    def _decide(self, k: Tensor | None, v: Tensor | None, rows: int) -> None:
        """Replace the keys by a state if that is cheaper now, or will be after so many rows more."""
        if self._state is not None:
            return
        if self._length == 0 and k is not None:
            self._state_from = self._least_for_state(k, v)
        if self._state_from > self._length + (rows if self._length else 0):
            return                              # without any keys yet, the first rows are a full pass
        state = RecurrentState(self.kernel, self.normaliser)
        if self._length:
            state.append(self.keys, self.values, self.visible)
        self._state, self._keys, self._values, self._visible, self._bias = state, None, None, None, None

    def _key_bias(self, k: Tensor) -> Tensor | None:
        """The logits' terms that depend on the key alone, kept where that spares a single query some work."""
        if self.path != "auto" or self.normaliser in ("none", "count") \
                or not has_softmax_form(self.kernel, k.shape[-1]):
            return None
        if k.dtype.itemsize < 4:
            with torch.autocast(k.device.type, enabled=False):
                return self._key_bias(k.float())
        form = softmax_form(self.kernel, no_query := k[..., :0, :], k)
        if form.key_bias is None or form.k is not k or form.q is not no_query:
            return None
        self._scale = form.scale
        return form.key_bias[..., None]

    def attend(self, q: Float[Tensor, "*batch n d"], k: Float[Tensor, "*batch n d"] | None = None,
               v: Float[Tensor, "*batch n d_v"] | None = None, *, visible: Bool[Tensor, "*#batch n"] | None = None,
               causal: bool = False) -> Float[Tensor, "*batch n d_v"]:
        """Attention from new queries to all the keys, after appending those given.

        Parameters
        ----------
        q : Tensor
            ``(..., n, d)``.
        k, v, visible : Tensor, optional
            As in :meth:`append`; they come first.
        causal : bool
            Whether a query sees only the keys up to its own position, the last query aligned with the last key.

        Returns
        -------
        Tensor
            ``(..., n, d_v)``: what :func:`attend` gives for these queries, all the keys, and the mask.

        Raises
        ------
        TypeError, ValueError
            As in :meth:`append`; also if the cache is empty, or it holds a state, ``causal`` is true, and the queries
            are not as many as the keys given.
        """
        if (k is None) != (v is None) or k is None and visible is not None:
            raise ValueError("k and v go together, and visible goes with them")
        if k is not None:
            self._check_new(k, v, visible)
        if not causal or q.shape[-2] == (1 if k is None else k.shape[-2]):      # else a state could not tell
            self._decide(k, v, rows=q.shape[-2])
        if self._state is not None:
            try:
                return self._state.attend(q, k, v, visible=visible, causal=causal)
            finally:
                self._length = len(self._state)     # it may have taken the keys and refused the queries
        if k is not None:
            self._append(k, v, visible)
        self._check_queries(q)
        return self._by_keys(q, causal)

    def _by_keys(self, q: Tensor, causal: bool) -> Tensor:
        keys, values = self.keys, self.values
        mask = None if self._visible is None else self._visible[..., :self._length, :].mT
        if q.shape[-2] == 1 and self.path == "auto":
            if q.dtype.itemsize >= 4:
                return self._row(q, keys, values, mask)
            with torch.autocast(q.device.type, enabled=False):
                return self._row(q.float(), keys.float(), values.float(), mask).to(q.dtype)
        options = {"mask": mask, "causal": causal, "dropout": 0.0, "normaliser": self.normaliser}
        chosen = choose(Call.of(q, keys, values, self.kernel, **options), self.path)
        return PATHS[chosen].compute(q, keys, values, self.kernel, **options)

    def _row(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Attention from one query, in at least float32."""
        if self._bias is None:
            return _weights(q, keys, self.kernel, mask, False, self.normaliser) @ values
        logits = (q * self._scale) @ keys.mT + self._bias[..., :self._length, :].mT
        return _softmax(logits, mask) @ values

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
        if self._state is not None:
            self._state.select(index)
        if self._keys is None:
            return
        if self._keys.ndim < 3:
            raise ValueError(f"the keys held have shape {tuple(self.keys.shape)}: there is no leading axis to select "
                             "from")
        self._keys, self._values = self._keys.index_select(0, index), self._values.index_select(0, index)
        if self._bias is not None:
            self._bias = self._bias.index_select(0, index)
        if self._visible is not None and self._visible.ndim == self._keys.ndim and self._visible.shape[0] > 1:
            self._visible = self._visible.index_select(0, index)

    def truncate(self, length: int) -> None:
        """Forget all keys but the first ``length``.

        Parameters
        ----------
        length : int
            From 0 to the number held.

        Raises
        ------
        ValueError
            If it is not, or a state is held, from which no key can be taken away.
        """
        if not 0 <= length <= self._length:
            raise ValueError(f"length must be from 0 to {self._length}, the number of keys held, not {length}")
        if self._state is not None and length < self._length:
            raise ValueError("a state does not know its keys apart, so none can be forgotten; kind='keys' keeps them")
        self._length = length

    def _check_new(self, k: Tensor, v: Tensor, visible: Tensor | None) -> None:
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise ValueError("a cache keeps no graph, but k or v requires a gradient: decode under torch.no_grad(), "
                             "or train by the full pass, without a cache")
        if k.ndim < 2 or k.shape[:-1] != v.shape[:-1]:
            raise ValueError("k and v must be (..., n, d) and (..., n, d_v) with the same leading axes and n, but have "
                             f"shapes {tuple(k.shape)} and {tuple(v.shape)}")
        if k.dtype is not v.dtype or k.device != v.device:
            raise TypeError(f"k and v must be of one dtype and device, but are {k.dtype} on {k.device} and {v.dtype} "
                            f"on {v.device}")
        if visible is not None:
            if visible.dtype is not torch.bool:
                raise TypeError(f"visible must be boolean, True where a key may be seen, not {visible.dtype}")
            try:
                fits = visible.shape[-1:] == k.shape[-2:-1] and torch.broadcast_shapes(
                    visible.shape, k.shape[:-1]) == k.shape[:-1]
            except RuntimeError:
                fits = False
            if not fits:
                raise ValueError(f"visible must broadcast to (..., n) = {tuple(k.shape[:-1])}, with n its last axis, "
                                 f"but has shape {tuple(visible.shape)}")
        if self._keys is not None:
            for name, new, old in (("k", k, self._keys), ("v", v, self._values)):
                if new.shape[:-2] != old.shape[:-2] or new.shape[-1] != old.shape[-1]:
                    raise ValueError(f"{name} must be {(*old.shape[:-2], 'n', old.shape[-1])} like those held, but has "
                                     f"shape {tuple(new.shape)}")
                if new.dtype is not old.dtype or new.device != old.device:
                    raise TypeError(f"{name} must be {old.dtype} on {old.device} like those held, but is {new.dtype} "
                                    f"on {new.device}")
            if visible is not None and self._visible is not None and visible.shape[:-1] != self._visible.shape[:-2]:
                raise ValueError(f"visible must be {(*self._visible.shape[:-2], 'n')} like the one held, but has "
                                 f"shape {tuple(visible.shape)}")
        check_finite(k=k, v=v)

    def _check_queries(self, q: Tensor) -> None:
        keys = self._keys
        if keys is None:
            raise ValueError("the cache is empty; append keys and values first")
        if torch.is_grad_enabled() and q.requires_grad:
            raise ValueError("a cache keeps no graph, but q requires a gradient: decode under torch.no_grad(), or "
                             "train by the full pass, without a cache")
        if q.ndim < 2 or q.shape[:-2] != keys.shape[:-2] or q.shape[-1] != keys.shape[-1]:
            raise ValueError(f"q must be {(*keys.shape[:-2], 'n', keys.shape[-1])} to fit the keys held, but has shape "
                             f"{tuple(q.shape)}")
        if q.dtype is not keys.dtype or q.device != keys.device:
            raise TypeError(f"q must be {keys.dtype} on {keys.device} like the keys held, but is {q.dtype} on "
                            f"{q.device}")
        check_finite(q=q)


def _put(buffer: Tensor | None, start: int, rows: Tensor) -> Tensor:
    """The buffer with these rows after the first ``start`` of it: a new one, at least twice as long, if it is full."""
    end = start + rows.shape[-2]
    if buffer is None or buffer.shape[-2] < end:
        held = 0 if buffer is None else buffer.shape[-2]
        capacity = max(end, 2 * held, _FIRST_ROWS if rows.shape[-2] == 1 else 0)
        larger = rows.new_empty(*rows.shape[:-2], capacity, rows.shape[-1])
        if start:
            larger[..., :start, :] = buffer[..., :start, :]
        buffer = larger
    buffer[..., start:end, :] = rows
    return buffer
