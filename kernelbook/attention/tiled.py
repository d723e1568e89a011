r"""Attention in tiles of a few queries by all their keys: no array of :math:`n\times m` numbers is ever made.

A tile of weights is computed, multiplied by the values and forgotten; the gradient computes it anew.  Only where there
are at most four keys for each coordinate are the tiles kept for the gradient.  So memory grows as :math:`n d`.  Tiles
and keys that a causal mask hides are skipped, which saves about half.

Each kernel has the quickest tile that it is known to have:

* *inner products*: the exponentiated dot product, all that reduces to it (:mod:`.reductions`), and functions of
  :math:`q\cdot k`: one matrix product;
* *coordinates*: the kernels :math:`\mathrm{link}\bigl(s\sum_l\rho(q_l,k_l)\bigr)` of :mod:`kernelbook.rules`, the
  intersection among them: a loop over the coordinates, each adding to the whole tile; or, inside :func:`compiling`,
  a function compiled by :func:`torch.compile`;
* *the definition*, for any other kernel: the weights of a few rows, made anew in the backward pass by autograd.

Dropout is drawn tile by tile from a seed, and drawn again from the same seed in the backward pass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import kernels
from ..features import FeatureKernel
from ..kernels import Kernel
from ..rules import Rule, coordinate_form
from .call import Call, autocasts, leading
from .definition import exact
from .reductions import has_softmax_form, softmax_form

__all__ = ["tiled", "does", "refusal", "drawback", "compiling"]

# Up to these sizes the definition's arrays are small, and it is as quick or quicker (measured on one core): a number of
# differences of coordinates, or of weights where the tiles are matrix products.
SMALL = 2 ** 16                     # always
SMALL_FOR_COORDINATES, SMALL_FOR_GRADIENT = 2 ** 21, 2 ** 17
SMALL_FOR_PRODUCTS = 2 ** 19
SMALL_FOR_DEFINITION = 2 ** 24      # tiles by the definition save memory, not time

#: A tile has at most about so many weights, or else one row.
PRODUCT_TILE, COORDINATE_TILE = 2 ** 17, 2 ** 18

#: A tile of the definition has at most about so many differences of coordinates, batch and all, or else one row.
DEFINITION_TILE = 2 ** 22


# ------------------------------------------------------------------------- opt-in compilation

_COMPILING: ContextVar[bool] = ContextVar("kernelbook_compiling", default=False)


class compiling:        # it is called like a function, as torch.set_grad_enabled is
    """Compile the tiles of coordinate-wise kernels: from here on, or within a ``with`` block.

    :func:`torch.compile` makes a C++ function of a kernel's rule when it is first needed, which takes seconds, and
    keeps it.  It needs a C++ compiler.

    Parameters
    ----------
    on : bool
        Whether to compile.

    Raises
    ------
    RuntimeError
        If there is no C++ compiler.

    Examples
    --------
    >>> with compiling():                                                               # doctest: +SKIP
    ...     out = attend(q, k, v, "exponentiated_intersection", path="tiled")
    """

    def __init__(self, on: bool = True) -> None:
        if on:
            _check_compiler()
        self._before = _COMPILING.get()
        _COMPILING.set(bool(on))

    def __enter__(self) -> compiling:
        return self

    def __exit__(self, *_) -> None:
        _COMPILING.set(self._before)


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise RuntimeError("compiling() needs a C++ compiler, and none was found: install one, such as g++ (Debian and "
                           "Ubuntu: apt install g++; conda: conda install gxx), or name yours in the environment "
                           "variable CXX; without compiling() the same tiles are computed by a loop") from None


# ------------------------------------------------------------------------- which tile a kernel has

@dataclass(frozen=True)
class _Products:
    r"""Tiles :math:`f(x)` of :math:`x=s\,q\cdot k+b(k)`, with a function ``f`` among those of :data:`_FUNCTIONS`."""

    function: str = "identity"
    degree: int = 1
    offset: float = 0.0

    name = "matrix products"
    tile = PRODUCT_TILE

    def keys(self, k: Tensor) -> Tensor:
        return k

    def values(self, q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        if bias is None:
            x = torch.bmm(q * scale, k.mT)
        else:
            x = torch.baddbmm(bias.unsqueeze(1), q, k.mT, alpha=scale)
        return (x, None) if self.function == "identity" else (self._of(x, self.degree), x)

    def _of(self, x: Tensor, degree: int) -> Tensor:
        if self.function == "power":
            return _integer_power(x + self.offset, degree)
        total = torch.full_like(x, 1 / math.factorial(degree))
        for i in reversed(range(degree)):
            total.mul_(x).add_(1 / math.factorial(i))
        return total

    def gradient(self, grad: Tensor, x: Tensor, q: Tensor, k: Tensor, bias: Tensor | None, scale: float, dq: Tensor,
                 dk: Tensor, db: Tensor | None) -> None:
        """Write the gradient in the queries into ``dq``, and add those in keys and bias to ``dk`` and ``db``."""
        if self.function == "power":
            grad = grad.mul_(self._of(x, self.degree - 1).mul_(self.degree))
        elif self.function == "taylor":
            grad = grad.mul_(self._of(x, self.degree - 1)) if self.degree else grad.zero_()
        dq.baddbmm_(grad, k, beta=0, alpha=scale)
        dk.baddbmm_(grad.mT, q, alpha=scale)
        if db is not None:
            db.add_(grad.sum(1))


def _integer_power(x: Tensor, degree: int) -> Tensor:
    """``x ** degree`` by repeated squaring, which is quicker than torch's for degrees above 3."""
    power = torch.ones_like(x) if degree % 2 == 0 else x.clone()
    while degree := degree // 2:
        x = x.square()
        if degree % 2:
            power.mul_(x)
    return power


