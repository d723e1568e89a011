r"""What attention costs: every kernel on every path, and other libraries, against torch's fused attention.

Times depend on the machine and on its mood; a ratio of two times taken a moment apart depends on them much less.  So
all candidates of a block (one problem, one pass) are timed in turn, several rounds in one process, and what counts is
the ratio to the block's *unit* in the same round: its median over the rounds, and the least and the largest.  The unit
is :func:`torch.nn.functional.scaled_dot_product_attention`, which is the exponentiated dot product, where nothing else
is said.  A candidate whose output is not what its definition gives in float64 is not timed.

The record is a plain dictionary: ``blocks`` lists the blocks that are complete, ``rows`` what was measured, one number
of interest a row.  Nothing here decides whether a test passes: the :data:`TARGETS` are looked up afterwards.
"""

from __future__ import annotations

import fnmatch
import functools
import gc
import io
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import kernels
from .attention import PATHS, KernelAttention, attend, compiling
from .attention.call import Call
from .attention.dispatch import choose
from .decoding import greedy
from .features import Fourier, Positive
from .files import FileError, write_whole
from .kernels import EDP, RBF, Kernel, TensorProduct
from .models import Transformer, TransformerConfig
from .results import _version, provenance
from .rules import coordinate_form

__all__ = ["Setting", "Shape", "Candidate", "Absent", "Block", "Target", "TARGETS", "PEERS", "candidates",
           "interleaved", "peak_bytes", "blocks", "run", "load", "verdicts"]

SCHEMA = 1
PASSES = ("forward", "forward+backward")
UNIT = "SDPA"

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """How to measure.

    Attributes
    ----------
    device : str
        ``"cpu"`` or ``"cuda"``.
    threads : int
        Of torch, on the CPU.
    rounds : int
        How often all candidates are timed in turn; those that take long fewer times.
    quick : bool
        Whether small problems and two rounds are enough, to see that everything runs.
    only : tuple of str
        Measure only what matches one of these patterns, as in ``"rbf"``, ``"n=512 forward "`` or ``"training*"``.
    """

    device: str = "cpu"
    threads: int = 1
    rounds: int = 5
    quick: bool = False
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.threads < 1 or self.rounds < 1:
            raise ValueError(f"threads and rounds must be at least 1, not {self.threads} and {self.rounds}")
        kind = torch.device(self.device).type
        if kind not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, not {self.device!r}")
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"there is no device {self.device!r} here: torch.cuda.is_available() is False; use cpu")

    @property
    def seconds(self) -> tuple[float, float]:
        """The least time of one measurement, and that after which a candidate has had enough rounds."""
        return (0.01, 0.1) if self.quick else (0.04, 1.0)

    def wants(self, *words: object) -> bool:
        """Whether ``only`` lets something of this name through."""
        name = " ".join(map(str, words))
        return not self.only or any(fnmatch.fnmatch(name, f"*{pattern}*") for pattern in self.only)


@dataclass(frozen=True)
class Shape:
    """One problem: self-attention of ``n`` standard normal queries, keys and values of width ``d`` in each head."""

    n: int
    d: int = 64
    heads: int = 8
    batch: int = 1
    causal: bool = False
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def tensors(self, seed: int = 0) -> list[Tensor]:
        """Queries, keys, values, and the gradient that the output gets; made on the CPU, so the same anywhere."""
        random = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.heads, self.n, self.d)
        return [torch.randn(shape, generator=random).to(self.device, self.dtype) for _ in range(4)]

    @property
    def elements(self) -> int:
        """Of the n x n x d array that some definitions make."""
        return self.batch * self.heads * self.n * self.n * self.d


class Absent(RuntimeError):
    """A candidate is not there: a package is missing, or cannot do what is asked; the message says which and what."""


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Candidate:
    """One way to compute attention.

    Attributes
    ----------
    name : str
        Unique within a block.
    function : callable
        Of queries, keys and values ``(batch, heads, n, d)``.
    definition : callable
        The same in float64, by the plainest code there is.
    about : dict
        What goes into its rows: ``who``, ``kernel``, ``path`` and the like.
    passes : tuple of str
        Those of :data:`PASSES` that it has.
    context : callable
        Makes a context in which it is run.
    call : Call, optional
        Of one of our paths.
    skipped : str, optional
        Why it is not measured here.
    """

    name: str
    function: Attention
    definition: Attention
    about: Row
    passes: tuple[str, ...] = PASSES
    context: Callable[[], AbstractContextManager] = nullcontext
    call: Call | None = None
    skipped: str | None = None

    def work(self, which: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Callable[[], Any]:
        """The function of no arguments that is timed: one pass."""
        if which == "forward":
            def once() -> Any:
                with torch.no_grad(), self.context():
                    return self.function(q, k, v)
        else:
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))

            def once() -> Any:
                with self.context():
                    return torch.autograd.grad(self.function(q, k, v), (q, k, v), g, allow_unused=True)
        return once


# ------------------------------------------------------------------------- the two instruments

