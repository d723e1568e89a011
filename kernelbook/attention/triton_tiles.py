r"""Attention in tiles on a GPU, by Triton, for weights that are a rule summed over the coordinates.

.. math:: o_i = \sum_j \frac{w_{ij}}{N_i}\,v_j, \qquad w_{ij} = \mathrm{link}\Bigl(s\sum_l\rho(q_{il},k_{jl})\Bigr),
   \qquad N_i = \sum_j w_{ij}

A program takes a tile of queries and runs through the keys, with the largest score so far, the sum of the weights and
the weighted sum of the values; no array of :math:`n\times m` numbers is made.  The backward pass computes the weights
again, once for the gradient of the queries and once for those of keys and values, so that each program adds to numbers
of its own and the result is the same in every run.  Scores, sums and gradients are float32; matrix products with the
values take float16 and bfloat16 as they are, and float32 in three TF32 products.  Where a rule has no derivative, the
gradient is the one that :mod:`kernelbook.rules` states.

The source of the rule and of its derivatives comes from :meth:`kernelbook.rules.Rule.triton`; a kernel is compiled when
it is first called.

**How far it is tested.**  The kernels run through Triton's interpreter, on a CPU, against the float64 definition, and
they are compiled ahead of time for compute capability 9.0 (:func:`compiled`, without a GPU), where registers and
instructions were counted.  **They have not been run on a GPU.**  So nothing was measured of their speed, nor of the
accuracy of the GPU's own exponential, square root, logarithm and TF32 products, which the interpreter replaces by
NumPy's; nor has bfloat16 been in a matrix product, which the interpreter cannot do, so that it takes float32 there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import linecache
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..rules import Rule, coordinate_form
from .call import Call, leading

__all__ = ["serves", "tiled_triton", "compiled", "Tiles"]

WIDEST = 128            # values wider than this leave no registers for the scores: they are taken in parts
LARGEST = 2**31         # offsets inside one problem are 32-bit integers
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Tiles:
    """The shape of a tile: ``2 * a * r`` rows by ``b * c`` columns, of which a thread has ``2 * a`` by ``b``.

    Attributes
    ----------
    a, b, r, c : int
        Powers of two.
    warps : int
        ``r * c`` threads are ``32 * warps``.
    unroll : int
        How many coordinates are taken at once.
    """

    a: int = 4
    b: int = 8
    r: int = 16
    c: int = 8
    warps: int = 4
    unroll: int = 4


# ------------------------------------------------------------------------- what it serves

HAVE_TRITON = importlib.util.find_spec("triton") is not None


def serves(call: Call) -> str | None:
    """Why Triton tiles cannot serve a call, or None if they can.

    Parameters
    ----------
    call : Call

    Returns
    -------
    str or None
    """
    if call.device != "cuda":
        return f"Triton tiles run on a GPU, and the tensors are on {call.device!r}"
    if not HAVE_TRITON:
        return "Triton is not installed (pip install triton)"
    if call.dtype not in _DTYPES:
        return f"Triton tiles compute in float32, and the tensors are {call.dtype}"
    if coordinate_form(call.kernel, call.d) is None:
        return f"{call.kernel!r} is not given by a rule for each coordinate (kernelbook.kernels.Coordinatewise)"
    if call.dropout:
        return "Triton tiles have no dropout"
    if call.normaliser in ("count", "none"):
        return f"Triton tiles divide by the sum of the weights, not by {call.normaliser!r}"
    if call.normaliser != "signed-sum" and not call.kernel.normalisable:
        return f"Triton tiles do not make signed weights positive, as {call.normaliser!r} does"
    if max(call.n, call.m) * max(call.d, call.d_v) >= LARGEST - 2**20:
        return "the sequence is too long for Triton tiles, which address it by 32-bit integers"
    if torch.version.hip or torch.cuda.get_device_properties(torch.cuda.current_device()).major < 8:
        return "Triton tiles need an NVIDIA GPU of compute capability 8.0 or more"
    return None


# ------------------------------------------------------------------------- making the kernels

_LOCK = threading.Lock()


@functools.cache
def _kernels(interpreted: bool) -> ModuleType:
    """The module of the kernels: compiled ones, or a second copy of it that Triton's interpreter runs on the CPU."""
    if not HAVE_TRITON:
        raise ImportError("this path needs Triton, which is not installed: pip install triton, or take another path "
                          "(path='exact' always works)")
    if not interpreted:
        from . import triton_kernels

        return triton_kernels
    path = Path(__file__).with_name("triton_kernels.py")
    spec = importlib.util.spec_from_file_location(f"{__package__}._triton_kernels_interpreted", path)
    module = importlib.util.module_from_spec(spec)
    with _decorating(interpreted):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _decorating(interpreted: bool):
    # Triton asks for this variable when a function is decorated, and only then.
    with _LOCK, mock.patch.dict(os.environ, TRITON_INTERPRET="1") if interpreted else contextlib.nullcontext():
        yield


