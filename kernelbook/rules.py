r"""Coordinate-wise rules, written as text: :math:`\rho(q_l, k_l)`, whose sum over the coordinates makes a kernel.

A rule such as ``"min(q, k)"`` or ``"-abs(q - k)"`` says what is computed from one coordinate of a query and the same
coordinate of a key.  Being text, it can be stored in a checkpoint, differentiated, and turned into the source of a GPU
kernel: :class:`kernelbook.kernels.Coordinatewise` is the kernel
:math:`\mathrm{link}\bigl(s\sum_l\rho(q_l,k_l)\bigr)`, and tiled attention computes it without an array of
:math:`n\times m\times d` numbers.

A rule is made of ``q``, ``k``, numbers, ``+ - * /``, powers with a constant exponent, and the functions of
:data:`FUNCTIONS`.  It is parsed, never evaluated as a program.

Where a rule has no derivative, the library takes one element of its subdifferential, the same in every computation:

* ``abs`` and ``sign`` have derivative 0 at 0;
* ``min`` and ``max`` give each argument half where the two are equal;
* ``sqrt``, and powers between 0 and 1, have derivative 0 at 0, where the true one is infinite.

The first two are what torch does.  In the last, torch's infinity would become NaN as soon as it meets a factor 0, as it
does in ``sqrt(abs(q - k))`` wherever a query meets an equal key.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Rule", "FUNCTIONS", "LINKS", "apply_link", "coordinate_form"]

# A number, a variable, or (name of an operation, arguments...).  The second argument of a power is a number.
Node = float | str | tuple

VARIABLES = ("q", "k")
LONGEST, DEEPEST = 1000, 40         # characters of a rule, and levels of nesting


# ------------------------------------------------------------------------- the operations

@dataclass(frozen=True)
class _Operation:
    """How an operation is computed by torch, how it is written in Triton, and its partial derivatives."""

    compute: Callable[..., Tensor]
    triton: str
    partials: Callable[..., tuple[Node, ...]]


def _tensors(a: Tensor | float, b: Tensor | float) -> tuple[Tensor, Tensor]:
    if not isinstance(a, Tensor):
        a = b.new_full((), a)
    return a, b if isinstance(b, Tensor) else a.new_full((), b)


def _minimum(a, b):
    return torch.minimum(*_tensors(a, b))


def _maximum(a, b):
    return torch.maximum(*_tensors(a, b))


def _above(a, b):
    a, b = _tensors(a, b)
    return ((a > b).to(a.dtype) + (a >= b).to(a.dtype)) / 2


def _power(x: Tensor, p: float) -> Tensor:
    if not 0 < p < 1:
        return x ** p
    zero = x == 0           # this way the derivative at 0 is 0 rather than infinite
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x) ** p)


def _slope(x: Tensor, p: float) -> Tensor:
    zero = x == 0
    return torch.where(zero, 0.0, p * torch.where(zero, 1.0, x) ** (p - 1))


def _power_partials(a: Node, p: float) -> tuple[Node, ...]:
    return (("slope", a, p) if 0 < p < 1 else _make("*", p, _make("**", a, p - 1)),)


_OPERATIONS: dict[str, _Operation] = {
    "+": _Operation(operator.add, "{0} + {1}", lambda a, b: (1.0, 1.0)),
    "-": _Operation(operator.sub, "{0} - {1}", lambda a, b: (1.0, -1.0)),
    "*": _Operation(operator.mul, "{0} * {1}", lambda a, b: (b, a)),
    "/": _Operation(operator.truediv, "{0} / {1}",
                    lambda a, b: (_make("/", 1.0, b), _make("neg", _make("/", _make("/", a, b), b)))),
    "neg": _Operation(operator.neg, "{0} * -1.0", lambda a: (-1.0,)),       # joins an addition; 0 - x does not
    "**": _Operation(_power, "", _power_partials),
    "slope": _Operation(_slope, "", lambda a, p: (_make("*", p, ("slope", a, p - 1)),)),
    "min": _Operation(_minimum, "tl.minimum({0}, {1}, tl.PropagateNan.ALL)",
                      lambda a, b: (_make("above", b, a), _make("above", a, b))),
    "max": _Operation(_maximum, "tl.maximum({0}, {1}, tl.PropagateNan.ALL)",
                      lambda a, b: (_make("above", a, b), _make("above", b, a))),
    # A subtraction and a saturating multiply-add, where comparing needs four instructions.  Numbers that differ by
    # less than 2**-101 count as more or less equal.
    "above": _Operation(_above, f"tl.clamp(({{0}} - {{1}}) * {2.0**100} + 0.5, 0.0, 1.0)", lambda a, b: (0.0, 0.0)),
    "abs": _Operation(torch.abs, "tl.abs({0})", lambda a: (_make("sign", a),)),
    "sign": _Operation(torch.sign, f"2.0 * tl.clamp({{0}} * {2.0**100} + 0.5, 0.0, 1.0) - 1.0", lambda a: (0.0,)),
    "exp": _Operation(torch.exp, "tl.exp({0})", lambda a: (("exp", a),)),
    "log": _Operation(torch.log, "tl.log({0})", lambda a: (_make("/", 1.0, a),)),
    # 1 - 2/(e^2x + 1) keeps no digits near 0: there the polynomial of the Cephes library.
    "tanh": _Operation(
        torch.tanh,
        "tl.where(tl.abs({0}) < 0.625, {0} + {0} * {0} * {0} * (-0.333332819422 + {0} * {0} * (0.133314422036 + "
        "{0} * {0} * (-0.0537397155531 + {0} * {0} * (0.0206390887954 - 0.00570498872745 * {0} * {0})))), "
        "1.0 - 2.0 / (tl.exp(2.0 * {0}) + 1.0))",
        lambda a: (_make("-", 1.0, _make("**", ("tanh", a), 2.0)),)),
}

#: The functions of a rule, and what each is.
FUNCTIONS = {
    "abs": "absolute value", "sign": "sign, 0 at 0", "min": "the smaller of two", "max": "the larger of two",
    "sqrt": "square root", "square": "square", "exp": "exponential", "log": "natural logarithm",
    "tanh": "hyperbolic tangent", "above": "above(a, b): 1 where a > b, 1/2 where they are equal, else 0",
    "slope": "slope(x, p): the derivative of x**p, and 0 at 0",
}

#: What may be made of the scaled sum of a rule over the coordinates.
LINKS = {"exp": "its exponential", "identity": "itself", "sqrt": "its square root, with derivative 0 at 0"}

_SYNONYMS = {"minimum": "min", "maximum": "max"}
_BINARY = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Pow: "**"}
_TWO = ("min", "max", "above", "slope")


def _is_number(x: Node, *values: float) -> bool:
    return isinstance(x, float) and (not values or x in values)


def _make(name: str, *args: Node) -> Node:
    """The node of an operation, simplified where an argument is 0 or 1 or all are numbers."""
    if all(_is_number(a) for a in args):
        numbers = [torch.tensor(x, dtype=torch.float64) for x in args]
        if name in ("**", "slope"):
            numbers[1] = args[1]
        value = _OPERATIONS[name].compute(*numbers).item()
        if not math.isfinite(value):
            raise ValueError(f"{_show((name, *args))} is no finite number")
        return value
    match name, *args:
        case ("+", 0.0, x) | ("+", x, 0.0) | ("-", x, 0.0) | ("*", 1.0, x) | ("*", x, 1.0) | ("/", x, 1.0):
            return x
        case ("**", x, 1.0) | ("neg", ("neg", x)):
            return x
        case ("*", 0.0, _) | ("*", _, 0.0) | ("/", 0.0, _):
            return 0.0
        case ("**", _, 0.0):
            return 1.0
        case ("-", 0.0, x) | ("*", -1.0, x) | ("*", x, -1.0):
            return _make("neg", x)
        case ("neg", ("-", x, y)):
            return _make("-", y, x)
        case ("neg", ("sign", x)):
            return _make("sign", _make("neg", x))
        case ("+", x, ("neg", y)):
            return _make("-", x, y)
        case ("-", x, ("neg", y)):
            return _make("+", x, y)
        case ("/", x, 0.0):
            raise ValueError(f"{_show(x)} is divided by 0")
    return (name, *args)


def _show(node: Node, binding: int = 0) -> str:
    """The text of a node, in brackets where the surroundings bind it closer than it does its own parts."""
    match node:
        case float():
            text, own = f"{node:g}" if float(f"{node:g}") == node else repr(node), 5 if node >= 0 else 3
        case str():
            text, own = node, 5
        case ("neg", a):
            text, own = f"-{_show(a, 3)}", 3
        case ("**", a, p):
            text, own = f"{_show(a, 5)}**{_show(p, 3)}", 4
        case (("+" | "-" | "*" | "/") as sign, a, b):
            own = 1 if sign in "+-" else 2
            text = f"{_show(a, own)} {sign} {_show(b, own + 1)}"
        case (name, *args):
            text, own = f"{name}({', '.join(map(_show, args))})", 5
    return f"({text})" if own < binding else text


# ------------------------------------------------------------------------- parsing

class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text

    def error(self, what: str, at: ast.AST | int) -> ValueError:
        column = at if isinstance(at, int) else at.col_offset
        return ValueError(f"{what}, in the rule\n    {self.text}\n    {' ' * column}^\n"
                          f"A rule is made of q, k, numbers, + - * / and ** with a constant exponent, and "
                          f"{', '.join(FUNCTIONS)}; for example 'min(q, k)' or '-abs(q - k)'")

    def parse(self) -> Node:
        if not self.text.isascii():
            at = next(i for i, c in enumerate(self.text) if not c.isascii())
            raise self.error(f"{self.text[at]!r} means nothing", at)
        if "\n" in self.text or len(self.text) > LONGEST:
            raise ValueError(f"a rule is one line of at most {LONGEST} characters, but this one has "
                             f"{self.text.count(chr(10)) + 1} lines and {len(self.text)} characters")
        try:
            tree = ast.parse(self.text, mode="eval")
        except (SyntaxError, RecursionError, MemoryError) as error:
            raise self.error(f"not a formula ({getattr(error, 'msg', 'nested too deeply')})",
                             max(0, (getattr(error, "offset", 1) or 1) - 1)) from None
        return self.node(tree.body, DEEPEST)

    def node(self, tree: ast.expr, depth: int) -> Node:
        if depth == 0:
            raise self.error(f"nested more than {DEEPEST} levels deep", tree)
        match tree:
            case ast.Constant(value=bool()):
                pass
            case ast.Constant(value=int() | float() as value):
                if abs(value) > 1e300:
                    raise self.error("the number is too large", tree)
                return float(value)
            case ast.Name(id=name):
                if name not in VARIABLES:
                    hint = f"; {name} is a function: {name}(...)" if name in FUNCTIONS | _SYNONYMS else ""
                    raise self.error(f"no variable is called {name!r} (known: q, k){hint}", tree)
                return name
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=operand):
                inner = self.node(operand, depth - 1)
                return inner if isinstance(op, ast.UAdd) else self.make("neg", inner, at=tree)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                name, a, b = _BINARY[type(op)], self.node(left, depth - 1), self.node(right, depth - 1)
                if name == "**" and not _is_number(b):
                    raise self.error("the exponent of ** must be a number; write exp(b * log(a)) for a**b", right)
                return self.make(name, a, b, at=tree)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
                return self.function(name, args, tree, depth)
        raise self.error(f"{ast.unparse(tree)!r} is not part of a rule", tree)

    def function(self, name: str, args: list[ast.expr], tree: ast.expr, depth: int) -> Node:
        name = _SYNONYMS.get(name, name)
        if name not in FUNCTIONS:
            raise self.error(f"no function is called {name!r} (known: {', '.join(FUNCTIONS)})", tree)
        if len(args) != (wanted := 2 if name in _TWO else 1):
            raise self.error(f"{name} takes {wanted} argument{'s' * (wanted > 1)}, not {len(args)}", tree)
        nodes = [self.node(a, depth - 1) for a in args]
        match name:
            case "sqrt":
                return self.make("**", nodes[0], 0.5, at=tree)
            case "square":
                return self.make("**", nodes[0], 2.0, at=tree)
            case "slope" if not _is_number(nodes[1]):
                raise self.error("the second argument of slope must be a number", args[1])
        return self.make(name, *nodes, at=tree)

    def make(self, name: str, *args: Node, at: ast.expr) -> Node:
        try:
            return _make(name, *args)
        except ValueError as error:
            raise self.error(str(error), at) from None


# ------------------------------------------------------------------------- the rule

class Rule:
    r"""A function :math:`\rho(q_l,k_l)` of one coordinate of a query and of a key, from its text.

    Parameters
    ----------
    text : str
        As in ``"min(q, k)"``, ``"-abs(q - k)"`` or ``"(q - k)**2"``; the module's text says what may stand in it.

    Raises
    ------
    TypeError
        If ``text`` is no string.
    ValueError
        If it is no rule; the message shows where, and lists what is known.

    Examples
    --------
    >>> Rule("min(q, k)").derivative("q")
    Rule('above(k, q)')
    """

    __slots__ = ("text", "node")

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise TypeError(f"a rule is a text such as 'min(q, k)', not {text!r}")
        self.text = text.strip()
        self.node = _Parser(self.text).parse()

    def __call__(self, q: Float[Tensor, "*#shape"], k: Float[Tensor, "*#shape"]) -> Float[Tensor, "*shape"]:
        """The rule at each pair of numbers; ``q`` and ``k`` broadcast.

        Parameters
        ----------
        q, k : Tensor
            Of one dtype, their shapes broadcasting.

        Returns
        -------
        Tensor
            Of the common shape; differentiable, with the derivatives of :meth:`derivative`.
        """
        value = _compute(self.node, q, k)
        shape = torch.broadcast_shapes(q.shape, k.shape)
        return value.expand(shape) if isinstance(value, Tensor) else q.new_full(shape, value)

    def derivative(self, variable: str) -> Rule:
        r"""The rule :math:`\partial\rho/\partial q` or :math:`\partial\rho/\partial k`.

        Where there is no derivative, it is the element of the subdifferential that the module's text states.

        Parameters
        ----------
        variable : str
            ``"q"`` or ``"k"``.

        Returns
        -------
        Rule

        Raises
        ------
        ValueError
            If there is no such variable.
        """
        if variable not in VARIABLES:
            raise ValueError(f"a rule has a derivative in 'q' and one in 'k', not in {variable!r}")
        return _of_node(_differentiate(self.node, variable))

    def triton(self, name: str = "rule") -> str:
        """The source text of a Triton function of ``q`` and ``k`` that computes the rule.

        Parameters
        ----------
        name : str
            The function's name.

        Returns
        -------
        str
            To stand in a module that has ``import triton`` and ``import triton.language as tl``.
        """
        lines: list[str] = []
        result = _write(self.node, lines, {})
        return "\n".join(["@triton.jit", f"def {name}(q, k):", *(f"    {line}" for line in lines),
                          f"    return {result}", ""])

    def __eq__(self, other: object) -> bool:
        return self.node == other.node if isinstance(other, Rule) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.node)

    def __str__(self) -> str:
        return _show(self.node)

    def __repr__(self) -> str:
        return f"Rule({str(self)!r})"

    def __reduce__(self):
        return _of_node, (self.node, self.text)


def _of_node(node: Node, text: str | None = None) -> Rule:
    rule = object.__new__(Rule)         # a derivative may be longer than what one may write
    rule.text, rule.node = _show(node) if text is None else text, node
    return rule


def _compute(node: Node, q: Tensor, k: Tensor) -> Tensor | float:
    if not isinstance(node, tuple):
        return node if isinstance(node, float) else q if node == "q" else k
    return _OPERATIONS[node[0]].compute(*[_compute(argument, q, k) for argument in node[1:]])


def _differentiate(node: Node, variable: str) -> Node:
    if not isinstance(node, tuple):
        return float(node == variable)
    total: Node = 0.0
    name, *args = node
    inner = [_differentiate(a, variable) for a in args]
    for argument, partial in zip(inner, _OPERATIONS[name].partials(*args), strict=False):    # an exponent has none
        if argument != 0.0:
            total = _make("+", total, _make("*", partial, argument))
    return total


def _write(node: Node, lines: list[str], names: dict[Node, str]) -> str:
    """The text of a node, after the lines that compute its parts, each once."""
    if not isinstance(node, tuple):
        return f"({node!r})" if isinstance(node, float) else node
    if node not in names:
        name, *args = node
        if name in ("**", "slope"):
            base = _write(args[0], lines, names)
            text = _write_power(base, args[1], lines) if name == "**" else (
                f"tl.where({base} == 0, 0.0, "
                f"{args[1]!r} * {_write_power(f'tl.where({base} == 0, 1.0, {base})', args[1] - 1, lines)})")
        else:
            text = _OPERATIONS[name].triton.format(*(_write(a, lines, names) for a in args))
        if not text.isidentifier():
            lines.append(f"t{len(lines)} = {text}")
            text = f"t{len(lines) - 1}"
        names[node] = text
    return names[node]


def _write_power(base: str, p: float, lines: list[str]) -> str:
    if abs(p) == 0.5:
        return f"tl.sqrt({base})" if p > 0 else f"1.0 / tl.sqrt({base})"
    if p != int(p) or abs(p) > 64:
        return f"tl.exp({p!r} * tl.log({base}))"
    factors, bits = [], int(abs(p))
    while bits:                                        # by squaring
        if bits % 2:
            factors.append(base)
        if bits := bits // 2:
            lines.append(f"t{len(lines)} = {base} * {base}")
            base = f"t{len(lines) - 1}"
    product = " * ".join(factors)
    return product if p > 0 else f"1.0 / ({product})"


# ------------------------------------------------------------------------- kernels made of a rule

def apply_link(x: Float[Tensor, "*shape"], link: str) -> Float[Tensor, "*shape"]:
    """The exponential, the square root (with derivative 0 at 0), or the tensor itself; see :data:`LINKS`."""
    return x.exp() if link == "exp" else _power(x, 0.5) if link == "sqrt" else x


_MINIMUM, _SQUARED_DIFFERENCE = Rule("min(q, k)"), Rule("(q - k)**2")


def coordinate_form(kernel, d: int) -> tuple[Rule, str, float] | None:
    r"""A kernel as :math:`\mathrm{link}\bigl(s\sum_{l\le d}\rho(q_l,k_l)\bigr)`, where it is known to have this form.

    Parameters
    ----------
    kernel : Kernel
    d : int
        Width of queries and keys.

    Returns
    -------
    tuple or None
        The rule :math:`\rho`, the name of the link among :data:`LINKS`, and :math:`s`.  None for a kernel that has no
        such form, and for classes derived from those that do: they may compute something else.
    """
    from . import kernels

    form = type(kernel)
    if form is kernels.Coordinatewise:
        return kernel.parsed, kernel.link, kernels._scale(kernel.scale, d)
    if form is kernels.ExponentiatedIntersection:
        return _MINIMUM, "exp", kernels._scale(kernel.scale, d)
    if form is kernels.Intersection:
        return _MINIMUM, "identity", kernels._scale(kernel.scale, d)
    if form is kernels.L2Squared:
        return _SQUARED_DIFFERENCE, "identity", kernels._scale(kernel.scale, d)
    if form is kernels.L2:
        return _SQUARED_DIFFERENCE, "sqrt", kernels._scale(kernel.scale, d) ** 2
    return None