_MINIMUM, _SQUARED_DIFFERENCE = Rule("min(q, k)"), Rule("(q - k)**2")


@dataclass(frozen=True)
class _Coordinates:
    r"""Tiles :math:`g\bigl(s\sum_l\rho(q_l,k_l)\bigr)` of a rule, with ``g`` the identity or the square root."""

    rule: Rule
    root: bool = False
    compiled: bool = False

    name = "a loop over the coordinates"
    tile = COORDINATE_TILE

    def keys(self, k: Tensor) -> Tensor:
        return k.mT.contiguous()

    def values(self, q: Tensor, k: Tensor, bias: None, scale: float) -> tuple[Tensor, Tensor | None]:
        """``q`` is ``(b, r, d)`` and ``k`` is ``(b, d, m)``."""
        if self.compiled and _worth_compiling(q, k):
            compiled = _compiled_values(self.rule, q.dtype, len(q) == 1)
            total = compiled(_in_fours(q), k, torch.tensor(scale, dtype=q.dtype))
            total = total.flatten(1, 2)[:, :q.shape[1]]
            return (total.sqrt(), total) if self.root else (total, None)
        rows, columns = _coordinates(q, k)
        if self.rule == _MINIMUM:
            total = torch.minimum(rows[0], columns[0])
            one = torch.empty_like(total)
            for a, b in zip(rows[1:], columns[1:], strict=True):
                torch.minimum(a, b, out=one)
                total.add_(one)
        elif self.rule == _SQUARED_DIFFERENCE:
            total, one = (torch.zeros(*q.shape[:2], k.shape[-1], dtype=q.dtype, device=q.device) for _ in range(2))
            for a, b in zip(rows, columns, strict=True):
                torch.sub(a, b, out=one)
                total.addcmul_(one, one)
        else:
            total = torch.zeros(*q.shape[:2], k.shape[-1], dtype=q.dtype, device=q.device)
            for a, b in zip(rows, columns, strict=True):
                total.add_(self.rule(a, b))
        total.mul_(scale)
        return (total.sqrt(), total) if self.root else (total, None)

    def gradient(self, grad: Tensor, x: Tensor, q: Tensor, k: Tensor, bias: None, scale: float, dq: Tensor,
                 dk: Tensor, db: None) -> None:
        if self.root:
            grad.div_(x.sqrt().mul_(2)).masked_fill_(x == 0, 0)
        minimum = self.rule == _MINIMUM
        grad.mul_(scale * 0.5 if minimum else scale)
        if self.compiled and _worth_compiling(q, k):
            queries, g, by = _in_fours(q), _in_fours(grad, zero=True), 4 if q.shape[2] % 4 == 0 else 1
            columns = queries.flatten(1, 2).mT.contiguous().unflatten(1, (-1, by))
            compiled = _compiled_gradient(self.rule, q.dtype, len(q) == 1, by)
            of_q, of_k = compiled(queries, columns, k, k.unflatten(1, (-1, by)), g)
            dq.copy_(of_q.flatten(1, 2)[:, :q.shape[1]])
            dk.add_(of_k.flatten(1, 2))
            return
        rows, columns = _coordinates(q, k)
        if minimum:         # the derivatives of min are (1 + s)/2 and (1 - s)/2 with s = sign(k - q)
            sign = torch.empty_like(grad)
            of_q, of_k = grad.sum(-1), grad.sum(-2)
            for i, (a, b) in enumerate(zip(rows, columns, strict=True)):
                torch.sub(b, a, out=sign)
                sign.sign_().mul_(grad)
                dq[..., i] = of_q + sign.sum(-1)        # not out=: a compiler could not trace that
                dk[:, i].add_(of_k).sub_(sign.sum(-2))
            return
        if self.rule == _SQUARED_DIFFERENCE:
            one = torch.empty_like(grad)
            grad.mul_(2)
            for i, (a, b) in enumerate(zip(rows, columns, strict=True)):
                torch.sub(a, b, out=one)
                one.mul_(grad)
                dq[..., i] = one.sum(-1)
                dk[:, i].sub_(one.sum(-2))
            return
        in_q, in_k = _derivatives(self.rule)
        for i, (a, b) in enumerate(zip(rows, columns, strict=True)):
            dq[..., i] = (in_q(a, b) * grad).sum(-1)
            dk[:, i] += (in_k(a, b) * grad).sum(-2)