@functools.cache
def _functions(text: str, interpreted: bool) -> SimpleNamespace:
    """The Triton functions of a rule and of its derivatives in q and k."""
    rule = Rule(text)
    # The name tells rules apart in Triton's cache on disk; the source is kept where Python's inspection finds it.
    name = "rule_" + hashlib.sha256(str(rule).encode()).hexdigest()[:16]
    sources = {name: rule, f"{name}_q": rule.derivative("q"), f"{name}_k": rule.derivative("k")}
    source = "\n".join(["import triton", "import triton.language as tl", "",
                        *(each.triton(as_name) for as_name, each in sources.items())])
    filename = f"<kernelbook rule {name}{' interpreted' if interpreted else ''}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    made: dict = {"__name__": f"{__package__}.{name}"}
    with _decorating(interpreted):
        exec(compile(source, filename, "exec"), made)
    return SimpleNamespace(value=made[name], q=made[f"{name}_q"], k=made[f"{name}_k"])


@functools.cache
def _usual_tiles(text: str) -> Tiles:
    """The tiles for a rule: a long one would be unrolled to more instructions than are worth compiling."""
    return Tiles(unroll=4 if Rule(text).triton().count(" = ") <= 4 else 1)


# ------------------------------------------------------------------------- running them

def _power_of_two(x: int) -> int:
    return 1 << (x - 1).bit_length()


def _transposed(x: Tensor, multiple: int) -> Tensor:
    """``(batch, n, d)`` as ``(batch, d, padded n)`` in float32; the last row fills the padding."""
    missing = -x.shape[1] % multiple
    x = x.detach().float()
    if missing:
        x = torch.cat([x, x[:, -1:].expand(-1, missing, -1)], 1)
    return x.transpose(1, 2).contiguous()


def _options(tiles: Tiles, link: str, causal: bool, masked: bool, d: int, d_v: int) -> dict:
    block = max(16, _power_of_two(d_v))
    return dict(LINK=link, CAUSAL=causal, MASKED=masked, D=d, DV=d_v, BLOCK_DV=block, CHUNK=min(64, block),
                A=tiles.a, B=tiles.b, R=tiles.r, C=tiles.c, UNROLL=tiles.unroll)