def interleaved(work: dict[str, Callable[[], Any]], unit: str, *, rounds: int = 5, least: float = 0.04,
                most: float = 1.0, patient: Container[str] = (), finish: Callable[[], Any] = lambda: None,
                clock: Callable[[], float] = time.perf_counter) -> dict[str, Row]:
    """Time several functions in turn, each as a ratio to one of them in the same round.

    Every function is called once first, so that what it makes once is made.  Then one measurement is the median of so
    many calls that they last ``least`` seconds together.  Every other round goes backwards, and the unit is timed anew
    wherever its last measurement is older than half a second, or than it takes three times.

    Parameters
    ----------
    work : dict
        Functions of no arguments, by name.
    unit : str
        The name of the one to compare with.
    rounds : int
        How often each is measured, unless it has taken ``most`` seconds by then.
    least, most : float
        Seconds.
    patient : container of str
        Names of those that get three rounds, however long they take.
    finish : callable
        Waits until all that was asked of the device is done.
    clock : callable
        Tells the time in seconds.

    Returns
    -------
    dict
        For each name ``ratio``, ``low``, ``high`` (median, least and largest over the rounds), ``rounds``, and
        ``seconds`` (median); or ``failed``, with the message, where the function raised.
    """
    sound: list[str] = []
    found: dict[str, Row] = {}

    def seconds(name: str, least: float) -> float:
        taken: list[float] = []
        while not taken or sum(taken) < least and len(taken) < 200:
            start = clock()
            work[name]()
            finish()
            taken.append(clock() - start)
        return statistics.median(taken)

    for name in (unit, *(name for name in work if name != unit)):
        try:
            seconds(name, 0.0)
            sound.append(name)
        except Exception as error:      # whatever a candidate raises, the others are measured
            if name == unit:
                raise
            found[name] = {"failed": _message(error)}
    ratios: dict[str, list[float]] = {name: [] for name in sound}
    times: dict[str, list[float]] = {name: [] for name in sound}
    spent = dict.fromkeys(sound, 0.0)
    for turn in range(rounds):
        base, when = 0.0, -math.inf
        others = sound[1:]
        for name in others[::-1] if turn % 2 else others:
            if turn >= (3 if name in patient else 1) and spent[name] > most:
                continue
            if clock() - when > max(0.5, 3 * base):
                base = seconds(unit, least)
                times[unit].append(base)
                when = clock()
            start = clock()
            t = seconds(name, least)
            spent[name] += clock() - start
            times[name].append(t)
            ratios[name].append(t / base)
        if not others:
            times[unit].append(seconds(unit, least))
    ratios[unit] = [1.0] * rounds
    for name in sound:
        r = ratios[name]
        found[name] = {"ratio": statistics.median(r), "low": min(r), "high": max(r), "rounds": len(r),
                       "seconds": statistics.median(times[name])}
    return {name: found[name] for name in work}


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def peak_bytes(once: Callable[[], Any], device: str = "cpu", *, warm: bool = True) -> int:
    """The most memory that torch has allocated at one time during a call, beyond what there was before it.

    On the CPU the profiler's list of every allocation and release is added up.  Scratch space that a library such as
    MKL keeps for itself is not in it.

    Parameters
    ----------
    once : callable
        What to call.
    device : str
        Where it computes.
    warm : bool
        Whether to call it once before, so that what it makes once does not count.

    Returns
    -------
    int
    """
    if warm:
        once()
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        once()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")      # or the profiler writes two lines to stderr each time
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        once()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    now = top = 0
    for event in events:
        now += event.nbytes()
        top = max(top, now)
    return top


# ------------------------------------------------------------------------- our own candidates

@dataclass(frozen=True)
class _Own:
    """A kernel of the suite: the normaliser it is used with, and up to which length by its definition.

    By default the definition goes as far as it makes no n x n x d array.
    """

    kernel: Kernel
    normaliser: str = "sum"
    exact_to: int = 1 << 20


#: The kernels of which every path is measured at any length, and of the others only what ``auto`` takes.
_IN_FULL = ("edp", "rbf", "exponentiated_intersection", "quadratic")


