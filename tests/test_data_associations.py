"""Word associations: counted on a toy corpus by hand, and the stored table."""

import math

import numpy as np
import pytest

from kernelbook import results
from kernelbook.data import Pair, associations
from kernelbook.files import FileError

TOY = [Pair("Der Hund schläft.", "The dog sleeps."), Pair("Der HUND frißt", "The dog eats"),
       Pair("Die Katze schläft", "The cat sleeps"), Pair("die Katze frisst", "the cat eats"),
       Pair("Ein Haus", "A house"), Pair("Ein Haus, ein Baum", "A house and a tree"), Pair("Nichts", "Nothing at all")]


def toy(pairs=TOY, **settings):
    return associations.measure(pairs, **{"least_sentences": 2, "threshold": 0.05} | settings)


def test_counts_of_a_toy_corpus():
    table = toy()
    assert dict(zip(table.source, table.target, strict=True)) == {
        "frisst": "eats", "haus": "house", "hund": "dog", "katze": "cat", "schläft": "sleeps"} | (
            {"ein": table.target[table.source.index("ein")]} if "ein" in table.source else {})
    i, j = table.source.index("hund"), table.target.index("dog")
    assert i == j and table.source_counts[i] == table.target_counts[j] == 2 and table.pairs == 7
    assert (i, j, 2) in table.together
    z = table.scores()
    assert z[i, j] == pytest.approx(math.log((2 + 5) / (2 * 2 / 7 + 5)))
    assert z[i, table.target.index("cat")] == 0                        # never together
    assert z[i, table.target.index("eats")] == pytest.approx(math.log(6 / (4 / 7 + 5)))


def test_order_of_sentences_does_not_matter_and_size_keeps_the_clearest():
    assert toy() == toy(TOY[::-1])
    assert len(toy(size=2).source) == 2
    with pytest.raises(ValueError, match="each other's strongest"):
        toy(least_sentences=100)


def test_likelihood_ratio():
    assert associations.likelihood_ratio(5, 10, 20, 40) == pytest.approx(0, abs=1e-12)        # independent
    assert associations.likelihood_ratio(2, 2, 2, 4) == pytest.approx(2 * 4 * math.log(2))    # one determines the other
    assert associations.log_ratio(3, 5, 7, 100, shrink=0) == pytest.approx(math.log(3 * 100 / 35))


def test_a_table_is_read_as_it_was_written(tmp_path):
    path = toy().save(tmp_path / "t.json")
    assert associations.load(path) == toy() and path.read_bytes() == toy().save(tmp_path / "u.json").read_bytes()
    for damage in ("", "[]", "{}", path.read_text().replace("word associations", "something else")):
        path.write_text(damage)
        with pytest.raises(FileError, match="make it anew"):
            associations.load(path)


def test_the_stored_table():
    path = results.find("word-associations-bible.json")
    table = associations.load(path)
    assert path.stat().st_size < 300_000 and len(table.source) == len(table.target) == 500
    partner = dict(zip(table.source, table.target, strict=True))
    assert partner["wasser"] == "water" and partner["könig"] == "king" and partner["ägypten"] == "egypt"
    z = table.scores()
    assert (z.diagonal() >= associations.THRESHOLD).all() and np.count_nonzero(z) == len(table.together)
    assert "associations" in table.provenance["command"] and table.data["licence"].startswith("public domain")