class _Launch:
    """What the kernels' calls have in common."""

    def __init__(self, q, k, v, mask, mask_at, rule, link, scale, causal, tiles) -> None:
        self.tiles = t = Tiles(*tiles) if tiles else _usual_tiles(rule)
        self.interpreted = q.device.type != "cuda"
        self.kernels, self.rule = _kernels(self.interpreted), _functions(rule, self.interpreted)
        (self.batch, self.n, d), self.m, d_v = q.shape, k.shape[1], v.shape[-1]
        multiple = max(2 * t.a * t.r, t.b * t.c)        # both are powers of two
        self.q, self.k = _transposed(q, multiple), _transposed(k, multiple)
        # The interpreter keeps bfloat16 as integers, and would multiply these.
        self.wide = torch.float32 if self.interpreted and v.dtype is torch.bfloat16 else v.dtype
        self.v = v.detach().to(self.wide).contiguous()
        # Without a mask any pointers do: they are not followed.
        self.mask = self.v if mask is None else mask.view(torch.uint8)
        self.mask_at = self.v if mask is None else mask_at
        row = 0 if mask is None or mask.shape[1] == 1 else self.m
        self.scalars = (self.n, self.m, self.q.shape[-1], self.k.shape[-1], row, scale)
        self.options = _options(t, link, causal, mask is not None, d, d_v) | dict(num_warps=t.warps, num_stages=1)

    def __call__(self, name: str, rows: int, *tensors: Tensor, **options) -> None:
        grid = (self.batch * -(-rows // (2 * self.tiles.a * self.tiles.r)),)
        kernel = getattr(self.kernels, name)[grid]
        options |= {key: x for key, x in self.options.items() if key != "CHUNK" or name == "backward"}
        arguments = (self.q, self.k, self.v, *tensors, self.mask, self.mask_at, *self.scalars)
        with contextlib.nullcontext() if self.interpreted else torch.cuda.device(self.q.device):
            kernel(*arguments, **options)


_ARGUMENTS = ("Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? mask_at, str rule, str link, float scale, "
              "bool causal, int[] tiles")


# Operators of their own, so that torch.compile takes each as one step and looks no further.
torch.library.define("kernelbook::tiled", f"({_ARGUMENTS}) -> (Tensor, Tensor)")
torch.library.define(
    "kernelbook::tiled_backward",
    f"(Tensor d_out, Tensor out, Tensor norm, bool want_q, bool want_k, bool want_v, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor)")


@torch.library.impl("kernelbook::tiled", "CompositeExplicitAutograd")
def _forward(q, k, v, mask, mask_at, rule, link, scale, causal, tiles):
    launch = _Launch(q, k, v, mask, mask_at, rule, link, scale, causal, tiles)
    out = torch.empty(*q.shape[:2], v.shape[-1], dtype=launch.wide, device=v.device)
    norm = torch.empty(q.shape[0], 2, q.shape[1], dtype=torch.float32, device=q.device)
    launch("forward", launch.n, out, norm, RULE=launch.rule.value)
    return out.to(v.dtype), norm


@torch.library.register_fake("kernelbook::tiled")
def _(q, k, v, mask, mask_at, rule, link, scale, causal, tiles):
    return v.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[0], 2, q.shape[1], dtype=torch.float32)


@torch.library.impl("kernelbook::tiled_backward", "CompositeExplicitAutograd")
def _backward(d_out, out, norm, want_q, want_k, want_v, q, k, v, mask, mask_at, rule, link, scale, causal, tiles):
    launch = _Launch(q, k, v, mask, mask_at, rule, link, scale, causal, tiles)
    d_out = d_out.to(launch.wide).contiguous()
    delta = (d_out.float() * out.float()).sum(-1)
    given, nothing = (d_out, norm, delta), launch.q.new_empty(0)
    d_q = d_k = d_v = nothing
    if want_q:
        d_q = torch.zeros_like(launch.q)
        launch("backward", launch.n, *given, d_q, nothing, RULE=launch.rule.value, SLOPE=launch.rule.q, KEYS=False,
               WANT_OWN=True, WANT_V=False)
        d_q = d_q[..., :launch.n].transpose(1, 2).to(q.dtype, memory_format=torch.contiguous_format)
    if want_k or want_v:
        d_k = torch.zeros_like(launch.k) if want_k else nothing
        d_v = torch.empty_like(launch.v) if want_v else nothing
        launch("backward", launch.m, *given, d_k, d_v, RULE=launch.rule.value, SLOPE=launch.rule.k, KEYS=True,
               WANT_OWN=want_k, WANT_V=want_v)
        if want_k:
            d_k = d_k[..., :launch.m].transpose(1, 2).to(k.dtype, memory_format=torch.contiguous_format)
    return d_q, d_k, d_v.to(v.dtype) if want_v else d_v


@torch.library.register_fake("kernelbook::tiled_backward")
def _(d_out, out, norm, want_q, want_k, want_v, q, k, v, mask, mask_at, rule, link, scale, causal, tiles):
    return tuple(x.new_empty(x.shape if wanted else 0) for x, wanted in ((q, want_q), (k, want_k), (v, want_v)))


def _save(ctx, inputs, output) -> None:
    q, k, v, mask, mask_at, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, mask, mask_at, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, d_out, _):
    nothing = [None] * (len(ctx.options) + 2)
    if d_out is None:
        return None, None, None, *nothing
    q, k, v, mask, mask_at, out, norm = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    found = torch.ops.kernelbook.tiled_backward(d_out, out, norm, *wanted, q, k, v, mask, mask_at, *ctx.options)
    return *(g if want else None for g, want in zip(found, wanted, strict=True)), *nothing


def _no_second(ctx, *_):
    raise RuntimeError("attention in Triton tiles has no second derivative; take path='exact' for it")


torch.library.register_autograd("kernelbook::tiled", _gradients, setup_context=_save)
torch.library.register_autograd("kernelbook::tiled_backward", _no_second)