def _coordinates(q: Tensor, k: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Of each coordinate, the column ``(b, r, 1)`` of the queries and the row ``(b, 1, m)`` of the keys."""
    return q.mT.contiguous().unsqueeze(-1).unbind(1), k.unsqueeze(-2).unbind(1)


@functools.lru_cache(256)
def _derivatives(rule: Rule) -> tuple[Rule, Rule]:
    return rule.derivative("q"), rule.derivative("k")


# Four rows share each key that is loaded, and four coordinates each gradient: so the compiled loops are bound by their
# arithmetic.  Lengths of 1 would be compiled apart, so problems that small are not.

def _worth_compiling(q: Tensor, k: Tensor) -> bool:
    return q.shape[1] > 4 and q.shape[2] > 4 and k.shape[2] > 1 and q.device.type == "cpu"


def _in_fours(x: Tensor, zero: bool = False) -> Tensor:
    """Rows in groups of four, ``(b, r/4, 4, ...)``; the last is filled up with zeros, or copies of the last row."""
    if over := -x.shape[1] % 4:
        last = x[:, -1:].expand(-1, over, -1)       # a rule need not be defined at 0
        x = torch.cat((x, torch.zeros_like(last) if zero else last), 1)
    return x.contiguous().unflatten(1, (-1, 4))


@functools.cache
def _compiled_values(rule: Rule, dtype: torch.dtype, single: bool) -> Callable[..., Tensor]:
    """The scaled sum of a rule over the coordinates, ``(b, r/4, 4, m)``, compiled for one problem or for several."""
    def values(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
        k = k.unsqueeze(1)
        return torch.stack([rule(q[:, :, i].unsqueeze(-1), k).sum(2) * scale for i in range(4)], 2)

    q, _, k, _, _ = _example(dtype, single, 4)
    return _compile(values, q, k, torch.ones((), dtype=dtype))


@functools.cache
def _compiled_gradient(rule: Rule, dtype: torch.dtype, single: bool, by: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """The gradients of the sum of a rule, ``(b, r/4, 4, d)`` and ``(b, d/by, by, m)``."""
    in_q, in_k = _derivatives(rule)

    def part(slope: Rule, q: Tensor, k: Tensor, grad: Tensor) -> Tensor:
        if rule != _MINIMUM:
            return slope(q, k) * grad
        low, high = (q, k) if slope is in_q else (k, q)         # twice the derivative: 1 of <, and 1 of <=
        return torch.where(low < high, grad, 0.0) + torch.where(low <= high, grad, 0.0)

    def gradient(q: Tensor, of_q: Tensor, k: Tensor, of_k: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        keys, whole = k.unsqueeze(1), grad.flatten(1, 2).unsqueeze(1)
        dq = [part(in_q, q[:, :, i].unsqueeze(-1), keys, grad[:, :, i].unsqueeze(2)).sum(-1) for i in range(4)]
        dk = [part(in_k, of_q[:, :, i].unsqueeze(-1), of_k[:, :, i].unsqueeze(2), whole).sum(2) for i in range(by)]
        return torch.stack(dq, 2), torch.stack(dk, 2)

    return _compile(gradient, *_example(dtype, single, by))


def _example(dtype: torch.dtype, single: bool, by: int) -> list[Tensor]:
    """Arguments of :func:`_compiled_gradient`, of usual sizes that all differ."""
    b, r, d, m = 1 if single else 6, 24, 48, 1000
    return [torch.ones(shape, dtype=dtype) for shape in
            ((b, r, 4, d), (b, d // by, by, 4 * r), (b, d, m), (b, d // by, by, m), (b, r, 4, m))]


def _compile(function: Callable, *example: Tensor) -> Callable:
    """The function compiled at once, for tensors of any sizes but 0 and 1.

    Sizes that agree when a function is compiled are taken to agree always; hence the example.  Compiled functions are
    found by their code, and forgotten where one code has many: so each has its own.
    """
    function.__code__ = function.__code__.replace(co_name=function.__name__)
    compiled = torch.compile(function, dynamic=True)
    compiled(*example)
    return compiled


@dataclass(frozen=True)
class _Form:
    """How tiles of a kernel are made: of which points, by what; ``exp(factor * tile)``, or ``factor * tile`` itself."""

    points: str                 # "softmax": of the kernel's softmax form; "features"; "unit" vectors; or "given"
    tile: _Products | _Coordinates
    scale: float = 1.0
    factor: float = 1.0
    exponential: bool = True


_NORMALISED = ("sum", "signed-sum", "abs-sum", "relu-sum")


def _keeps(form: _Form | None, normaliser: str, d: int, m: int) -> bool:
    """Whether the forward pass keeps its weights for the gradient: they are few, and it needs nothing else of a tile.

    At most four for each coordinate of the queries: memory of the order of :math:`n d`.
    """
    if form is None:
        return False
    inner = form.tile.root if isinstance(form.tile, _Coordinates) else form.tile.function != "identity"
    return m <= 4 * d and form.exponential and normaliser in _NORMALISED and not inner


def _form(kernel: Kernel, d: int, normaliser: str) -> _Form | None:
    """The tile of a kernel of points of width ``d``; None where only the definition serves."""
    if normaliser in _NORMALISED and has_softmax_form(kernel, d):
        return _Form("softmax", _Products())
    exponential, factor = False, 1.0
    if type(kernel) is kernels.Exponential:
        exponential, kernel = True, kernel.base
    while type(kernel) is kernels.Scaled:
        factor, kernel = factor * kernel.factor, kernel.base
    kind = type(kernel)
    if (form := coordinate_form(kernel, d)) is not None and not (exponential and form[1] == "exp"):
        rule, link, scale = form
        if link == "exp" and factor != 1.0:     # a factor before the exponential is none behind it
            return None
        return _Form("given", _Coordinates(rule, link == "sqrt"), scale, factor, exponential or link == "exp")
    if kind is kernels.RBF and not exponential and factor == 1.0:
        return _Form("given", _Coordinates(_SQUARED_DIFFERENCE), -0.5 * kernel.precision(d))
    if kind is kernels.EDP and not exponential and factor == 1.0:
        return _Form("given", _Products(), kernels._scale(kernel.scale, d))
    if kind is kernels.Cosine:
        return _Form("unit", _Products(), 1.0, factor, exponential)
    if kind in (kernels.Linear, kernels.Quadratic, kernels.Polynomial, kernels.Taylor):
        tile = {kernels.Linear: lambda: _Products(), kernels.Quadratic: lambda: _Products("power", 2),
                kernels.Polynomial: lambda: _Products("power", kernel.degree, kernel.offset),
                kernels.Taylor: lambda: _Products("taylor", kernel.degree)}[kind]()
        return _Form("given", tile, kernels._scale(kernel.scale, d), factor, exponential)
    if isinstance(kernel, FeatureKernel) and kind.gram is FeatureKernel.gram and not kernel.exponential:
        return _Form("features", _Products(), 1.0, factor, exponential)
    return None


# ------------------------------------------------------------------------- what the path says of a call

def does(call: Call) -> str:
    """How the path computes a call."""
    if call.device == "cuda" and _triton(call):
        return "tiles of rows and keys, by Triton, made anew in the backward pass"
    form = _form(call.kernel, call.d, call.normaliser)
    how = "the definition row by row" if form is None else form.tile.name
    if form is not None and isinstance(form.tile, _Coordinates) and _COMPILING.get() and call.device == "cpu":
        how = "compiled loops over the coordinates"
    again = "kept for" if call.gradient and _keeps(form, call.normaliser, call.d, call.m) else "made anew in"
    return f"tiles of rows, by {how}, {again} the backward pass"


def _triton(call: Call) -> bool:
    from .triton_tiles import serves

    return serves(call) is None


def refusal(call: Call) -> str | None:
    """Why the tiled path cannot serve a call, or None: it serves every call."""
    return None


def drawback(call: Call) -> str | None:
    """Why another path serves a call better, or None."""
    weights = call.batch * call.n * call.m
    size = weights * call.d
    if size > SMALL:
        form = _form(call.kernel, call.d, call.normaliser)
        if form is None:
            small = weights * _numbers_of_a_pair(call.kernel, call.d) <= SMALL_FOR_DEFINITION
        elif isinstance(form.tile, _Products):
            small = weights <= SMALL_FOR_PRODUCTS
        else:       # the gradient of torch.minimum is what is slow whole
            slow = call.gradient and form.tile.rule == _MINIMUM
            small = size <= (SMALL_FOR_GRADIENT if slow else SMALL_FOR_COORDINATES)
        if not small:
            return None
    return f"so small a problem ({call.batch} times {call.n} queries, {call.m} keys) is quicker whole"


def _numbers_of_a_pair(kernel: Kernel, d: int) -> int:
    """How many numbers a definition may make for a query and a key: their differences, but products of features."""
    return 1 if isinstance(kernel, FeatureKernel) else d


# ------------------------------------------------------------------------- the path

def tiled(
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
    """Attention in tiles of rows, with the gradient computed from the tiles made anew.

    Raises
    ------
    RuntimeError
        If a gradient of the gradient is asked for, of a kernel with tiles of its own.
    """
    if q.is_cuda and _triton(Call.of(q, k, v, kernel, mask=mask, causal=causal, dropout=dropout,
                                     normaliser=normaliser)):
        from .triton_tiles import tiled_triton

        return tiled_triton(q, k, v, coordinate_form(kernel, q.shape[-1]), mask=mask, causal=causal)
    form = _form(kernel, q.shape[-1], normaliser)
    if form is None:
        return _by_definition(q, k, v, kernel, mask, causal, dropout, normaliser)
    (n, d), (m, d_v), device, dtype = q.shape[-2:], v.shape[-2:], q.device.type, q.dtype
    batch = leading(q, k, v)
    bias, scale = None, form.scale
    if form.points == "softmax":
        made = softmax_form(kernel, q, k)
        q, k, bias, scale = made.q, made.k, made.key_bias, made.scale
    elif form.points == "features":
        base = kernel.base if type(kernel) is kernels.Exponential else kernel
        while type(base) is kernels.Scaled:
            base = base.base
        q, k = base.map(q), base.map(k)
    elif form.points == "unit":
        q, k = kernels._unit(q), kernels._unit(k)
    autocast = autocasts(device) and dtype is torch.float32
    out_dtype = torch.get_autocast_dtype(device) if autocast else dtype
    wide, problems = torch.promote_types(dtype, torch.float32), math.prod(batch)
    q, k, v = (x.to(wide).expand(*batch, *x.shape[-2:]).reshape(problems, *x.shape[-2:])
               for x in (q, k, v))
    if bias is not None:
        bias = bias.to(wide).expand(*batch, m).reshape(problems, m)
    index = None
    if mask is not None:
        mask = mask[(None,) * (2 - mask.ndim)] if mask.ndim < 2 else mask
        lead = mask.shape[:-2]
        mask = mask.reshape(math.prod(lead), *mask.shape[-2:])
        if 1 < len(mask) < problems:      # which mask each problem has; a copy for each could be as large as n x m
            index = torch.arange(len(mask), device=q.device).view(lead).expand(batch).reshape(-1)
    seed = torch.randint(2 ** 62, ()) if dropout else None
    tile = form.tile
    if isinstance(tile, _Coordinates) and not torch.compiler.is_compiling() and _COMPILING.get():
        tile = replace(tile, compiled=True)
    gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    keeps = gradient and _keeps(form, normaliser, d, m) and not torch.compiler.is_compiling()
    work = _Work(tile, scale, form.factor, form.exponential, normaliser, causal, dropout, form.tile.tile, keeps)
    if autocast:
        with torch.autocast(device, enabled=False):
            out, *_ = _Tiled.apply(q, k, v, bias, mask, index, seed, work)
    else:
        out, *_ = _Tiled.apply(q, k, v, bias, mask, index, seed, work)
    return out.to(out_dtype).view(*batch, n, d_v)


@dataclass(frozen=True)
class _Work:
    """What both passes must agree on."""

    tile: _Products | _Coordinates
    scale: float
    factor: float
    exponential: bool
    normaliser: str
    causal: bool
    dropout: float
    size: int
    keeps: bool


@dataclass
class _Rows:
    """A tile: problems ``first:last``, queries ``start:stop``, and the keys up to ``seen``."""

    first: int
    last: int
    start: int
    stop: int
    seen: int


def _tiles(problems: int, n: int, m: int, causal: bool, size: int) -> Iterator[tuple[slice, list[tuple[slice, int]]]]:
    """Groups of problems, each with slices of its rows, and how many keys these may see."""
    start = max(0, n - m) if causal else 0                  # the rows before it see nothing
    rows = min(n, max(32, -(-n // 8))) if causal else n     # the fewer, the more is skipped
    rows = max(1, min(rows, size // m))
    groups = max(1, problems // max(1, size // (rows * m)))
    slices = [(slice(i, min(i + rows, n)), min(m, i + rows + m - n) if causal else m) for i in range(start, n, rows)]
    for g in range(groups):     # of about one size: never one problem alone where others are several
        yield slice(g * problems // groups, (g + 1) * problems // groups), slices


def _hidden(mask: Tensor | None, index: Tensor | None, group: slice, rows: slice, seen: int) -> Tensor | None:
    """Where the mask hides a tile's keys: broadcasts to ``(b, r, seen)``."""
    if mask is None:
        return None
    if mask.shape[-2] > 1:
        mask = mask[:, rows]
    if index is not None:
        mask = mask[index[group]]
    elif len(mask) > 1:
        mask = mask[group]
    return ~(mask[..., :seen] if mask.shape[-1] > 1 else mask)


def _weights(x: Tensor, hidden: Tensor | None, rows: slice, n: int, m: int, work: _Work) -> tuple[Tensor, Tensor | None,
                                                                                              Tensor | None]:
    """Weights of a tile from its values or logarithms, in place; the normaliser, and the values where still needed."""
    seen = x.shape[-1]
    softmax = work.exponential and work.normaliser in _NORMALISED
    if work.factor != 1.0:
        x = x * work.factor
    upper = None
    if work.causal and (ahead := rows.start + m - n + 1) < seen:        # the keys after the first row's own
        lowest = max(0, ahead)
        upper = torch.ones(x.shape[-2], seen - lowest, dtype=torch.bool, device=x.device).triu(ahead - lowest)
    fill = -math.inf if work.exponential else 0.0
    if hidden is not None:
        x = x.masked_fill_(hidden, fill)
    if upper is not None:
        x[..., seen - upper.shape[-1]:].masked_fill_(upper, fill)
    if softmax:
        w = x.softmax(-1)
        if hidden is not None:
            empty = hidden.expand(*hidden.shape[:-1], seen)
            if upper is not None:
                empty = empty.expand(-1, x.shape[-2], -1).clone()
                empty[..., seen - upper.shape[-1]:] |= upper
            empty = empty.all(-1, keepdim=True)
            if torch.compiler.is_compiling() or empty.any():
                w.masked_fill_(empty, 0.0)
        return w, None, None
    if work.exponential:
        x = x.exp()
    if work.normaliser == "relu-sum":
        x = x.relu()
    if work.normaliser == "none":
        return x, None, x
    if work.normaliser == "count":
        see = torch.ones((), dtype=torch.bool, device=x.device) if hidden is None else ~hidden
        see = see.expand(x.shape).clone()
        if upper is not None:
            see[..., seen - upper.shape[-1]:] &= ~upper
        total = see.sum(-1, keepdim=True).to(x.dtype)
    else:
        total = (x.abs() if work.normaliser == "abs-sum" else x).sum(-1, keepdim=True)
    total = torch.where(total == 0, math.inf, total)
    return x / total, total, x


def _keep(shape: torch.Size, like: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
    """What dropout multiplies weights by: 0, or 1/(1 - p)."""
    keep = torch.empty(shape, dtype=like.dtype, device=like.device)
    return keep.bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


class _Tiled(torch.autograd.Function):
    """Queries ``(b, n, d)``, keys ``(b, m, d)`` and values ``(b, m, d_v)`` to outputs; a bias of keys ``(b, m)``."""

    @staticmethod
    def forward(q, k, v, bias, mask, index, seed, work):
        return _forward(q, k, v, bias, mask, index, seed, work)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.work = inputs
        ctx.save_for_backward(*tensors, *output)
        if len(output) > 1:     # kept tiles, whose gradients would else be arrays of zeros
            ctx.mark_non_differentiable(*output[1:])
            ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 8
        gradient = _TiledGradient.apply if torch.is_grad_enabled() else _backward
        return *gradient(ctx.work, grad, *ctx.saved_tensors), None, None, None, None


class _TiledGradient(torch.autograd.Function):
    """The gradient of :class:`_Tiled`, a function of its own so that a second derivative meets an error."""

    @staticmethod
    def forward(*arguments):
        return _backward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("tiles have no second derivatives; use path='exact'")


def _generator(seed: Tensor | None, device: torch.device) -> torch.Generator | None:
    return None if seed is None else torch.Generator(device).manual_seed(int(seed))


def _forward(q, k, v, bias, mask, index, seed, work):
    (problems, n, _), m = q.shape, k.shape[1]
    out, kept = q.new_zeros(problems, n, v.shape[-1]), []
    if out.numel() == 0 or m == 0:
        return (out,)
    generator = _generator(seed, q.device)
    for group, slices in _tiles(problems, n, m, work.causal, work.size):
        keys, values = work.tile.keys(k[group]), v[group]
        for rows, seen in slices:
            some = keys[..., :seen].contiguous() if isinstance(work.tile, _Coordinates) else keys[:, :seen]
            x, _ = work.tile.values(q[group, rows], some, None if bias is None else bias[group, :seen], work.scale)
            w, _, _ = _weights(x, _hidden(mask, index, group, rows, seen), rows, n, m, work)
            if work.keeps:
                kept.append(w)
            if work.dropout:
                w = w * _keep(w.shape, w, work.dropout, generator)
            out[group, rows] = torch.bmm(w, values[:, :seen])
    return out, *kept


def _backward(work, grad, q, k, v, bias, mask, index, seed, out, *kept):
    (problems, n, _), m = q.shape, k.shape[1]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    db = None if bias is None else torch.zeros_like(bias)
    if out.numel() == 0 or m == 0:
        return dq, dk, dv, db
    generator = _generator(seed, q.device)
    coordinates, kept = isinstance(work.tile, _Coordinates), iter(kept)
    for group, slices in _tiles(problems, n, m, work.causal, work.size):
        keys, values = work.tile.keys(k[group]), v[group]
        dkeys = torch.zeros_like(keys) if coordinates else dk[group]
        for rows, seen in slices:
            some, dsome = (x[..., :seen] if coordinates else x[:, :seen] for x in (keys, dkeys))
            some = some.contiguous() if coordinates else some
            queries, g = q[group, rows], grad[group, rows]
            b = None if bias is None else bias[group, :seen]
            w = next(kept, None)
            if w is None:
                x, inner = work.tile.values(queries, some, b, work.scale)
                hidden = _hidden(mask, index, group, rows, seen)
                w, total, value = _weights(x, hidden, rows, n, m, work)
            else:
                inner = hidden = total = value = None
            dw = torch.bmm(g, values[:, :seen].mT)
            if work.dropout:
                keep = _keep(w.shape, w, work.dropout, generator)
                dw.mul_(keep)
                dv[group, :seen].baddbmm_((w * keep).mT, g)
            else:
                dv[group, :seen].baddbmm_(w.mT, g)
            if work.normaliser in _NORMALISED:
                delta = (g * out[group, rows]).sum(-1, keepdim=True)
                dw.sub_(delta * value.sign() if work.normaliser == "abs-sum" and value is not None else delta)
            if work.exponential:
                dw.mul_(w)
            else:
                if total is not None:
                    dw.div_(total)
                if work.normaliser == "relu-sum":
                    dw.mul_(value > 0)
                if hidden is not None:
                    dw.masked_fill_(hidden, 0)
                if work.causal:
                    dw.tril_(rows.start + m - n)
            if work.factor != 1.0:
                dw.mul_(work.factor)
            work.tile.gradient(dw, inner, queries, some, b, work.scale, dq[group, rows], dsome,
                               None if db is None else db[group, :seen])
        if coordinates:
            dk[group] = dkeys.mT
    return dq, dk, dv, db
def _by_definition(q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, mask: Tensor | None, causal: bool, dropout: float,
                   normaliser: str) -> Tensor:
    n, m, d = q.shape[-2], k.shape[-2], q.shape[-1]
    batch = leading(q, k, v)
    rows = max(1, DEFINITION_TILE // max(1, batch.numel() * m * _numbers_of_a_pair(kernel, d)))
    if rows >= n:
        return exact(q, k, v, kernel, mask=mask, causal=causal, dropout=dropout, normaliser=normaliser)
    if mask is not None and mask.ndim >= 2:
        mask = mask.expand(*mask.shape[:-1], m)

    def some(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return exact(q, k, v, kernel, mask=mask, causal=causal, dropout=dropout, normaliser=normaliser)

    parts = []
    for i in range(0, n, rows):
        stop = min(i + rows, n)
        seen = max(0, m - n + stop) if causal else m
        see = mask
        if see is not None and see.ndim > 0:
            see = see[..., :seen]
            see = see[..., i:stop, :] if see.ndim > 1 and see.shape[-2] == n else see
        parts.append(checkpoint(some, q[..., i:stop, :], k[..., :seen, :], v[..., :seen, :], see, use_reentrant=False,
                                preserve_rng_state=dropout > 0))
    return torch.cat(parts, -2)
