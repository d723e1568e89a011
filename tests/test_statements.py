"""Every numbered statement of the book has a label, a proof and a check that can fail; every experiment is executed."""

import pytest
from chapters import BOOK
from claims import checks, checks_in_tests, checks_in_text, register, statements, statements_of

CHECKED = {check.name for check in checks() if check.can_fail}
REGISTER = register()


@pytest.mark.parametrize("statement", statements(), ids=lambda s: s.label or s.title)
def test_a_statement_is_proved_and_checked(statement):
    where = f"{statement.kind} {statement.title!r} in {statement.chapter}"
    assert statement.label, f"{where} has no label"
    assert statement.proved, f"no {{prf:proof}} follows the {where}"
    assert statement.label in CHECKED, f"nothing checks the {where}: write '# checks: {statement.label}' where it is"


def test_labels_are_unique():
    labels = [s.label for s in statements()]
    assert len(labels) == len(set(labels))


@pytest.mark.parametrize("number", REGISTER["experiments"])
def test_an_experiment_is_executed(number):
    assert number in CHECKED, f"nothing executes it: write '# checks: {number}' where it is"


def test_what_is_named_exists_and_can_fail():
    known = {s.label for s in statements()} | set(REGISTER["experiments"])
    for check in checks():
        assert check.name in known, f"{check.place} checks {check.name!r}, no statement and no experiment"
        assert check.can_fail, f"{check.place} names {check.name} but asserts nothing"


def test_the_register_names_labels_that_exist():
    text = "".join(p.read_text("utf8") for p in BOOK.glob("*.md"))
    named = {label for labels in REGISTER["statements"].values() for label in labels}
    named |= {label for row in REGISTER["experiments"].values() for label in row["of"]}
    assert [label for label in sorted(named) if f":label: {label}\n" not in text] == []


THEOREM = "```{prf:theorem} T\n:label: thm-t\nx\n```\n"
PROOF = "\n```{prf:proof}\ny\n```\n"
CELL = "\n```{code-cell} ipython3\n# checks: thm-t, E1.1\n%s\n```\n"


def test_what_counts_as_proved():
    assert [s.proved for s in statements_of(THEOREM + PROOF)] == [True]
    assert [s.proved for s in statements_of(THEOREM + THEOREM + PROOF)] == [False, True]
    assert [s.proved for s in statements_of(THEOREM + "\n## Another matter\n" + PROOF)] == [False]
    assert [s.label for s in statements_of(THEOREM.replace(":label: thm-t\n", ""))] == [""]


def test_what_counts_as_a_check():
    assert [(c.name, c.can_fail) for c in checks_in_text(CELL % "assert x")] == [("thm-t", True), ("E1.1", True)]
    assert not any(c.can_fail for c in checks_in_text(CELL % "print(x)"))
    assert not checks_in_text(PROOF + "# checks: thm-t\n")
    inside = "def test_x():\n    # checks: thm-t\n    %s\n"
    assert [c.can_fail for c in checks_in_tests(inside % "assert x")] == [True]
    assert [c.can_fail for c in checks_in_tests(inside % "x")] == [False]
