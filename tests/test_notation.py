"""The notation page says of each kernel what the library says of it."""

import math
import re
from pathlib import Path

import pytest

from kernelbook import kernels

PAGE = (Path(__file__).resolve().parents[1] / "book" / "notation.md").read_text("utf8")
ROWS = {cells[0].strip("`"): cells[1:] for cells in (
    [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| `"))}
DEFINITE = {kernels.Definiteness.POSITIVE: "positive", kernels.Definiteness.CONDITIONAL: "conditional",
            kernels.Definiteness.NEGATIVE_TYPE: "negative type"}


def features(cell, d):
    """The number that a formula of the table gives at width ``d``."""
    text = cell.strip("$").replace(r"\infty", "math.inf")
    text = re.sub(r"\\binom\{d\+(\d)\}\s*\{?(\d)\}?", r"math.comb(d+\1, \2)", text).replace("d(", "d*(")
    return eval(text, {"math": math, "d": d})


def test_every_kernel_has_a_row():
    assert list(ROWS) == kernels.available()


@pytest.mark.parametrize("name", ROWS)
def test_the_row_is_true(name):
    kernel, (formula, values, dimension, definite) = kernels.get(name), ROWS[name]
    assert formula == f"${kernel.latex}$"
    assert [features(dimension, d) for d in (1, 2, 5)] == [kernel.feature_dimension(d) for d in (1, 2, 5)]
    assert definite == DEFINITE[kernel.definiteness]
    shown = values.strip("$").replace(r"\infty", "∞").replace(r"\frac12", "0.5")
    shown = {r"\R": "(-∞,∞)", r"\{1\}": "[1,1]"}.get(shown, shown)
    assert shown == str(kernel.range).replace("−", "-").replace(" ", "")
