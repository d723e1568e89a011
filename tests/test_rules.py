"""Rules written as text: their values, their derivatives (also where there is none), and what is refused."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernelbook import kernels
from kernelbook.attention import attend
from kernelbook.kernels import L2, RBF, Coordinatewise, ExponentiatedIntersection, Intersection, L2Squared
from kernelbook.rules import FUNCTIONS, Rule, coordinate_form

# A grid with many ties: each value of q meets each of k.
Q, K = (x.flatten() for x in torch.meshgrid(*[torch.arange(-2, 2.5, 0.5, dtype=torch.float64)] * 2, indexing="ij"))

# How torch computes what a rule says, without the library.
TORCH = {"abs": torch.abs, "sign": torch.sign, "exp": torch.exp, "log": torch.log, "tanh": torch.tanh,
         "sqrt": torch.sqrt, "square": torch.square, "min": torch.minimum, "max": torch.maximum}


def expressions():
    """Pairs of a rule's text and torch's function of q and k that computes it."""
    leaves = st.one_of(
        st.just(("q", lambda q, k: q)), st.just(("k", lambda q, k: k)),
        st.sampled_from([0.5, 1.0, 2.0]).map(lambda c: (str(c), lambda q, k: torch.full_like(q, c))))

    def binary(sign):
        def make(pair):
            (s, f), (t, g) = pair
            if sign in TORCH:
                return f"{sign}({s}, {t})", lambda q, k: TORCH[sign](f(q, k), g(q, k))
            return f"({s}) {sign} ({t})", lambda q, k: {
                "+": torch.add, "-": torch.sub, "*": torch.mul, "/": torch.div}[sign](f(q, k), g(q, k))
        return make

    def unary(name):
        def make(inner):
            s, f = inner
            if name == "-":
                return f"-({s})", lambda q, k: -f(q, k)
            if name in ("sqrt", "log"):                 # of positive numbers: what is special at 0 has its own test
                return f"{name}(1 + ({s})**2)", lambda q, k: TORCH[name](1 + f(q, k) ** 2)
            if name == "**":
                return f"({s})**3", lambda q, k: f(q, k) ** 3
            if name == "exp":
                return f"exp(-({s})**2)", lambda q, k: torch.exp(-f(q, k) ** 2)
            return f"{name}({s})", lambda q, k: TORCH[name](f(q, k))
        return make

    def positive(inner):
        s, f = inner
        return f"2 + abs({s})", lambda q, k: 2 + f(q, k).abs()

    return st.recursive(leaves, lambda inner: st.one_of(
        *[st.tuples(inner, inner).map(binary(sign)) for sign in ("+", "-", "*", "min", "max")],
        st.tuples(inner, inner.map(positive)).map(binary("/")),
        *[inner.map(unary(name)) for name in ("-", "abs", "sqrt", "log", "exp", "tanh", "square", "sign", "**")]
    ), max_leaves=8)


def autograd(function, q=Q, k=K):
    """Value and derivatives of a function, by torch."""
    q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
    value = function(q, k) + 0 * (q + k)
    return value, *torch.autograd.grad(value.sum(), (q, k))


def same(found, wanted):
    finite = wanted.isfinite()          # overflow may come about differently
    torch.testing.assert_close(found[finite], wanted[finite], rtol=1e-9, atol=1e-9)


@given(expressions())
def test_values_and_derivatives_are_torchs_also_at_ties(expression):
    text, function = expression
    rule = Rule(text)
    value, d_q, d_k = autograd(function)
    same(rule(Q, K), value)
    same(rule.derivative("q")(Q, K), d_q)
    same(rule.derivative("k")(Q, K), d_k)
    for found, wanted in zip(autograd(rule), (value, d_q, d_k), strict=True):
        same(found, wanted)
    assert Rule(str(rule)) == rule and pickle.loads(pickle.dumps(rule)) == rule
    assert str(Rule(str(rule))) == str(rule)


@pytest.mark.parametrize("text, at_tie", [
    ("min(q, k)", 0.5), ("max(q, k)", 0.5), ("-abs(q - k)", 0.0), ("sign(q - k)", 0.0), ("above(q, k)", 0.0),
    ("sqrt(abs(q - k))", 0.0), ("sqrt(q - k)", 0.0), ("(q - k)**0.25", 0.0), ("minimum(q, k) - 3 * q", -2.5)])
def test_what_stands_for_the_derivative_where_there_is_none(text, at_tie):
    rule, x = Rule(text), torch.tensor([1.25], dtype=torch.float64)
    assert rule.derivative("q")(x, x).item() == at_tie
    assert autograd(rule, x, x)[1].item() == at_tie


def test_powers_between_0_and_1_elsewhere():
    q = torch.tensor([0.5, 1.0, 7.0], dtype=torch.float64)
    for text, p in (("sqrt(q)", 0.5), ("q**0.3", 0.3), ("q**-1.5", -1.5), ("slope(q, 0.5)", None)):
        rule = Rule(text)
        if p is None:
            torch.testing.assert_close(rule(q, q), 0.5 / q.sqrt())
        else:
            torch.testing.assert_close(rule(q, q), q**p)
            torch.testing.assert_close(rule.derivative("q")(q, q), p * q ** (p - 1))
        torch.testing.assert_close(rule.derivative("q")(q, q), autograd(rule, q, q)[1])


def test_shapes_and_dtypes_are_those_of_the_arguments():
    q, k = torch.randn(3, 1, dtype=torch.float16), torch.randn(4, dtype=torch.float16)
    for text in ("min(q, k)", "q", "2", "max(k, 1)", "above(q, 0)"):
        value = Rule(text)(q, k)
        assert value.shape == (3, 4) and value.dtype is torch.float16, text


def test_a_rule_is_simplified_not_evaluated():
    assert Rule("2 * 3 + 0 * q - -k * 1") == Rule("6 + k")
    assert str(Rule("min(q, k)").derivative("q")) == "above(k, q)"
    assert str(Rule("(q - k)**2").derivative("k")) == "-(2 * (q - k))"
    assert Rule("q - (k - 1)") != Rule("(q - k) - 1") and str(Rule("(q - (k - 1))**2")) == "(q - (k - 1))**2"
    assert str(Rule("(-q)**2 / (q * k)")) == "(-q)**2 / (q * k)"


def test_the_triton_source_names_each_part_once():
    assert Rule("exp(-(q - k)**2) * (q - k)").triton("f") == """\