@functools.cache
def _own(d: int) -> dict[str, _Own]:
    """Every kernel of the library, at width ``d``."""
    return {
        "edp": _Own(EDP()),
        "rbf": _Own(RBF(), exact_to=128),
        "exponentiated_intersection": _Own(kernels.ExponentiatedIntersection(), exact_to=512),
        "quadratic": _Own(kernels.Quadratic()),
        "taylor": _Own(kernels.Taylor()),
        "polynomial": _Own(kernels.Polynomial(degree=2)),
        "l2": _Own(kernels.L2(), exact_to=512),
        "l2_squared": _Own(kernels.L2Squared(), exact_to=128),
        "intersection": _Own(kernels.Intersection(), "count", exact_to=128),
        "linear": _Own(kernels.Linear(), "count"),
        "cosine": _Own(kernels.Cosine(), "count"),
        "constant": _Own(kernels.Constant()),
        "product": _Own(TensorProduct(EDP(), RBF(), split=max(1, 3 * d // 4)), exact_to=128),
        "elu": _Own(kernels.get("elu")),
        "positive_features": _Own(kernels.get("positive_features", count=256)),
        "fourier_features": _Own(kernels.get("fourier_features", count=256), "count"),
    }


#: The most multiply-adds, of all heads, that a candidate of the linear path may take in one call.
_MOST = 2e10


def _own_candidates(shape: Shape, compiled: bool) -> Iterator[Candidate]:
    for name, own in _own(shape.d).items():
        options = {"causal": shape.causal, "normaliser": own.normaliser}
        call = Call(own.kernel, own.normaliser, shape.n, shape.n, shape.d, shape.d, shape.batch * shape.heads,
                    causal=shape.causal, dtype=shape.dtype, device=torch.device(shape.device).type)
        taken = {choose(replace(call, gradient=gradient)) for gradient in (False, True)}
        for path in PATHS:
            if PATHS[path].refusal(call) is not None:
                continue
            skipped = None
            if (shape.n > 512 or shape.causal) and name not in _IN_FULL and path not in taken:
                skipped = "not what auto takes"
            if path == "exact" and shape.causal:
                skipped = "as slow as without the mask"
            if path == "exact" and shape.n > own.exact_to:
                skipped = f"too long for the definition, with n n d = {shape.elements:.1e} in all"
            rank = own.kernel.feature_dimension(shape.d)
            if path == "linear" and (work := rank * shape.d * shape.n * shape.heads * shape.batch * 2) > _MOST:
                skipped = f"{rank:,} features a point, {work:.1e} multiplications in all"
            candidate = Candidate(
                f"{name} {path}", functools.partial(attend, kernel=own.kernel, path=path, **options),
                functools.partial(attend, kernel=own.kernel, path="exact", **options),
                {"who": "kernelbook", "kernel": name, "path": path, "group": _group(own.kernel, call)},
                call=call, skipped=skipped)
            yield candidate
            if compiled and path == "tiled" and coordinate_form(own.kernel, shape.d) and candidate.skipped is None:
                yield replace(candidate, name=f"{name} tiled, compiled", context=compiling,
                              about=candidate.about | {"path": "tiled, compiled"})


def _group(kernel: Kernel, call: Call) -> str:
    if PATHS["fused"].refusal(call) is None:
        return "fused"
    if isinstance(kernel, (Positive, Fourier)):     # of far more features than coordinates
        return "random-feature"
    return "finite-rank" if math.isfinite(kernel.feature_dimension(call.d)) else "other"


# ------------------------------------------------------------------------- other libraries

def _need(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        why = f"not installed: pip install {package}" if _version(package) is None else f"cannot be imported: {error}"
        raise Absent(f"{package} is {why}") from error


def _softmax(q: Tensor, k: Tensor, v: Tensor, *, scale: float, norms: float = 0.0, causal: bool = False) -> Tensor:
    """softmax(scale q.k - norms |k|^2) v, with the whole matrix."""
    logits = scale * q @ k.mT - norms * k.square().sum(-1)[..., None, :]
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -math.inf)
    return logits.softmax(-1) @ v


def _weighted(w: Tensor, v: Tensor, causal: bool) -> Tensor:
    w = w.tril() if causal else w
    return w / w.sum(-1, keepdim=True) @ v


def _sdpa(shape: Shape, compiled: bool) -> Iterator[Candidate]:
    yield Candidate(UNIT, functools.partial(F.scaled_dot_product_attention, is_causal=shape.causal),
                    functools.partial(_softmax, scale=shape.d ** -0.5, causal=shape.causal),
                    {"who": "torch", "kernel": "edp"})


def row_chunks(q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, rows: int = 256) -> Tensor:
    """Attention by the definition, a few queries at a time, with each part made again in the backward pass."""
    part = functools.partial(attend, kernel=kernel, path="exact")
    if not torch.is_grad_enabled():
        return torch.cat([part(chunk, k, v) for chunk in q.split(rows, -2)], -2)
    return torch.cat([checkpoint(part, chunk, k, v, use_reentrant=False, preserve_rng_state=False)
                      for chunk in q.split(rows, -2)], -2)


def _row_chunks(shape: Shape, compiled: bool) -> Iterator[Candidate]:
    if not shape.causal:
        yield Candidate("edp row chunks", functools.partial(row_chunks, kernel=EDP()),
                        functools.partial(_softmax, scale=shape.d ** -0.5), {"who": "torch", "kernel": "edp"})


def _compiled(shape: Shape, compiled: bool) -> Iterator[Candidate]:
    """What torch.compile makes of definitions, and FlexAttention."""
    if not compiled or shape.causal:
        return
    rbf = functools.partial(_softmax, scale=shape.d ** -0.5, norms=0.5 * shape.d ** -0.5)
    yield Candidate("rbf torch.compile", torch.compile(rbf, dynamic=False), rbf, {"who": "torch", "kernel": "rbf"})

    from torch.nn.attention.flex_attention import flex_attention

    flex = torch.compile(flex_attention, dynamic=False)
    passes = PASSES[:1] if torch.device(shape.device).type == "cpu" else PASSES     # on a CPU it has no backward pass

    def squared(score: Tensor, b: Any, h: Any, i: Any, j: Any) -> Tensor:
        return 2 * score.abs().log()

    yield Candidate("quadratic FlexAttention", functools.partial(flex, score_mod=squared),
                    lambda q, k, v: _weighted((q @ k.mT).square(), v, False),
                    {"who": "torch", "kernel": "quadratic"}, passes)


def _x_transformers(shape: Shape, compiled: bool) -> Iterator[Candidate]:
    module = _need("x_transformers.attend", "x-transformers")
    for flash in (False, True):
        attend_ = module.Attend(l2_distance=True, flash=flash, causal=shape.causal)
        # Flash: two columns are added first, and the scale is that of the wider queries.
        scale = (shape.d + 2 * flash) ** -0.5
        yield Candidate(f"x-transformers l2_distance{', flash' if flash else ''}",
                        lambda q, k, v, f=attend_: f(q, k, v)[0],
                        functools.partial(_softmax, scale=2 * scale, norms=scale, causal=shape.causal),
                        {"who": "x-transformers", "kernel": "rbf"})


def _performer(shape: Shape, compiled: bool) -> Iterator[Candidate]:
    module = _need("performer_pytorch.performer_pytorch", "performer-pytorch")
    if shape.causal and torch.device(shape.device).type == "cpu" and shape.n > 512:
        raise Absent("performer-pytorch is without its compiled causal product here, and too slow for this length")
    with torch.random.fork_rng(), redirect_stdout(io.StringIO()):       # it prints what it has no compiled code for
        torch.manual_seed(0)
        features = module.FastAttention(shape.d, nb_features=256, causal=shape.causal).to(shape.device)

    def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # The stabilisers, and the 1e-4 that is added to each feature, are part of what the package computes.
        def phi(x: Tensor, over: tuple[int, ...]) -> Tensor:
            x = x * shape.d ** -0.25
            y = x @ features.projection_matrix.to(x).mT
            return (y - x.square().sum(-1, keepdim=True) / 2 - y.amax(over, keepdim=True)).exp() + 1e-4

        return _weighted(phi(q, (-1,)) @ phi(k, (-1, -2)).mT, v, shape.causal)

    yield Candidate("performer-pytorch FastAttention(256)", features, definition,
                    {"who": "performer-pytorch", "kernel": "positive random features"})


def _linear_attention_transformer(shape: Shape, compiled: bool) -> Iterator[Candidate]:
    if shape.causal:        # by buckets of queries that do not see their own bucket whole: another definition
        return
    module = _need("linear_attention_transformer.linear_attention_transformer", "linear-attention-transformer")
    yield Candidate("linear-attention-transformer", module.linear_attn,
                    lambda q, k, v: q.softmax(-1) @ k.softmax(-2).mT @ v * shape.d ** -0.5,
                    {"who": "linear-attention-transformer", "kernel": "two softmaxes"})


def _flash_linear_attention(shape: Shape, compiled: bool) -> Iterator[Candidate]:
    if torch.device(shape.device).type != "cuda":
        raise Absent("flash-linear-attention is measured on a GPU only, which its kernels are for")
    if not shape.causal:
        return
    module = _need("fla.ops.linear_attn", "flash-linear-attention")

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))      # it wants (batch, length, heads, width)
        return module.chunk_linear_attn(q, k, v, scale=1.0, normalize=False)[0].transpose(1, 2)

    yield Candidate("flash-linear-attention", function, lambda q, k, v: (q @ k.mT).tril() @ v,
                    {"who": "flash-linear-attention", "kernel": "linear"})


#: Other ways to compute attention, by name; each makes its candidates for a shape, or raises :class:`Absent`.
PEERS: dict[str, Callable[[Shape, bool], Iterable[Candidate]]] = {
    "torch": _sdpa,
    "row chunks": _row_chunks,
    "torch.compile": _compiled,
    "x-transformers": _x_transformers,
    "performer-pytorch": _performer,
    "linear-attention-transformer": _linear_attention_transformer,
    "flash-linear-attention": _flash_linear_attention,
}


def candidates(shape: Shape, *, compiled: bool = True) -> tuple[list[Candidate], dict[str, str]]:
    """All ways to compute attention of a shape, the unit first.

    Parameters
    ----------
    shape : Shape
        The problem.
    compiled : bool
        Whether to include what is compiled at its first call, which takes seconds.

    Returns
    -------
    candidates : list of Candidate
    absent : dict
        The peers that are not there, with the reason of each.
    """
    found: list[Candidate] = []
    absent: dict[str, str] = {}
    for name, make in PEERS.items():
        try:
            found.extend(make(shape, compiled))
        except Absent as why:
            absent[name] = str(why)
        if name == "torch":
            found.extend(_own_candidates(shape, compiled))
    return found, absent


# The largest error of an output, relative to the largest value, with which a candidate is still timed.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def output_error(candidate: Candidate, shape: Shape) -> float:
    """The largest error of a candidate's output on a short problem, relative to the largest value."""
    q, k, v, _ = replace(shape, n=min(shape.n, 128)).tensors(seed=1)
    with torch.no_grad(), candidate.context():
        found = candidate.function(q, k, v)
        wanted = candidate.definition(q.double(), k.double(), v.double())
    if found.shape != wanted.shape:
        return math.inf
    error = ((found.double() - wanted).abs().max() / wanted.abs().max()).item()
    return error if math.isfinite(error) else math.inf


# ------------------------------------------------------------------------- suites

Note = Callable[[str], Any]


@dataclass(frozen=True)
class Block:
    """A part of the benchmark that is measured and recorded as a whole.

    Attributes
    ----------
    suite : str
        It belongs to.
    case : str
        Which one it is within the suite.
    measure : callable
        Measures it: given a function that is told what is going on, returns rows.
    """

    suite: str
    case: str
    measure: Callable[[Note], list[Row]]

    @property
    def name(self) -> str:
        return f"{self.suite} {self.case}"


def _finish(setting: Setting) -> Callable[[], None]:
    if torch.device(setting.device).type == "cuda":
        return lambda: torch.cuda.synchronize(setting.device)
    return lambda: None


def _timed(setting: Setting, work: dict[str, Callable[[], Any]], unit: str,
           rounds: int | None = None, patient: Container[str] = ()) -> dict[str, Row]:
    least, most = setting.seconds
    gc.collect()
    return interleaved(work, unit, rounds=min(rounds or setting.rounds, setting.rounds), least=least, most=most,
                       patient=patient, finish=_finish(setting))


def _checked(setting: Setting, shape: Shape, which: str, words: str, compiled: bool, note: Note,
             rows: list[Row]) -> list[Candidate]:
    """The candidates that are wanted, and compute what they should; what becomes of the others goes to ``rows``."""
    good: list[Candidate] = []
    every, absent = candidates(shape, compiled=compiled)
    rows.extend({"candidate": name, "absent": why} for name, why in absent.items() if setting.wants(words, name))
    if not any(setting.wants(words, c.name) for c in every):
        return []
    for c in every:
        if c.name != UNIT and not setting.wants(words, c.name):
            continue
        if c.skipped is not None or which not in c.passes:
            rows.append({"candidate": c.name, **c.about, "skipped": c.skipped or "it has no backward pass here"})
            continue
        note(f"checking {c.name}")
        try:
            error = output_error(c, shape)
        except Exception as wrong:      # a peer may raise anything
            rows.append({"candidate": c.name, **c.about, "failed": _message(wrong)})
            continue
        if error > _TOLERANCE[shape.dtype]:
            rows.append({"candidate": c.name, **c.about, "wrong": error})
            continue
        call = None if c.call is None else replace(c.call, gradient=which != PASSES[0])
        auto = {} if call is None else {"auto": choose(call) == c.about["path"]}
        good.append(replace(c, about=c.about | auto | {"error": error}))
    return good


def _attention(setting: Setting, suite: str, shape: Shape, which: str, compiled: bool) -> Block:
    case = f"n={shape.n} {which}"

    def measure(note: Note) -> list[Row]:
        rows: list[Row] = []
        good = _checked(setting, shape, which, f"{suite} {case}", compiled, note, rows)
        note("timing")
        work = {c.name: c.work(which, *shape.tensors()) for c in good}
        found = _timed(setting, work, UNIT, patient=_AIMED_AT) if good else {}
        rows = [{"candidate": c.name, **c.about, **found[c.name]} for c in good] + rows
        return [{"n": shape.n, "d": shape.d, "causal": shape.causal, "pass": which} | row for row in rows]

    return Block(suite, case, measure)


def _memory(setting: Setting, shape: Shape, compiled: bool) -> Block:
    case = f"n={shape.n}"

    def measure(note: Note) -> list[Row]:
        rows: list[Row] = []
        good = _checked(setting, shape, PASSES[1], f"memory {case}", compiled, note, rows)
        unit = math.nan
        q, k, v, g = shape.tensors()
        inputs = _bytes([q, k, v])
        measured = []
        for c in good:
            note(c.name)
            try:
                work = c.work(PASSES[1], q, k, v, g)
                size = (inputs + peak_bytes(work, setting.device, warm="compile" in c.name)) / 1e6
            except Exception as error:
                rows.append({"candidate": c.name, **c.about, "failed": _message(error)})
                continue
            unit = size if c.name == UNIT else unit
            measured.append({"candidate": c.name, **c.about, "megabytes": size, "ratio": size / unit})
        what = {"n": shape.n, "d": shape.d, "causal": shape.causal, "pass": PASSES[1]}
        return [what | row for row in measured + rows]

    return Block("memory", case, measure)


def _bytes(tensors: list[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _long(setting: Setting, name: str, shapes: list[Shape], which: str) -> Block:
    """One candidate at several lengths: its growth, in time and in memory, over the growth of the length."""
    def measure(note: Note) -> list[Row]:
        work, rows = {}, []
        for shape in shapes:
            c = next(c for c in _own_candidates(shape, compiled=False) if c.name == name)
            tensors = shape.tensors()
            work[str(shape.n)] = c.work(which, *tensors)
            note(f"memory at n = {shape.n:,}")
            size = peak_bytes(work[str(shape.n)], setting.device, warm=False) + _bytes(tensors[:3])
            rows.append({"candidate": name, **c.about, "n": shape.n, "d": shape.d, "heads": shape.heads,
                         "causal": shape.causal, "pass": which, "megabytes": size / 1e6})
        note("timing")
        found = _timed(setting, work, str(shapes[0].n), rounds=3, patient=work)
        for row in rows:
            row |= found[str(row["n"])]
            longer = row["n"] / shapes[0].n
            row["growth"] = row["ratio"] / longer
            row["memory_growth"] = row["megabytes"] / rows[0]["megabytes"] / longer
        return rows

    return Block("long", f"{name}{' causal' if shapes[0].causal else ''} {which}", measure)


def _crossover(setting: Setting, name: str, shapes: list[Shape], which: str) -> Block:
    """The linear path of a kernel against row chunks of its definition, from length to length."""
    d = shapes[0].d
    own = _own(d)[name]

    def measure(note: Note) -> list[Row]:
        starts = auto_from(own.kernel, d, shapes[0].heads, which != PASSES[0])
        rows: list[Row] = []
        for shape in shapes:
            note(f"n = {shape.n:,}")
            work = {path: Candidate(path, function, function, {}).work(which, *shape.tensors()) for path, function in (
                ("row chunks", functools.partial(row_chunks, kernel=own.kernel)),
                ("linear", functools.partial(attend, kernel=own.kernel, path="linear")))}
            found = _timed(setting, work, "row chunks", rounds=3)["linear"]
            rows.append({"candidate": f"{name} linear", "kernel": name, "n": shape.n, "d": d, "heads": shape.heads,
                         "pass": which, "auto_from": starts,
                         "from_twice_auto": None if starts is None else shape.n >= 2 * starts, **found})
        return [row | {"crossover": crossing(rows)} for row in rows]

    return Block("crossover", f"{name} d={d} {which}", measure)


def auto_from(kernel: Kernel, d: int, heads: int = 8, gradient: bool = False) -> int | None:
    """The least length, up to 2^20, from which ``auto`` takes the linear path; None if it never does."""
    def linear(n: int) -> bool:
        return choose(Call(kernel, n=n, m=n, d=d, d_v=d, batch=heads, gradient=gradient)) == "linear"

    low, high = 1, 1 << 20
    if not linear(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if linear(middle) else (middle, high)
    return high


def crossing(rows: list[Row]) -> float | None:
    """The length from which on the ratio stays below 1, interpolated between lengths; None if there is none."""
    points = [(row["n"], row["ratio"]) for row in rows if "ratio" in row]
    if not points or points[-1][1] >= 1:
        return None
    for (n0, r0), (n1, r1) in zip(points[-2::-1], points[:0:-1], strict=True):
        if r0 >= 1:
            share = math.log(r0) / (math.log(r0) - math.log(r1))
            return n0 * (n1 / n0) ** share
    return float(points[0][0])          # below 1 from the first length on


def _worthwhile(setting: Setting, suite: str, case: str, names: Iterable[str]) -> bool:
    """Whether more is wanted than the unit, which is always there."""
    return any(setting.wants(suite, case, name) for name in names)


def _module(setting: Setting, n: int, which: str) -> Block:
    """The module with its projections, 512 wide with 8 heads, as it is used in a model."""
    case = f"n={n} {which}"

    def measure(note: Note) -> list[Row]:
        random = torch.Generator().manual_seed(0)
        x, g = (torch.randn(1, n, 512, generator=random).to(setting.device) for _ in range(2))
        modules: dict[str, tuple[nn.Module, Callable[[], AbstractContextManager], Row]] = {}
        for name in ("edp", "rbf", "exponentiated_intersection", "l2_squared"):
            module = KernelAttention(512, 8, batch_first=True, kernel=name).to(setting.device)
            call = Call(module.kernel, n=n, m=n, d=64, d_v=64, batch=8, gradient=which != PASSES[0])
            path = choose(call)
            if path == "exact":
                continue
            modules[name] = module, nullcontext, {"who": "kernelbook", "kernel": name, "path": path}
            if path == "tiled" and not setting.quick:
                modules[f"{name}, compiled"] = module, compiling, {
                    "who": "kernelbook", "kernel": name, "path": "tiled, compiled"}
        modules["torch.nn.MultiheadAttention"] = (nn.MultiheadAttention(512, 8, batch_first=True).to(setting.device),
                                                  nullcontext, {"who": "torch", "kernel": "edp"})

        def work(module: nn.Module, context: Callable[[], AbstractContextManager]) -> Callable[[], Any]:
            inside = [x.detach().requires_grad_(), *module.parameters()]

            def once() -> Any:
                with context():
                    if which == PASSES[0]:
                        with torch.no_grad():
                            return module(x, x, x, need_weights=False)[0]
                    return torch.autograd.grad(module(*inside[:1] * 3, need_weights=False)[0], inside, g)
            return once

        wanted = {name: made for name, made in modules.items()
                  if name == "edp" or setting.wants("module", case, name)}
        if not _worthwhile(setting, "module", case, wanted):
            return []
        note("timing")
        found = _timed(setting, {name: work(m, context) for name, (m, context, _) in wanted.items()}, "edp",
                       patient=wanted)
        return [{"candidate": name, **about, "n": n, "pass": which, **found[name]}
                for name, (_, _, about) in wanted.items()]

    return Block("module", case, measure)


class _TorchTranslator(nn.Module):
    """``torch.nn.Transformer`` with the same embeddings, sizes and order of norms as ours."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        c = config
        self.embedded = Transformer(replace(c, kernel=EDP(), layers=1))     # for its embedding and logits only
        for name in ("encoder", "encoder_norm", "decoder", "decoder_norm"):
            setattr(self.embedded, name, None)
        with warnings.catch_warnings():     # that nested tensors do not go with norm_first
            warnings.simplefilter("ignore", UserWarning)
            self.body = nn.Transformer(c.width, c.heads, c.layers, c.layers, c.feedforward, dropout=c.dropout,
                                       batch_first=True, norm_first=True)
        self.pad = c.pad_id

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        hidden = source == self.pad
        n = target.shape[1]
        causal = torch.ones(n, n, dtype=torch.bool, device=target.device).triu(1)
        x = self.body(self.embedded._embed(source), self.embedded._embed(target), tgt_mask=causal, tgt_is_causal=True,
                      src_key_padding_mask=hidden, memory_key_padding_mask=hidden)
        return self.embedded.logits(x)


def _training(setting: Setting, n: int, batch: int, names: list[str] | None = None) -> Block:
    """Steps of a translator of 3 + 3 layers, 128 wide, with 4 heads, at sentences of ``n`` tokens."""
    case = f"n={n}"

    def measure(note: Note) -> list[Row]:
        random = torch.Generator().manual_seed(0)
        source, target = (torch.randint(1, 4000, (batch, n), generator=random) for _ in range(2))
        source[: batch // 2, -n // 8:] = 0                                  # half of the sources are padded
        source, target = source.to(setting.device), target.to(setting.device)
        config = TransformerConfig("encoder-decoder", vocabulary=4000)

        def step(make: Callable[[], nn.Module], context: Callable[[], AbstractContextManager]) -> Callable[[], Any]:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = make().to(setting.device)
            optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)

            def once() -> Any:
                with context():
                    logits = model(source, target[:, :-1])
                    loss = F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())
                    optimiser.zero_grad(set_to_none=True)
                    loss.backward()
                    optimiser.step()
            return once

        steps: dict[str, tuple[Callable[[], Any], Row]] = {}

        def add(name: str, about: Row, make: Callable[[], nn.Module], context: Callable = nullcontext) -> None:
            if name == "edp" or (names is None or name in names) and setting.wants("training", case, name):
                steps[name] = step(make, context), about

        for name, own in _own(32).items():
            call = Call(own.kernel, own.normaliser, n=n, m=n, d=32, d_v=32, batch=4 * batch, mask="keys", gradient=True)
            about = {"who": "kernelbook", "kernel": name, "path": choose(call), "group": _group(own.kernel, call)}
            make = functools.partial(Transformer, replace(config, kernel=own.kernel, normaliser=own.normaliser))
            add(name, about, make)
            if about["path"] == "tiled" and coordinate_form(own.kernel, 32) and not setting.quick:
                add(f"{name}, compiled", about | {"path": "tiled, compiled"}, make, compiling)
        add("torch.nn.Transformer", {"who": "torch", "kernel": "edp"}, functools.partial(_TorchTranslator, config))
        if not _worthwhile(setting, "training", case, steps):
            return []
        note("timing")
        found = _timed(setting, {name: work for name, (work, _) in steps.items()}, "edp", rounds=3, patient=steps)
        return [_per_second({"candidate": name, **about, "n": n, "batch": batch, "pass": "training step",
                             **found[name]}, batch * (n - 1)) for name, (_, about) in steps.items()]

    return Block("training", case, measure)


def _per_second(row: Row, tokens: int) -> Row:
    return row | {"tokens_per_second": tokens / row["seconds"]} if "seconds" in row else row


def _decoding(setting: Setting, length: int, batch: int, names: list[str]) -> Block:
    """Greedy decoding by the same translator, untrained, with a cache of keys and values and without."""
    case = f"n={length}"

    def measure(note: Note) -> list[Row]:
        random = torch.Generator().manual_seed(0)
        source = torch.randint(1, 4000, (batch, 32), generator=random).to(setting.device)
        work: dict[str, Callable[[], Any]] = {}
        abouts: dict[str, Row] = {}
        for name in names:
            own = _own(32)[name]
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = Transformer(TransformerConfig("encoder-decoder", vocabulary=4000, kernel=own.kernel,
                                                      normaliser=own.normaliser)).to(setting.device)
            for cache in (True, False):
                full = f"{name}{'' if cache else ', no cache'}"
                if full == "edp" or setting.wants("decoding", case, full):
                    # No token is -1, so none ends a sequence.
                    work[full] = functools.partial(greedy, model, source, bos_id=1, eos_id=-1, max_length=length,
                                                   cache=cache)
                    abouts[full] = {"who": "kernelbook", "kernel": name, "cache": cache}
        if not _worthwhile(setting, "decoding", case, work):
            return []
        note("timing")
        found = _timed(setting, work, "edp", rounds=3, patient=work)
        return [_per_second({"candidate": name, **abouts[name], "n": length, "batch": batch, "pass": "decoding",
                             **found[name]}, batch * length) for name in work]

    return Block("decoding", case, measure)


def _accuracy(setting: Setting, n: int) -> Block:
    """Errors against float64 of outputs and gradients; the inputs are rounded to the precision first."""
    def measure(note: Note) -> list[Row]:
        rows = []
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            shape = Shape(n, heads=2, device=setting.device, dtype=dtype)
            for name, own in _own(64).items():
                call = Call(own.kernel, own.normaliser, n=n, m=n, d=64, d_v=64, batch=2, dtype=dtype)
                # The fastest that serves it, small as the problem is.
                path = next((p for p in PATHS if p != "exact" and PATHS[p].refusal(call) is None), None)
                if path is None or not setting.wants("accuracy", name):
                    continue
                note(f"{name} in {dtype}")
                function = functools.partial(attend, kernel=own.kernel, normaliser=own.normaliser, path=path)
                definition = functools.partial(row_chunks_of, own=own)
                seeds = range(2 if setting.quick else 3)
                row = {"candidate": f"{name} {path}", "kernel": name, "path": path, "n": n,
                       "dtype": str(dtype).removeprefix("torch.")}
                rows.append(row)
                try:
                    errors = [_errors(function, definition, shape.tensors(seed)) for seed in seeds]
                except Exception as error:      # half precision, say, of an operation that has none
                    row["failed"] = _message(error)
                    continue
                row |= {"error": statistics.median(e[0] for e in errors), "largest_error": max(e[0] for e in errors),
                        "gradient_error": statistics.median(e[1] for e in errors)}
        return rows

    return Block("accuracy", f"n={n}", measure)


def row_chunks_of(q: Tensor, k: Tensor, v: Tensor, own: _Own) -> Tensor:
    """The definition, a few queries at a time: the array n x n x d of some kernels would be large in float64."""
    return torch.cat([attend(part, k, v, own.kernel, normaliser=own.normaliser, path="exact")
                      for part in q.split(32, -2)], -2)


def _errors(function: Attention, definition: Attention, tensors: list[Tensor]) -> tuple[float, float]:
    def passes(f: Attention, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = f(*inputs)
        gradients = torch.autograd.grad(out, inputs, g, allow_unused=True)
        gradients = [torch.zeros_like(x) if y is None else y for x, y in zip(inputs, gradients, strict=True)]
        return out.detach().double(), torch.cat([x.double().flatten() for x in gradients])

    found, wanted = passes(function, *tensors), passes(definition, *(x.double() for x in tensors))
    return tuple(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True))


def blocks(setting: Setting) -> list[Block]:
    """The whole benchmark in order.

    Parameters
    ----------
    setting : Setting
        How to measure.

    Returns
    -------
    list of Block
    """
    gpu = torch.device(setting.device).type == "cuda"
    shape = Shape(128, device=setting.device, batch=8 if gpu else 1, dtype=torch.bfloat16 if gpu else torch.float32)
    quick, found = setting.quick, []
    for n in (128,) if quick else (128, 512, 2048):
        found += [_attention(setting, "attention", replace(shape, n=n), which, not quick and n > 128)
                  for which in PASSES]
    for n in () if quick else (2048,):
        found += [_attention(setting, "causal", replace(shape, n=n, causal=True), which, True) for which in PASSES]
    found.append(_memory(setting, replace(shape, n=128 if quick else 2048), not quick))
    for n in (128,) if quick else (512, 2048):
        found += [_module(setting, n, which) for which in PASSES]
    found.append(_training(setting, *(16, 2, ["edp", "rbf"]) if quick else (128, 32)))
    found.append(_decoding(setting, *(4, 2, ["edp"]) if quick else (
        64, 8, ["edp", "rbf", "exponentiated_intersection", "quadratic", "elu"])))
    found.append(_accuracy(setting, 64 if quick else 256))
    if "linear" in PATHS and not quick:
        for name, d, causal in (("elu", 64, False), ("elu", 64, True), ("l2_squared", 64, False),
                                ("positive_features", 64, False), ("quadratic", 16, False)):
            shapes = [replace(shape, n=n, d=d, heads=2, batch=1, causal=causal) for n in (2048, 16384, 65536)]
            found += [_long(setting, f"{name} linear", shapes, which) for which in PASSES]
        for name in ("quadratic", "taylor", "l2_squared", "elu", "positive_features"):
            for d in (16, 32, 64):
                rank = _own(d)[name].kernel.feature_dimension(d)
                shapes = [replace(shape, n=1 << i, d=d, heads=1, batch=1) for i in range(6, 14)
                          if rank / 2 <= 1 << i <= max(8 * rank, 1024)]
                found += [_crossover(setting, name, shapes, which) for which in PASSES[:2 if d < 64 else 1]]
    # Which candidates the other blocks have, and so whether a pattern names one, is known when they are measured.
    return [block for block in found if block.suite not in ("long", "crossover") or setting.wants(block.name)]


# ------------------------------------------------------------------------- the record

def _empty(setting: Setting, command: str | None) -> dict[str, Any]:
    about = provenance(setting.device, command=command) | {"threads": setting.threads, "cpu_model": None,
                                                           "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        vectors = ("avx", "fma", "amx", "vnni", "bf16", "sve", "asimd")
        flags = facts.get("flags", facts.get("Features", "")).split()
        about |= {"cpu_model": facts.get("model name"),
                  "cpu_flags": sorted(f for f in flags if any(v in f for v in vectors))}
    except OSError:
        pass
    about["versions"] |= {p: _version(p) for p in ("triton", "x-transformers", "performer-pytorch",
                                                   "linear-attention-transformer", "flash-linear-attention")}
    return {"kind": "benchmark", "schema": SCHEMA, "name": "benchmark-attention", "complete": False,
            "setting": asdict(setting) | {"only": list(setting.only)}, "provenance": about, "blocks": [], "rows": []}


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Read a record that :func:`run` wrote.

    Parameters
    ----------
    path : path
        Of the JSON file.

    Returns
    -------
    dict

    Raises
    ------
    FileError
        If the file is missing, damaged, or something else.
    """
    try:
        record = json.loads(Path(path).read_text("utf8"))
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read as a record of the benchmark: {error}") from error
    if not isinstance(record, dict) or record.get("name") != "benchmark-attention" or record.get("schema") != SCHEMA:
        raise FileError(f"{path} is not a record of the attention benchmark of schema {SCHEMA}")
    return record


def run(setting: Setting = Setting(), out: str | os.PathLike | None = None, *, resume: bool = False,
        overwrite: bool = False, report: Callable[[dict[str, Any]], Any] = lambda event: None,
        command: str | None = None) -> dict[str, Any]:
    """Measure; after every block the record is written, so that an interrupted run loses no more than one.

    Parameters
    ----------
    setting : Setting
        How to measure.
    out : path, optional
        The record's file.
    resume : bool
        Whether to go on with the record that is there, from the same machine, source and setting.
    overwrite : bool
        Whether to replace the record that is there.
    report : callable
        Told of the progress: dictionaries with ``block``, ``number`` and ``of``; with ``doing``; with ``rows``.
    command : str, optional
        For the record; by default the command line of this process.

    Returns
    -------
    dict
        The record.

    Raises
    ------
    FileError
        If ``out`` exists and neither ``resume`` nor ``overwrite`` is given, or cannot be gone on with, or not written.
    ValueError
        If nothing matches ``only``.
    """
    record = _empty(setting, command)
    if out is not None and Path(out).exists() and not overwrite:
        if not resume:
            raise FileError(f"{out} exists; replace it with --overwrite, or go on with it with --resume")
        earlier = load(out)
        for what, old, new in (("setting", earlier["setting"], record["setting"]),
                               *((key, earlier["provenance"].get(key), record["provenance"][key])
                                 for key in ("device", "cpu_model", "versions", "commit"))):
            if old != new:
                raise FileError(f"{out} cannot be gone on with: its {what} was {old}, and is {new} now; "
                                "measure anew with --overwrite")
        record = earlier
    start = time.perf_counter()
    spent = record["provenance"].get("wall_time_s", 0.0)
    todo = blocks(setting)
    with _machine(setting):
        for number, block in enumerate(todo):
            if block.name in record["blocks"]:
                continue
            report({"block": block.name, "number": number, "of": len(todo)})
            rows = [{"suite": block.suite} | row for row in block.measure(lambda what: report({"doing": what}))]
            record["rows"] += [_plain(row) for row in rows]
            record["blocks"].append(block.name)
            record["complete"] = len(record["blocks"]) == len(todo)
            record["provenance"]["wall_time_s"] = spent + time.perf_counter() - start
            if out is not None and (record["rows"] or not setting.only):
                write_whole(out, _text(record))
            report({"rows": rows})
    if setting.only and not record["rows"]:
        raise ValueError(f"nothing that is measured matches {' or '.join(map(repr, setting.only))}; a pattern is part "
                         "of a name such as 'attention n=512 forward rbf fused' or 'training n=128 rbf'")
    return record


def _text(record: dict[str, Any]) -> str:
    """As JSON, a row a line."""
    rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in record["rows"])
    rest = {key: value for key, value in record.items() if key != "rows"}
    return json.dumps(rest, indent=1, ensure_ascii=False).removesuffix("\n}") + f',\n "rows": [\n  {rows}\n ]\n}}\n'


def _plain(row: Row) -> Row:
    """Four significant digits are more than a time has."""
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}


@contextmanager
def _machine(setting: Setting) -> Iterator[None]:
    """The threads that were asked for, and numbers below 1e-38 taken for 0: they slow some CPUs manyfold."""
    threads = torch.get_num_threads()
    flushed = (torch.tensor([1e-39]) * 1.0).item() == 0.0
    torch.set_num_threads(setting.threads)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flushed)


# ------------------------------------------------------------------------- what came of it

@dataclass(frozen=True)
class Target:
    """A number to reach, on the CPU with one thread.

    Attributes
    ----------
    what : str
        To read.
    of : dict
        Which rows: those with these entries.  Of several the worst counts.
    bound : float
        The number.
    measure : str
        Which entry of the row.
    over : dict, optional
        Divide by the same entry of the row with these entries changed.
    at_least : bool
        Whether more is better.
    """

    what: str
    of: dict[str, Any]
    bound: float
    measure: str = "ratio"
    over: dict[str, Any] = field(default_factory=dict)
    at_least: bool = False


def _targets() -> list[Target]:
    found = []
    short = {PASSES[0]: "forward", PASSES[1]: "with backward"}
    tiled, compiled = "exponentiated_intersection tiled", "exponentiated_intersection tiled, compiled"
    for n in (512, 2048):
        for which, bound in zip(PASSES, (1.25, 1.2), strict=True):
            here = {"suite": "attention", "n": n, "pass": which, "causal": False}
            found.append(Target(f"RBF fused over SDPA, n = {n}, {short[which]}", here | {"candidate": "rbf fused"},
                                bound))
            found.append(Target(f"x-transformers' l2_distance over RBF fused, n = {n}, {short[which]}",
                                here | {"candidate": "x-transformers l2_distance"}, 2.0,
                                over={"candidate": "rbf fused"}, at_least=True))
            found.append(Target(f"RBF over EDP in the module, n = {n}, {short[which]}",
                                {"suite": "module", "n": n, "pass": which, "candidate": "rbf"}, 1.08))
    found += [
        Target("RBF fused over SDPA, n = 2048, memory", {"suite": "memory", "n": 2048, "candidate": "rbf fused"}, 1.4),
        Target("intersection, n = 2048, memory in MB", {"suite": "memory", "n": 2048, "candidate": tiled}, 75.0,
               "megabytes"),
        Target("RBF over EDP, error of outputs in bfloat16",
               {"suite": "accuracy", "n": 256, "candidate": "rbf fused", "dtype": "bfloat16"}, 2.0, "error",
               over={"candidate": "edp fused"}),
    ]
    for which, fast, slow in zip(PASSES, (4.5, 5.5), (14.0, 14.0), strict=True):
        here = {"suite": "attention", "n": 2048, "pass": which}
        found.append(Target(f"intersection compiled over SDPA, n = 2048, {short[which]}",
                            here | {"candidate": compiled}, fast))
        found.append(Target(f"intersection over SDPA, n = 2048, {short[which]}", here | {"candidate": tiled}, slow))
    for which, fast, slow in zip(PASSES, (10.0, 35.0), (4.0, 15.0), strict=True):
        naive = {"suite": "attention", "n": 512, "pass": which, "candidate": "exponentiated_intersection exact"}
        for label, candidate, bound in ((" compiled", compiled, fast), ("", tiled, slow)):
            found.append(Target(f"naive intersection over ours{label}, n = 512, {short[which]}", naive, bound,
                                over={"candidate": candidate}, at_least=True))
    for which in PASSES:
        for suite, bound in (("attention", 0.25), ("causal", 0.4)):
            found.append(Target(f"elu+1 over {'causal ' if suite == 'causal' else ''}SDPA, n = 2048, {short[which]}",
                                {"suite": suite, "n": 2048, "pass": which, "candidate": "elu linear"}, bound))
    found += [
        Target("linear path, time over length, to n = 65,536", {"suite": "long", "n": 65536}, 1.25, "growth"),
        Target("linear path, memory over length, to n = 65,536", {"suite": "long", "n": 65536}, 1.1, "memory_growth"),
        Target("quadratic features over row chunks, from twice auto's crossover",
               {"suite": "crossover", "kernel": "quadratic", "from_twice_auto": True}, 1.0),
    ]
    for group, bound in (("fused", 1.15), ("finite-rank", 1.15), ("random-feature", 1.15)):
        found.append(Target(f"training step over EDP's, n = 128, {group} kernels",
                            {"suite": "training", "n": 128, "group": group}, bound))
    found += [Target(f"training step over EDP's, n = 128, intersection{label}",
                     {"suite": "training", "n": 128, "candidate": f"exponentiated_intersection{label}"}, 1.3)
              for label in ("", ", compiled")]
    return found


#: What is aimed at; :func:`verdicts` looks it up in a record.
TARGETS: tuple[Target, ...] = tuple(_targets())

_AIMED_AT = {of["candidate"] for t in TARGETS for of in (t.of, t.over) if "candidate" in of}


def _matching(rows: list[Row], of: dict[str, Any], measure: str) -> list[Row]:
    return [row for row in rows if row.get(measure) is not None and all(row.get(k) == v for k, v in of.items())]


def verdicts(record: dict[str, Any], targets: Iterable[Target] = TARGETS) -> list[dict[str, Any]]:
    """What a record says about the targets.

    Parameters
    ----------
    record : dict
        As :func:`run` returns it.
    targets : iterable of Target
        What to look up.

    Returns
    -------
    list of dict
        With ``what``, ``bound``, ``at_least``, ``value``, ``met`` and ``which`` (the candidate the value is of); the
        last three are None where nothing was measured.
    """
    found = []
    for t in targets:
        values = []
        for row in _matching(record["rows"], t.of, t.measure):
            value = row[t.measure]
            if t.over:
                others = _matching(record["rows"], t.of | t.over, t.measure)
                if len(others) != 1:
                    continue
                value /= others[0][t.measure]
            values.append((value, row["candidate"]))
        value, which = (min if t.at_least else max)(values, default=(None, None))
        met = None if value is None else value >= t.bound if t.at_least else value <= t.bound
        found.append({"what": t.what, "bound": t.bound, "at_least": t.at_least, "value": value, "met": met,
                      "which": which})
    return found