def tiled_triton(
    q: Float[Tensor, "*#batch n d"],
    k: Float[Tensor, "*#batch m d"],
    v: Float[Tensor, "*#batch m d_v"],
    form: tuple[Rule, str, float],
    *,
    mask: Bool[Tensor, "*#batch #n #m"] | None = None,
    causal: bool = False,
    tiles: Tiles | None = None,
) -> Float[Tensor, "*batch n d_v"]:
    r"""The means of the values by the normalised weights :math:`\mathrm{link}(s\sum_l\rho(q_{il},k_{jl}))`, in tiles.

    Tensors on a CPU go through Triton's interpreter: for tests, not for use.

    Parameters
    ----------
    q, k, v : Tensor
        Queries, keys and values, of one dtype: float32, float16 or bfloat16.
    form : tuple
        Rule, link and :math:`s`, as :func:`kernelbook.rules.coordinate_form` gives them.
    mask : Tensor, optional
        Boolean, True where a key may be seen.
    causal : bool
        Whether a query sees only the keys up to its own position, the last query aligned with the last key.
    tiles : Tiles, optional
        The shape of the tiles, if not the usual one.

    Returns
    -------
    Tensor
        Of the values' dtype.  Its derivative can be taken once.

    Raises
    ------
    ImportError
        If Triton is not installed.
    """
    rule, link, scale = form
    n, (m, d_v) = q.shape[-2], v.shape[-2:]
    batch = leading(q, k, v)
    if 0 in (*batch, n, m, d_v):
        zero = (q.sum() + k.sum() + v.sum()) * 0                # a gradient of zeros, as the definition's
        return zero.to(v.dtype).expand(*batch, n, d_v)
    if d_v > WIDEST:
        parts = [tiled_triton(q, k, part, form, mask=mask, causal=causal, tiles=tiles) for part in v.split(WIDEST, -1)]
        return torch.cat(parts, -1)
    q, k, v = (x.expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (q, k, v))
    at = None
    if mask is not None:
        mask = mask.reshape((1,) * (len(batch) + 2 - mask.ndim) + tuple(mask.shape))
        mask = mask.expand(*mask.shape[:-1], m).contiguous()
        own, size = mask.shape[:-2], mask.shape[-2] * m
        mask = mask.reshape(-1, *mask.shape[-2:])
        at = (torch.arange(mask.shape[0], device=q.device) * size).reshape(own).expand(batch).reshape(-1).contiguous()
    shape = [] if tiles is None else [tiles.a, tiles.b, tiles.r, tiles.c, tiles.warps, tiles.unroll]
    out, _ = torch.ops.kernelbook.tiled(q, k, v, mask, at, rule.text, link, scale, causal, shape)
    return out.reshape(*batch, n, d_v)


def compiled(form: tuple[Rule, str, float], *, d: int = 64, d_v: int = 64, dtype: torch.dtype = torch.float32,
             causal: bool = False, masked: bool = False, capability: int = 90, tiles: Tiles | None = None) -> dict:
    """The kernels compiled ahead of time for a GPU that need not be there.

    Parameters
    ----------
    form : tuple
        Rule, link and scale, as :func:`kernelbook.rules.coordinate_form` gives them.
    d, d_v : int
        Width of queries and keys, and of values.
    dtype : torch.dtype
        float32, float16 or bfloat16.
    causal, masked : bool
    capability : int
        Ten times the GPU's compute capability.
    tiles : Tiles, optional
        The shape of the tiles, if not the usual one.

    Returns
    -------
    dict
        ``"forward"``, ``"queries"`` and ``"keys"`` (the backward pass, for queries, and for keys and values): Triton's
        compiled kernels, whose ``asm`` holds ``"ptx"`` and ``"cubin"``.
    """
    kernels, rule, t = _kernels(False), _functions(form[0].text, False), tiles or _usual_tiles(form[0].text)
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    wide = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    types = dict.fromkeys(("V", "OUT", "D_OUT", "D_V"), wide) | dict.fromkeys(
        ("QT", "KT", "NORM", "DELTA", "D_OWN"), "*fp32") | dict.fromkeys(
        ("n", "m", "n_pad", "m_pad", "mask_row"), "i32") | {
        "scale": "fp32", "MASK": "*u8" if masked else wide, "MASK_AT": "*i64" if masked else wide}
    aligned = ("n_pad", "m_pad")            # these, like all pointers, are multiples of 16
    found = {}
    for name, more in {"forward": {}, "queries": dict(KEYS=False, SLOPE=rule.q, WANT_OWN=True, WANT_V=False),
                       "keys": dict(KEYS=True, SLOPE=rule.k, WANT_OWN=True, WANT_V=True)}.items():
        function = kernels.backward if more else kernels.forward
        names = function.arg_names
        options = {key: x for key, x in (_options(t, form[1], causal, masked, d, d_v) | more).items() if key in names}
        source = ASTSource(
            fn=function, signature={a: types.get(a, "constexpr") for a in names},
            constexprs=options | {"RULE": rule.value},
            attrs={(i,): [["tt.divisibility", 16]] for i, a in enumerate(names)
                   if a in aligned or types.get(a, "").startswith("*")})
        found[name] = compile(source, target=GPUTarget("cuda", capability, 32),
                              options={"num_warps": t.warps, "num_stages": 1})
    return found