@triton.jit
def f(q, k):
    t0 = q - k
    t1 = t0 * t0
    t2 = t1 * -1.0
    t3 = tl.exp(t2)
    t4 = t3 * t0
    return t4
"""


@pytest.mark.parametrize("text, parts", [
    ("min(q, x)", ["no variable is called 'x' (known: q, k)", f"{' ' * 4}min(q, x)\n{' ' * 11}^"]),
    ("q + min", ["min is a function: min(...)"]),
    ("floor(q)", ["no function is called 'floor'", *FUNCTIONS]),
    ("min(q)", ["min takes 2 arguments, not 1"]),
    ("abs(q, k)", ["abs takes 1 argument, not 2"]),
    ("q**k", ["must be a number; write exp(b * log(a))"]),
    ("slope(q, k)", ["second argument of slope"]),
    ("q +", ["not a formula"]),
    ("q / (1 - 1)", ["q is divided by 0"]),
    ("log(0 - 1) * q", ["log(-1) is no finite number"]),
    ("1e400 * q", ["too large"]),
    ("True * q", ["'True' is not part of a rule"]),
    ("q if k else 2", ["is not part of a rule"]),
    ("__import__('os').system('true')", ["is not part of a rule"]),
    ("max(q, k, key=abs)", ["is not part of a rule"]),
    ("q ² k", ["'²' means nothing"]),
    ("-" * 60 + "q", ["nested more than 40 levels"]),
    ("q" + " + q" * 600, ["at most 1000 characters"]),
    ("q\n+ k", ["one line"]),
])
def test_what_is_no_rule_is_said_and_shown(text, parts):
    with pytest.raises(ValueError) as error:
        Rule(text)
    assert all(part in str(error.value) for part in parts)


def test_other_mistakes():
    with pytest.raises(TypeError, match="a rule is a text such as"):
        Rule(3)
    with pytest.raises(ValueError, match="not in 'x'"):
        Rule("q").derivative("x")


# ------------------------------------------------------------------------- kernels made of a rule

FORMS = [ExponentiatedIntersection(), Intersection(0.3), L2(), L2(2.0), L2Squared(),
         Coordinatewise("-abs(q - k)", scale=2), Coordinatewise("q * k", link="identity"),
         Coordinatewise("(q - k)**4", link="sqrt")]


@pytest.mark.parametrize("kernel", FORMS, ids=repr)
def test_the_form_of_a_kernel_gives_its_matrix(kernel):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, n, 3, generator=generator, dtype=torch.float64) for n in (4, 5))
    rule, link, scale = coordinate_form(kernel, 3)
    total = scale * rule(q[:, :, None], k[:, None]).sum(-1)
    torch.testing.assert_close({"exp": total.exp(), "identity": total, "sqrt": total.abs().sqrt()}[link], kernel(q, k),
                               rtol=1e-12, atol=1e-12)


def test_no_form_is_invented():
    class Mine(L2):
        pass

    assert coordinate_form(RBF(), 3) is None and coordinate_form(Mine(), 3) is None
    assert coordinate_form(L2() + L2(), 3) is None


def test_a_coordinatewise_kernel_is_the_kernel_it_spells():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (4, 5))
    for text, link, scale, other in (("min(q, k)", "exp", None, ExponentiatedIntersection()),
                                     ("min(q, k)", "identity", 2.0, Intersection(2.0)),
                                     ("(q - k)**2", "sqrt", 1 / 9, L2(1 / 3)), ("-(q - k)**2", "exp", 0.5, RBF(1.0))):
        kernel = Coordinatewise(text, link, scale)
        torch.testing.assert_close(kernel(q, k), other(q, k), rtol=1e-12, atol=1e-12)
        assert kernel.exponential == (link == "exp")
        if kernel.exponential:
            torch.testing.assert_close(kernel.log_gram(q, k), other.log_gram(q, k), rtol=1e-12, atol=1e-12)
        assert kernels.from_config(kernel.to_config()) == kernel and pickle.loads(pickle.dumps(kernel)) == kernel
        assert eval(repr(kernel), {"Coordinatewise": Coordinatewise}) == kernel


def test_a_coordinatewise_kernel_claims_no_more_than_it_knows():
    exponential, signed = Coordinatewise("q * k"), Coordinatewise("q * k", link="identity")
    assert exponential.range == kernels.POSITIVE and exponential.normalisable
    assert signed.range == kernels.ANY_REAL and not signed.normalisable
    assert Coordinatewise("q * k", link="sqrt").normalisable
    assert Coordinatewise("abs(q)", link="identity", non_negative=True).normalisable
    assert exponential.definiteness is kernels.Definiteness.UNKNOWN and not signed.exponential
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="not normalised by 'sum' unasked"):
        attend(x, x, x, signed)
    assert "coordinatewise" not in kernels.available()
    assert str(exponential) == "κ(q, k) = exp(Σ [q * k]/√d)" and r"\texttt{q * k}" in exponential.latex


def test_the_distance_of_equal_points_has_gradient_0():
    q = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    Coordinatewise("(q - k)**2", link="sqrt")(q, q.detach()).sum().backward()
    assert torch.equal(q.grad, torch.zeros_like(q))


@pytest.mark.parametrize("options, part", [
    (dict(rule="min(q, x)"), "no variable is called 'x'"), (dict(rule="q", link="log"), "one of exp, identity, sqrt"),
    (dict(rule="q", scale=-1.0), "a sign belongs to the rule"),
    (dict(rule="q", scale=torch.ones(())), "positive number"),
])
def test_what_is_no_coordinatewise_kernel(options, part):
    with pytest.raises(ValueError, match=part):
        Coordinatewise(**options)
